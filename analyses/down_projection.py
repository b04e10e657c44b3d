"""Do super neurons write through heavy-tailed rows of W_down into few residual dimensions?

    python analyses/down_projection.py

A neuron adds its activation times its row of W_out to the residual stream. The row is heavy-tailed when its excess
kurtosis is far above a normal distribution's 0, and writes into few dimensions when its k largest entries hold much of
its energy (the squared norm). Only the shape of a row is asked, never its size. Two nulls: as many other neurons of the
block, and normally distributed rows of the same width, whose k largest entries hold some energy too.

Well above means twice: the k largest entries hold at least twice what they hold in other neurons and in normal rows.
These are weights, the same for every prompt, so the estimate has no interval; the null has the range of its draws.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import sinklens as sl
from sinklens import metrics

CLAIM = "Super neurons write through heavy-tailed rows of W_down into few residual dimensions."
RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Which of a row's sorted magnitudes are kept for the figure."""
N_NORMAL = 500
"""Normally distributed rows to compare with."""


def run(
    study: sl.Study,
    *,
    k: Annotated[int, "how many of a row's largest entries to take the energy share of"] = 5,
    draws: Annotated[int, "sets of as many other neurons for the null"] = 1000,
) -> sl.Findings:
    layer, neurons = study.formation.layer, list(study.formation.neurons)
    sl.models.check_writes_directly(study.model, layer)
    W_out = study.weights(layer).W_out.detach().float().cpu()
    if not 0 < k < W_out.shape[1]:
        raise sl.InputError(f"k={k} must be in 1..{W_out.shape[1] - 1}, below the width of the residual stream")
    normal = torch.randn(N_NORMAL, W_out.shape[1], generator=study.generator("down_projection/normal"))
    kinds = ["super" if i in neurons else "other" for i in range(len(W_out))]
    table = pd.concat([shapes(W_out, kinds, k), shapes(normal, ["normal"] * N_NORMAL, k)], ignore_index=True)

    measures = ("excess_kurtosis", "top_share", "gini")
    shape = {what: table.loc[table.kind != "normal", what].to_numpy() for what in measures}
    sets = torch.tensor(study.other_neurons("down_projection/others", draws)).numpy()
    own = {what: float(values[neurons].mean()) for what, values in shape.items()}
    null = {what: values[sets].mean(1) for what, values in shape.items()}
    p = {what: sl.statistics.permutation_p(own[what], null[what]) for what in own}
    others = {what: sl.statistics.null_estimate(null[what]) for what in own}
    gaussian = sl.statistics.null_estimate(table[table.kind == "normal"].top_share.to_numpy())
    heavy = p["excess_kurtosis"] < 0.05
    few = p["top_share"] < 0.05 and own["top_share"] > 2 * max(others["top_share"].value, gaussian.value)
    verdict = sl.verdict(
        CLAIM,
        "excess kurtosis of the super neurons' rows of W_out, mean over them",
        sl.Estimate(own["excess_kurtosis"], n=len(neurons)),
        f"as many other neurons of the block, {draws} draws",
        others["excess_kurtosis"],
        f"holds when p < 0.05, and the {k} largest entries hold an outlying share of the energy too (p < 0.05), at "
        "least twice that of other neurons and of normally distributed rows",
        holds=heavy and few,
        p_value=p["excess_kurtosis"],
    )
    numbers = {
        f"share of the energy in the {k} largest entries, super neurons": own["top_share"],
        "the same, other neurons": others["top_share"],
        "the same, normally distributed rows": gaussian,
        "p of that share against other neurons": p["top_share"],
        "Gini coefficient of the magnitudes, super neurons": own["gini"],
        "Gini coefficient, other neurons": others["gini"],
    }
    caption = (
        f"Sorted magnitudes of rows of W_out of block {layer}, in units of each row's root mean square: super neurons "
        f"(at most three), other neurons and {N_NORMAL} normally distributed rows (median and 95% of the rows)."
    )
    return sl.Findings(verdict, table, caption, numbers)


def shapes(rows: Tensor, kinds: list[str], k: int) -> pd.DataFrame:
    """Shape of every row: tails, concentration, and its magnitudes at some ranks over their root mean square."""
    magnitude = rows.abs().sort(dim=-1, descending=True).values / rows.pow(2).mean(-1, keepdim=True).sqrt()
    columns = {
        "norm": metrics.vector_norm(rows),
        "excess_kurtosis": metrics.excess_kurtosis(rows),
        "top_share": metrics.top_energy_share(rows, k),
        "gini": metrics.gini(rows),
    } | {f"rank_{rank}": magnitude[:, rank - 1] for rank in RANKS if rank <= rows.shape[1]}
    return pd.DataFrame({"kind": kinds, "row": range(len(rows))} | {name: x.numpy() for name, x in columns.items()})


def draw(findings: sl.Findings):
    table = findings.table
    ranks = [column for column in table if str(column).startswith("rank_")]
    supers = table[table.kind == "super"]
    groups = {f"super neuron {row}": supers[supers.row == row] for row in supers.row[:3]}
    groups |= {"other neurons": table[table.kind == "other"], "normal rows": table[table.kind == "normal"]}
    shown = pd.DataFrame(
        [
            {"series": name, "rank": int(str(column)[5:])}
            | dict(zip(("low", "magnitude", "high"), np.quantile(rows[column], [0.025, 0.5, 0.975]), strict=True))
            for name, rows in groups.items()
            for column in ranks
        ]
    )
    titles = {"rank": "rank of the entry", "magnitude": "magnitude / root mean square of the row", "series": ""}
    figure = sl.viz.line(
        shown, "rank", "magnitude", series="series", low="low", high="high", titles=titles, log_x=True, log_y=True
    )
    return figure.update_xaxes(dtick=1).update_yaxes(dtick=1)


ANALYSIS = sl.Analysis(
    name="down_projection",
    title="What the super neurons write",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figure 10",
)

if __name__ == "__main__":
    sl.analysis.main(ANALYSIS)
