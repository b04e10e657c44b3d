"""Estimates with intervals, and nulls: how sure a number is, and what it would be by chance.

Prompts are what is sampled, so intervals are bootstraps over prompts: of a mean when there is one number for each
prompt, and of any statistic of the prompts (a variance across them, say) by resampling which prompts it is computed
from. A permutation null says what a statistic would be if what it pairs up had nothing to do with one another.

Pitfall: a percentile interval of few prompts is too narrow. It is honest about the noise between prompts, and says
nothing about other models.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from sinklens.metrics import position_variance
from sinklens.records.text import number

N_RESAMPLES = 2000
"""Bootstrap resamples for the interval of a mean."""
N_REFITS = 400
"""Bootstrap resamples for a statistic that has to be computed anew for each."""

Values = Sequence[float] | np.ndarray | Tensor


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    """The estimate."""
    low: float = np.nan
    """Lower end; NaN when there is none."""
    high: float = np.nan
    """Upper end."""
    n: int = 1
    """How many prompts (or draws, for a null) it is made of."""

    def above(self, limit: float) -> bool:
        """Whether the whole interval lies above ``limit``; False where there is no interval."""
        return bool(self.low > limit)

    def below(self, limit: float) -> bool:
        """Whether the whole interval lies below ``limit``; False where there is no interval."""
        return bool(self.high < limit)


def bootstrap_interval(values: Values, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts (NaN with fewer than two values)."""
    values = _finite(values)
    if len(values) < 2:
        return np.nan, np.nan
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=N_RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def mean_estimate(values: Values, seed: int) -> Estimate:
    """Mean over prompts of one number for each, with its bootstrap interval; values that are not finite are left out
    and not counted.
    """
    finite = _finite(values)
    low, high = bootstrap_interval(finite, seed)
    return Estimate(float(finite.mean()) if len(finite) else np.nan, low, high, len(finite))


