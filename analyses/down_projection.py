"""Do super neurons write through heavy-tailed rows of W_down into few residual dimensions?

    python analyses/down_projection.py

A neuron adds its activation times its row of W_out to the residual stream. The row is heavy-tailed when its excess
kurtosis is far above a normal distribution's 0, and writes into few dimensions when its k largest entries hold much of
its energy (the squared norm). Only the shape of a row is asked, never its size. Two nulls: as many other neurons of the
block, and normally distributed rows of the same width, whose k largest entries hold some energy too.

Well above means twice: the k largest entries hold at least twice what they hold in other neurons and in normal rows.
These are weights, the same for every prompt, so the estimate has no interval; the null has the range of its draws.

Does the shape count? The rows are rotated (norms and mutual angles stay, sparsity goes), as are those of other neurons;
and what the super neurons wrote is put into a random dense direction of the residual stream, or into as few others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import metrics, statistics

CLAIM = "Super neurons write through heavy-tailed rows of W_down into few residual dimensions."
RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Which of a row's sorted magnitudes are kept for the figure."""
N_NORMAL = 500
"""Normally distributed rows to compare with."""
ROTATIONS = 6
"""Draws of what is rotated or put elsewhere: one differs from the next by more than one prompt does."""
LAPLACE = 3.0
"""Excess kurtosis of a Laplace distribution: tails as heavy must have been possible to see."""
MEASURES = ("excess_kurtosis", "top_share", "gini")


def run(
    study: sl.Study,
    *,
    k: Annotated[int, "how many of a row's largest entries to take the energy share of", sl.Between(1)] = 5,
    draws: Annotated[int, "sets of as many other neurons for the null", sl.Between(1, 100_000)] = 1000,
) -> sl.Findings:
    for identity in ("neurons_write", "mlp_adds"):
        study.require(identity, (study.formation.layer,))
    sl.analysis.check_k(study, k)
    table = row_table(study, k)
    super_neurons, null = against_others(study, table, draws)
    others = {measure: statistics.null_estimate(null[measure]) for measure in MEASURES}
    p_values = {measure: statistics.permutation_p(super_neurons[measure], null[measure]) for measure in MEASURES}
    normal = statistics.null_estimate(table[table.kind == "normal"].top_share.to_numpy())
    shape = heavy_tails(super_neurons, others, p_values, normal, (k, draws, len(study.formation.neurons)))
    verdict = sl.analysis.verdict_of(CLAIM, [shape, *causes(study)])
    numbers = {
        f"share of the energy in the {k} largest entries, super neurons": super_neurons["top_share"],
        "the same, other neurons": others["top_share"],
        "the same, normally distributed rows": normal,
        "p of that share against other neurons": p_values["top_share"],
        "Gini coefficient of the magnitudes, super neurons": super_neurons["gini"],
        "Gini coefficient, other neurons": others["gini"],
    }
    return sl.Findings(verdict, table, caption(study.formation.layer), numbers)


def heavy_tails(
    super_neurons: Mapping[str, float],
    others: Mapping[str, sl.Estimate],
    p_values: Mapping[str, float],
    normal: sl.Estimate,
    sizes: tuple[int, int, int],
) -> sl.analysis.Part:
    """The quantity; ``sizes`` are k, draws and how many super neurons there are."""
    k, draws, n = sizes
    kurtosis = sl.Estimate(super_neurons["excess_kurtosis"], n=n)
    top_share = sl.Estimate(super_neurons["top_share"], n=n)
    twice = super_neurons["top_share"] > 2 * max(others["top_share"].value, normal.value)
    return sl.analysis.judge(
        "quantity",
        "heavy tails",
        CLAIM,
        statistic="excess kurtosis of the super neurons' rows of W_out, mean over them",
        estimate=kurtosis,
        control=f"as many other neurons of the block, {draws} draws",
        control_estimate=others["excess_kurtosis"],
        rule=f"holds when p < 0.05, and the {k} largest entries hold an outlying share of the energy too (p < 0.05), "
        "at least twice that of other neurons and of normally distributed rows",
        conditions=[
            sl.analysis.rare(kurtosis, others["excess_kurtosis"], p_values["excess_kurtosis"], sought=LAPLACE),
            sl.analysis.rare(top_share, others["top_share"], p_values["top_share"], sought=others["top_share"].value),
            sl.analysis.of_bool(twice),
        ],
    )


