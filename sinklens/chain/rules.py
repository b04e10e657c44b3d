"""A verdict has parts: does a *quantity* behave as stated, and is it the *cause*? Each is judged by a stated rule.

A rule is a list of conditions, each on an estimate's whole 95% interval: *met* when it lies beyond the threshold,
*missed* when it lies short of it, *open* when it reaches over it. A part holds when all are met, does not hold when
one is missed, and is undecided otherwise: another sample of prompts could then say something else.

Power: an interval of half-width ``w`` clears a threshold when the value is more than ``w`` beyond it, so ``w =
(high - low) / 2`` is the smallest effect (distance from the threshold) that a run of this size could have seen.
Against a permutation null it is the distance from the null's mean to the end of 95% of its draws. What a run cannot
have seen it does not deny: a wide interval is open, and a null wider than the effect that is looked for is too.

The words of several parts together: *holds*, *holds in part* (some hold), *does not hold*, *not measurable* (none
could be), and *undecided* where the undecided parts would decide which of these it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, TypeAlias

import numpy as np
from scipy import stats

from sinklens.records.text import join
from sinklens.statistics import N_RESAMPLES, Estimate

About = Literal["quantity", "cause"]
"""What a part is about."""
PartAnswer = Literal["holds", "does not hold", "undecided", "not measurable"]
"""What can be said of a part."""
Answer = Literal["holds", "holds in part", "does not hold", "undecided", "not measurable"]
"""What can be said of a claim."""
Limit: TypeAlias = float | Estimate
"""A threshold: a number, or the interval of a control."""
Z_95 = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class Condition:
    """One condition of a rule."""

    answer: Literal["met", "missed", "open"]
    """Whether the whole interval lies beyond the threshold, short of it, or neither."""
    p: float = math.nan
    """One-sided p-value of its being met; NaN where there is none."""
    smallest: float = math.nan
    """The smallest distance from the threshold that could have been seen (see the module's docstring)."""
    why: str = "an interval reaches over its threshold: more prompts would tell"
    """Why it is open, where it is."""


def above(estimate: Estimate, limit: Limit, *, least: float = 0.0) -> Condition:
    """The interval lies above ``limit``, or above the whole interval of a control.

    Args:
        estimate: what was measured.
        limit: the threshold, or the control.
        least: it is missed where the whole interval lies less than this above the threshold: what is smaller would
            not matter. With 0 it is missed where the interval lies below.
    """
    beyond = limit if isinstance(limit, Estimate) else Estimate(limit, limit, limit)
    ends = (estimate.low, estimate.high, beyond.low, beyond.high)
    if not all(math.isfinite(end) for end in ends):
        return Condition("open", why="there is no interval of a single prompt")
    answer = "open"
    if estimate.low > beyond.high:
        answer = "met"
    elif estimate.high <= beyond.low + least:
        answer = "missed"
    widths = [(estimate.high - estimate.low) / 2, (beyond.high - beyond.low) / 2]
    return Condition(answer, _p_of_interval(estimate.value - beyond.value, widths), sum(widths))


def below(estimate: Estimate, limit: Limit, *, least: float = 0.0) -> Condition:
    """The interval lies below ``limit``, as in :func:`above`."""
    return above(_negative(estimate), _negative(limit) if isinstance(limit, Estimate) else -limit, least=least)


def within(estimate: Estimate, limit: float) -> tuple[Condition, Condition]:
    """The interval lies between ``-limit`` and ``limit``."""
    return above(estimate, -limit), below(estimate, limit)


def rare(
    estimate: Estimate,
    null: Estimate,
    p_value: float,
    *,
    sought: float,
    alternative: Literal["greater", "less"] = "greater",
) -> Condition:
    """The value is rare under a permutation null, with p < 0.05.

    It is missed where the null could have shown an effect of the size ``sought`` (a distance from the null's mean), and
    the whole interval of the value lies short of that; else it is open: the run had no power, or its value is large and
    might be chance.
    """
    sign = 1 if alternative == "greater" else -1
    half = (null.high - null.low) / 2
    farthest = sign * ((estimate.high if sign > 0 else estimate.low) - null.value)
    if not math.isfinite(farthest):
        farthest = sign * (estimate.value - null.value)  # the same for every prompt, such as weights
    answer = "open"
    if p_value < 0.05:
        answer = "met"
    elif half < sought and farthest < sought:
        answer = "missed"
    why = "it cannot be told from chance: too little was permuted, or the value lies in between"
    return Condition(answer, p_value, half, why)


def of_bool(met: bool) -> Condition:
    """A condition on what is the same for all prompts, and has no interval."""
    return Condition("met" if met else "missed")


def _negative(estimate: Estimate) -> Estimate:
    return replace(estimate, value=-estimate.value, low=-estimate.high, high=-estimate.low)


def _p_of_interval(distance: float, widths: Sequence[float]) -> float:
    """One-sided, from 95% intervals by the normal approximation; never below what a bootstrap could tell."""
    half, least = math.hypot(*widths), 1 / (N_RESAMPLES + 1)
    if half == 0:
        return least if distance > 0 else 1.0
    return float(np.clip(stats.norm.sf(distance / half * Z_95), least, 1.0))


@dataclass(frozen=True)
class Part:
    """One part of a verdict."""

    about: About
    """A quantity, or a cause."""
    name: str
    """Short name, unique in its verdict."""
    sentence: str
    """The sentence of the claim that it judges."""
    outcome: PartAnswer
    """What the rule says."""
    statistic: str = ""
    """What was measured, in words, with its unit."""
    estimate: Estimate | None = None
    """Its value and 95% interval."""
    control: str = ""
    """What it is compared with."""
    control_estimate: Estimate | None = None
    """Its value and 95% interval; for a null the mean and the range of 95% of its draws."""
    rule: str = ""
    """When the part counts as holding, stated before the number."""
    p_value: float | None = None
    """Largest of the conditions' one-sided p-values: an intersection-union test of the whole rule. Against a null they
    are permutations', else from the intervals by the normal approximation; None where there are none."""
    smallest: float | None = None
    """The smallest effect, as a distance from the threshold, that this run could have seen."""
    detail: str = ""
    """What else to know beside the value: median and share of prompts, say."""
    reason: str = ""
    """Why it is not measurable, or undecided; empty otherwise."""


def judge(
    about: About,
    name: str,
    sentence: str,
    *,
    statistic: str,
    estimate: Estimate,
    rule: str,
    conditions: Sequence[Condition],
    control: str = "",
    control_estimate: Estimate | None = None,
    detail: str = "",
) -> Part:
    """A part by its rule; one whose value is NaN is not measurable."""
    outcome, reason = judged(conditions), ""
    if not math.isfinite(estimate.value):
        outcome, reason = "not measurable", "the statistic has no finite value on these prompts"
    elif outcome == "undecided":
        reason = next(condition.why for condition in conditions if condition.answer == "open")
    ps = [condition.p for condition in conditions if math.isfinite(condition.p)]
    seen = [condition.smallest for condition in conditions if math.isfinite(condition.smallest)]
    return Part(
        about,
        name,
        sentence,
        outcome,
        statistic,
        estimate,
        control,
        control_estimate,
        rule,
        p_value=max(ps, default=None),
        smallest=next(iter(seen), None),
        detail=detail,
        reason=reason,
    )


def unmeasured(about: About, name: str, sentence: str, reason: str) -> Part:
    """A part that could not be measured, and why."""
    return Part(about, name, sentence, "not measurable", reason=reason)


def judged(conditions: Sequence[Condition]) -> PartAnswer:
    """What conditions say that must all be met."""
    answers = [condition.answer for condition in conditions]
    if "missed" in answers:
        return "does not hold"
    return "holds" if answers and "open" not in answers else "undecided"


def together(outcomes: Sequence[PartAnswer]) -> Answer:
    """What parts say together: the word that stays whichever way the undecided ones turn out, else *undecided*."""
    measured = [outcome for outcome in outcomes if outcome != "not measurable"]
    if not measured:
        return "not measurable"
    unknown = len(measured) != len(outcomes)
    ways = [("holds", "does not hold") if outcome == "undecided" else (outcome,) for outcome in measured]
    words: set[Answer] = {_of_known(way, unknown) for way in product(*ways)}
    return words.pop() if len(words) == 1 else "undecided"


def _of_known(outcomes: Sequence[str], unknown: bool) -> Answer:
    if "holds" not in outcomes:
        return "does not hold"
    # A claim of which something could not be measured has not been seen to hold as a whole.
    return "holds in part" if unknown or "does not hold" in outcomes else "holds"


def which(parts: Sequence[Part]) -> str:
    """``attention holds; cause does not hold``: empty where there is one part."""
    if len(parts) < 2:
        return ""
    words = dict.fromkeys(part.outcome for part in parts)
    groups = {word: [part.name for part in parts if part.outcome == word] for word in words}
    return "; ".join(f"{join(names)}: {word}" for word, names in groups.items())
