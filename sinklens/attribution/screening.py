"""Screening: of many patches that were estimated, those to run exactly; and a judgement of the estimates.

Exact values of the patches that look largest say nothing about those that were passed over. So some more are drawn at
random from all, and the rank correlation between estimate and exact value is that of this sample alone. What is large
in the sample and was not among the top is a hint at what was missed elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from sinklens.statistics import Estimate, bootstrap_estimate

KINDS = ("estimate", "sample", "top")
"""What is known of a patch: its estimate alone; its exact value, because it was drawn, or because it looked large."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """The patches that are run exactly, of many that were estimated."""

    top: Int[Tensor, " top"]
    """Those with the largest absolute mean estimate, the largest first."""
    sample: Int[Tensor, " sample"]
    """Those that were drawn at random from all patches (some of the top may be among them), ascending."""

    @cached_property
    def verified(self) -> Int[Tensor, " run_patch"]:
        """All of them, ascending."""
        return torch.cat([self.top, self.sample]).unique()

    def kinds(self, patches: Int[Tensor, " patch"]) -> Int[np.ndarray, " patch"]:
        """What is known of each patch, as an index into :data:`KINDS`."""
        drawn, large = torch.isin(patches, self.sample), torch.isin(patches, self.top)
        return torch.where(large, 2, drawn.long()).numpy()

    def sampled(self, patches: Int[Tensor, " patch"]) -> Bool[np.ndarray, " patch"]:
        """Whether each patch was drawn, those of the top included."""
        return torch.isin(patches, self.sample).numpy()


def choose(estimates: Float[Tensor, "patch prompt"], top: int, sample: int, seed: int) -> Chosen:
    """The patches that look largest, and as many as asked for at random."""
    size = estimates.mean(-1).abs()
    largest = torch.argsort(size, descending=True, stable=True)[:top]
    drawn = np.random.default_rng(seed).choice(len(estimates), min(sample, len(estimates)), replace=False)
    return Chosen(largest, torch.from_numpy(np.sort(drawn)))


def rank_correlations(
    estimate: Float[np.ndarray, " patch"], exact: Float[np.ndarray, " patch"], seed: int
) -> dict[str, Estimate]:
    """``spearman``, ``spearman_size`` (of absolute values) and ``kendall``, with bootstraps over patches."""
    return {
        "spearman": _spearman(estimate, exact, seed),
        "spearman_size": _spearman(abs(estimate), abs(exact), seed),
        "kendall": bootstrap_estimate(
            lambda drawn: np.asarray(stats.kendalltau(estimate[drawn], exact[drawn]))[0],
            len(exact),
            seed,
            correlation=True,
        ),
    }


def _spearman(x: Float[np.ndarray, " patch"], y: Float[np.ndarray, " patch"], seed: int) -> Estimate:
    """Spearman's correlation with its bootstrap interval; NaN where one side does not vary."""

    def statistic(drawn: Int[np.ndarray, " draw"]) -> float:
        first, second = stats.rankdata(x[drawn]), stats.rankdata(y[drawn])
        if np.ptp(first) == 0 or np.ptp(second) == 0:
            return np.nan
        return float(np.corrcoef(first, second)[0, 1])

    return bootstrap_estimate(statistic, len(x), seed, correlation=True)
