"""Estimates with intervals, and nulls: how sure a number is, and what it would be by chance.

Prompts are what is sampled, so intervals are bootstraps over prompts: of a mean when there is one number for each
prompt, and of any statistic of the prompts (a variance across them, say) by resampling which prompts it is computed
from. Where several prompts are passages of one text, whole texts are drawn (``groups``: a cluster bootstrap): passages
of a text are alike, and drawn one by one they would make the interval too narrow. Where something else was drawn too
(directions, neurons), and every prompt saw the same draws, prompts and draws are resampled both, independently of each
other (:func:`drawn_interval`: the pigeonhole bootstrap, Owen 2007). A permutation null says what a statistic would be
if what it pairs up had nothing to do with one another.

Pitfall: a percentile interval of few prompts is too narrow. It is honest about the noise between prompts, and says
nothing about other models.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from sinklens.errors import InputError
from sinklens.metrics import position_variance
from sinklens.records.text import number

N_RESAMPLES = 2000
"""Bootstrap resamples for the interval of a mean."""
N_REFITS = 400
"""Bootstrap resamples for a statistic that has to be computed anew for each."""

PROMPTS, DRAWS = "prompts", "draws"
"""What an interval is over, where that is nothing else."""

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
    """How many of ``over`` it is made of."""
    n_groups: int | None = None
    """How many texts these prompts are passages of, where several are of one; None where each is a text of its own."""
    over: str = PROMPTS
    """What ``n`` counts and the interval is over: prompts; draws, for a null; or whatever else was drawn again."""

    def above(self, limit: float) -> bool:
        """Whether the whole interval lies above ``limit``; False where there is no interval."""
        return bool(self.low > limit)

    def below(self, limit: float) -> bool:
        """Whether the whole interval lies below ``limit``; False where there is no interval."""
        return bool(self.high < limit)


def bootstrap_interval(
    values: Values, seed: int, level: float = 0.95, groups: Sequence[object] | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over prompts (NaN with fewer than two values, or texts).

    Args:
        values: one for each prompt; those that are not finite are left out.
        seed: fixes the draws.
        level: how much of the draws the interval holds.
        groups: for each value, the text that it is of; each a text of its own by default.
    """
    array = _flat(values)
    return _interval(array[:, None], seed, level, groups)


def drawn_interval(
    values: Float[np.ndarray, "prompt draw"], seed: int, level: float = 0.95, groups: Sequence[object] | None = None
) -> tuple[float, float]:
    """:func:`bootstrap_interval` of the mean over prompts of the mean over draws, both drawn again.

    The draws (of directions, neurons, heads, targets) are the same for all prompts: how much the mean depends on them
    does not shrink with the number of prompts. With one draw, or equal ones, the interval is that over prompts.

    Args:
        values: those that are not finite are left out.
        seed: fixes which prompts and which draws.
        level: how much of the draws the interval holds.
        groups: for each prompt, the text that it is of.
    """
    return _interval(np.asarray(values, dtype=float), seed, level, groups)


def _interval(
    values: Float[np.ndarray, "prompt draw"], seed: int, level: float, groups: Sequence[object] | None
) -> tuple[float, float]:
    there = np.isfinite(values).any(1)
    labels = None if groups is None else _checked(groups, len(values))[there]
    values = _filled(values[there])
    drawn = drawn_prompts(len(values), seed, N_RESAMPLES, labels)
    if drawn is None:
        return np.nan, np.nan
    if np.ptp(values) == 0:
        return float(values[0, 0]), float(values[0, 0])
    if values.shape[1] == 1 and n_groups_of(labels) is None:
        return _plain_interval(values[:, 0], seed, level)
    means = _resampled_means(values, drawn, seed)
    tails = (1 - level) / 2
    low, high = np.percentile(means, [100 * tails, 100 * (1 - tails)])
    return float(low), float(high)


def _plain_interval(values: Float[np.ndarray, " prompt"], seed: int, level: float) -> tuple[float, float]:
    """The same where only prompts are drawn, each a text of its own."""
    rng, method = np.random.default_rng(seed), "percentile"
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=N_RESAMPLES, confidence_level=level, method=method, rng=rng
    ).confidence_interval
    return float(found.low), float(found.high)


def _resampled_means(
    values: Float[np.ndarray, "prompt draw"], drawn: Sequence[np.ndarray], seed: int
) -> Float[np.ndarray, " resample"]:
    """The mean of every resample: over its prompts of the mean over its draws."""
    if values.shape[1] == 1:
        column = np.ascontiguousarray(values[:, 0])
        return np.concatenate([column[rows].mean(-1) for rows in drawn])
    n_draws, n_resamples = values.shape[1], sum(map(len, drawn))
    # Drawn apart from the prompts, so that these are the same however many draws there are.
    choice = np.random.default_rng([seed, 1]).integers(n_draws, size=(n_resamples, n_draws))
    times = (choice[:, :, None] == np.arange(n_draws)).mean(1)
    per_prompt = times @ values.T  # [resample, prompt]
    first, means = 0, []
    for rows in drawn:
        means.append(np.take_along_axis(per_prompt[first : first + len(rows)], rows, axis=1).mean(1))
        first += len(rows)
    return np.concatenate(means)


def _filled(values: Float[np.ndarray, "prompt draw"]) -> Float[np.ndarray, "prompt draw"]:
    """The values, and where a draw has none the mean of the prompt's others."""
    finite = np.isfinite(values)
    means = np.where(finite, values, 0.0).sum(1, keepdims=True) / finite.sum(1, keepdims=True)
    return np.where(finite, values, means)


