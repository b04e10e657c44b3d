"""From all edges to the fewest that keep a stated share of the sink.

1. Edges are ranked by an estimate, and the shortest beginning of that list is sought that keeps the share.
2. Edges that lead nowhere, or from where nothing differs, go: they change nothing.
3. Of the rest those go that are missed least, as many at a time as the share allows, until no single one can go (of
   more than 150 not even the hundredth of them that is missed least).

A set keeps a share of 0.9 if between 0.9 and 1.1 of the sink is left: one that makes more of it has lost what held it
back, and is no more faithful than one that makes less. Whether a set of edges keeps the share is measured by the
engine at every step; how much an edge is missed within the set is ranked with the later tokens held
(:mod:`sinklens.circuits.direct`). The last set, of 150 edges or fewer, cannot lose any one of them, each measured; that
no smaller set would do is not shown (finding it takes all subsets).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.circuits.direct import Listeners
from sinklens.circuits.graph import Graph
from sinklens.circuits.nodes import Edge, Node
from sinklens.circuits.rewired import Wiring
from sinklens.circuits.verify import Verifier
from sinklens.errors import NotApplicableError

FIRST = 32
"""Edges that are tried first."""
MANY = 150
"""Edges up to which each one's going is tried."""
PARTWAY = (0.4, 0.6, 0.8, 1.0)
"""How much of the kept edges is heard where slopes are taken."""
PARTS = (0.6, 0.3, 0.15, 0.08, 0.04, 0.02, 0.01)
"""What parts of the edges are tried to be done without at once."""
GROWTH = 4
"""Up to so many times as many as could go the last time are tried first."""


