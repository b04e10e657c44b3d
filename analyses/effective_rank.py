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
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites

CLAIM = "The hidden states' effective rank collapses after formation."
TOKENS = ("all tokens", "without the sink token")
COLLAPSE = 0.5
"""Ratio of ranks after and before, below which it has collapsed."""


def run(
    study: sl.Study,
    *,
    lengths: Annotated[tuple[int, ...], "prompt lengths; a quarter, half and all by default"] = (),
) -> sl.Findings:
    lengths, n_layers, layer = study.lengths(lengths), study.shape.n_layers, study.formation.layer

    def ranks(x: Tensor, rows: sl.Rows) -> Tensor:
        sink = study.sinks.to(x.device)[rows.prompts]
        others = torch.arange(x.shape[1], device=x.device) != sink[:, None]
        rest = x[others].view(len(x), -1, x.shape[-1])
        both = [[metrics.effective_rank(x[:, :n]), metrics.effective_rank(rest[:, : n - 1])] for n in lengths]
        return torch.stack([torch.stack(pair, -1) for pair in both], -2)  # [row, length, tokens]

    found = study.measure(
        [
            sl.Readout("entering", sites.RESID_PRE, tuple(range(n_layers)), ranks),
            sl.Readout("final", sites.RESID_POST, (n_layers - 1,), ranks),
        ]
    )
    rank = torch.cat([found["entering"], found["final"]])  # [depth, prompt, length, tokens]
    ratio = rank[layer + 1] / rank[layer]  # [prompt, length, tokens]
    collapse, without = (study.mean(ratio[:, -1, tokens]) for tokens in range(2))
    verdict = sl.verdict(
        CLAIM,
        f"effective rank of the hidden states that leave the formation block over that of those that enter it "
        f"({lengths[-1]} tokens)",
        collapse,
        f"the same without the sink token's row: {remains(without)}",
        without,
        f"holds when the whole interval lies below {COLLAPSE}, all tokens counted; the control does not decide, it "
        "says whether more collapses than one token's norm accounts for",
        holds=collapse.below(COLLAPSE),
    )
    numbers = {
        f"effective rank {what} the formation block, {tokens}": study.mean(rank[depth, :, -1, j])
        for j, tokens in enumerate(TOKENS)
        for what, depth in (("entering", layer), ("leaving", layer + 1))
    }
    for i, length in enumerate(lengths[:-1]):
        for j, tokens in enumerate(TOKENS):
            numbers[f"ratio of the ranks at {length} tokens, {tokens}"] = study.mean(ratio[:, i, j])
    axes = {"layer": range(n_layers + 1), "prompt": range(study.batch.n), "length": lengths, "tokens": TOKENS}
    table = sl.analysis.tidy(rank, axes, formation=layer).rename(columns={"value": "effective_rank"})
    caption = (
        "Effective rank of the hidden states entering every block (the last point: leaving the model's last one), with "
        "all tokens and without the sink token's row, at several prompt lengths: mean over prompts. The dashed line is "
        "the formation block."
    )
    return sl.Findings(verdict, table, caption, numbers)


def remains(without: sl.Estimate) -> str:
    """What the control says, in words."""
    if without.below(COLLAPSE):
        return "the other tokens collapse as well"
    if without.above(COLLAPSE):
        return "the other tokens do not collapse, any collapse is the sink token's norm alone"
    return "undecided whether the other tokens collapse"


def draw(findings: sl.Findings):
    table = findings.table.assign(series=findings.table["length"].astype(str) + " tokens")
    shown = table.pivot_table("effective_rank", ["tokens", "series", "layer"], sort=False).reset_index()
    titles = {"layer": "block", "effective_rank": "effective rank", "series": ""}
    figure = sl.viz.line(shown, "layer", "effective_rank", series="series", facet="tokens", titles=titles)
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
    sl.analysis.main(ANALYSIS)