def two_way_interval(values: Float[np.ndarray, "draw prompt"], seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over draws and prompts, when both are resampled (NaN with one prompt).

    A draw that was made once is used on every prompt, so the two are crossed: each resample takes draws and prompts
    with repetitions, and the mean of what they have in common. Entries that are NaN have no say.
    """
    draws, prompts = values.shape
    if prompts < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    of_draws = rng.multinomial(draws, np.full(draws, 1 / draws), N_RESAMPLES)
    of_prompts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), N_RESAMPLES)
    known = np.isfinite(values)
    totals = np.einsum("sd,dp,sp->s", of_draws, np.where(known, values, 0.0), of_prompts, optimize=True)
    counts = np.einsum("sd,dp,sp->s", of_draws, known.astype(float), of_prompts, optimize=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = totals / counts
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: the chance of one wrong rejection among all stays below the level.

    The smallest of ``m`` is multiplied by ``m``, the next by ``m - 1``, and so on; none is below one before it, or
    above 1. One that is NaN stays NaN, and does not count.
    """
    adjusted = np.full(len(p_values), np.nan)
    order = [i for i in np.argsort(p_values) if np.isfinite(p_values[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted.tolist()


def bootstrap_estimate(
    statistic: Callable[[np.ndarray], Any],
    n_prompts: int,
    seed: int,
    n_resamples: int = N_REFITS,
    *,
    vectorized: bool = False,
    correlation: bool = False,
) -> Estimate:
    """A statistic of all prompts, with the interval that it has when the prompts are drawn again.

    Args:
        statistic: takes prompt indices (an integer array, with repetitions) and gives the number for these prompts.
        n_prompts: how many prompts there are.
        seed: fixes the draws.
        n_resamples: how often it is computed anew.
        vectorized: the statistic takes all draws at once, ``[draw, prompt]``, and gives one number for each: for what
            is cheaper so.
        correlation: the statistic is a correlation of what is measured over prompts. A draw holds some prompts several
            times over, so it is noisier than the prompts themselves, and its correlation nearer to 0: the draws are
            shifted, on Fisher's scale, so that their median is the value.
    """
    everyone = np.arange(n_prompts)
    value = float(statistic(everyone[None])[0] if vectorized else statistic(everyone))
    if n_prompts < 2:
        return Estimate(value, n=n_prompts)
    drawn = np.random.default_rng(seed).integers(n_prompts, size=(n_resamples, n_prompts))
    found = np.asarray(statistic(drawn) if vectorized else [statistic(one) for one in drawn], dtype=float)
    if not np.isfinite(found).any():
        return Estimate(value, n=n_prompts)
    if correlation:
        scaled = np.arctanh(np.clip(found, -1 + 1e-6, 1 - 1e-6))
        found = np.tanh(scaled - np.nanmedian(scaled) + np.arctanh(np.clip(value, -1 + 1e-6, 1 - 1e-6)))
    # A draw can be without a value (a variance of one prompt drawn n times over): it has no say in the interval.
    low, high = np.nanquantile(found, [0.025, 0.975])
    return Estimate(value, float(low), float(high), n_prompts)


def resampled_variance(
    x: Float[Tensor, "prompt pos *unit d"], average: Literal["mean", "median"] = "mean"
) -> Callable[[Int[np.ndarray, " draw"]], Float[Tensor, " pos"]]:
    """``metrics.position_variance(x[drawn], average)`` as a function of the prompts drawn, for bootstraps.

    A variance is half the mean squared difference between two prompts, so for the mean over dimensions the differences
    of all pairs are computed once, and a draw only picks among them. For the median everything is computed anew.
    """
    if average != "mean" or len(x) < 2:
        position_variance(x, average)  # refuses what cannot be computed before the first draw
        return lambda drawn: position_variance(x[torch.as_tensor(drawn, device=x.device)], average).cpu()
    wide = (x.float() - x.float().mean(0)).double().flatten(2).movedim(1, 0)
    inner = wide @ wide.mT
    square = inner.diagonal(dim1=-2, dim2=-1)
    difference = ((square[:, :, None] + square[:, None] - 2 * inner) / wide.shape[-1]).cpu()  # [pos, prompt, prompt]

    def variance(drawn: Int[np.ndarray, " draw"]) -> Float[Tensor, " pos"]:
        times = torch.bincount(torch.as_tensor(drawn, device="cpu"), minlength=len(x)).double()
        return (difference @ times @ times / (2 * len(drawn) * (len(drawn) - 1))).float()

    return variance


def resampled_curves(
    values: Iterable[Float[Tensor, "prompt pos *unit d"]], average: Literal["mean", "median"] = "mean"
) -> Callable[[Int[np.ndarray, " draw"]], Float[Tensor, "block pos"]]:
    """:func:`resampled_variance` of every block's activations, as one function of the prompts drawn."""
    blocks = [resampled_variance(x, average) for x in values]
    return lambda drawn: torch.stack([variance(drawn) for variance in blocks])


def random_orders(shape: Sequence[int], rng: torch.Generator) -> Int[Tensor, "*shape"]:
    """Random orders of ``shape[-1]`` things, one for every entry of the other axes: for permutation nulls."""
    return torch.rand(*shape, generator=rng, dtype=torch.float32, device="cpu").argsort(-1)


def null_estimate(draws: Values) -> Estimate:
    """Mean of a statistic's draws under a null, with the range that holds 95% of them."""
    finite = _finite(draws)
    if not len(finite):
        return Estimate(np.nan, n=0)
    low, high = np.quantile(finite, [0.025, 0.975])
    return Estimate(float(finite.mean()), float(low), float(high), len(finite))


def permutation_p(observed: float, draws: Values, alternative: str = "greater") -> float:
    """One-sided p-value of ``observed`` among a null's draws, itself counted (Phipson and Smyth 2010): never 0.

    Args:
        observed: the statistic.
        draws: the same under the null.
        alternative: ``greater`` or ``less``.
    """
    finite = _finite(draws)
    # A draw that ties with the statistic counts, also where float32 has rounded the two differently.
    rounding = 1e-6 * np.abs(np.append(finite, observed)).max()
    as_extreme = finite >= observed - rounding if alternative == "greater" else finite <= observed + rounding
    return float((1 + as_extreme.sum()) / (1 + len(finite)))


def generator(seed: int, name: str) -> torch.Generator:
    """A generator seeded by ``seed`` and by what it is for, so that no draw depends on which others were made."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def _finite(values: Values) -> np.ndarray:
    plain = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    array = np.asarray(plain, dtype=float).ravel()
    return array[np.isfinite(array)]


def estimate_text(estimate: Estimate) -> str:
    """``0.52 [0.48, 0.55], n = 16``."""
    text = number(estimate.value)
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        text += f" [{number(estimate.low)}, {number(estimate.high)}]"
    return f"{text}, n = {estimate.n}"
