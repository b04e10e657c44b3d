"""Gating and silencing of heads: what they aggregate is scaled, ``z <- gate * z``, at every position.

A gate of 0 silences a head. *Sink heads* are those whose first token receives more than a share of all later queries'
attention, ``alpha_1 > 0.3`` by default (Gu et al., ICLR 2025), in the mean over prompts. If a head attends to its sink
in order to do nothing, to silence it costs little. The control gates as many other heads of the same blocks, those
that attend to the first token least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens import edits, metrics
from sinklens.engine.capture import capture_runs
from sinklens.engine.memory import row_budget
from sinklens.errors import NotApplicableError
from sinklens.interventions.patched import Hooks, hooks_of
from sinklens.metrics.sink import EPS
from sinklens.models.identities import is_unnormalised
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, model_id, model_shape
from sinklens.patches import CLEAN, Patch
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
from sinklens.records.integers import whole_numbers
from sinklens.records.ranges import Between, check_number
from sinklens.sites import PATTERN, Z


@dataclass(frozen=True, eq=False)
class SinkHeads:
    """Heads by what their first token receives."""

    received: Float[Tensor, "layer head"]
    """``alpha`` of the first token, mean over prompts."""
    heads: Mapping[int, tuple[int, ...]]
    """The sink heads of every block that has some."""
    others: Mapping[int, tuple[int, ...]]
    """As many other heads of the same blocks, or all where there are fewer: those that receive least."""


@in_usual_state
def find_sink_heads(model: Model, batch: PromptBatch, *, eps: float = EPS, most: int | None = None) -> SinkHeads:
    """The heads whose first token is a sink.

    Args:
        model: the model.
        batch: prompts.
        eps: share of later queries' attention that the first token receives in a sink head.
        most: how many at most, the strongest; all by default. At most half of a block's, so that it has a control.

    Raises:
        NotApplicableError: there are none.
    """
    shape, shares = model_shape(model), is_unnormalised(model)
    layers = tuple(range(shape.n_layers))

    def first(act: Tensor, rows: object) -> Tensor:  # noqa: ARG001
        return metrics.alpha(metrics.normalised_rows(act)[0] if shares else act)[..., 0]

    rows = row_budget(model, batch.length, None)
    store = capture_runs(model, batch.tokens, CLEAN, [], [Readout("alpha", PATTERN, layers, first)], max_rows=rows)
    received = torch.stack([store.readings["base", "alpha", layer].float().mean(0).cpu() for layer in layers])
    chosen: dict[int, list[int]] = {}
    for place in received.flatten().argsort(descending=True, stable=True).tolist():
        layer, head = divmod(place, shape.n_heads)
        taken = sum(map(len, chosen.values()))
        if received[layer, head] <= eps or (most is not None and taken >= most):
            break
        if 2 * (len(chosen.get(layer, ())) + 1) <= shape.n_heads:
            chosen.setdefault(layer, []).append(head)
    if not chosen:
        most_received = f"the first token receives at most {float(received.max()):.2g} of any head's attention"
        told = "and a block needs two heads, one of them for a control" if shape.n_heads < 2 else f"not {eps:g}"
        raise NotApplicableError(f"{model_id(model)} has no sink heads to gate: {most_received}, {told}")
    heads = {layer: tuple(sorted(found)) for layer, found in sorted(chosen.items())}
    others = {layer: _least(received[layer], found) for layer, found in heads.items()}
    return SinkHeads(received, heads, others)


def _least(received: Float[Tensor, " head"], chosen: Sequence[int]) -> tuple[int, ...]:
    order = received.argsort(stable=True).tolist()
    return tuple(sorted([head for head in order if head not in chosen][: len(chosen)]))


def gate_heads(model: Model, heads: Mapping[int, Sequence[int]], gate: float = 0.0) -> Hooks:
    """Scale what some heads aggregate.

    Args:
        model: the model.
        heads: the heads of every block.
        gate: the factor on ``hook_z``; 0 silences them, 1 changes nothing.

    Raises:
        InputError: a gate that is no finite number.
    """
    check_number("gate", gate, Between(-math.inf, math.inf))
    shape = model_shape(model)
    zero, factor = torch.zeros(shape.n_heads, shape.d_head, device="cpu"), torch.tensor(float(gate), device="cpu")
    hooks: Hooks = []
    for layer, chosen in heads.items():
        edit = edits.Rescale("gated", {layer: zero}, {layer: factor})
        hooks += hooks_of(Patch(Z, (layer,), (), edit, whole_numbers(chosen, "heads")))
    return hooks
