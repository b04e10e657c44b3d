"""Exact edges of a setting without the search for a circuit: one at a time, or several at once.

Effects of single edges do not add up where attention saturates or one sender stands in for another, so a claim about
*all heads* is asked of all their edges at once: every input hears the sum of what its senders say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.chain.result import METRIC
from sinklens.circuits.exact import other_tokens
from sinklens.circuits.graph import Graph, Input
from sinklens.circuits.measure import Effects, Measure
from sinklens.circuits.nodes import Edge, Node
from sinklens.circuits.parts import Parts
from sinklens.circuits.paths import edge_patch, together
from sinklens.circuits.written import Written, written
from sinklens.edits.general import resized
from sinklens.pairs.choice import Direction
from sinklens.pairs.effects import MIN_GAP
from sinklens.patches import Patch
from sinklens.readouts.named import NamedReadout
from sinklens.stages.base import Setting


@dataclass(frozen=True, eq=False)
class Edges:
    """All edges at the sink's token, and what runs them."""

    measure: Measure
    """What is measured of the sink, and of which setting."""
    graph: Graph
    """Nodes and edges up to the blocks in which it is read."""
    parts: Parts
    """The model, taken apart."""
    with_sink: Written
    """What nodes write in the run with the sink."""
    without: Written
    """What they write in the run without."""

    @classmethod
    def of(cls, setting: Setting, metric: str | NamedReadout = METRIC, min_gap: float = MIN_GAP) -> Self:
        """The edges of a setting.

        Args:
            setting: the runs with and without the sink, and the blocks in which it is read.
            metric: what is measured of it, of attention.
            min_gap: least difference of the metric between the runs; prompts with less have no effect (NaN).

        Raises:
            NoSinkError: the pair makes no sink in any prompt.
            NotApplicableError: the model cannot be taken apart.
            EngineError: what the nodes write does not add up to what the model has.
        """
        formation, pair = setting.formation, setting.pair
        graph = Graph(setting.shape, formation.layer, setting.neurons, max(setting.readout_layers))
        parts = Parts(setting.model, setting.batch.length, formation.layer, setting.neurons)
        ends = [written(setting, graph, parts, source) for source in (pair.with_sink, pair.without)]
        return cls(Measure(setting, setting.study.named_readout(metric), min_gap), graph, parts, *ends)

    @cached_property
    def change(self) -> Float[Tensor, "sender prompt d_model"]:
        """What each sender writes more in the run with the sink than in the run without."""
        return self.with_sink.nodes - self.without.nodes

    @cached_property
    def other_token(self) -> Float[Tensor, "sender prompt d_model"]:
        """The control: a change of the same size, towards what each sender writes at an ordinary token."""
        return other_tokens(self.measure, self.graph, self.parts, self.change, self.without)

    def into(self, inputs: Sequence[Input], senders: Iterable[Node] | None = None) -> tuple[Edge, ...]:
        """All edges into some inputs, or those from some senders alone."""
        found = self.graph.edges_into(inputs)
        if senders is None:
            return found
        chosen = frozenset(senders)
        return tuple(edge for edge in found if edge.sender in chosen)

    def effects(
        self, edges: Sequence[Edge], direction: Direction, said: Float[Tensor, "sender prompt d_model"] | None = None
    ) -> Effects:
        """The effect of each edge alone, ``[edge, prompt]``: see :meth:`at_once`."""
        return self.at_once([[edge] for edge in edges], direction, said)

    def at_once(
        self,
        sets: Sequence[Sequence[Edge]],
        direction: Direction,
        said: Float[Tensor, "sender prompt d_model"] | None = None,
    ) -> Effects:
        """The effect of all edges of a set at once, ``[set, prompt]``: 1 where they do all that the pair does; 0 of a
        set without edges.

        Args:
            sets: sets of edges.
            direction: denoising adds what their senders say in the run without the sink, noising takes it away in the
                run with it.
            said: what senders say in place of :attr:`change`; what each input hears of it is moved to the length of
                what it would hear of that.
        """
        setting = self.measure.setting
        run, _ = setting.pair.ends(direction)
        patches = [self._patch(edges, run, 1 if direction == "denoise" else -1, said) for edges in sets if edges]
        found = iter(self.measure.effects(patches, direction, "exact"))
        start, end = self.measure.ends(direction)
        nothing = self.measure.as_effects(start, start, end)
        rows = [next(found) if edges else nothing for edges in sets]
        return torch.stack([torch.as_tensor(row) for row in rows]).numpy()

    def table(
        self,
        sets: Sequence[Sequence[Edge]],
        labels: Sequence[Mapping[str, Any]],
        direction: Direction,
        said: Float[Tensor, "sender prompt d_model"] | None = None,
    ) -> pd.DataFrame:
        """:meth:`at_once` as a tidy table, a row for every set and prompt: ``prompt``, the labels, and ``effect``.

        Args:
            sets: sets of edges; where each has one, this is the effect of each edge alone.
            labels: for every set in order, the columns that say which it is.
            direction: see :meth:`at_once`.
            said: see :meth:`at_once`.

        Raises:
            ValueError: there are more labels or fewer than sets.
        """
        rows = [
            {"prompt": prompt, **label, "effect": effect}
            for label, effects in zip(labels, self.at_once(sets, direction, said), strict=True)
            for prompt, effect in enumerate(effects)
        ]
        return pd.DataFrame(rows)

    def _patch(self, edges: Sequence[Edge], run: str, sign: int, said: Tensor | None) -> Patch:
        by_input: dict[Input, list[Edge]] = {}
        for edge in dict.fromkeys(edges):
            by_input.setdefault((edge.receiver, edge.branch), []).append(edge)
        patches = []
        for heard in by_input.values():
            senders = [self.graph.number[edge.sender] for edge in heard]
            added = self.change[senders].sum(0)
            if said is not None:
                added = resized(said[senders].sum(0), added)
            patches.append(edge_patch(self.measure.setting, self.parts, heard[0], run, sign * added))
        return together(patches)
