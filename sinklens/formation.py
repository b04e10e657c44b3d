"""Where the sink forms: its position, the formation blocks, the super neurons, the dimensions that they write.

Everything is found in the data; nothing is assumed about the model or the first token.

* The *sink position* of a prompt is the position that receives most attention from later queries, over all blocks and
  heads, among positions that enough later queries see.
* A *formation block* makes the sink token's residual norm jump against the other tokens': with
  ``r_l = |h_l[sink]| / median_j |h_l[j]|``, block l is one when ``r_after >= min_ratio`` and
  ``r_after / r_before >= min_jump``. The block to explain is the one with the largest growth ``r_after - r_before``.
* A *formation step* is a run of formation blocks, one after another. A model may make its sink in several, each for the
  blocks behind it; ``event`` says which one to explain, by the block of it with the largest growth.
* *Super neurons* (of that block) have outlying norms of both their W_gate and W_up columns (robust z of each, the
  smaller one counts) and fire selectively: their mean magnitude on the sink token is ``selectivity`` times what they
  reach on other tokens (95th percentile). A plain MLP has no gate, so W_in alone is asked.
* *Outlier dimensions* are the residual dimensions in which the super neurons' joint contribution on the sink token
  outlies that in all others (robust z of its magnitude); where a norm stands behind the MLP, so that a neuron's own
  contribution cannot be told, all that the MLP adds takes its place.

The thresholds are choices, not facts of nature: each is an argument, and what was measured is returned with the
verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens import metrics
from sinklens.engine.capture import ActivationStore, Want, capture_runs
from sinklens.engine.memory import row_budget
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.models.identities import identities, require
from sinklens.models.state import in_usual_state
from sinklens.models.view import BlockWeights, Model, model_shape
from sinklens.patches import CLEAN
from sinklens.prompts import PromptBatch, check_batch
from sinklens.readouts.base import Readout
from sinklens.records.ranges import Between, check_number, short, shown, spans
from sinklens.records.summaries import html, some, summary
from sinklens.sites import ATTN_OUT, MLP_OUT, MLP_POST, PATTERN, RESID_POST, RESID_PRE


@dataclass(frozen=True)
class FormationEvent:
    """A block at which the sink token's residual norm jumps."""

    layer: int
    """Block index."""
    norm_before: float
    """Residual norm of the sink token entering the block, median over prompts."""
    norm_after: float
    """Residual norm of the sink token leaving the block."""
    ratio_before: float
    """The same norm over the median of the other tokens', entering."""
    ratio_after: float
    """And leaving."""
    mlp_norm: float
    """Norm of the block's MLP output at the sink token."""
    attn_norm: float
    """Norm of the block's attention output at the sink token."""

    @property
    def growth(self) -> float:
        """By how much the ratio grows in the block."""
        return self.ratio_after - self.ratio_before


@dataclass(frozen=True)
class FormationStep:
    """Formation blocks in a row, which together make the sink of the blocks behind them: what ``event=`` counts."""

    number: int
    """Its number, from 1, in the order of the blocks."""
    blocks: tuple[int, ...]
    """Its blocks, in order."""
    layer: int
    """The one with the largest growth, which is explained."""

    def __str__(self) -> str:
        return f"{self.number} (block{'s' if len(self.blocks) > 1 else ''} {spans(self.blocks, '-')})"


@dataclass(frozen=True)
class SuperNeuron:
    """A neuron with outlying weights that fires on the sink token."""

    index: int
    """Neuron index in the block's MLP."""
    gate_z: float | None
    """Robust z of the norm of its W_gate column; None in a plain MLP."""
    up_z: float
    """Robust z of the norm of its W_up (W_in) column."""
    activation_sink: float
    """Its activation (``hook_post``) on the sink token, mean over prompts."""
    activation_other: float
    """95th percentile of its magnitude on other tokens."""


@dataclass(frozen=True)
class OutlierDim:
    """A residual dimension that the super neurons write."""

    index: int
    """Dimension of the residual stream."""
    written: float
    """What the super neurons write there on the sink token, mean over prompts."""
    z: float
    """Robust z of its magnitude among all dimensions."""


