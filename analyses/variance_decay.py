"""Does averaging take variance away: the variance of aggregated values across prompts, position by position.

    python analyses/variance_decay.py

Under a causal mask the first token attends to itself alone and every later one averages more values, so the variance of
``hook_z`` across prompts should fall with position, from an outlier at the first. Nothing in that depends on language,
so it must hold on random tokens as well. The control is the value before aggregation (``hook_v``): what that does with
position comes from the tokens, not from averaging.

Is it the variance that makes a sink? A sink is made at a token by letting it attend to itself alone, and of its
aggregated value only the deviation from the mean over prompts is exchanged between the two runs: it must do what the
whole value does, and the mean, which does not vary, nothing.

The question is about the position that averages nothing, so it is asked of the first, wherever the sink is. Pitfalls:
prompts that all begin with the same token (BOS) have no variance there, so that the ratio is 0 and the claim does not
hold; and after the first formation blocks the first token's values are all alike, so these are left out by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import gmean
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites, statistics

CLAIM = (
    "The variance of the aggregated value decays with position, and the first token is a high-variance outlier, for "
    "natural and random tokens alike."
)
LEAST_RATIO = 2.0  # round: twice an ordinary position's variance
LEAST_TOKENS = 4  # round: fewer have no order to speak of
SOUGHT = 0.3
"""A tau of this size must have been possible to see, for one that is not seen to speak against the claim."""
AGGREGATED, BEFORE = "aggregated", "not aggregated"
SITES = {AGGREGATED: sites.Z, BEFORE: sites.V}
RATIO, TAU = "variance of the first token over later ones", "Kendall's tau of variance with position"

Variance = Float[Tensor, "block pos"]


@dataclass(frozen=True, eq=False)
class Decay:
    """What variance does with position at one site, on one kind of prompts."""

    variance: Variance
    """Across all prompts."""
    ratio: sl.Estimate
    """Of the first position over the median of later ones."""
    tau: sl.Estimate
    """Kendall's tau of variance with later positions."""
    null: sl.Estimate
    """Of tau, with positions shuffled."""
    p_value: float
    """Of tau, against these."""


Decays = Mapping[str, Mapping[str, Decay]]
"""By kind of prompts and quantity."""


def run(
    study: sl.Study,
    *,
    layers: Annotated[tuple[int, ...], "blocks to look at; those up to the first formation blocks by default"] = (),
    average: Annotated[Literal["mean", "median"], "how the variances of all dimensions are brought together"] = "mean",
    permutations: Annotated[int, "draws of shuffled positions", sl.Between(1, 100_000)] = 2000,
    target: Annotated[int, "where a sink is made to ask for the cause; 0: the first of 10, 5, 20 that fits"] = 0,
) -> sl.Findings:
    sl.analysis.check_first_varies(study)
    blocks, rng = study.blocks(layers), study.generator("variance_decay/shuffled")
    shuffled = torch.rand(permutations, study.batch.length - 1, generator=rng)
    kinds = {"given prompts": study, "random tokens": study.random}
    seen = {
        source: {quantity: here.activations(site, blocks) for quantity, site in SITES.items()}
        for source, here in kinds.items()
    }

    def decays_over(shuffled: Float[Tensor, "draw pos"]) -> Decays:
        """What variance does over as many later positions as are shuffled."""
        return {
            source: {quantity: decay(here, seen[source][quantity], average, shuffled) for quantity in SITES}
            for source, here in kinds.items()
        }

    decays, half = decays_over(shuffled), study.batch.length // 2
    outlier = outlier_of(decays)
    if half >= LEAST_TOKENS:
        shorter = outlier_of(decays_over(shuffled[:, : half - 1]))
        outlier = replace(outlier, detail=f"on the first {half} tokens alone: {shorter.outcome}")
    verdict = sl.analysis.verdict_of(CLAIM, [outlier, cause(study, target)])
    numbers = {}
    for source, each in decays.items():
        for quantity, item in each.items():
            numbers[f"{RATIO}, {quantity}, {source}"] = item.ratio
            numbers[f"{TAU}, {quantity}, {source}"] = item.tau
    return sl.Findings(verdict, table(decays, blocks), caption(blocks, average), numbers)


