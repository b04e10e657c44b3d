"""Does the sink set in where its norm jumps: attention received and residual norm, block by block.

    python analyses/onset.py

The claim puts the cause of attention in the residual stream: an outlier that one block writes is what the next one
attends to. So the largest rise in attention must come one block after the largest growth of the norm, prompt by prompt.
An ordinary position of the same prompt is the control: whatever rises there does so at no block in particular.

That two things happen in step is no cause. So what the formation block's MLP writes at the sink is exchanged for what
it writes at an ordinary position, all else left: the sink must go, and the same elsewhere must leave it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites

CLAIM = "Attention to the sink rises right after the block in which its residual norm grows most."
CAPTION = (
    "Attention received from later queries (mean over heads and prompts) and the residual norm entering each block "
    "(median over prompts), for the sink and for one ordinary position of every prompt, at several prompt lengths."
)
WHICH = (
    " The verdict is about the largest growth of all, whichever event is explained; the numbers are about that event."
)


@dataclass(frozen=True, eq=False)
class Profile:
    """One token of every prompt, block by block."""

    attention: Float[Tensor, "layer prompt length"]
    """Attention that it receives from later queries, mean over heads."""
    norm: Float[Tensor, "layer prompt"]
    """Norm of its residual where it enters the block."""
    growth: Float[Tensor, "layer prompt"]
    """Factor by which the block multiplies that norm."""


def run(
    study: sl.Study,
    *,
    lengths: Annotated[tuple[int, ...], "prompt lengths to read attention at; a quarter, half and all by default"] = (),
) -> sl.Findings:
    lengths = study.lengths(lengths)
    tokens = profiles(study, lengths)
    *shorter, (share, control) = (shares(study, tokens, length) for length in range(len(lengths)))
    chance = 1 / (study.shape.n_layers - 1)
    in_steps = sl.analysis.judge(
        "quantity",
        "in step",
        CLAIM,
        statistic="share of prompts whose largest rise in attention comes one block after the largest growth of the "
        "norm",
        estimate=share,
        control=f"the same at an ordinary position (by chance {chance:.2f})",
        control_estimate=control,
        rule="holds when the whole interval of the share lies above one half, above chance and above the control's",
        conditions=conditions(share, control, chance),
    )
    rules = {f"{n} tokens": conditions(*x, chance) for n, x in zip(lengths[:-1], shorter, strict=True)}
    written = sl.analysis.cause(
        study,
        sl.stages.DOWN_PROJECTION,
        "transplant",
        "other_position",
        name="the block's write",
        sentence="What the MLP of that block writes is what the next blocks attend to.",
    )
    verdict = sl.analysis.verdict_of(CLAIM, [sl.analysis.elsewhere(in_steps, rules), written])
    later, growth = list(study.after_formation()), tokens["sink"].growth[study.formation.layer]
    attention = {who: study.mean(each.attention[later, :, -1].mean(0)) for who, each in tokens.items()}
    numbers = {
        "attention to the sink in the blocks after formation": attention["sink"],
        "attention to an ordinary token there": attention["ordinary"],
        "factor by which the formation block multiplies the sink's norm": study.mean(growth),
    }
    note = WHICH if "event" in study.given else ""
    return sl.Findings(verdict, table(tokens, lengths), CAPTION + note, numbers)


def profiles(study: sl.Study, lengths: tuple[int, ...]) -> dict[str, Profile]:
    """The sink, and an ordinary position of the same prompt."""
    blocks = tuple(range(study.shape.n_layers))
    readings = study.measure(
        [
            sl.Readout(
                "attention", sites.PATTERN, blocks, lambda a, _: metrics.received_at_lengths(a, lengths).mean(1)
            ),
            sl.Readout("entering", sites.RESID_PRE, blocks, lambda x, _: x.float().norm(dim=-1)),
            sl.Readout("leaving", sites.RESID_POST, blocks, lambda x, _: x.float().norm(dim=-1)),
        ]
    )
    positions = {"sink": study.sinks, "ordinary": study.ordinary_position("onset/ordinary")}
    profile = {}
    for who, position in positions.items():
        attention, entering, leaving = (at(readings[name], position) for name in ("attention", "entering", "leaving"))
        profile[who] = Profile(attention, entering, leaving / entering)
    return profile


def at(values: Float[Tensor, "layer prompt *rest pos"], position: Int[Tensor, " prompt"]) -> Tensor:
    """``[layer, prompt, ...]`` at one position of every prompt."""
    index = position.view(1, -1, *[1] * (values.ndim - 2))
    return values.take_along_dim(index, -1).squeeze(-1)


def shares(study: sl.Study, tokens: Mapping[str, Profile], length: int) -> tuple[sl.Estimate, sl.Estimate]:
    """Of the sink and of the ordinary position, the share of prompts in which both rise in step, at one length."""
    sink, ordinary = (study.mean(in_step(tokens[who], length)) for who in ("sink", "ordinary"))
    return sink, ordinary


def conditions(share: sl.Estimate, control: sl.Estimate, chance: float) -> list[sl.analysis.Condition]:
    return [sl.analysis.above(share, max(0.5, chance)), sl.analysis.above(share, control)]


def in_step(token: Profile, length: int = -1) -> Float[Tensor, " prompt"]:
    """1 for the prompts in which attention rises most one block after the norm grows most."""
    rise = token.attention[..., length].diff(dim=0)
    return (token.growth[:-1].argmax(0) == rise.argmax(0)).float()


def table(tokens: Mapping[str, Profile], lengths: tuple[int, ...]) -> pd.DataFrame:
    """A row for every token, block and length: mean attention, median norm."""
    rows = []
    for who, token in tokens.items():
        for layer, (attention, norm) in enumerate(zip(token.attention, token.norm, strict=True)):
            columns = {"layer": layer, "token": who, "norm": float(norm.median())}
            means = attention.nanmean(0).tolist()
            rows += [columns | {"length": n, "attention": mean} for n, mean in zip(lengths, means, strict=True)]
    return pd.DataFrame(rows, columns=["layer", "token", "length", "attention", "norm"])


def draw(findings: sl.Findings):
    longest = findings.table["length"].max()
    norms = findings.table[findings.table["length"] == longest]
    panels = [
        findings.table.assign(quantity="attention received", value=findings.table.attention),
        norms.assign(quantity="residual norm entering", value=norms.norm),
    ]
    lines = pd.concat(panels)
    lines["series"] = lines.token + ", " + lines["length"].astype(str) + " tokens"
    titles = {"layer": "block", "value": ""}
    figure = sl.viz.line(lines, "layer", "value", series="series", facet="quantity", titles=titles)
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
    sl.main(ANALYSIS)