@dataclass(frozen=True)
class Formation:
    """Where and how the sink forms."""

    layer: int
    """The formation block to explain."""
    sink_positions: tuple[int, ...]
    """The sink position of every prompt."""
    super_neurons: tuple[SuperNeuron, ...]
    """Super neurons of that block, strongest first."""
    outlier_dims: tuple[OutlierDim, ...]
    """Residual dimensions that they write, strongest first."""
    events: tuple[FormationEvent, ...] = ()
    """All formation blocks, in order."""
    profile: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False, repr=False)
    """Per block: residual norms and attention of the sink and of other tokens."""

    def __repr__(self) -> str:
        sinks = some(sorted(set(self.sink_positions)))
        return summary(
            self,
            f"block {self.layer}" + (f" (event {self.event} of {len(self.steps)})" if len(self.steps) > 1 else ""),
            f"sink at position {sinks} of {len(self.sink_positions)} prompts",
            f"super neurons {some(self.neurons)}" if self.super_neurons else "",
            f"outlier dimensions {some(self.dims)}" if self.outlier_dims else "",
        )

    def _repr_html_(self) -> str:
        return html(repr(self), [vars(event) for event in self.events])

    @property
    def steps(self) -> tuple[FormationStep, ...]:
        """The formation blocks, in groups of those that follow one another: the events by their numbers."""
        groups: list[list[FormationEvent]] = []
        for event in self.events:
            if groups and event.layer == groups[-1][-1].layer + 1:
                groups[-1].append(event)
            else:
                groups.append([event])
        return tuple(
            FormationStep(number, tuple(event.layer for event in group), _strongest(group).layer)
            for number, group in enumerate(groups, start=1)
        )

    @property
    def event(self) -> int | None:
        """Number of the event (see :attr:`steps`) that :attr:`layer` belongs to; ``None`` for another block."""
        return next((step.number for step in self.steps if self.layer in step.blocks), None)

    def step(self, event: int) -> FormationStep:
        """The event of that number.

        Raises:
            InputError: there is none.
        """
        found = next((step for step in self.steps if step.number == event), None)
        if found is None:
            known = ", ".join(map(str, self.steps))
            raise InputError(f"there is no event {shown(event)}: the formation events of this sink are {known}")
        return found

    @property
    def first(self) -> int:
        """The last of the first formation blocks in a row (a jump may take two or three), at most :attr:`layer`."""
        blocks = [event.layer for event in self.events if event.layer <= self.layer] or [self.layer]
        last = min(blocks)
        while last + 1 in blocks:
            last += 1
        return last

    @property
    def up_to(self) -> tuple[int, ...]:
        """The blocks up to the formation block, it included."""
        return tuple(range(self.layer + 1))

    def after(self, n_layers: int, blocks: int | None = 4) -> tuple[int, ...]:
        """The ``blocks`` after the formation block, where attention is read (None: all up to the next event).

        They end before the first block of the next event (see :attr:`steps`): what is behind that one is a sink that
        has been made anew.

        Args:
            n_layers: blocks of the model.
            blocks: how many, where there are as many.

        Raises:
            NotApplicableError: the formation block is the last, or the next event begins right behind it.
            InputError: fewer than one block is asked for.
        """
        if blocks is not None and blocks < 1:
            raise InputError(f"attention has to be read in at least 1 block, not {blocks}")
        first = self.layer + 1
        if first >= n_layers:
            raise NotApplicableError(
                f"block {self.layer} is the model's last: no later block attends to the sink it forms"
            )
        following = next((step for step in self.steps if step.blocks[0] > self.layer), None)
        end = n_layers if following is None else following.blocks[0]
        if end == first:
            raise NotApplicableError(
                f"event {following} begins right behind block {self.layer}, so that no block is left to read its sink "
                "in: explain that event, or an earlier block"
            )
        return tuple(range(first, end if blocks is None else min(first + blocks, end)))

    @property
    def neurons(self) -> tuple[int, ...]:
        """Indices of the super neurons."""
        return tuple(neuron.index for neuron in self.super_neurons)

    @property
    def dims(self) -> tuple[int, ...]:
        """Indices of the outlier dimensions."""
        return tuple(dim.index for dim in self.outlier_dims)