@dataclass(eq=False)
class Pruner:
    """Looks for a small circuit."""

    verifier: Verifier
    """Measures what a circuit keeps."""
    listeners: Listeners
    """Rank what is missed."""
    instead: Float[Tensor, "sender prompt d_model"]
    """What is heard where an edge is not kept."""
    rooted: tuple[int, ...]
    """Blocks in which the run itself makes heads write otherwise, whatever they hear."""
    goal: float
    """The share of the sink that is to be kept."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Sizes that were measured, and the share that each kept."""

    _most: int = 0
    """Up to how many are tried to be done without at first."""
    _far: float = 0.0
    """How far the last set that was measured is from the sink."""

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.verifier.graph

    def prune(self, ranking: Sequence[int]) -> list[int]:
        """Numbers of the edges that are kept, of those in ``ranking`` (the most important first)."""
        kept = self._reduced(self._beginning(list(ranking)))
        self._most = len(kept)
        while len(kept) > 1:
            tried = (self._fewer(kept, order) for order in self._orders(kept))
            fewer = next((found for found in tried if found is not None), None)
            if fewer is None:
                break
            kept = fewer
        return sorted(kept)

    def _fewer(self, kept: list[int], order: Sequence[int]) -> list[int] | None:
        """What is left without the first so many of an order: as many as may go."""
        least = {1} if len(kept) <= MANY else set()  # of many, one by one would take for ever
        sizes = sorted({max(1, int(part * len(kept))) for part in PARTS} | least, reverse=True)
        # Where few could go, many more seldom can: these are tried when nothing else is left.
        for size in sorted(sizes, key=lambda size: size > self._most):
            fewer = self._reduced([e for e in kept if e not in set(order[:size])])
            self._far = abs(self._shares([fewer])[0] - 1)
            if self._far <= 1 - self.goal:
                self._most = GROWTH * size
                return fewer
        return None

    def _beginning(self, ranking: list[int]) -> list[int]:
        """The shortest beginning of the list, to within a few, that keeps the share."""
        n = len(ranking)
        low, high = 0, min(FIRST, n)
        while (share := self._shares([ranking[:high]])[0]) < self.goal:
            if high == n:
                raise NotApplicableError(
                    f"all {n} edges together keep {share:.2f} of the sink and not {self.goal}: ask for a smaller share"
                )
            low, high = high, min(2 * high, n)
        while high - low > max(2, high // 8):
            middle = (low + high) // 2
            if self._shares([ranking[:middle]])[0] >= self.goal:
                high = middle
            else:
                low = middle
        return ranking[:high]

    def _shares(self, kept: Sequence[Sequence[int]]) -> list[float]:
        found = self.verifier.shares(self.masks(kept), self.instead, "pruning")
        shares = [float(np.nanmean(row)) for row in found]
        self.curve += [(len(edges), share) for edges, share in zip(kept, shares, strict=True)]
        return shares

    def masks(self, kept: Sequence[Sequence[int]]) -> Bool[Tensor, "circuit edge"]:
        """Sets of edges as the verifier takes them."""
        masks = torch.zeros(len(kept), len(self.graph.edges), dtype=torch.bool)
        for row, edges in zip(masks, kept, strict=True):
            row[torch.tensor(list(edges), dtype=torch.long)] = True
        return masks

    def _orders(self, kept: list[int]) -> Iterator[list[int]]:
        """The kept edges, those first that might go; another order where the ones before it led to nothing.

        By how much attention an edge's going moves (mean over prompts), and by how near to the sink's own it leaves it:
        this first where the set makes nearly too much or too little of it. Then by what is left without each, measured.
        Of many by the slope of attention in how much of each is heard, averaged on the way to all: one pass for all.
        """
        if len(kept) > MANY:
            yield self._by_slope(kept)
            return
        without = [[e for e in kept if e != gone] for gone in kept]
        left, whole = self._attention(without), self._attention([kept])
        near = self._far <= (1 - self.goal) / 2
        for like in (whole, self._sink) if near else (self._sink, whole):
            yield [kept[i] for i in (left - like).abs().mean(1).argsort().tolist()]
        far = np.abs(np.array(self._shares([self._reduced(edges) for edges in without])) - 1)
        if far.min() <= 1 - self.goal:
            yield [kept[i] for i in far.argsort(kind="stable").tolist()]

    def _attention(self, kept: Sequence[Sequence[int]]) -> Float[Tensor, "circuit prompt"]:
        """What later tokens give the target, their queries held."""
        tokens = self.verifier.tokens(self.masks(kept), self.instead)
        return torch.cat([self.listeners.attention(token).view(-1, self.verifier.n_prompts) for token in tokens])

    @cached_property
    def _sink(self) -> Float[Tensor, "circuit prompt"]:
        return self._attention([range(len(self.graph.edges))])

    def _by_slope(self, kept: list[int]) -> list[int]:
        whole, prompts = self.verifier.rewiring.keep(self.masks([kept]))
        slopes = torch.zeros(whole.shape[1], device=whole.device)
        for part in PARTWAY:
            with torch.enable_grad():
                keep = (whole * part).requires_grad_()
                token = self.verifier.rewiring(Wiring(keep, self.instead, prompts))
                (slope,) = torch.autograd.grad(self.listeners.attention(token).sum(), keep)
            slopes += slope.abs().sum(0)
        mine = slopes[torch.tensor(kept, device=slopes.device)]
        return [kept[i] for i in mine.argsort().tolist()]

    def _reduced(self, kept: list[int]) -> list[int]:
        """Without edges that lead nowhere, and those of senders that write the same in both runs."""
        edges = self.graph.edges
        while True:
            speaking = {edges[e].sender for e in kept}
            hearing = {edges[e].receiver for e in kept}
            left = [e for e in kept if _leads_on(edges[e], speaking) and self._differs(edges[e].sender, hearing)]
            if len(left) == len(kept):
                return kept
            kept = left

    def _differs(self, node: Node, hearing: set[Node]) -> bool:
        """Whether a sender writes something else than in the other run, with such receivers in the circuit."""
        if node.kind == "embed":
            return self.verifier.measure.setting.pair.is_natural
        if node.kind != "head":
            return node in hearing
        shared = self.graph.kv(node.block, node.index * self.graph.shape.n_kv_heads // self.graph.shape.n_heads)
        return node.block in self.rooted or node in hearing or shared in hearing


def _leads_on(edge: Edge, speaking: set[Node]) -> bool:
    """Whether anything hears the receiver: keys and values are always heard by later tokens."""
    return edge.branch in ("k", "v") or edge.receiver in speaking
