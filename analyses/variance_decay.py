"""Does averaging take variance away: the variance of aggregated values across prompts, position by position.

    python analyses/variance_decay.py

Under a causal mask the first token attends to itself alone and every later one averages more values, so the variance of
``hook_z`` across prompts should fall with position, from an outlier at the first. Nothing in that depends on language,
so it must hold on random tokens as well. The control is the value before aggregation (``hook_v``): what that does with
position comes from the tokens, not from averaging.

The question is about the position that averages nothing, so it is asked of the first, wherever the sink is. Pitfalls:
prompts that all begin with the same token (BOS) have no variance there, so that the ratio is 0 and the claim does not
hold; and after the first formation blocks the first token's values are all alike, so these are left out by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

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
FIRST = 0  # the position that averages nothing
LEAST_RATIO = 2.0  # round: twice an ordinary position's variance
SITES = {"aggregated": sites.Z, "not aggregated": sites.V}
RATIO, TAU = "variance of the first token over later ones", "Kendall's tau of variance with position"

Curves = Float[Tensor, "block pos"]


class Decay(NamedTuple):
    """What is found at one site, on one kind of prompts."""

    ratio: sl.Estimate
    tau: sl.Estimate
    p_value: float


def run(
    study: sl.Study,
    *,
    layers: Annotated[tuple[int, ...], "blocks to look at; those up to the first formation blocks by default"] = (),
    average: Annotated[Literal["mean", "median"], "how the variances of all dimensions are brought together"] = "mean",
    permutations: Annotated[int, "draws of shuffled positions"] = 2000,
) -> sl.Findings:
    blocks, rng = study.blocks(layers), study.generator("variance_decay/shuffled")
    shuffled = torch.rand(permutations, study.batch.length - 1, generator=rng)
    axes = {"layer": blocks, "position": range(study.batch.length)}
    found, numbers, tables = {}, {}, []
    for source, here in {"given prompts": study, "random tokens": study.random}.items():
        for quantity, site in SITES.items():
            each = [statistics.resampled_variance(x, average) for x in here.activations(site, blocks).values()]
            item, curves = decay(study, lambda drawn, each=each: torch.stack([f(drawn) for f in each]), shuffled)
            found[source, quantity] = item
            numbers |= {f"{RATIO}, {quantity}, {source}": item.ratio, f"{TAU}, {quantity}, {source}": item.tau}
            columns = {"source": source, "quantity": quantity, "relative": relative(curves).flatten().numpy()}
            tables.append(sl.analysis.tidy(curves, axes, **columns))
    caption = (
        "Variance across prompts at every position over the median of later positions (geometric mean over blocks "
        f"{', '.join(map(str, blocks))}; {average} over dimensions): of the values that attention has averaged, and of "
        "the values before."
    )
    return sl.Findings(judged(found), pd.concat(tables, ignore_index=True), caption, numbers)


def decay(
    study: sl.Study, curves: Callable[[np.ndarray], Curves], shuffled: Float[Tensor, "draw pos"]
) -> tuple[Decay, Curves]:
    """Ratio and tau with intervals over prompts, and the curves; positions are shuffled alike in every block."""
    n, seed, in_order = study.batch.n, study.seed, torch.arange(shuffled.shape[-1]).float()[None]
    ratio = statistics.bootstrap_estimate(lambda drawn: outlier(curves(drawn)), n, seed)
    tau = statistics.bootstrap_estimate(lambda drawn: float(trend(curves(drawn), in_order)), n, seed, correlation=True)
    everyone = curves(np.arange(n))
    return Decay(ratio, tau, statistics.permutation_p(tau.value, trend(everyone, shuffled), "less")), everyone


def relative(curves: Curves) -> Curves:
    """In units of the median over the positions after the first."""
    return curves / curves[:, FIRST + 1 :].quantile(0.5, dim=-1, keepdim=True)


def outlier(curves: Curves) -> float:
    """Variance of the first position over the median of later ones, geometric mean over blocks."""
    return float(relative(curves)[:, FIRST].log().mean().exp())


def trend(curves: Curves, positions: Float[Tensor, "draw pos"]) -> Float[Tensor, " draw"]:
    """Kendall's tau of variance with position after the first, mean over blocks."""
    return metrics.kendall_tau(positions, curves[:, FIRST + 1 :]).mean(-1)


def judged(found: dict[tuple[str, str], Decay]) -> sl.Verdict:
    """The verdict takes both sources; it shows the one with the lower ratio."""
    pairs = {source: (found[source, "aggregated"], found[source, "not aggregated"]) for source, _ in found}
    holds = all(
        item.ratio.above(max(LEAST_RATIO, control.ratio.high))
        and item.tau.below(min(0.0, control.tau.low))
        and item.p_value < 0.05
        for item, control in pairs.values()
    )
    weaker = min(pairs, key=lambda source: pairs[source][0].ratio.value)
    return sl.verdict(
        CLAIM,
        f"variance of the first token's aggregated value over the median of later ones ({weaker}, the lower)",
        pairs[weaker][0].ratio,
        "the same of the values before aggregation",
        pairs[weaker][1].ratio,
        f"holds when, on the given prompts and on random tokens, the interval of this ratio lies above {LEAST_RATIO:g} "
        "and above the control's, and that of Kendall's tau of variance with later positions lies below 0 and below "
        "the control's, with p < 0.05 against shuffled positions (the larger p of the two is given)",
        holds=holds,
        p_value=max(item.p_value for item, _ in pairs.values()),
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
    sl.analysis.main(ANALYSIS)
