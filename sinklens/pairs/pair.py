"""Sink pairs: two runs on the same tokens, one without a sink at a position and one with.

The *induced* pair has the clean model as ``base`` and an intervention at the root of the chain as ``anchored``: the
token at the target may attend only to itself (``block_aggregation``), or the deviation of its aggregated value is
amplified (``amplify_variance``). Because both are interventions on one token's attention alone, transplanting that
token's aggregated value must carry over all of the effect: the identity check of every chain.

The *natural* pair has one run, the clean model, and compares the sink that the data has with ordinary positions.
There is no run without the sink to denoise, so it is noised only, with activations of an ordinary position of the same
prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens import edits
from sinklens.engine.capture import capture_runs
from sinklens.engine.store import Want
from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model
from sinklens.pairs.choice import NATURAL, STRENGTH, Direction, InducedKind, PairChoice, PairKind, directions_of
from sinklens.patches import CLEAN, Patch, Positions, Runs, Source
from sinklens.prompts import PromptBatch, check_batch
from sinklens.sites import PATTERN, HookSite, Z


@dataclass(frozen=True, eq=False)
class SinkPair:
    """Two runs on the same tokens, and the positions at which they differ by a sink."""

    kind: PairKind
    """How the sink came about."""
    target: Positions
    """The sink's position: one for every prompt."""
    runs: Runs
    """Run name to root patches."""
    without: Source
    """Where activations without the sink come from."""
    with_sink: Source
    """Where activations with the sink come from."""
    ordinary: Float[Tensor, "prompt pos"]
    """1 at the positions that count as ordinary: not a sink, not the target, and seen by enough later queries."""
    reference: Positions
    """One ordinary position of every prompt, drawn with the seed."""
    strength: float | None = None
    """Lambda of ``amplify_variance``."""
    root_site: HookSite = Z
    """Where all of an induced pair's difference passes: a transplant there, at the target and in all the blocks of
    :attr:`root_layers`, must carry exactly all of the effect."""

    @property
    def is_natural(self) -> bool:
        """Whether the sink is the one that the data has: then there is no run without it."""
        return self.kind == NATURAL

    @property
    def root_layers(self) -> tuple[int, ...]:
        """The blocks of the intervention that makes the sink; none for the natural one."""
        return tuple(sorted({layer for roots in self.runs.values() for root in roots for layer in root.layers}))

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions in which patches can be run."""
        return directions_of(self.kind)

    def ends(self, direction: Direction) -> tuple[str, Source]:
        """The run that is patched, and the source of what is put there."""
        if direction == "denoise":
            return self.without.run, self.with_sink
        return self.with_sink.run, self.without


@in_usual_state
def make_pair(
    choice: PairChoice,
    model: Model,
    batch: PromptBatch,
    formation: Formation,
    *,
    seed: int = 0,
    max_rows: int = 64,
) -> SinkPair:
    """The two runs that were chosen.

    Args:
        choice: which sink.
        model: the model.
        batch: the prompts.
        formation: where the model's own sink forms.
        seed: draws the reference positions.
        max_rows: prompts in one forward pass, for the statistics that ``amplify_variance`` needs.

    Raises:
        InputError: a choice that does not fit the prompts or the formation (see :meth:`PairChoice.check`): a target at
            the sink itself, blocks beyond the formation block, fewer than two prompts for ``amplify_variance`` over
            prompts.
    """
    check_batch(model, batch)
    choice.check(batch.length)
    formation.check_prompts(batch.n, batch.length)
    if choice.is_natural:
        return natural_pair(batch, formation, seed)
    root = _root(choice, model, batch, formation, max_rows)
    ordinary, reference = _ordinary(batch, formation.sink_positions, (choice.position,) * batch.n, seed)
    return SinkPair(
        kind=choice.kind,
        target=Positions.of((choice.position,)),
        runs={"base": (), "anchored": (root,)},
        without=Source("base"),
        with_sink=Source("anchored"),
        ordinary=ordinary,
        reference=reference,
        strength=choice.amplification,
    )


def induced_pair(
    model: Model,
    batch: PromptBatch,
    formation: Formation,
    target: int,
    *,
    kind: InducedKind = "block_aggregation",
    layers: tuple[int, ...] | None = None,
    strength: float = STRENGTH,
    axis: edits.MeanAxis = "prompts",
    seed: int = 0,
    max_rows: int = 64,
) -> SinkPair:
    """A sink made at position ``target`` by an intervention at the root of the chain.

    :func:`make_pair` with the fields of a :class:`PairChoice` as arguments; it raises what that does.
    """
    choice = PairChoice(target, kind, strength=strength, layers=layers, axis=axis)
    return make_pair(choice, model, batch, formation, seed=seed, max_rows=max_rows)


@in_usual_state
def natural_pair(batch: PromptBatch, formation: Formation, seed: int = 0) -> SinkPair:
    """The sink that the data has, against ordinary positions of the same run.

    Raises:
        InputError: the formation was found on other prompts.
    """
    formation.check_prompts(batch.n, batch.length)
    ordinary, reference = _ordinary(batch, formation.sink_positions, formation.sink_positions, seed)
    return SinkPair(
        kind=NATURAL,
        target=Positions.one_each(formation.sink_positions),
        runs={"natural": ()},
        without=Source("natural", reference),
        with_sink=Source("natural"),
        ordinary=ordinary,
        reference=reference,
    )


def _root(choice: PairChoice, model: Model, batch: PromptBatch, formation: Formation, max_rows: int) -> Patch:
    """The patch that makes the sink."""
    target = choice.position
    if target in formation.sink_positions:
        raise InputError(f"target {target} is already the sink of a prompt: choose another, or target {NATURAL}")
    top = formation.layer if choice.kind == "block_aggregation" else formation.first
    layers = tuple(range(top + 1)) if choice.layers is None else choice.layers
    if not layers or max(layers) > formation.layer or min(layers) < 0:
        raise InputError(f"the pair's blocks {layers} must be within 0..{formation.layer}, up to the formation block")
    if choice.kind == "amplify_variance":
        return _amplify(choice, model, batch, layers, max_rows)
    return Patch(PATTERN, layers, (target,), edits.AttendSelf(), run="anchored", label=choice.kind)


def _amplify(choice: PairChoice, model: Model, batch: PromptBatch, layers: tuple[int, ...], max_rows: int) -> Patch:
    target = choice.position
    if batch.n < 2 and choice.axis == "prompts":
        raise InputError(f"amplify_variance needs a variance over prompts: give at least 2, there is {batch.n}")
    kept = (target,) if choice.axis == "prompts" else None  # no more than the mean needs
    wants = [Want("base", Z, layer, kept) for layer in layers]
    store = capture_runs(model, batch.tokens, CLEAN, wants, max_rows=max_rows)
    z = {layer: store.tensor("base", Z, layer) for layer in layers}
    if kept and not any(_varies(values) for values in z.values()):
        raise InputError(
            f"amplify_variance has nothing to amplify: these prompts are the same up to position {target}; choose a "
            "target behind what they share, or block_aggregation"
        )
    edit = edits.amplification(z, 0 if kept else target, choice.strength, choice.axis)
    return Patch(Z, layers, (target,), edit, run="anchored", label=choice.kind)


def _varies(z: Float[Tensor, "prompt *rest"]) -> bool:
    """Whether it differs between prompts by more than rounding."""
    z = z.float()
    return bool((z - z.mean(0)).abs().max() > 1e-5 * z.abs().max())


@in_usual_state
def ordinary_positions(batch: PromptBatch, *kinds: tuple[int, ...]) -> Bool[Tensor, "prompt pos"]:
    """Marks the positions that are none of ``kinds`` (one for every prompt each), and that enough later queries see."""
    length = batch.length
    marks = torch.ones(batch.n, length, dtype=torch.bool)
    marks[:, length - max(1, length // 4) :] = False  # too few later queries see these
    for positions in kinds:
        marks[torch.arange(batch.n), torch.tensor(positions)] = False
    return marks


def _ordinary(
    batch: PromptBatch, sinks: tuple[int, ...], targets: tuple[int, ...], seed: int
) -> tuple[Float[Tensor, "prompt pos"], Positions]:
    length = batch.length
    marks = ordinary_positions(batch, sinks, targets).float()
    # The first quarter averages few values yet: a reference position comes from the middle, where there is one.
    middle = marks.clone()
    middle[:, : length // 4] = 0
    middle = torch.where(middle.sum(-1, keepdim=True) > 0, middle, marks)
    if (middle.sum(-1) == 0).any():
        raise InputError(f"prompts of {length} tokens have no ordinary position: use longer ones")
    drawn = torch.multinomial(middle, 1, generator=torch.Generator().manual_seed(seed)).flatten().tolist()
    return marks, Positions.one_each(drawn)
