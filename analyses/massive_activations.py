"""Massive activations: where they live, and whether they are more than a constant.

    sinklens analyse massive_activations

Sun et al. (COLM 2024) call an entry of a hidden state massive when it is beyond 100 and beyond 1000 times that state's
median. Such entries stand on the first token and on few dimensions, behind one early block and nearly all that follow.
Set to zero where they first appear they break Llama-2-7B, and set to their mean over data they do not: they are
constants, biases that have no parameter. Owen et al. (arXiv 2503.22329) find the mean harmless in all of 16 models, and
zero harmful in nine.

The mean, and the dimensions, are those of every other prompt, and the loss is of the rest: a constant that was made of
the prompt itself could not do harm. The control replaces as many entries of median size at the same tokens.

Pitfall: both bounds are conventions; a small model can have a sink and none beyond them. That is *not measurable*, and
`--relative` and `--absolute` lower them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites
from sinklens.interventions import massive_patch
from sinklens.interventions.massive_activations import MassiveMode

CLAIM = "Massive activations live on the sink; without them the model breaks, and with a constant for each it does not."
MOST = 0.9  # ours
BREAKS, HARM = 0.5, 0.02  # ours, nats a token
MODES: tuple[MassiveMode, ...] = ("zero", "mean", "clamp")
CAPTION = (
    "Massive activations behind every block: how many of them a prompt has on its sink and on all other tokens (means "
    "over prompts). The dashed line is the block behind which they first appear."
)


def run(
    study: sl.Study,
    *,
    absolute: Annotated[float, "the magnitude to exceed", sl.Between(0)] = 100.0,
    relative: Annotated[float, "how many times the median magnitude to exceed", sl.Between(0)] = 1000.0,
) -> sl.Findings:
    if study.batch.n < 2:
        raise sl.NotApplicableError("a mean over data that has not seen the prompt needs at least two prompts")
    sinks = study.sinks  # found before anything is read, for a readout cannot run the model
    data, judged = (study.batch.subset(range(first, study.batch.n, 2)) for first in (0, 1))
    massive = sl.interventions.find_massive(study.model, data, absolute=absolute, relative=relative)
    count = counts(study, sinks, absolute, relative)  # [layer prompt (sink, others)]
    total = count.sum((0, 2))
    share = study.mean(torch.where(total > 0, count[..., 0].sum(0) / total, torch.nan))
    chance = sl.Estimate(1 / study.batch.length)
    added, attention = harm(study, judged, massive)
    verdict = sl.analysis.verdict_of(CLAIM, [where(share, chance), broken(added), constant(added)])
    x = largest(study, massive)
    numbers: dict[str, sl.Estimate | float] = {
        "block behind which they first appear": float(massive.layer),
        "dimensions that hold them there": float(len(massive.dims)),
        "share of the data's prompts that have some there": massive.share,
        "largest magnitude there": study.mean(x[:, 0]),
        "the same over the median magnitude": study.mean(x[:, 1]),
    }
    numbers |= {f"loss added, {name}, nats a token": x for name, x in added.items()}
    numbers |= {f"attention to the sink in the blocks behind, {name}": x for name, x in attention.items()}
    axes = {"layer": range(len(count)), "prompt": range(study.batch.n), "token": ("sink", "all others")}
    table = sl.analysis.tidy(count, axes, appear=massive.layer)
    return sl.Findings(verdict, table, CAPTION, numbers)


def counts(study: sl.Study, sinks: Tensor, absolute: float, relative: float) -> Float[Tensor, "layer prompt token"]:
    """How many there are behind every block, on the sink and elsewhere."""

    def count(x: Tensor, rows: sl.Rows) -> Tensor:
        each = metrics.massive_activations(x, absolute, relative).sum(-1).float()
        of_sink = each.take_along_dim(sinks.to(each.device)[rows.prompts][:, None], -1)[:, 0]
        return torch.stack([of_sink, each.sum(-1) - of_sink], -1)

    layers = tuple(range(study.shape.n_layers))
    return study.measure([sl.Readout("massive", sites.RESID_POST, layers, count)])["massive"]


def largest(study: sl.Study, massive: sl.interventions.Massive) -> Float[Tensor, "prompt quantity"]:
    """The largest magnitude of each prompt behind that block, and over its median."""

    def top(x: Tensor, _rows: sl.Rows) -> Tensor:
        flat = x.float().abs().flatten(1)
        return torch.stack([flat.amax(-1), flat.amax(-1) / flat.median(-1).values], -1)

    return study.measure([sl.Readout("top", sites.RESID_POST, (massive.layer,), top)])["top"][0]


def harm(
    study: sl.Study, judged: sl.PromptBatch, massive: sl.interventions.Massive
) -> tuple[dict[str, sl.Estimate], dict[str, sl.Estimate]]:
    """What every replacement adds to the loss of prompts that it was not made of, and leaves of the sink."""
    here = replace(study, batch=judged, given=dict(study.given))
    here.formation = replace(study.formation, sink_positions=study.formation.sink_positions[1::2])
    behind = tuple(range(massive.layer + 1, study.shape.n_layers)) or (massive.layer,)  # where they first appear
    loss, attention = here.readout("loss"), sl.readouts.attention_received("attention", behind, here.sink, judged.n)
    arms = {mode: massive_patch(massive, mode, length=judged.length) for mode in MODES}
    arms |= {"zero, as many of median size": massive_patch(massive, "zero", control=True, length=judged.length)}
    patches = list(arms.values())
    result = here.run(patches, [loss, attention])
    losses = dict(zip(arms, result.added(patches, "loss"), strict=True))
    attentions = {"untouched": result.runs["base"]["attention"]}
    attentions |= dict(zip(arms, result.values["attention"], strict=True))
    added, left = ({name: here.mean(x) for name, x in of.items()} for of in (losses, attentions))
    return added, left


def where(share: sl.Estimate, chance: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "quantity",
        "on the sink",
        "Massive activations live on the sink.",
        statistic="share of a prompt's massive activations, behind all blocks, that are the sink's",
        estimate=share,
        control="a token by chance",
        control_estimate=chance,
        rule=f"holds when the whole interval lies above {MOST}",
        conditions=[sl.analysis.above(share, MOST)],
    )


def broken(added: dict[str, sl.Estimate]) -> sl.analysis.Part:
    zero, control = added["zero"], added["zero, as many of median size"]
    return sl.analysis.judge(
        "cause",
        "zero breaks",
        "Without its massive activations the model breaks.",
        statistic="loss added when they are set to zero where they first appear, nats a token",
        estimate=zero,
        control="the same of as many entries of median size",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {BREAKS} and the control's below {HARM}",
        conditions=[sl.analysis.above(zero, BREAKS), sl.analysis.below(control, HARM)],
    )


def constant(added: dict[str, sl.Estimate]) -> sl.analysis.Part:
    return sl.analysis.judge(
        "cause",
        "mean does not",
        "With a constant in the place of each it does not.",
        statistic="loss added when each is set to its mean over other prompts, nats a token",
        estimate=added["mean"],
        control="set to zero",
        control_estimate=added["zero"],
        rule=f"holds when the whole interval lies below {HARM} and the control's above",
        conditions=[sl.analysis.below(added["mean"], HARM), sl.analysis.above(added["zero"], HARM)],
    )


def draw(findings: sl.Findings):
    lines: pd.DataFrame = findings.table.groupby(["token", "layer"], sort=False).value.mean().reset_index()
    titles = {"layer": "block", "value": "massive activations in a prompt", "token": ""}
    figure = sl.viz.line(lines, "layer", "value", series="token", titles=titles)
    return sl.viz.mark(figure, x=int(findings.table["appear"].iloc[0]))


ANALYSIS = sl.Analysis(
    name="massive_activations",
    title="Massive activations",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="Llama-2-7B: perplexity 5.47, infinite with zero, 5.47 with the mean (Sun et al., COLM 2024)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