@in_usual_state
def find_formation(
    model: Model,
    batch: PromptBatch,
    *,
    layer: int | None = None,
    event: int | None = None,
    super_neurons: Sequence[int] | None = None,
    outlier_dims: Sequence[int] | None = None,
    eps: float = 0.3,
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
    _check_given(shape, layer, super_neurons, outlier_dims, event)
    rows = row_budget(model, batch.length, memory_budget)
    store = capture_runs(model, batch.tokens, CLEAN, [], _profile_readouts(model, shape.n_layers), max_rows=rows)
    received = torch.stack([store.readings["base", "attention", b] for b in range(shape.n_layers)]).cpu()
    sinks = _sink_positions(received)
    profile = _profile(store, received, sinks, shape.n_layers, eps)
    events = _events(profile, min_ratio, min_jump)
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
    sinks = torch.tensor(formation.sink_positions, device="cpu")
    post, added = _written(model, batch, layer, row_budget(model, batch.length, memory_budget))
    neurons = _super_neurons(model, layer, post, sinks, neuron_z, selectivity, super_neurons)
    dims = _outlier_dims(model, layer, post, added, sinks, neurons, dim_z, outlier_dims)
    return replace(formation, layer=layer, super_neurons=neurons, outlier_dims=dims)


def _check_given(shape, layer, neurons, dims, event=None) -> None:  # noqa: ANN001
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


def _written(model: Model, batch: PromptBatch, layer: int, rows: int) -> tuple[Tensor | None, Tensor]:
    """The neurons' activations, ``None`` without a dense MLP; and what the MLP adds, or attention without an MLP."""
    measured = identities(model)
    dense = measured.holds("dense_mlp", (layer,))
    adds = MLP_OUT if MLP_OUT.at(layer) in measured.fired else ATTN_OUT
    wants = [Want("base", site, layer) for site in ([MLP_POST, adds] if dense else [adds])]
    store = capture_runs(model, batch.tokens, CLEAN, wants, max_rows=rows)
    return store.tensor("base", MLP_POST, layer) if dense else None, store.tensor("base", adds, layer)


def _profile_readouts(model: Model, n_layers: int) -> list[Readout]:
    blocks = tuple(range(n_layers))

    def norm(act: Tensor, _rows: object) -> Tensor:
        return act.float().norm(dim=-1)

    def received(act: Tensor, _rows: object) -> Tensor:
        return metrics.attention_received(act)

    fired = identities(model).fired
    with_mlp = tuple(block for block in blocks if MLP_OUT.at(block) in fired)
    return [
        Readout("before", RESID_PRE, blocks, norm),
        Readout("after", RESID_POST, blocks, norm),
        Readout("attn", ATTN_OUT, blocks, norm),
        *([Readout("mlp", MLP_OUT, with_mlp, norm)] if with_mlp else []),
        Readout("attention", PATTERN, blocks, received),
    ]


def _sink_positions(received: Float[Tensor, "layer prompt head key"]) -> Int[Tensor, " prompt"]:
    length = received.shape[-1]
    # A position that only a few queries see can get a high mean by chance: ask for a quarter of the sequence.
    eligible = max(1, length - max(1, length // 4))
    return received.mean((0, 2))[:, :eligible].argmax(-1)


def _of_sink(values: Float[Tensor, "prompt pos"], sinks: Tensor) -> Float[Tensor, " prompt"]:
    return values.take_along_dim(sinks[:, None], -1).squeeze(-1)


def _of_others(values: Float[Tensor, "prompt pos"], sinks: Tensor) -> Float[Tensor, "prompt other"]:
    other = torch.ones_like(values, dtype=torch.bool).scatter(1, sinks[:, None], False)
    return values[other].view(len(values), -1)


def _median(x: Tensor, dim: int = -1) -> Tensor:
    # Not torch.median, which gives the lower of the two middle values.
    return x.float().quantile(0.5, dim=dim)


def _profile(store: ActivationStore, received: Tensor, sinks: Tensor, n_layers: int, eps: float) -> pd.DataFrame:
    records = []
    for block in range(n_layers):
        norms = {name: store.readings["base", name, block].cpu() for name in ("before", "after", "attn")}
        norms["mlp"] = store.readings.get(("base", "mlp", block), torch.zeros_like(norms["attn"])).cpu()
        attention = received[block].mean(1)
        heads = received[block].take_along_dim(sinks[:, None, None], -1).squeeze(-1)
        record = {"layer": block}
        for name in ("before", "after"):
            sink, other = _of_sink(norms[name], sinks), _median(_of_others(norms[name], sinks), -1)
            record |= {f"norm_sink_{name}": _median(sink), f"norm_other_{name}": _median(other)}
            record |= {f"ratio_{name}": _median(sink / other)}
        record |= {
            "attn_norm": _median(_of_sink(norms["attn"], sinks)),
            "mlp_norm": _median(_of_sink(norms["mlp"], sinks)),
        }
        record |= {
            "attention_sink": _of_sink(attention, sinks).mean(),
            "attention_other": _of_others(attention, sinks).nanmean(),
            "sink_rate": (heads > eps).float().mean(),
        }
        records.append({key: float(value) if key != "layer" else value for key, value in record.items()})
    return pd.DataFrame(records)


def _events(profile: pd.DataFrame, min_ratio: float, min_jump: float) -> tuple[FormationEvent, ...]:
    jumps = profile.loc[(profile.ratio_after >= min_ratio) & (profile.ratio_after >= min_jump * profile.ratio_before)]
    return tuple(
        FormationEvent(
            layer=int(row["layer"]),
            norm_before=row["norm_sink_before"],
            norm_after=row["norm_sink_after"],
            ratio_before=row["ratio_before"],
            ratio_after=row["ratio_after"],
            mlp_norm=row["mlp_norm"],
            attn_norm=row["attn_norm"],
        )
        for row in jumps.to_dict("records")
    )


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
    return _strongest(events).layer


def _strongest(events: Sequence[FormationEvent]) -> FormationEvent:
    return max(events, key=lambda event: event.growth)


def _super_neurons(model, layer, post, sinks, neuron_z, selectivity, given) -> tuple[SuperNeuron, ...]:  # noqa: ANN001
    if post is None:
        if given:
            require(model, "dense_mlp", (layer,))
        return ()
    weights = BlockWeights(model, layer)
    up_z = metrics.robust_z(weights.W_in.detach().float().norm(dim=0)).cpu()
    gate_z = None if weights.W_gate is None else metrics.robust_z(weights.W_gate.detach().float().norm(dim=0)).cpu()
    joint = up_z if gate_z is None else torch.minimum(gate_z, up_z)
    post = post.float().cpu()
    index = torch.arange(len(post))
    sink = post[index, sinks].mean(0)
    other = torch.ones(post.shape[:2], dtype=torch.bool)
    other[index, sinks] = False
    ordinary = post[other].abs().double().quantile(0.95, dim=0).float()
    if given is None:
        chosen = (joint >= neuron_z) & (sink.abs() >= selectivity * ordinary) & (sink != 0)
        if not chosen.any():
            best = int(joint.argmax())
            raise NoSinkError(
                f"no super neuron in block {layer}: neuron {best} has the largest weight norms (robust z "
                f"{joint[best]:.1f}, {neuron_z} asked) and activation {sink[best]:.2f} on the sink token against "
                f"{ordinary[best]:.2f} on others; name neurons yourself with super_neurons"
            )
        given = chosen.nonzero().flatten().tolist()
    found = [
        SuperNeuron(
            index=int(i),
            gate_z=None if gate_z is None else float(gate_z[i]),
            up_z=float(up_z[i]),
            activation_sink=float(sink[i]),
            activation_other=float(ordinary[i]),
        )
        for i in given
    ]
    return tuple(sorted(found, key=lambda neuron: -abs(neuron.activation_sink)))


def _outlier_dims(model, layer, post, added, sinks, neurons, dim_z, given) -> tuple[OutlierDim, ...]:  # noqa: ANN001
    index = torch.arange(len(added))
    measured = identities(model)
    if neurons and measured.holds("neurons_write", (layer,)) and measured.holds("mlp_adds", (layer,)):
        chosen = [neuron.index for neuron in neurons]
        rows = BlockWeights(model, layer).W_out.detach()[chosen].float()
        written = post[index, sinks.to(post.device)][:, chosen].float() @ rows
    else:
        # No neuron's share can be told (a norm or a multiplier stands behind the MLP): take all that the MLP adds.
        written = added[index, sinks.to(added.device)].float()
    written = written.mean(0).cpu()
    z = metrics.robust_z(written.abs())
    if given is None:
        given = (z >= dim_z).nonzero().flatten().tolist() or [int(z.argmax())]
    dims = [OutlierDim(int(i), float(written[i]), float(z[i])) for i in given]
    return tuple(sorted(dims, key=lambda dim: -abs(dim.written)))


def formation_to_json(formation: Formation) -> dict[str, Any]:
    """A formation as plain lists and dictionaries."""
    told = {"event": formation.event, "steps": [asdict(step) for step in formation.steps]}
    return {**asdict(formation), **told, "profile": formation.profile.to_dict("records")}


def formation_from_json(data: Mapping[str, Any]) -> Formation:
    """The inverse of :func:`formation_to_json`, also of what :func:`sinklens.records.plain.to_plain` made of it.

    Raises:
        LookupError, TypeError: something is missing.
    """
    return Formation(
        layer=data["layer"],
        sink_positions=tuple(data["sink_positions"]),
        super_neurons=tuple(_from_plain(SuperNeuron, item) for item in data["super_neurons"]),
        outlier_dims=tuple(_from_plain(OutlierDim, item) for item in data["outlier_dims"]),
        events=tuple(_from_plain(FormationEvent, item) for item in data["events"]),
        profile=_frame(data["profile"]),
    )


_Item = TypeVar("_Item", SuperNeuron, OutlierDim, FormationEvent)


def _from_plain(kind: type[_Item], item: Mapping[str, Any]) -> _Item:
    """The inverse of :func:`sinklens.records.plain.to_plain`: a number that JSON could not hold is NaN again."""
    missing = {f.name: np.nan for f in fields(kind) if f.type == "float" and item[f.name] is None}
    return kind(**{**item, **missing})


def _frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(records)
    empty = frame.columns[frame.isna().all()]  # a column of nulls alone would hold objects
    return frame.astype(dict.fromkeys(empty, float))
