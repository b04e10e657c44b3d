"""Does the sink keep tokens from mixing too much: how far does one changed token spread, with the sink and without?

    sinklens analyse overmixing

Barbero et al. (COLM 2025) hold that a sink is what a deep model needs against over-mixing: attention that has nowhere
else to go blends every token with every other, and a sink takes it away. So a token is exchanged for another one, and
what that moves in the last hidden states of the later tokens is measured, relative to their norm. Without the sink as a
place to look at (behind the formation block its weight goes to the other keys, as if it were masked) it must spread
farther. Doing without an ordinary token is the control: any edit of attention moves something.

Is it the place, or what is taken from it? With the sink's value at zero attention is where it was and blends no more
than before; only what comes from the sink is missing. That must not let the change spread. Relative to a norm this is
no matter of scale: what is asked is a difference over what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, sites

CLAIM = "The sink keeps tokens from mixing: without it a changed token spreads farther."
LEAST = 1.1  # ours: a tenth more
WITH, WITHOUT, ANOTHER, NO_VALUE = "as it is", "without the sink", "without an ordinary token", "sink without a value"
CAPTION = (
    "How far one exchanged token moves the hidden states of later tokens, relative to their norm, behind every block: "
    "as the model is, without the sink (or an ordinary token) as a place to look at, and with a sink whose value is "
    "zero; geometric mean over prompts and exchanged tokens. The dashed line is the formation block."
)


def run(
    study: sl.Study,
    *,
    positions: Annotated[tuple[int, ...], "tokens to exchange, one at a time"] = (5, 20),
) -> sl.Findings:
    changed = study.targets(positions)
    blocks = tuple(range(study.formation.layer, study.shape.n_layers))
    arms = patches(study, study.after_formation(None), changed)
    others = [exchanged(study, k) for k in changed]
    moved = {arm: spread(study, changed, others, blocks, patch) for arm, patch in arms.items()}
    last = {arm: x[:, -1].log().mean(0) for arm, x in moved.items()}  # [prompt]

    def factor(arm: str) -> sl.Estimate:
        """Geometric mean over prompts and tokens of how much farther it spreads than as the model is."""
        return study.bootstrap(lambda prompts: (last[arm] - last[WITH])[prompts].mean().exp().item())

    without, another, no_value = map(factor, (WITHOUT, ANOTHER, NO_VALUE))
    verdict = sl.analysis.verdict_of(CLAIM, [spreads(without, another), place(without, no_value)])
    numbers = {f"relative change of the last hidden states, {arm}": spread_of(study, x) for arm, x in last.items()}
    axes = {"position": changed, "layer": blocks, "prompt": range(study.batch.n)}
    tables = [sl.analysis.tidy(x, axes, arm=arm, formation=study.formation.layer) for arm, x in moved.items()]
    return sl.Findings(verdict, pd.concat(tables, ignore_index=True), CAPTION, numbers)


def spread_of(study: sl.Study, logs: Float[Tensor, " prompt"]) -> sl.Estimate:
    return study.bootstrap(lambda prompts: logs[prompts].mean().exp().item())


def spreads(without: sl.Estimate, another: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "cause",
        "without the sink",
        CLAIM,
        statistic="how much farther an exchanged token moves the last hidden states when nobody can look at the sink "
        "(a factor)",
        estimate=without,
        control="the same when nobody can look at an ordinary token",
        control_estimate=another,
        rule=f"holds when the whole interval lies above {LEAST} and above the control's",
        conditions=[sl.analysis.above(without, LEAST), sl.analysis.above(without, another)],
    )


def place(without: sl.Estimate, no_value: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "cause",
        "the place",
        "It is the place to look at that keeps them apart, not what is taken from there.",
        statistic="how much farther it moves them when the sink's value is zero and attention stays (a factor)",
        estimate=no_value,
        control="when nobody can look at the sink",
        control_estimate=without,
        rule=f"holds when the whole interval lies below {LEAST} and below the control's",
        conditions=[sl.analysis.below(no_value, LEAST), sl.analysis.below(no_value, without)],
    )


def patches(study: sl.Study, layers: tuple[int, ...], changed: Sequence[int]) -> dict[str, tuple[sl.Patch, ...]]:
    """What is done to the sink, or to an ordinary token that is none of those exchanged."""
    ordinary = study.ordinary_position("overmixing/another", changed)

    def masked(positions: Tensor) -> sl.Patch:
        n, length = study.batch.n, study.batch.length
        keep = torch.ones(n, length, length, dtype=torch.bool)
        keep[torch.arange(n), :, positions] = False
        later = tuple(tuple(range(k + 1, length)) for k in positions.tolist())
        return sl.Patch(sites.PATTERN, layers, later, edits.MaskKeys(keep=keep))

    return {
        WITH: (),
        WITHOUT: (masked(study.sinks),),
        ANOTHER: (masked(ordinary),),
        NO_VALUE: (sl.Patch(sites.V, layers, study.sink, edits.Constant()),),
    }


def exchanged(study: sl.Study, position: int) -> sl.Study:
    """The same prompts with the token at one position exchanged: each has that of another prompt there."""
    tokens = study.batch.tokens.clone()
    order = torch.randperm(study.batch.n, generator=study.generator(f"overmixing/{position}"))
    other = torch.empty_like(tokens[:, position])
    other[order] = tokens[order.roll(1), position]
    # Where that is the same one, or there is no other prompt, the token before it is said twice.
    tokens[:, position] = torch.where(other == tokens[:, position], tokens[:, position - 1], other)
    here = replace(study, batch=sl.prompts.from_tokens(study.model, tokens), given=dict(study.given))
    here.formation = study.formation
    return here


def spread(
    study: sl.Study,
    changed: Sequence[int],
    others: Sequence[sl.Study],
    blocks: tuple[int, ...],
    arm: tuple[sl.Patch, ...],
) -> Float[Tensor, "position layer prompt"]:
    """``|h' - h| / |h|`` behind every block, mean over the positions behind the token that is exchanged."""
    before, distances = study.activations(sites.RESID_POST, blocks, arm), []
    for position, other in zip(changed, others, strict=True):
        after = other.activations(sites.RESID_POST, blocks, arm)
        moved = [metrics.vector_norm(after[b] - before[b]) / metrics.vector_norm(before[b]) for b in blocks]
        distances.append(torch.stack([x[:, position + 1 :].mean(-1).cpu() for x in moved]))
    return torch.stack(distances)


def draw(findings: sl.Findings):
    lines = findings.table.groupby(["arm", "layer"], sort=False).value.apply(geometric).reset_index()
    titles = {"layer": "block", "value": "relative change of later tokens", "arm": ""}
    figure = sl.viz.line(lines, "layer", "value", series="arm", titles=titles, log_y=True)
    return sl.viz.mark(figure, x=int(findings.table.formation.iloc[0]))


def geometric(values: pd.Series) -> float:
    return float(torch.tensor(values.to_numpy()).log().mean().exp())


ANALYSIS = sl.Analysis(
    name="overmixing",
    title="Over-mixing",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="sinks against over-mixing (Barbero et al., COLM 2025)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
