"""Sink pairs: two runs on the same tokens, one without a sink at a position and one with.

The *induced* pair has the clean model as ``base`` and an intervention at the root of the chain as ``anchored``: the
token at the target may attend only to itself (``block_aggregation``), or the deviation of its aggregated value is
amplified (``amplify_variance``). Because both are interventions on one token's attention alone, transplanting that
token's aggregated value must carry over all of the effect: the identity check of every chain.

The *natural* pair has one run, the clean model, and compares the sink that the data has with ordinary positions. There
is no run without the sink to denoise, so it is noised only, with activations of an ordinary position of the same
prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens import edits
from sinklens.engine.capture import Want, capture_runs
from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.models.view import Model
from sinklens.patches import CLEAN, Patch, Positions, Runs, Source
from sinklens.prompts import PromptBatch
from sinklens.sites import PATTERN, Z

Direction = Literal["denoise", "noise"]
PairKind = Literal["block_aggregation", "amplify_variance", "natural"]


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

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions in which patches can be run."""
        return ("noise",) if self.kind == "natural" else ("denoise", "noise")

    def ends(self, direction: Direction) -> tuple[str, Source]:
        """The run that is patched, and the source of what is put there."""
        if direction == "denoise":
            return self.without.run, self.with_sink
        return self.with_sink.run, self.without


def induced_pair(
    model: Model,
    batch: PromptBatch,
    formation: Formation,
    target: int,
    *,
    kind: PairKind = "block_aggregation",
    layers: tuple[int, ...] | None = None,
    strength: float = 8.0,
    axis: edits.MeanAxis = "prompts",
    seed: int = 0,
    max_rows: int = 64,
) -> SinkPair:
    """A sink made at position ``target`` by an intervention at the root of the chain.

    Args:
        model: the model.
        batch: the prompts.
        formation: where the model's own sink forms.
        target: position that becomes a sink.
        kind: ``block_aggregation`` or ``amplify_variance``.
        layers: blocks of the intervention; by default all up to the formation block, and for ``amplify_variance`` up to
            the first formation blocks (while the first token's values still have the higher variance).
        strength: lambda of ``amplify_variance``.
        axis: what the mean that ``amplify_variance`` leaves in place is taken over (see
            :func:`sinklens.edits.amplification`).
        seed: draws the reference positions.
        max_rows: prompts in one forward pass, for the statistics that ``amplify_variance`` needs.

    Raises:
        InputError: a target outside the sequence, without earlier or enough later tokens, or at the sink itself; fewer
            than two prompts for ``amplify_variance`` over prompts.
    """
    check_target(batch, target)
    if target in formation.sink_positions:
        raise InputError(f"target {target} is already the sink of a prompt: choose another, or target natural")
    top = formation.layer if kind == "block_aggregation" else formation.first
    layers = tuple(range(top + 1)) if layers is None else layers
    if not layers or max(layers) > formation.layer or min(layers) < 0:
        raise InputError(f"the pair's blocks {layers} must be within 0..{formation.layer}, up to the formation block")
    if kind == "block_aggregation":
        root = Patch(PATTERN, layers, (target,), edits.AttendSelf(), run="anchored", label="block_aggregation")
    elif kind == "amplify_variance":
        root = _amplify(model, batch, target, layers, strength, axis, max_rows)
    else:
        raise InputError(f"unknown pair {kind!r}: block_aggregation or amplify_variance")
    ordinary, reference = _ordinary(batch, formation.sink_positions, (target,) * batch.n, seed)
    return SinkPair(
        kind,
        Positions.of((target,)),
        {"base": (), "anchored": (root,)},
        Source("base"),
        Source("anchored"),
        ordinary,
        reference,
    )


@dataclass(frozen=True)
class PairChoice:
    """Which pair: what a chain, a sweep or a command is asked for."""

    target: int | Literal["natural"]
    """Position that is made a sink, or ``natural`` for the sink that the data has."""
    kind: PairKind = "block_aggregation"
    """How it is made: ``block_aggregation`` or ``amplify_variance``."""
    strength: float = 8.0
    """Lambda of ``amplify_variance``."""
    layers: tuple[int, ...] | None = None
    """Blocks of that intervention; ``None``: as :func:`induced_pair` chooses them."""


def make_pair(
    choice: PairChoice, model: Model, batch: PromptBatch, formation: Formation, *, seed: int, max_rows: int
) -> SinkPair:
    """The pair that was chosen; errors are those of :func:`induced_pair`."""
    if choice.target == "natural":
        return natural_pair(batch, formation, seed)
    return induced_pair(
        model,
        batch,
        formation,
        choice.target,
        kind=choice.kind,
        layers=choice.layers,
        strength=choice.strength,
        seed=seed,
        max_rows=max_rows,
    )


def check_target(batch: PromptBatch, target: int) -> None:
    """Make sure that a sink can be made at ``target``.

    Raises:
        InputError: when it lies outside the sequence, or has no earlier or no later tokens.
    """
    if not 0 <= target < batch.length - 1:
        raise InputError(
            f"target {target} must be in 1..{batch.length - 2}: prompts have {batch.length} tokens, and a sink needs "
            "later tokens that attend to it"
        )
    if target == 0:
        raise InputError("target 0 has no earlier tokens to aggregate: choose a later position, or target natural")


def natural_pair(batch: PromptBatch, formation: Formation, seed: int = 0) -> SinkPair:
    """The sink that the data has, against ordinary positions of the same run."""
    target = Positions.one_each(formation.sink_positions)
    ordinary, reference = _ordinary(batch, formation.sink_positions, formation.sink_positions, seed)
    without = Source("natural", reference)
    return SinkPair("natural", target, {"natural": ()}, without, Source("natural"), ordinary, reference)


def _amplify(model, batch, target, layers, strength, axis, max_rows) -> Patch:  # noqa: ANN001
    if batch.n < 2 and axis == "prompts":
        raise InputError(f"amplify_variance needs a variance over prompts: give at least 2, there is {batch.n}")
    kept = (target,) if axis == "prompts" else None  # no more than the mean needs
    wants = [Want("base", Z, layer, kept) for layer in layers]
    store = capture_runs(model, batch.tokens, CLEAN, wants, max_rows=max_rows)
    z = {layer: store.tensor("base", Z, layer) for layer in layers}
    edit = edits.amplification(z, 0 if kept else target, strength, axis)
    return Patch(Z, layers, (target,), edit, run="anchored", label="amplify_variance")


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
