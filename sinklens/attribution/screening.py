"""Screening: estimate all patches, verify the largest, and judge the estimate on a random sample.

Exact values of the patches that look largest say nothing about those that were passed over. So some more are drawn at
random from all, and the rank correlation between estimate and exact value is that of this sample alone. What is large
in the sample and was not among the top is a hint at what was missed elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from sinklens.attribution.estimation import estimate, grad_drop
from sinklens.engine.run import Progress, run_patches
from sinklens.errors import InputError
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model
from sinklens.patches import CLEAN, Patch, Runs
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
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


@dataclass(frozen=True, eq=False)
class Screen:
    """Estimates of all patches, and exact values of those that were run. Changes are ``M_patched - M_run``."""

    readout: str
    """What was read."""
    estimates: Float[Tensor, "patch prompt"]
    """Estimated changes, on the CPU."""
    exact: Float[Tensor, "run_patch prompt"]
    """Exact changes of the patches in :attr:`verified`, on the CPU."""
    chosen: Chosen
    """Which were run, and why."""
    spearman: Estimate
    """Rank correlation of estimate and exact change, means over prompts, on the random sample; intervals are
    bootstraps over its patches."""
    spearman_size: Estimate
    """The same of their absolute values: whether what looks large is large, which is what screening rests on."""
    kendall: Estimate
    """Kendall's tau-b of estimate and exact change on the random sample."""

    @property
    def verified(self) -> Int[Tensor, " run_patch"]:
        """The patches that were run, ascending."""
        return self.chosen.verified

    @property
    def top(self) -> Int[Tensor, " top"]:
        """Those with the largest absolute mean estimate, the largest first."""
        return self.chosen.top

    @property
    def sample(self) -> Int[Tensor, " sample"]:
        """Those that were drawn at random from all patches, ascending."""
        return self.chosen.sample

    def exact_mean(self, patches: Int[Tensor, " patch"]) -> Float[Tensor, " patch"]:
        """Mean exact change over prompts of patches that were run."""
        return self.exact[torch.searchsorted(self.verified, patches)].mean(-1)

    @property
    def largest_missed(self) -> float:
        """The largest absolute mean exact change in the sample that is not among the top; NaN when all of it is."""
        missed = self.sample[~torch.isin(self.sample, self.top)]
        return float(self.exact_mean(missed).abs().max()) if len(missed) else np.nan

    def table(self, *, everything: bool = True) -> pd.DataFrame:
        """One row for each patch and prompt: ``patch, prompt, estimate, exact, kind, sampled``.

        ``exact`` is NaN where the patch was not run; ``kind`` is ``top``, ``sample`` or ``estimate`` (not run), and
        ``sampled`` also marks those of the top that were drawn. ``everything=False`` leaves out what was not run.
        """
        patches = torch.arange(len(self.estimates)) if everything else self.verified
        n_prompts = self.estimates.shape[1]
        exact = torch.full((len(self.estimates), n_prompts), torch.nan, dtype=torch.float64)
        exact[self.verified] = self.exact
        kinds = np.repeat(self.chosen.kinds(patches), n_prompts)
        return pd.DataFrame(
            {
                "patch": patches.repeat_interleave(n_prompts).numpy(),
                "prompt": np.tile(np.arange(n_prompts), len(patches)),
                "estimate": self.estimates[patches].flatten().numpy(),
                "exact": exact[patches].flatten().numpy(),
                "kind": pd.Categorical.from_codes(kinds, categories=KINDS),
                "sampled": np.repeat(self.chosen.sampled(patches), n_prompts),
            }
        )


@in_usual_state
def screen(
    model: Model,
    prompts: PromptBatch | Int[Tensor, "prompt pos"],
    patches: Sequence[Patch],
    readout: Readout,
    *,
    runs: Runs = CLEAN,
    top: int = 200,
    sample: int = 200,
    seed: int = 0,
    qk_fix: bool = True,
    drop_blocks: bool = False,
    memory_budget: int | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> Screen:
    """Estimate all patches, then run the ``top`` that look largest and ``sample`` drawn at random.

    Args:
        model: as in :func:`sinklens.attribution.estimate`.
        prompts: equal-length prompts.
        patches: any sequence, also one that builds its patches when they are asked for.
        readout: what to measure.
        runs: root patches of every run.
        top: patches to verify: those whose mean estimate over prompts is largest in absolute value.
        sample: patches to draw from all, whatever their estimate.
        seed: draws the sample and the bootstrap.
        qk_fix: as in :func:`sinklens.attribution.estimate`.
        drop_blocks: choose the top by the sizes of :func:`sinklens.attribution.grad_drop`, in place of the estimates'.
        memory_budget: bytes that one pass's activations may take.
        max_rows: rows for one pass, in place of the memory budget.
        progress: of the exact runs, called with (rows done, rows in all).

    Raises:
        InputError: a number of patches that is not positive, or what :func:`sinklens.attribution.estimate` refuses.
        EngineError: what it, or :func:`sinklens.run_patches`, cannot trust.
    """
    if top < 1 or sample < 3:
        raise InputError("top must be at least 1, and the random sample at least 3")
    options: dict[str, Any] = {"runs": runs, "memory_budget": memory_budget, "max_rows": max_rows}
    found = estimate(model, prompts, patches, [readout], qk_fix=qk_fix, **options)
    estimates = sizes = found.changes[readout.name].cpu()
    if drop_blocks:
        sizes = grad_drop(model, prompts, patches, [readout], qk_fix=qk_fix, **options).changes[readout.name].cpu()
    chosen = choose(sizes, top, sample, seed)
    # A patch that changes nothing is a change of 0 here, as it is in the estimate.
    verified = [replace(patches[index], allow_unchanged=True) for index in chosen.verified.tolist()]
    result = run_patches(model, prompts, verified, [readout], progress=progress, **options)
    exact = result.values[readout.name] - torch.stack([result.runs[patch.run][readout.name] for patch in verified])
    return compare(readout.name, estimates, exact, chosen=chosen, seed=seed)


def choose(estimates: Float[Tensor, "patch prompt"], top: int, sample: int, seed: int) -> Chosen:
    """The patches that look largest, and as many as asked for at random."""
    size = estimates.mean(-1).abs()
    largest = torch.argsort(size, descending=True, stable=True)[:top]
    drawn = np.random.default_rng(seed).choice(len(estimates), min(sample, len(estimates)), replace=False)
    return Chosen(largest, torch.from_numpy(np.sort(drawn)))


def compare(
    readout: str,
    estimates: Float[Tensor, "patch prompt"],
    exact: Float[Tensor, "run_patch prompt"],
    *,
    chosen: Chosen,
    seed: int,
) -> Screen:
    """Judge estimates by exact changes, on the random sample."""
    x = estimates[chosen.sample].mean(-1).numpy()
    y = exact[torch.searchsorted(chosen.verified, chosen.sample)].mean(-1).numpy()
    return Screen(readout=readout, estimates=estimates, exact=exact, chosen=chosen, **rank_correlations(x, y, seed))


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
