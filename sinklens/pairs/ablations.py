"""Edits by name: what a sweep, a stage or an analysis puts in the place of an activation.

===================  ==========================================================================================
transplant           the activation of the pair's other run at the same place (natural sink: at an ordinary position)
zero                 nothing
mean                 per block and unit, the mean over all ordinary positions of all prompts, in the run without the
                     sink
resample             the activation at one ordinary position of one prompt, both drawn for each prompt with the seed
sink_mean            the mean over prompts of the activation at the target, in the run with the sink: the same for all
deviation_exchanged  the activation at the target with its deviation from the mean over prompts from the other run
mean_exchanged       the same with its mean from the other run, and its own deviation
===================  ==========================================================================================

Ablations are applied in the run that the direction patches: noised, the run with the sink. What is exchanged depends on
the direction. ``sink_mean`` and ``deviation_exchanged`` say whether it is what varies over prompts that counts, at any
site and in any block: the stages have them with a control of equal size (``no_variance``, ``constant_key``, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.edits import Constant, Edit, PerPrompt
from sinklens.edits.general import Transplant
from sinklens.engine.capture import capture_runs
from sinklens.engine.store import ActivationStore, Want
from sinklens.errors import InputError
from sinklens.models.view import Model, model_shape
from sinklens.pairs.choice import Direction
from sinklens.pairs.pair import SinkPair
from sinklens.pairs.subset import roots_for_prompts
from sinklens.patches import Source
from sinklens.prompts import PromptBatch
from sinklens.records.fingerprint import fingerprint_of
from sinklens.records.registry import check_kind, enter, is_the_package_s
from sinklens.sites import HookSite, site_name
from sinklens.statistics import generator

_CHUNK_BYTES = 1 << 28
"""Activations kept at once while means are taken."""


@dataclass(frozen=True, eq=False)
class EditContext:
    """What a named edit may know of the place that it is made for."""

    model: Model
    """The model."""
    batch: PromptBatch
    """All prompts."""
    pair: SinkPair
    """The two runs, on all prompts."""
    site: HookSite
    """Where it will be applied."""
    layers: tuple[int, ...]
    """In which blocks."""
    seed: int
    """Fixes every draw."""
    max_rows: int
    """Rows for one forward pass."""
    direction: Direction | None = None
    """Which run is patched, for an edit that exchanges; None for any other, which is one for both."""

    @property
    def step(self) -> int:
        """Prompts whose activations in all the blocks are kept at once."""
        per_prompt = self.batch.length * model_shape(self.model).d_model * 4 * max(1, len(self.layers))
        return max(1, min(self.max_rows, _CHUNK_BYTES // per_prompt))

    def captured(self, run: str, index: Int[Tensor, " prompt"] | None = None) -> Iterator[tuple[int, ActivationStore]]:
        """A run's activations there, of :attr:`step` prompts after the other: the first one's number, and theirs.

        Args:
            run: name of the run.
            index: one position of every prompt, where no other is needed.
        """
        for first in range(0, self.batch.n, self.step):
            chosen = slice(first, first + self.step)
            at = None if index is None else tuple(sorted(set(index[chosen].tolist())))
            wants = [Want(run, self.site, layer, at) for layer in self.layers]
            runs = {run: roots_for_prompts(self.pair.runs[run], first, first + self.step)}
            yield first, capture_runs(self.model, self.batch.tokens[chosen], runs, wants, max_rows=self.max_rows)

    def at_target(self, source: Source) -> dict[int, Float[Tensor, "prompt unit *rest"]]:
        """By block, the activation of a run at the target, or where the source says, of every prompt."""
        index = source.where(self.pair.target).single(self.batch.n)
        parts: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        for first, store in self.captured(source.run, index):
            for layer in self.layers:
                here = index[first : first + self.step]
                parts[layer].append(store.at(source.run, self.site, layer, here).float())
        return {layer: torch.cat(part) for layer, part in parts.items()}


@dataclass(frozen=True, eq=False)
class NamedEdit:
    """An edit that can be asked for by its name, at any site."""

    name: str
    """The name."""
    make: Callable[[EditContext], Edit]
    """``(context) -> Edit``."""
    exchanges: bool = False
    """Whether it exchanges parts of the two runs' activations at the target: then it is made for each direction, and is
    for the target alone."""
    over_prompts: bool = False
    """Whether it takes means over prompts of what is at the target: it needs several, and no site of attention."""


def _ablation(name: Literal["mean", "resample"], context: EditContext) -> Edit:
    """The edit ``mean`` or ``resample`` of a site, in some blocks, on all prompts."""
    pair, layers = context.pair, context.layers
    donors = draw_places(pair.ordinary, generator(context.seed, "sweep/resample"))
    sums: dict[int, Tensor] = {}
    drawn: dict[int, Tensor] = {}
    run = pair.without.run
    for first, store in context.captured(run):
        marks = pair.ordinary[first : first + context.step].bool()
        mine = (donors[:, 0] >= first) & (donors[:, 0] < first + context.step)
        for layer in layers:
            x = store.tensor(run, context.site, layer)
            here = x[marks.to(x.device)].double().sum(0)
            sums[layer] = sums[layer] + here if layer in sums else here
            if layer not in drawn:
                drawn[layer] = x.new_zeros(context.batch.n, *x.shape[2:])
            drawn[layer][mine.to(x.device)] = x[donors[mine, 0] - first, donors[mine, 1]]
    if name == "mean":
        count = pair.ordinary.sum().item()
        return Constant("mean", {layer: (total / count).float() for layer, total in sums.items()})
    return PerPrompt("resample", drawn)


def _sink_mean(context: EditContext) -> Edit:
    with_sink = context.at_target(context.pair.with_sink)
    return Constant("sink_mean", {layer: x.mean(0) for layer, x in with_sink.items()})


def _exchanged(name: Literal["deviation_exchanged", "mean_exchanged"], context: EditContext) -> Edit:
    """The activation at the target, one part of which is the other run's: the deviation from the mean, or the mean."""
    assert context.direction is not None
    _, there = context.pair.ends(context.direction)
    here = context.pair.without if context.direction == "denoise" else context.pair.with_sink
    kept, other = context.at_target(here), context.at_target(there)
    values = {}
    for layer, x in kept.items():
        own, theirs = x.mean(0), other[layer].mean(0)
        values[layer] = own + other[layer] - theirs if name == "deviation_exchanged" else theirs + x - own
    return PerPrompt(name, values)