def drawn_prompts(
    n_prompts: int, seed: int, n_resamples: int, groups: Sequence[object] | np.ndarray | None = None
) -> list[Int[np.ndarray, "resample prompt"]] | None:
    """Which prompts every resample holds, as arrays of equally long resamples; None with fewer than two texts.

    Args:
        n_prompts: how many prompts there are.
        seed: fixes the draws.
        n_resamples: how many resamples.
        groups: for each prompt, the text that it is of: so many texts are drawn as there are, with all their prompts.
    """
    rng = np.random.default_rng(seed)
    labels = None if groups is None else _checked(groups, n_prompts)
    n_groups = n_prompts if labels is None else len(set(labels.tolist()))
    if n_groups < 2:
        return None
    chosen = rng.integers(n_groups, size=(n_resamples, n_groups))
    if labels is None or n_groups == n_prompts:
        return [chosen]
    members: dict[object, list[int]] = {}
    for prompt, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(prompt)
    texts = [np.array(prompts) for prompts in members.values()]
    by_length: dict[int, list[np.ndarray]] = {}
    for choice in chosen:
        prompts = np.concatenate([texts[i] for i in choice])
        by_length.setdefault(len(prompts), []).append(prompts)
    return [np.stack(prompts) for prompts in by_length.values()]


def _checked(groups: Sequence[object] | np.ndarray, n: int) -> np.ndarray:
    """The groups as an array; raises InputError unless there is one for each of ``n`` prompts."""
    if len(groups) != n:
        raise InputError(f"groups name a text for {len(groups)} prompts, and there are {n}: give one for each")
    labels = np.empty(n, dtype=object)
    labels[:] = list(groups)
    return labels


def n_groups_of(groups: Sequence[object] | np.ndarray | None) -> int | None:
    """How many texts the prompts are passages of; None where each is a text of its own."""
    if groups is None:
        return None
    found = len(set(groups))
    return None if found == len(groups) else found


def mean_estimate(values: Values, seed: int, groups: Sequence[object] | None = None, over: str = PROMPTS) -> Estimate:
    """Mean over prompts of one number for each, with its bootstrap interval; values that are not finite are left out
    and not counted. ``groups`` are the texts that the prompts are of; ``over`` says what the numbers are of where that
    is not prompts.
    """
    array = _flat(values)
    there = np.isfinite(array)
    kept = None if groups is None else _checked(groups, len(array))[there]
    finite = array[there]
    low, high = bootstrap_interval(finite, seed, groups=None if kept is None else kept.tolist())
    return Estimate(float(finite.mean()) if len(finite) else np.nan, low, high, len(finite), n_groups_of(kept), over)


def drawn_estimate(
    values: Float[np.ndarray, "prompt draw"], seed: int, groups: Sequence[object] | None = None
) -> Estimate:
    """Mean over prompts of the mean over draws, with :func:`drawn_interval`; prompts without a value do not count."""
    array = np.asarray(values, dtype=float)
    there = np.isfinite(array).any(1)
    kept = None if groups is None else _checked(groups, len(array))[there].tolist()
    array = _filled(array[there])
    low, high = drawn_interval(array, seed, groups=kept)
    value = float(array.mean()) if len(array) else np.nan
    return Estimate(value, low, high, len(array), n_groups_of(kept))


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
    groups: Sequence[object] | None = None,
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
        groups: for each prompt, the text that it is of; resamples then hold whole texts, and are not equally long.
    """
    everyone = np.arange(n_prompts)
    value = float(statistic(everyone[None])[0] if vectorized else statistic(everyone))
    n_groups = n_groups_of(groups)
    drawn = drawn_prompts(n_prompts, seed, n_resamples, groups)
    if drawn is None:
        return Estimate(value, n=n_prompts, n_groups=n_groups)
    each = [statistic(rows) if vectorized else [statistic(one) for one in rows] for rows in drawn]
    found = np.concatenate([np.asarray(numbers, dtype=float) for numbers in each])
    if not np.isfinite(found).any():
        return Estimate(value, n=n_prompts, n_groups=n_groups)
    if correlation:
        scaled = np.arctanh(np.clip(found, -1 + 1e-6, 1 - 1e-6))
        found = np.tanh(scaled - np.nanmedian(scaled) + np.arctanh(np.clip(value, -1 + 1e-6, 1 - 1e-6)))
    # A draw can be without a value (a variance of one prompt drawn n times over): it has no say in the interval.
    low, high = np.nanquantile(found, [0.025, 0.975])
    return Estimate(value, float(low), float(high), n_prompts, n_groups)


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
        return Estimate(np.nan, n=0, over=DRAWS)
    low, high = np.quantile(finite, [0.025, 0.975])
    return Estimate(float(finite.mean()), float(low), float(high), len(finite), over=DRAWS)


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


def _flat(values: Values) -> np.ndarray:
    plain = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    return np.asarray(plain, dtype=float).ravel()


def _finite(values: Values) -> np.ndarray:
    array = _flat(values)
    return array[np.isfinite(array)]


def interval_text(estimate: Estimate) -> str:
    """``0.52 [0.48, 0.55]``, and over what the interval is where that is neither prompts nor a null's draws."""
    text = number(estimate.value)
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return text
    over = "" if estimate.over in (PROMPTS, DRAWS) else f" over {estimate.n} {estimate.over}"
    return f"{text} [{number(estimate.low)}, {number(estimate.high)}]{over}"


def estimate_text(estimate: Estimate) -> str:
    """``0.52 [0.48, 0.55], n = 16``, what these are where they are no prompts, and of how many texts where these are
    fewer.
    """
    value = interval_text(replace(estimate, over=PROMPTS))
    counted = "" if estimate.over == PROMPTS else f" {estimate.over}"
    texts = "" if estimate.n_groups is None else f" of {estimate.n_groups} texts"
    return f"{value}, n = {estimate.n}{counted}{texts}"