def outlier_of(decays: Decays) -> sl.analysis.Part:
    """The quantity: is the first token an outlier, and does variance fall behind it, as averaging makes it?"""
    weaker = min(decays, key=lambda source: decays[source][AGGREGATED].ratio.value)
    return sl.analysis.judge(
        "quantity",
        "variance",
        CLAIM,
        statistic=f"variance of the first token's aggregated value over the median of later ones ({weaker}, the lower)",
        estimate=decays[weaker][AGGREGATED].ratio,
        control="the same of the values before aggregation",
        control_estimate=decays[weaker][BEFORE].ratio,
        rule="holds when, on the given prompts and on random tokens, the interval of this ratio lies above "
        f"{LEAST_RATIO:g} and above the control's, and that of Kendall's tau of variance with later positions lies "
        "below 0 and below the control's, with p < 0.05 against shuffled positions (the larger p of the two is given)",
        conditions=[c for each in decays.values() for c in decays_by_averaging(each[AGGREGATED], each[BEFORE])],
    )


def cause(study: sl.Study, target: int) -> sl.analysis.Part:
    """Is it the deviation, and not the mean, that makes a sink?"""
    return sl.analysis.cause(
        study,
        sl.stages.VALUE_AGGREGATION,
        "deviation_exchanged",
        "mean_exchanged",
        sentence="The token becomes a sink because its aggregated value is a high-variance outlier.",
        target=target or None,
    )


def decay(
    study: sl.Study,
    activations: Mapping[int, Tensor],
    average: Literal["mean", "median"],
    shuffled: Float[Tensor, "draw pos"],
) -> Decay:
    """Ratio and tau over as many tokens as are shuffled, with intervals over prompts; alike in every block."""
    first = slice(shuffled.shape[-1] + 1)
    curves = statistics.resampled_curves([act[:, first] for act in activations.values()], average)
    in_order = torch.arange(shuffled.shape[-1]).float()[None]
    variance = curves(np.arange(study.batch.n))

    def estimate(statistic: Callable[[Variance], Tensor], correlation: bool) -> sl.Estimate:
        return study.bootstrap(lambda prompts: float(statistic(curves(prompts))), correlation=correlation)

    ratio = estimate(metrics.first_over_later, correlation=False)
    tau = estimate(lambda variance: trend(variance, in_order), correlation=True)
    null = trend(variance, shuffled)
    return Decay(
        variance, ratio, tau, statistics.null_estimate(null), statistics.permutation_p(tau.value, null, "less")
    )


def trend(variance: Variance, positions: Float[Tensor, "draw pos"]) -> Float[Tensor, " draw"]:
    """Kendall's tau of variance with position after the first, mean over blocks."""
    return metrics.kendall_tau(positions, variance[:, 1:]).mean(-1)


def decays_by_averaging(aggregated: Decay, before: Decay) -> list[sl.analysis.Condition]:
    """The rule, on one kind of prompts."""
    return [
        sl.analysis.above(aggregated.ratio, LEAST_RATIO),
        sl.analysis.above(aggregated.ratio, before.ratio),
        sl.analysis.below(aggregated.tau, 0.0),
        sl.analysis.below(aggregated.tau, before.tau),
        sl.analysis.rare(aggregated.tau, aggregated.null, aggregated.p_value, sought=SOUGHT, alternative="less"),
    ]


def table(decays: Decays, blocks: tuple[int, ...]) -> pd.DataFrame:
    """A row for every kind of prompts, quantity, block and position."""
    tables = []
    for source, each in decays.items():
        for quantity, item in each.items():
            axes = {"layer": blocks, "position": range(item.variance.shape[1])}
            relative = metrics.relative_to_later(item.variance).flatten().numpy()
            tables.append(sl.analysis.tidy(item.variance, axes, source=source, quantity=quantity, relative=relative))
    return pd.concat(tables, ignore_index=True)


def caption(blocks: tuple[int, ...], average: str) -> str:
    return (
        "Variance across prompts at every position over the median of later positions (geometric mean over blocks "
        f"{', '.join(map(str, blocks))}; {average} over dimensions): of the values that attention has averaged, and of "
        "the values before."
    )


def draw(findings: sl.Findings):
    by = ["source", "quantity", "position"]
    mean = findings.table.pivot_table("relative", by, aggfunc=gmean, sort=False).reset_index()
    titles = {"relative": "variance / median of later positions"}
    figure = sl.viz.line(mean, "position", "relative", series="quantity", facet="source", titles=titles, log_y=True)
    return figure.update_yaxes(dtick=np.log10(2))


ANALYSIS = sl.Analysis(
    name="variance_decay",
    title="Variance of the aggregated value by position",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 4",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
