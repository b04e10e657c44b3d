"""Does the effective rank of the hidden states collapse after formation, and is it more than one huge token?

    python analyses/effective_rank.py

The effective rank of a prompt's hidden states ``[pos, d_model]`` is the exponential of the entropy of their normalised
singular values. One token whose norm is a hundred times that of the others makes the first singular value as large as
all the rest, so the rank falls by that token alone, whatever the others do. The claim is about the hidden states with
all tokens, and the verdict decides it so; the control takes the sink token's row out, and says what is left of it.

A collapse is a fall below one half. Shorter prompts are the first rows of longer ones, which is exact in a causal
model.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites

CLAIM = "The hidden states' effective rank collapses after formation."
CAPTION = (
    "Effective rank of the hidden states entering every block (the last point: leaving the model's last one), with "
    "all tokens and without the sink token's row, at several prompt lengths: mean over prompts. The dashed line is "
    "the formation block."
)
TOKENS = ("all tokens", "without the sink token")
ALL, WITHOUT_SINK = range(2)
COLLAPSE = 0.5
"""Ratio of ranks after and before, below which it has collapsed."""


def run(
    study: sl.Study,
    *,
    lengths: Annotated[tuple[int, ...], "prompt lengths; a quarter, half and all by default"] = (),
) -> sl.Findings:
    lengths, layer = study.lengths(lengths), study.formation.layer
    rank = ranks(study, lengths)
    ratio = rank[layer + 1] / rank[layer]  # [prompt, length, tokens]
    collapse, without_sink = (study.mean(ratio[:, -1, tokens]) for tokens in (ALL, WITHOUT_SINK))
    collapses = sl.analysis.judge(
        "quantity",
        "collapse",
        CLAIM,
        statistic="effective rank of the hidden states that leave the formation block over that of those that enter "
        f"it ({lengths[-1]} tokens)",
        estimate=collapse,
        control=f"the same without the sink token's row: {remains(without_sink)}",
        control_estimate=without_sink,
        rule=f"holds when the whole interval lies below {COLLAPSE}, all tokens counted; the control does not decide, "
        "it says whether more collapses than one token's norm accounts for",
        conditions=[sl.analysis.below(collapse, COLLAPSE)],
    )
    shorter = {f"{n} tokens": study.mean(ratio[:, i, ALL]) for i, n in enumerate(lengths[:-1])}
    rule = {place: [sl.analysis.below(x, COLLAPSE)] for place, x in shorter.items()}
    verdict = sl.analysis.verdict_of(CLAIM, [sl.analysis.elsewhere(collapses, rule)])
    numbers = {}
    for tokens, name in enumerate(TOKENS):
        for what, depth in (("entering", layer), ("leaving", layer + 1)):
            numbers[f"effective rank {what} the formation block, {name}"] = study.mean(rank[depth, :, -1, tokens])
    for i, length in enumerate(lengths[:-1]):
        for tokens, name in enumerate(TOKENS):
            numbers[f"ratio of the ranks at {length} tokens, {name}"] = study.mean(ratio[:, i, tokens])
    axes = {"layer": range(len(rank)), "prompt": range(study.batch.n), "length": lengths, "tokens": TOKENS}
    table = sl.analysis.tidy(rank, axes, formation=layer).rename(columns={"value": "effective_rank"})
    return sl.Findings(verdict, table, CAPTION, numbers)


def ranks(study: sl.Study, lengths: tuple[int, ...]) -> Float[Tensor, "depth prompt length tokens"]:
    """Effective rank of what enters every block and, at the last depth, of what leaves the last one."""

    def reduce(x: Tensor, rows: sl.Rows) -> Tensor:
        rest = study.sink_first(x, rows.prompts)[:, 1:]
        pairs = [[metrics.effective_rank(x[:, :n]), metrics.effective_rank(rest[:, : n - 1])] for n in lengths]
        return torch.stack([torch.stack(pair, -1) for pair in pairs], -2)

    layers = tuple(range(study.shape.n_layers))
    readings = study.measure(
        [
            sl.Readout("entering", sites.RESID_PRE, layers, reduce),
            sl.Readout("final", sites.RESID_POST, layers[-1:], reduce),
        ]
    )
    return torch.cat([readings["entering"], readings["final"]])


def remains(without_sink: sl.Estimate) -> str:
    """What the control says, in words."""
    if without_sink.below(COLLAPSE):
        return "the other tokens collapse as well"
    if without_sink.above(COLLAPSE):
        return "the other tokens do not collapse, any collapse is the sink token's norm alone"
    return "undecided whether the other tokens collapse"


def draw(findings: sl.Findings):
    table = findings.table.assign(series=findings.table["length"].astype(str) + " tokens")
    lines = table.pivot_table("effective_rank", ["tokens", "series", "layer"], sort=False).reset_index()
    titles = {"layer": "block", "effective_rank": "effective rank", "series": ""}
    figure = sl.viz.line(lines, "layer", "effective_rank", series="series", facet="tokens", titles=titles)
    return sl.viz.mark(figure.update_yaxes(rangemode="tozero"), x=int(table.formation.iloc[0]))


ANALYSIS = sl.Analysis(
    name="effective_rank",
    title="Effective rank of the hidden states",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figures 15 and 21",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
