"""From all edges to the fewest that keep a stated share of the sink.

1. Edges are ranked by an estimate, and the shortest beginning of that list is sought that keeps the share.
2. Edges that lead nowhere, or from where nothing differs, go: they change nothing.
3. Of the rest those go that are missed least, as many at a time as the share allows, until none can go (of more than
   150 not even a hundredth of them).

A set keeps a share of 0.9 if between 0.9 and 1.1 of the sink is left: one that makes more of it has lost what held it
back, and is no more faithful than one that makes less. Whether a set of edges keeps the share is measured by the
engine at every step; how much an edge is missed within the set is ranked with the later tokens held
(:mod:`sinklens.circuits.direct`). The last set cannot lose the one edge that ranks lowest; that no smaller set would do
is not shown (finding it takes all subsets).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
PARTS = (0.6, 0.4, 0.25, 0.15, 0.06, 0.01)
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

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.verifier.graph

    def prune(self, ranking: Sequence[int]) -> list[int]:
        """Numbers of the edges that are kept, of those in ``ranking`` (the most important first)."""
        kept = self._reduced(self._beginning(list(ranking)))
        gone = len(kept)
        while len(kept) > 1:
            order = self._least_missed(kept)
            least = {1} if len(kept) <= MANY else set()  # of many, one by one would take for ever
            sizes = sorted({max(1, int(part * len(kept))) for part in PARTS} | least, reverse=True)
            # Where few could go, many more seldom can: these are tried when nothing else is left.
            sizes = sorted(sizes, key=lambda size, most=GROWTH * gone: size > most)
            for gone in sizes:
                tried = self._reduced([e for e in kept if e not in set(order[:gone])])
                if self.goal <= self._shares([tried])[0] <= 2 - self.goal:
                    break
            else:
                break
            kept = tried
        return sorted(kept)

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

    def _least_missed(self, kept: list[int]) -> list[int]:
        """The kept edges, the least missed first: by how much attention their going moves, mean over prompts.

        Of many by its slope in how much of each is heard, averaged on the way to all of it: one pass for all.
        """
        if len(kept) > MANY:
            return self._by_slope(kept)
        without = [[e for e in kept if e != gone] for gone in kept]
        found = [
            self.listeners.attention(token).view(-1, self.verifier.n_prompts)
            for token in self.verifier.tokens(self.masks(without), self.instead)
        ]
        left = torch.cat(found)
        (whole,) = self.verifier.tokens(self.masks([kept]), self.instead)
        moved = (left - self.listeners.attention(whole)).abs().mean(1)
        return [kept[i] for i in moved.argsort().tolist()]

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
