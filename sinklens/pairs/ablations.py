"""The edits of a sweep by name, and what the ablations put in place of an activation.

==========  ===================================================================================================
transplant  the activation of the pair's other run at the same place (natural sink: at an ordinary position)
zero        nothing
mean        per block and unit, the mean over all ordinary positions of all prompts, in the run without the sink
resample    the activation at one ordinary position of one prompt, both drawn for each prompt with the seed
==========  ===================================================================================================

Ablations are applied in the run that the direction patches: noised, the run with the sink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.edits import Constant, Edit, PerPrompt
from sinklens.edits.general import Transplant
from sinklens.engine.capture import capture_runs
from sinklens.engine.store import Want
from sinklens.errors import InputError
from sinklens.models.view import Model, model_shape
from sinklens.pairs.pair import SinkPair
from sinklens.pairs.subset import roots_for_prompts
from sinklens.prompts import PromptBatch
from sinklens.records.fingerprint import fingerprint_of
from sinklens.records.registry import enter, is_the_package_s
from sinklens.sites import HookSite
from sinklens.statistics import generator

_CHUNK_BYTES = 1 << 28
"""Activations kept at once while means are taken."""


def _ablation(name: Literal["mean", "resample"], context: EditContext) -> Edit:
    """The edit ``mean`` or ``resample`` of a site, in some blocks, on all prompts."""
    model, batch, pair, site = context.model, context.batch, context.pair, context.site
    layers, max_rows = context.layers, context.max_rows
    donors = draw_places(pair.ordinary, generator(context.seed, "sweep/resample"))
    per_block = batch.length * model_shape(model).d_model * 4 * max(1, len(layers))
    step = max(1, min(max_rows, _CHUNK_BYTES // per_block))
    sums: dict[int, Tensor] = {}
    drawn: dict[int, Tensor] = {}
    for first in range(0, batch.n, step):
        marks = pair.ordinary[first : first + step].bool()
        run = pair.without.run
        roots = roots_for_prompts(pair.runs[run], first)
        wants = [Want(run, site, layer) for layer in layers]
        store = capture_runs(model, batch.tokens[first : first + step], {run: roots}, wants, max_rows=max_rows)
        mine = (donors[:, 0] >= first) & (donors[:, 0] < first + step)
        for layer in layers:
            x = store.tensor(run, site, layer)
            here = x[marks.to(x.device)].double().sum(0)
            sums[layer] = sums[layer] + here if layer in sums else here
            if layer not in drawn:
                drawn[layer] = x.new_zeros(batch.n, *x.shape[2:])
            drawn[layer][mine.to(x.device)] = x[donors[mine, 0] - first, donors[mine, 1]]
    if name == "mean":
        count = pair.ordinary.sum().item()
        return Constant("mean", {layer: (total / count).float() for layer, total in sums.items()})
    return PerPrompt("resample", drawn)


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


@dataclass(frozen=True, eq=False)
class NamedEdit:
    """An edit that can be asked for by its name, at any site."""

    name: str
    """The name."""
    make: Callable[[EditContext], Edit]
    """``(context) -> Edit``."""


KIND = "an edit"
"""What the registry calls them."""
EDITS: dict[str, NamedEdit] = {}
"""Edits by name."""


def register_edit(edit: NamedEdit) -> NamedEdit:
    """Make an edit known by its name.

    Raises:
        ValueError: the name is taken (see :mod:`sinklens.records.registry`).
    """
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
    """The edit itself."""
    if isinstance(edit, Edit):
        return edit
    return (EDITS[edit] if isinstance(edit, str) else edit).make(context)


def edit_fingerprint(edit: EditLike) -> object:
    """What tells an edit from another, in plain data."""
    if isinstance(edit, str):
        return edit  # what a name of the package means changes with the version alone
    return [edit.name, fingerprint_of(edit.make) if isinstance(edit, NamedEdit) else edit.fingerprint()]


def draw_places(ordinary: Tensor, drawn: torch.Generator) -> Int[Tensor, "prompt 2"]:
    """For every prompt, the (prompt, position) of one of all ordinary positions."""
    places = ordinary.nonzero()
    return places[torch.randint(len(places), (len(ordinary),), generator=drawn)]


for _edit in (
    NamedEdit("transplant", lambda _: Transplant()),
    NamedEdit("zero", lambda _: Constant("zero")),
    NamedEdit("mean", lambda context: _ablation("mean", context)),
    NamedEdit("resample", lambda context: _ablation("resample", context)),
):
    register_edit(_edit)
