"""What is found of a formation, and how it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from sinklens.errors import InputError, NotApplicableError
from sinklens.records.ranges import shown, spans
from sinklens.records.summaries import html, some, summary

READOUT_BLOCKS = 4
"""In how many blocks after the formation block attention is read by default."""


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
        """Formation blocks, super neurons and outlier dimensions, as ``sinklens find`` prints them."""
        events = [
            {
                "block": event.layer,
                "norm before": event.norm_before,
                "norm after": event.norm_after,
                "others' ratio before": event.ratio_before,
                "others' ratio after": event.ratio_after,
                "MLP output": event.mlp_norm,
                "attention output": event.attn_norm,
            }
            for event in self.events
        ]
        neurons = [
            {
                "neuron": neuron.index,
                "z of |W_gate|": neuron.gate_z,
                "z of |W_up|": neuron.up_z,
                "activation on the sink": neuron.activation_sink,
                "on others (95%)": neuron.activation_other,
            }
            for neuron in self.super_neurons
        ]
        dims = [
            {"dimension": dim.index, "written on the sink": dim.written, "robust z": dim.z} for dim in self.outlier_dims
        ]
        found = html(repr(self), events)
        found += html(f"Super neurons of block {self.layer}", neurons) if neurons else ""
        return found + (html("Outlier dimensions that they write", dims) if dims else "")

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
            FormationStep(number, tuple(event.layer for event in group), strongest_of(group).layer)
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

    def check_prompts(self, n: int, length: int) -> None:
        """Make sure that it can have been found on ``n`` prompts of ``length`` tokens.

        Raises:
            InputError: it was found on others.
        """
        found, last = len(self.sink_positions), max(self.sink_positions, default=0)
        if found != n:
            told = f"the formation was found on {found} prompts, and there are {n}"
        elif last >= length:
            told = f"the formation has a sink at position {last}, and the prompts have {length} tokens"
        else:
            return
        raise InputError(f"{told}: call find_formation on these prompts")

    @property
    def up_to(self) -> tuple[int, ...]:
        """The blocks up to the formation block, it included."""
        return tuple(range(self.layer + 1))

    def until(self, n_layers: int) -> int:
        """The block before which this sink ends: the first of the next event (see :attr:`steps`), behind which is a
        sink that has been made anew; ``n_layers`` where no event follows.
        """
        return min((step.blocks[0] for step in self.steps if step.blocks[0] > self.layer), default=n_layers)

    def after(self, n_layers: int, blocks: int | None = READOUT_BLOCKS) -> tuple[int, ...]:
        """The ``blocks`` after the formation block, where attention is read (None: all up to the next event).

        They end before the next event (see :meth:`until`).

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
        end = self.until(n_layers)
        if end == first:
            following = next(step for step in self.steps if step.blocks[0] == end)
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


def strongest_of(events: Sequence[FormationEvent]) -> FormationEvent:
    """The block with the largest growth."""
    return max(events, key=lambda event: event.growth)


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
        profile=frame_of(data["profile"]),
    )


_Item = TypeVar("_Item", SuperNeuron, OutlierDim, FormationEvent)


def _from_plain(kind: type[_Item], item: Mapping[str, Any]) -> _Item:
    """The inverse of :func:`sinklens.records.plain.to_plain`: a number that JSON could not hold is NaN again."""
    missing = {f.name: np.nan for f in fields(kind) if f.type == "float" and item[f.name] is None}
    return kind(**{**item, **missing})


def frame_of(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A table of records that were written as JSON."""
    frame = pd.DataFrame(records)
    empty = frame.columns[frame.isna().all()]  # a column of nulls alone would hold objects
    return frame.astype(dict.fromkeys(empty, float))