KIND = "an edit"
"""What the registry calls them."""
EDITS: dict[str, NamedEdit] = {}
"""Edits by name."""


def register_edit(edit: NamedEdit) -> NamedEdit:
    """Make an edit known by its name.

    Raises:
        ValueError: the name is taken (see :mod:`sinklens.records.registry`).
    """
    check_kind(KIND, edit, NamedEdit)
    return enter(EDITS, KIND, edit.name, edit)


EditLike = str | NamedEdit | Edit
"""An edit, what makes one, or the name of that."""


def read_edit(edit: EditLike) -> EditLike:
    """What stands for an edit wherever it is used: a name that the package has; for any other the edit itself.

    A name that a user has registered is known in one process only.

    Raises:
        InputError: an unknown name, or neither name nor edit.
    """
    if isinstance(edit, Edit):
        return edit
    named = edit if isinstance(edit, NamedEdit) else EDITS.get(edit) if isinstance(edit, str) else None
    if named is None:
        raise InputError(f"edit {edit!r} is not known: choose from {', '.join(EDITS)}, or give an Edit")
    return named.name if is_the_package_s(EDITS, KIND, named.name, named) else named


def make_edit(edit: EditLike, context: EditContext) -> Edit:
    """The edit itself.

    Raises:
        InputError: what was registered makes something else, or means nothing there (:func:`check_edit`).
    """
    if isinstance(edit, Edit):
        return edit
    named = EDITS[edit] if isinstance(edit, str) else edit
    check_edit(named, context.site, context.batch.n)
    made = named.make(replace(context, direction=told_direction(named, context.direction)))
    if not isinstance(made, Edit):
        raise InputError(f"the edit {named.name!r} must make an Edit, not something of type {type(made).__name__}")
    return made


def check_edit(edit: EditLike, site: HookSite, n_prompts: int) -> None:
    """Make sure that an edit means something at a site, on so many prompts.

    Raises:
        InputError: it takes means over prompts, and there is one alone, which has none; or the site has rows of
            attention, of which each is of its own keys.
    """
    named = EDITS[edit] if isinstance(edit, str) else edit
    if not (isinstance(named, NamedEdit) and named.over_prompts):
        return
    if n_prompts < 2:
        raise InputError("what varies over prompts, and the mean over them, need at least 2 prompts, there is 1")
    if "key" in site.axes:
        raise InputError(
            f"the mean over prompts of {site_name(site)} would be no attention: choose another site or edit"
        )


def exchanges(edit: EditLike) -> bool:
    """Whether the edit is another one in the other direction, and for the target alone."""
    named = EDITS[edit] if isinstance(edit, str) else edit
    return isinstance(named, NamedEdit) and named.exchanges


def told_direction(edit: EditLike, direction: Direction | None) -> Direction | None:
    """What an edit is told of the direction: nothing where it is one for both."""
    return direction if exchanges(edit) else None


def edit_fingerprint(edit: EditLike) -> object:
    """What tells an edit from another, in plain data."""
    if isinstance(edit, str):
        return edit  # what a name of the package means changes with the version alone
    if isinstance(edit, NamedEdit):
        return [edit.name, fingerprint_of(edit.make), *(["exchanges"] if edit.exchanges else [])]
    return [edit.name, edit.fingerprint()]


def draw_places(ordinary: Tensor, drawn: torch.Generator) -> Int[Tensor, "prompt 2"]:
    """For every prompt, the (prompt, position) of one of all ordinary positions."""
    places = ordinary.nonzero()
    return places[torch.randint(len(places), (len(ordinary),), generator=drawn)]


for _edit in (
    NamedEdit("transplant", lambda _: Transplant()),
    NamedEdit("zero", lambda _: Constant("zero")),
    NamedEdit("mean", lambda context: _ablation("mean", context)),
    NamedEdit("resample", lambda context: _ablation("resample", context)),
    NamedEdit("sink_mean", _sink_mean, over_prompts=True),
    NamedEdit("deviation_exchanged", partial(_exchanged, "deviation_exchanged"), exchanges=True, over_prompts=True),
    NamedEdit("mean_exchanged", partial(_exchanged, "mean_exchanged"), exchanges=True, over_prompts=True),
):
    register_edit(_edit)
