"""Do a few dimensions dominate the sink token after formation, before and after the norm?

    python analyses/dominance.py

The dominance ratio ``max_j |x_j| / mean_j |x_j|`` of the residual stream that enters a block and of what its attention
reads, the same after the norm. Dividing a vector by a number leaves the ratio as it was, so RMSNorm itself cannot
change it: only the norm's weight can, and a LayerNorm's centring. ``weighted`` says whether that weight is counted.
Ordinary positions of the same prompts are the control: every residual stream has some larger dimensions.

Two parts, before the norm and after it, for the one can hold without the other. And the cause: the outlier dimensions
of the residual stream that leaves the formation block are exchanged at the sink for an ordinary position's, all else
left; as many others must not count.

The sink must exceed them threefold, before and after: the least ratio of norms that formation asks of a sink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites

CLAIM = "After formation a few dimensions dominate the sink token, before and after RMSNorm."
LEAST = 3.0
"""Least factor between the sink token's dominance ratio and an ordinary position's."""
TOKENS = ("sink", "ordinary")
SINK, ORDINARY = range(2)
QUANTITIES = ("dominance ratio", "energy share of the k largest", "Gini coefficient", "massive activations")
RATIO, ENERGY, GINI, MASSIVE = range(4)

Disparity = Float[Tensor, "layer prompt token quantity"]


def run(
    study: sl.Study,
    *,
    blocks: Annotated[int, "how many blocks after formation the verdict is about", sl.Between(1)] = 4,
    k: Annotated[int, "how many of the largest dimensions to take the energy share of", sl.Between(1)] = 5,
    weighted: Annotated[bool, "count the norm's weight, as attention does"] = True,
) -> sl.Findings:
    sl.analysis.check_k(study, k)
    after = list(study.after_formation(blocks))
    study.require("norm_before_attention", range(study.shape.n_layers))
    disparity = disparities(study, k, weighted)
    late = {norm: values[after].mean(0) for norm, values in disparity.items()}
    ratio, control = (study.mean(late["after"][:, token, RATIO]) for token in (SINK, ORDINARY))
    factor = {norm: study.mean(over_ordinary(values[after])) for norm, values in disparity.items()}
    before, usual = (study.mean(late["before"][:, token, RATIO]) for token in (SINK, ORDINARY))
    parts = [
        dominates("after the norm", ratio, control, factor["after"], after),
        dominates("before the norm", before, usual, factor["before"], after),
        sl.analysis.cause(
            study,
            sl.stages.DOWN_PROJECTION,
            "spike_exchanged",
            "other_dims",
            sentence="The sink is made by its few dominating dimensions.",
        ),
    ]
    verdict = sl.analysis.verdict_of(CLAIM, parts)
    entering = disparity["after"][study.formation.layer, :, SINK, RATIO]
    numbers = {f"dominance ratio of the sink over an ordinary position's, {n} the norm": x for n, x in factor.items()}
    numbers |= {"dominance ratio of the sink after the formation block's own norm": study.mean(entering)}
    numbers |= other_views(study, late, k)
    axes = {"norm": disparity, "layer": range(study.shape.n_layers), "prompt": range(study.batch.n)}
    axes |= {"token": TOKENS, "quantity": QUANTITIES}
    table = sl.analysis.tidy(torch.stack(list(disparity.values())), axes, formation=study.formation.layer)
    return sl.Findings(verdict, table, caption(weighted), numbers)


def dominates(
    where: str, ratio: sl.Estimate, control: sl.Estimate, factor: sl.Estimate, blocks: Sequence[int]
) -> sl.analysis.Part:
    """The quantity, on one side of the norm."""
    return sl.analysis.judge(
        "quantity",
        where,
        f"A few dimensions dominate the sink token {where}.",
        statistic=f"dominance ratio max|x| / mean|x| of the sink token {where}, blocks {blocks[0]} to {blocks[-1]}",
        estimate=ratio,
        control="the same of ordinary positions",
        control_estimate=control,
        rule=f"holds when the sink token's ratio is at least {LEAST:g} times that of ordinary positions of its prompt "
        "(the whole interval of the factor)",
        conditions=[sl.analysis.above(factor, LEAST)],
        detail=f"{sl.statistics.estimate_text(factor)} times that of ordinary positions",
    )


def disparities(study: sl.Study, k: int, weighted: bool) -> dict[str, Disparity]:
    """Every quantity of what enters each block and, ``after`` the norm, of what its attention reads."""
    layers = tuple(range(study.shape.n_layers))
    weights = {layer: study.weights(layer).ln1_w.detach().float() for layer in layers}

    def describe(x: Tensor, rows: sl.Rows, massive: Tensor) -> Tensor:
        views = [metrics.dominance_ratio(x), metrics.top_energy_share(x, k), metrics.gini(x), massive]
        return sink_and_ordinary(torch.stack(views, -1), rows, study)

    def before_norm(x: Tensor, rows: sl.Rows) -> Tensor:
        return describe(x, rows, metrics.massive_activations(x).sum(-1).float())

    def after_norm(x: Tensor, rows: sl.Rows) -> Tensor:
        # Massive activations are a notion of the residual stream: there is no number of them here.
        x = x.float() * weights[rows.layer] if weighted else x.float()
        return describe(x, rows, torch.full(x.shape[:2], torch.nan, device=x.device))

    return study.measure(
        [
            sl.Readout("before", sites.RESID_PRE, layers, before_norm),
            sl.Readout("after", sites.LN1_NORMALIZED, layers, after_norm),
        ]
    )


def sink_and_ordinary(
    values: Float[Tensor, "row pos quantity"], rows: sl.Rows, study: sl.Study
) -> Float[Tensor, "row token quantity"]:
    """At the sink, and averaged over ordinary positions."""
    weight = study.ordinary[rows.prompts.cpu()].to(values)[..., None]
    mean = (values * weight).sum(1) / weight.sum(1)
    return torch.stack([study.sink_first(values, rows.prompts)[:, 0], mean], 1)


def over_ordinary(disparity: Disparity) -> Float[Tensor, " prompt"]:
    """The sink's dominance ratio over that of ordinary positions, mean over blocks."""
    return (disparity[:, :, SINK, RATIO] / disparity[:, :, ORDINARY, RATIO]).mean(0)


