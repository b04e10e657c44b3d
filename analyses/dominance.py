"""Do a few dimensions dominate the sink token after formation, before and after the norm?

    python analyses/dominance.py

The dominance ratio ``max_j |x_j| / mean_j |x_j|`` of the residual stream that enters a block and of what its attention
reads, the same after the norm. Dividing a vector by a number leaves the ratio as it was, so RMSNorm itself cannot
change it: only the norm's weight can, and a LayerNorm's centring. ``weighted`` says whether that weight is counted.
Ordinary positions of the same prompts are the control: every residual stream has some larger dimensions.

The sink must exceed them threefold, before and after: the least ratio of norms that formation asks of a sink.
"""

from __future__ import annotations

import itertools
from typing import Annotated

import pandas as pd
import torch
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites

CLAIM = "After formation a few dimensions dominate the sink token, before and after RMSNorm."
LEAST = 3.0
"""Least factor between the sink token's dominance ratio and an ordinary position's."""
TOKENS = ("sink", "ordinary")
QUANTITIES = ("dominance ratio", "energy share of the k largest", "Gini coefficient", "massive activations")


def run(
    study: sl.Study,
    *,
    blocks: Annotated[int, "how many blocks after formation the verdict is about"] = 4,
    k: Annotated[int, "how many of the largest dimensions to take the energy share of"] = 5,
    weighted: Annotated[bool, "count the norm's weight, as attention does"] = True,
) -> sl.Findings:
    if not 0 < k < study.shape.d_model:
        raise sl.InputError(f"k={k} must be in 1..{study.shape.d_model - 1}, below the width of the residual stream")
    layers, after = tuple(range(study.shape.n_layers)), list(study.after_formation(blocks))
    weights = {layer: study.weights(layer).ln1_w.detach().float() for layer in layers}

    def describe(x: Tensor, rows: sl.Rows, massive: Tensor) -> Tensor:
        values = [metrics.dominance_ratio(x), metrics.top_energy_share(x, k), metrics.gini(x), massive]
        return sink_and_ordinary(torch.stack(values, -1), study.sinks, study.ordinary, rows)

    def before_norm(x: Tensor, rows: sl.Rows) -> Tensor:
        return describe(x, rows, metrics.massive_activations(x).sum(-1).float())

    def after_norm(x: Tensor, rows: sl.Rows) -> Tensor:
        # Massive activations are a notion of the residual stream: there is no number of them here.
        x = x.float() * weights[rows.layer] if weighted else x.float()
        return describe(x, rows, torch.full(x.shape[:2], torch.nan, device=x.device))

    found = study.measure(
        [
            sl.Readout("before", sites.RESID_PRE, layers, before_norm),
            sl.Readout("after", sites.LN1_NORMALIZED, layers, after_norm),
        ]
    )  # [layer, prompt, token, quantity]
    late = {stage: values[after].mean(0) for stage, values in found.items()}  # [prompt, token, quantity]
    factor = {stage: study.mean((x[after, :, 0, 0] / x[after, :, 1, 0]).mean(0)) for stage, x in found.items()}
    ratio, control = (study.mean(late["after"][:, token, 0]) for token in range(2))
    verdict = sl.verdict(
        CLAIM,
        f"dominance ratio max|x| / mean|x| of the sink token after the norm, blocks {after[0]} to {after[-1]}",
        ratio,
        "the same of ordinary positions",
        control,
        f"holds when the sink token's ratio is at least {LEAST:g} times that of ordinary positions of its prompt (the "
        "whole interval of the factor), before the norm and after it",
        holds=factor["before"].above(LEAST) and factor["after"].above(LEAST),
    )
    entering = found["after"][study.formation.layer, :, 0, 0]
    numbers = {f"dominance ratio of the sink over an ordinary position's, {s} the norm": x for s, x in factor.items()}
    numbers |= {"dominance ratio of the sink after the formation block's own norm": study.mean(entering)}
    for (stage, quantity), token in itertools.product((("after", 1), ("after", 2), ("before", 3)), range(2)):
        what = f"{QUANTITIES[quantity]}, {TOKENS[token]}, {stage} the norm{f' (k = {k})' if quantity == 1 else ''}"
        numbers[what] = study.mean(late[stage][:, token, quantity])
    caption = (
        "Dominance ratio of the sink token and of ordinary positions at every block, before and after the norm"
        f"{' with its weight' if weighted else ''}: mean over prompts, and the range of 95% of them. The dashed line "
        "is the formation block."
    )
    axes = {"norm": found, "layer": layers, "prompt": range(study.batch.n), "token": TOKENS, "quantity": QUANTITIES}
    table = sl.analysis.tidy(torch.stack(list(found.values())), axes, formation=study.formation.layer)
    return sl.Findings(verdict, table, caption, numbers)


def sink_and_ordinary(values: Tensor, sinks: Tensor, ordinary: Tensor, rows: sl.Rows) -> Tensor:
    """``[row, pos, quantity]`` at the sink and averaged over ordinary positions, ``[row, token, quantity]``."""
    prompts = rows.prompts.cpu()
    index = torch.arange(len(prompts), device=values.device)
    weight = ordinary[prompts].to(values)[..., None]
    mean = (values * weight).sum(1) / weight.sum(1)
    return torch.stack([values[index, sinks[prompts].to(values.device)], mean], 1)


def draw(findings: sl.Findings):
    table = findings.table[findings.table.quantity == QUANTITIES[0]]
    ratio = table.groupby(["norm", "token", "layer"], sort=False)["value"]
    shown = pd.DataFrame({"mean": ratio.mean(), "low": ratio.quantile(0.025), "high": ratio.quantile(0.975)})
    shown = shown.reset_index().replace({"norm": {"before": "before the norm", "after": "after the norm"}})
    titles = {"layer": "block", "mean": "dominance ratio", "token": ""}
    figure = sl.viz.line(
        shown, "layer", "mean", series="token", low="low", high="high", facet="norm", titles=titles, log_y=True
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
    sl.analysis.main(ANALYSIS)
