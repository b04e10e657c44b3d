"""The tables ``tests`` and ``minimality``: what a circuit keeps, what is left without it, and its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.circuits.graph import Graph
from sinklens.circuits.measure import Effects, Measure
from sinklens.circuits.result import table
from sinklens.circuits.rewired import Rewiring
from sinklens.circuits.verify import ABLATIONS, Ablation, Verifier, instead_of
from sinklens.circuits.written import Written

TRANSPLANTED = "none"
"""In place of an ablation, where the circuit's edges hear something else in the run without the sink."""


@dataclass(eq=False)
class Tester:
    """Tests of one circuit."""

    measure: Measure
    """The metric."""
    verifier: Verifier
    """In the run with the sink."""
    kept: Sequence[int]
    """Numbers of the circuit's edges."""
    without: Written
    """What nodes write in the run without."""
    draws: int
    """Random sets of edges."""

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.verifier.graph

    def _mask(self, edges: Sequence[int]) -> Bool[Tensor, " edge"]:
        mask = torch.zeros(len(self.graph.edges), dtype=torch.bool)
        mask[torch.tensor(list(edges), dtype=torch.long)] = True
        return mask

    def frame(self, carried: tuple[Rewiring, Tensor, Tensor] | None) -> pd.DataFrame:
        """The table ``tests``.

        Args:
            carried: the token in the run without the sink, and what circuit edges hear there in place of it: of the run
                with the sink, and its control of other tokens. None where there is no such run.
        """
        records: list[dict[str, Any]] = []
        mine, n = self._mask(self.kept), len(self.kept)
        names = ("circuit", "complement", "all", "none")
        sets = torch.stack([mine, ~mine, torch.ones_like(mine), torch.zeros_like(mine)])
        for ablation in ABLATIONS:
            shares = self._shares(sets, ablation)
            records += [
                self._record(name, ablation, int(mask.sum()), share)
                for name, mask, share in zip(names, sets, shares[:, None], strict=True)
            ]
        records += self._random(n)
        return table("tests", records + ([] if carried is None else self._carried(mine, *carried)))

    def _shares(self, sets: Bool[Tensor, "circuit edge"], ablation: Ablation) -> Effects:
        instead = instead_of(ablation, self.without, self.measure.setting.study.seed)
        return self.verifier.shares(sets, instead, "tests")

    def _random(self, n: int) -> list[dict[str, Any]]:
        """As many edges drawn from all: these alone, and all but these."""
        drawn = self.measure.setting.study.generator("circuit/random edges")
        total = len(self.graph.edges)
        sets = torch.stack([self._mask(torch.randperm(total, generator=drawn)[:n].tolist()) for _ in range(self.draws)])
        only, but = self._shares(sets, "other run"), self._shares(~sets, "other run")
        return [
            self._record("random", "other run", n, only),
            self._record("all but random", "other run", total - n, but),
        ]

    def _carried(
        self, mine: Bool[Tensor, " edge"], base: Rewiring, real: Tensor, control: Tensor
    ) -> list[dict[str, Any]]:
        """In the run without the sink the circuit's edges hear that with it; and something else of the same size."""
        verifier = Verifier(self.measure, self.graph, base)
        # What super neurons write has few directions: a change of the same size in it is the sink itself. Their edges
        # stay live, so that it is asked whether the others make them fire.
        super_ = [edge.sender.kind == "super" for edge in self.graph.edges]
        mine = mine & ~torch.tensor(super_)
        records = []
        for name, instead in (("carried", real), ("other tokens", control)):
            share = verifier.shares(~mine[None], instead, "tests")
            records.append(self._record(name, TRANSPLANTED, int(mine.sum()), share))
        return records

    def _record(
        self, what: str, ablation: str, n_edges: int, shares: Float[np.ndarray, "draw prompt"]
    ) -> dict[str, Any]:
        """One row; several draws are averaged for each prompt, and drawn again for the interval."""
        study = self.measure.setting.study
        estimate = study.mean_of_draws(shares.T)
        there = np.isfinite(shares).any(0)
        return {
            "what": what,
            "ablation": ablation,
            "n_edges": n_edges,
            "draws": len(shares),
            "effect": estimate.value,
            "ci_low": estimate.low,
            "ci_high": estimate.high,
            "n": int(there.sum()),
            "n_excluded": int((~there).sum()),
        }

    def minimality(self) -> pd.DataFrame:
        """The table ``minimality``: what the circuit loses without each of its edges."""
        mine = self._mask(self.kept)
        sets = mine.repeat(len(self.kept) + 1, 1)
        for row, edge in enumerate(self.kept, start=1):
            sets[row, edge] = False
        shares = self.verifier.shares(sets, instead_of("other run", self.without, 0), "minimality")
        losses = shares[:1] - shares[1:]
        records = []
        for edge, mean in zip(self.kept, self.measure.means(losses), strict=True):
            named = self.graph.edges[edge]
            record = {"sender": named.sender.name, "receiver": named.receiver.name, "branch": named.branch}
            records.append({**record, **mean, "loss": mean["effect"]})
        return table("minimality", records)
