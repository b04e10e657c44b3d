"""Finding the formation of a sink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sinklens.engine.capture import capture_runs
from sinklens.engine.memory import row_budget
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.formation.explain import outlier_dims_of, super_neurons_of, written_at
from sinklens.formation.profile import events_of, profile_of, profile_readouts, sink_positions_of
from sinklens.formation.result import Formation, strongest_of
from sinklens.metrics.sink import EPS
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, model_shape
from sinklens.patches import CLEAN
from sinklens.prompts import PromptBatch, check_batch
from sinklens.records.ranges import Between, check_number, short


@in_usual_state
def find_formation(
    model: Model,
    batch: PromptBatch,
    *,
    layer: int | None = None,
    event: int | None = None,
    super_neurons: Sequence[int] | None = None,
    outlier_dims: Sequence[int] | None = None,
    eps: float = EPS,
    min_ratio: float = 3.0,
    min_jump: float = 2.0,
    neuron_z: float = 5.0,
    selectivity: float = 10.0,
    dim_z: float = 10.0,
    memory_budget: int | None = None,
) -> Formation:
    """Find where the sink of ``batch`` forms.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        batch: equal-length prompts.
        layer: explain this block instead of the one with the largest jump.
        event: explain the event of this number instead (see :attr:`Formation.steps`), by its strongest block.
        super_neurons: take these neurons instead of looking for them.
        outlier_dims: take these dimensions instead of looking for them.
        eps: attention above which a head counts as having a sink (0.3, Gu et al. 2025).
        min_ratio: least ratio of the sink token's norm to the others' after a formation block.
        min_jump: least factor by which that ratio grows in a formation block.
        neuron_z: least robust z of a super neuron's weight norms.
        selectivity: least ratio of a super neuron's magnitude on the sink token to that on others.
        dim_z: least robust z of what is written into an outlier dimension.
        memory_budget: bytes for one forward pass's activations.

    Raises:
        NoSinkError: no position receives enough attention, no block makes its norm jump, or no neuron qualifies; with
            the numbers that were measured.
        InputError: no model, or no prompts that it can read; activations are not finite, a block, event, neuron or
            dimension does not exist, or both a block and an event are given.
    """
    check_batch(model, batch)
    shape = model_shape(model)
    check_given(shape, layer, super_neurons, outlier_dims, event)
    rows = row_budget(model, batch.length, memory_budget)
    store = capture_runs(model, batch.tokens, CLEAN, [], profile_readouts(model, shape.n_layers), max_rows=rows)
    received = torch.stack([store.readings["base", "attention", b] for b in range(shape.n_layers)]).cpu()
    sinks = sink_positions_of(received)
    profile = profile_of(store, received, sinks, shape.n_layers, eps)
    events = events_of(profile, min_ratio, min_jump)
    if layer is None:
        layer = _block_to_explain(profile, events, sinks, eps, min_ratio, min_jump)
    found = Formation(layer, tuple(sinks.tolist()), (), (), events, profile)
    return explained(
        model,
        batch,
        found,
        layer if event is None else found.step(event).layer,
        super_neurons=super_neurons,
        outlier_dims=outlier_dims,
        neuron_z=neuron_z,
        selectivity=selectivity,
        dim_z=dim_z,
        memory_budget=memory_budget,
    )


@in_usual_state
def explained(
    model: Model,
    batch: PromptBatch,
    formation: Formation,
    layer: int,
    *,
    super_neurons: Sequence[int] | None = None,
    outlier_dims: Sequence[int] | None = None,
    neuron_z: float = 5.0,
    selectivity: float = 10.0,
    dim_z: float = 10.0,
    memory_budget: int | None = None,
) -> Formation:
    """The same sink, explained by the super neurons and outlier dimensions of one of its blocks.

    Args:
        model: the model.
        batch: the prompts that ``formation`` was found on.
        formation: where the sink forms; its positions, events and profile are kept.
        layer: the block to explain.
        super_neurons: as :func:`find_formation` takes them, as are the others.
        outlier_dims: dimensions.
        neuron_z: threshold.
        selectivity: threshold.
        dim_z: threshold.
        memory_budget: bytes for one forward pass's activations.

    Raises:
        NoSinkError: no neuron of the block qualifies.
    """
    check_batch(model, batch)
    formation.check_prompts(batch.n, batch.length)
    sinks = torch.tensor(formation.sink_positions, device="cpu")
    post, added = written_at(model, batch, layer, row_budget(model, batch.length, memory_budget))
    neurons = super_neurons_of(model, layer, post, sinks, neuron_z, selectivity, super_neurons)
    dims = outlier_dims_of(model, layer, post, added, sinks, neurons, dim_z, outlier_dims)
    return replace(formation, layer=layer, super_neurons=neurons, outlier_dims=dims)


def check_given(shape, layer, neurons, dims, event=None) -> None:  # noqa: ANN001
    """Make sure that what is given for a formation is there in a model of this shape.

    Raises:
        InputError: it is not.
    """
    if event is not None:
        check_number("event", event, Between(1), whole=True)
        if layer is not None:
            raise InputError(f"give a block ({layer}) or an event ({event}) to explain, not both")
    if neurons and not shape.d_mlp:
        raise NotApplicableError("super_neurons are given, and the model has no dense MLP: leave them out")
    for name, given, top in (
        ("block", [] if layer is None else [layer], shape.n_layers),
        ("neuron", neurons or [], shape.d_mlp),
        ("dimension", dims or [], shape.d_model),
    ):
        if not all(0 <= index < top for index in given):
            raise InputError(f"{name} [{short(given, 8)}] is not in 0..{top - 1}")


def _block_to_explain(profile, events, sinks, eps, min_ratio, min_jump) -> int:  # noqa: ANN001
    strongest = profile.loc[profile.attention_sink.idxmax()]
    measured = (
        f"the most attended position (the median over prompts is {int(sinks.median())}) receives at most "
        f"{strongest.attention_sink:.3f} (block {int(strongest.layer)}; others {strongest.attention_other:.3f}), "
        f"and its norm is at most {profile.ratio_after.max():.2f} times the others'"
    )
    if profile.sink_rate.max() == 0:
        raise NoSinkError(f"no attention sink in this model on these prompts: {measured}; no head exceeds {eps}")
    if not events:
        raise NoSinkError(
            f"no formation block: {measured}; a jump to {min_ratio} times the others' by a factor of {min_jump} "
            "in one block was asked for"
        )
    return strongest_of(events).layer


def given_event(event: int | None, formation: Formation | None) -> dict[str, Any]:
    """What :func:`find_formation` is told where a caller may give a formation or the number of an event.

    Raises:
        InputError: both are given.
    """
    if formation is not None and event is not None:
        raise InputError(
            "give a formation or the number of an event, not both: find_formation(event=) finds its formation"
        )
    return {} if event is None else {"event": event}
