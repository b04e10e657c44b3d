"""How much of the sink a set of edges keeps: in the run with the sink, all other edges hear something else.

*Faithfulness* is the share that is left when only the circuit's edges hear the run with the sink, *completeness* what
is left when all but these do (a complete circuit leaves nothing), an edge's *minimality* what the circuit loses without
it.
What the others hear instead is a choice, and the answers depend on it, so all are shown:

* ``other run``: what the sender writes in the run without the sink,
* ``mean``: the mean over prompts of that,
* ``resample``: the same of another prompt,
* ``zero``: nothing, which no run has.

With no edge and ``other run`` the token is exactly that of the run without the sink, with all that of the run with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.circuits.graph import Graph
from sinklens.circuits.measure import Effects, Measure
from sinklens.circuits.paths import together
from sinklens.circuits.rewired import Rewiring, Token, Wiring
from sinklens.circuits.written import Written
from sinklens.edits import PerPrompt
from sinklens.patches import Patch
from sinklens.sites import HookSite, K, V
from sinklens.statistics import generator

Ablation: TypeAlias = Literal["other run", "mean", "resample", "zero"]
"""What edges that are not of a circuit hear."""
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)
BUDGET = 1 << 28
"""Bytes that the token of all rows of a pass may take."""
UNMOVED = 1e-5
"""Relative change of a key or value that is rounding: before the first change, rows need not be run."""


def instead_of(ablation: Ablation, without: Written, seed: int) -> Float[Tensor, "sender prompt d_model"]:
    """What each sender is heard to write where an edge is not kept."""
    nodes = without.nodes
    if ablation == "other run":
        return nodes
    if ablation == "zero":
        return torch.zeros_like(nodes)
    if ablation == "mean":
        return nodes.mean(1, keepdim=True).expand_as(nodes)
    n = nodes.shape[1]
    # A shift by at least one: no prompt is given its own.
    shift = 1 + int(torch.randint(max(n - 1, 1), (1,), generator=generator(seed, "circuit/resample")))
    return nodes.roll(shift, 1)


class Verifier:
    """The share of the sink that circuits keep, measured by the engine."""

    def __init__(self, measure: Measure, graph: Graph, rewiring: Rewiring) -> None:
        self.measure, self.graph, self.rewiring = measure, graph, rewiring
        self.n_prompts = measure.setting.batch.n
        with torch.no_grad():
            self._whole = self._token(torch.ones(1, len(graph.edges), dtype=torch.bool), self._nothing)

    @property
    def _nothing(self) -> Float[Tensor, "sender prompt d_model"]:
        size = (len(self.graph.senders), self.n_prompts, self.graph.shape.d_model)
        return torch.zeros(size, device=self.rewiring.device)

    def tokens(
        self, kept: Bool[Tensor, "circuit edge"], instead: Float[Tensor, "sender prompt d_model"]
    ) -> list[Token]:
        """The token of some circuits, as many at a time as fit."""
        bytes_each = 16 * self.n_prompts * len(self.graph.senders) * self.graph.shape.d_model
        at_once = max(1, (self.measure.setting.study.memory_budget or BUDGET) // bytes_each)
        with torch.no_grad():
            return [self._token(part, instead) for part in kept.split(at_once)]

    def _token(self, kept: Tensor, instead: Tensor) -> Token:
        keep, prompts = self.rewiring.keep(kept)
        token = self.rewiring(Wiring(keep, instead, prompts))
        token.heard.clear()
        return token

    def shares(
        self, kept: Bool[Tensor, "circuit edge"], instead: Float[Tensor, "sender prompt d_model"], what: str
    ) -> Effects:
        """The share of the sink that each circuit keeps, ``[circuit, prompt]``."""
        patches = [patch for token in self.tokens(kept, instead) for patch in self.patches(token)]
        with_sink = self.measure.runs[self.rewiring.run]["sink"]
        values = np.tile(with_sink, (len(patches), 1))
        moved = [i for i, patch in enumerate(patches) if patch is not None]
        found = self.measure.values([patch for patch in patches if patch is not None], what)
        values[moved] = found
        return self.measure.as_shares(values)

    def patches(self, token: Token) -> list[Patch | None]:
        """For each circuit the patch that gives the later tokens its keys and values; None where none has moved."""
        k, v = (self._by_circuit(found) for found in (token.k, token.v))
        n_circuits = len(token.prompts) // self.n_prompts
        return [
            self._patch({b: x[i] for b, x in k.items()}, {b: x[i] for b, x in v.items()}) for i in range(n_circuits)
        ]

    def _by_circuit(self, found: dict[int, Tensor]) -> dict[int, Tensor]:
        return {block: x.view(-1, self.n_prompts, *x.shape[1:]) for block, x in found.items()}

    def _patch(self, k: dict[int, Tensor], v: dict[int, Tensor]) -> Patch | None:
        whole = self._whole
        moved = [b for b in k if _moves(k[b], whole.k[b]) or (b in v and _moves(v[b], whole.v[b]))]
        if not moved:
            return None
        # From the first change on the engine's own token is no longer the circuit's: it is told all.
        blocks = [block for block in k if block >= min(moved)]
        return together([self._part(K, blocks, k), *([self._part(V, blocks[:-1], v)] if blocks[:-1] else [])])

    def _part(self, site: HookSite, blocks: Sequence[int], values: dict[int, Tensor]) -> Patch:
        return Patch(
            site=site,
            layers=tuple(blocks),
            positions=self.measure.setting.pair.target,
            edit=PerPrompt("circuit", {block: values[block] for block in blocks}),
            run=self.rewiring.run,
            label="a circuit",
            allow_unchanged=True,
        )


def _moves(x: Tensor, own: Tensor) -> bool:
    return bool((x - own).abs().max() > UNMOVED * own.abs().max())