def other_views(
    study: sl.Study, late: Mapping[str, Float[Tensor, "prompt token quantity"]], k: int
) -> dict[str, sl.Estimate]:
    """The other quantities after formation, each where it says most."""
    numbers = {}
    for norm, quantity in (("after", ENERGY), ("after", GINI), ("before", MASSIVE)):
        note = f" (k = {k})" if quantity == ENERGY else ""
        for token in (SINK, ORDINARY):
            name = f"{QUANTITIES[quantity]}, {TOKENS[token]}, {norm} the norm{note}"
            numbers[name] = study.mean(late[norm][:, token, quantity])
    return numbers


def caption(weighted: bool) -> str:
    return (
        "Dominance ratio of the sink token and of ordinary positions at every block, before and after the norm"
        f"{' with its weight' if weighted else ''}: mean over prompts, and the range of 95% of them. The dashed line "
        "is the formation block."
    )


def draw(findings: sl.Findings):
    ratios: Any = findings.table[findings.table.quantity == QUANTITIES[RATIO]]
    lines = sl.analysis.mean_and_range(ratios, ["norm", "token", "layer"])
    lines = lines.replace({"norm": {"before": "before the norm", "after": "after the norm"}})
    titles = {"layer": "block", "mean": "dominance ratio", "token": ""}
    figure = sl.viz.line(
        lines, "layer", "mean", series="token", low="low", high="high", facet="norm", titles=titles, log_y=True
    )
    return sl.viz.mark(figure.update_yaxes(dtick=1), x=int(findings.table.formation.iloc[0]))


ANALYSIS = sl.Analysis(
    name="dominance",
    title="Dominance ratio before and after the norm",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 11; 262.88 at layer 2 of Llama-2 after RMSNorm",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
