"""Does the sink set in where its norm jumps: attention received and residual norm, block by block.

    python analyses/onset.py

The claim puts the cause of attention in the residual stream: an outlier that one block writes is what the next one
attends to. So the largest rise in attention must come one block after the largest growth of the norm, prompt by prompt.
An ordinary position of the same prompt is the control: whatever rises there does so at no block in particular.
"""

from __future__ import annotations

from typing import Annotated

import pandas as pd
import torch
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites

CLAIM = "Attention to the sink rises right after the block in which its residual norm grows most."


def run(
    study: sl.Study,
    *,
    lengths: Annotated[tuple[int, ...], "prompt lengths to read attention at; a quarter, half and all by default"] = (),
) -> sl.Findings:
    blocks, lengths = tuple(range(study.shape.n_layers)), study.lengths(lengths)
    ordinary = torch.multinomial(study.ordinary.float(), 1, generator=study.generator("onset/ordinary")).squeeze(-1)
    tokens = {"sink": study.sinks, "ordinary": ordinary}
    found = study.measure(
        [
            sl.Readout("seen", sites.PATTERN, blocks, lambda a, _: metrics.received_at_lengths(a, lengths).mean(1)),
            sl.Readout("entering", sites.RESID_PRE, blocks, lambda a, _: a.float().norm(dim=-1)),
            sl.Readout("leaving", sites.RESID_POST, blocks, lambda a, _: a.float().norm(dim=-1)),
        ]
    )
    seen = {who: at(found["seen"], where) for who, where in tokens.items()}  # [layer, prompt, length]
    norm = {who: at(found["entering"], where) for who, where in tokens.items()}  # [layer, prompt]
    growth = {who: at(found["leaving"], where) / norm[who] for who, where in tokens.items()}
    hits = {who: in_step(growth[who], seen[who][..., -1]) for who in tokens}
    share, control = study.mean(hits["sink"]), study.mean(hits["ordinary"])
    chance = 1 / (len(blocks) - 1)
    verdict = sl.verdict(
        CLAIM,
        "share of prompts whose largest rise in attention comes one block after the largest growth of the norm",
        share,
        f"the same at an ordinary position (by chance {chance:.2f})",
        control,
        "holds when the whole interval of the share lies above one half, above chance and above the control",
        holds=share.above(max(0.5, chance, control.value)),
    )
    rows = [
        {
            "layer": layer,
            "token": who,
            "length": length,
            "attention": attention,
            "norm": float(norm[who][layer].median()),
        }
        for who in tokens
        for layer in blocks
        for length, attention in zip(lengths, seen[who][layer].nanmean(0).tolist(), strict=True)
    ]
    later = list(study.after_formation())
    numbers = {
        "attention to the sink in the blocks after formation": study.mean(seen["sink"][later, :, -1].mean(0)),
        "attention to an ordinary token there": study.mean(seen["ordinary"][later, :, -1].mean(0)),
        "factor by which the formation block multiplies the sink's norm": study.mean(
            growth["sink"][study.formation.layer]
        ),
    }
    caption = (
        "Attention received from later queries (mean over heads and prompts) and the residual norm entering each block "
        "(median over prompts), for the sink and for one ordinary position of every prompt, at several prompt lengths."
    )
    return sl.Findings(verdict, pd.DataFrame(rows), caption, numbers)


def at(values: Tensor, where: Tensor) -> Tensor:
    """``[layer, prompt, ...]`` at one position of every prompt; the last axis of ``values`` is over positions."""
    index = where.view(1, -1, *[1] * (values.ndim - 2)).expand(*values.shape[:-1], 1)
    return values.gather(-1, index).squeeze(-1)


def in_step(growth: Tensor, seen: Tensor) -> Tensor:
    """1 for the prompts in which attention rises most one block after the norm grows most; ``[layer, prompt]``."""
    return (growth[:-1].argmax(0) == seen.diff(dim=0).argmax(0)).float()


def draw(findings: sl.Findings):
    table = findings.table
    longest = table["length"].max()
    norms = table[table["length"] == longest].assign(quantity="residual norm entering", value=lambda t: t.norm)
    attention = table.assign(quantity="attention received", value=table.attention)
    shown = pd.concat([attention, norms])
    shown["series"] = shown.token + ", " + shown["length"].astype(str) + " tokens"
    figure = sl.viz.line(
        shown, "layer", "value", series="series", facet="quantity", titles={"layer": "block", "value": ""}
    )
    figure.update_yaxes(matches=None, showticklabels=True)
    return figure.update_yaxes(type="log", exponentformat="power", col=2)


ANALYSIS = sl.Analysis(
    name="onset",
    title="Where the sink sets in",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="figures 3 and 18",
)

if __name__ == "__main__":
    sl.analysis.main(ANALYSIS)