def causes(study: sl.Study) -> list[sl.analysis.Part]:
    """Does the sink go when the rows, or what is written, are made dense?"""
    asked = (
        ("dense rows", "densified", "random_neurons", "The sink needs the sparse rows of the super neurons."),
        ("dense direction", "dense_direction", "spike_moved", "The sink needs few dimensions, whichever they are."),
    )
    stage = sl.stages.DOWN_PROJECTION
    return [
        sl.analysis.cause(study, stage, edit, control, name=name, sentence=sentence, draws=ROTATIONS)
        for name, edit, control, sentence in asked
    ]


def row_table(study: sl.Study, k: int) -> pd.DataFrame:
    """The shape of every neuron's row of W_out, and of as wide normally distributed ones."""
    rows = study.weights(study.formation.layer).W_out.detach().float().cpu()
    normal = torch.randn(N_NORMAL, rows.shape[1], generator=study.generator("down_projection/normal"))
    kinds = ["super" if neuron in study.formation.neurons else "other" for neuron in range(len(rows))]
    return pd.concat([shapes(rows, kinds, k), shapes(normal, ["normal"] * N_NORMAL, k)], ignore_index=True)


def shapes(rows: Float[Tensor, "row d_model"], kinds: list[str], k: int) -> pd.DataFrame:
    """Shape of every row: tails, concentration, and its magnitudes at some ranks over their root mean square."""
    magnitude = rows.abs().sort(dim=-1, descending=True).values / rows.pow(2).mean(-1, keepdim=True).sqrt()
    columns = {
        "norm": metrics.vector_norm(rows),
        "excess_kurtosis": metrics.excess_kurtosis(rows),
        "top_share": metrics.top_energy_share(rows, k),
        "gini": metrics.gini(rows),
    } | {f"rank_{rank}": magnitude[:, rank - 1] for rank in RANKS if rank <= rows.shape[1]}
    return pd.DataFrame({"kind": kinds, "row": range(len(rows))} | {name: x.numpy() for name, x in columns.items()})


def against_others(
    study: sl.Study, table: pd.DataFrame, draws: int
) -> tuple[dict[str, float], dict[str, Float[np.ndarray, " draw"]]]:
    """Every measure's mean over the super neurons, and over as many other neurons, draw by draw."""
    neurons = list(study.formation.neurons)
    others = np.array(study.other_neurons("down_projection/others", draws))
    by_neuron = {measure: table.loc[table.kind != "normal", measure].to_numpy() for measure in MEASURES}
    means = {measure: float(values[neurons].mean()) for measure, values in by_neuron.items()}
    return means, {measure: values[others].mean(1) for measure, values in by_neuron.items()}


def caption(layer: int) -> str:
    return (
        f"Sorted magnitudes of rows of W_out of block {layer}, in units of each row's root mean square: super neurons "
        f"(at most three), other neurons and {N_NORMAL} normally distributed rows (median and 95% of the rows)."
    )


def draw(findings: sl.Findings):
    table = findings.table
    supers = table[table.kind == "super"]
    groups = {f"super neuron {row}": supers[supers.row == row] for row in supers.row[:3]}
    groups |= {"other neurons": table[table.kind == "other"], "normal rows": table[table.kind == "normal"]}
    points = []
    for name, rows in groups.items():
        for column in [column for column in map(str, table) if column.startswith("rank_")]:
            low, median, high = np.quantile(rows[column], [0.025, 0.5, 0.975])
            rank = int(column.removeprefix("rank_"))
            points.append({"series": name, "rank": rank, "low": low, "magnitude": median, "high": high})
    lines = pd.DataFrame(points)
    titles = {"rank": "rank of the entry", "magnitude": "magnitude / root mean square of the row", "series": ""}
    figure = sl.viz.line(
        lines, "rank", "magnitude", series="series", low="low", high="high", titles=titles, log_x=True, log_y=True
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
    sl.main(ANALYSIS)
