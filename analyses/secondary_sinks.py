"""Are there other sinks than the first, and what makes them?

    sinklens analyse secondary_sinks

Secondary sinks (arXiv 2512.22213) are tokens further on whose hidden state comes to point where the first sink's does,
for some blocks. They are told as in the released code: where the first sink lives, a later token is one behind a block
if ``|cos| > 0.9`` with it there; up to 4 blocks of that are noise, and more than ``L - 16`` of ``L`` make it one like
the first. Its level is the block that makes it, and in how many it lives. The code looks where the sink's norm grows
most; a model may make its sink in several events, so here every event is looked at behind its own blocks.

What makes them? On the MLP's way (its normed input, its neurons, what it writes) such a token is compared with the
first sink in the block that makes it, and the exact edit puts what that MLP writes at an ordinary token in its place:
then the token must lose its attention. The MLP of the block before it is the control. Steering scales what is written.

The control of the detection is the same search around an ordinary token: that others point where it does is the
likeness of hidden states as such.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

import sinklens as sl
from sinklens import edits, metrics, sites

CLAIM = "Later tokens become sinks like the first one for some blocks, and the MLP of one block makes them."
ALIKE = 0.9
"""Of the paper: |cos| with the first sink of a token that is one."""
BELOW_FIRST = 15
"""Of the paper: who is alike in all but so many blocks of the model is like the first."""
HALF, CLOSE = 0.5, 0.9  # ours
STAGES = {"MLP input": sites.LN2_NORMALIZED, "neurons": sites.MLP_POST, "MLP output": sites.MLP_OUT}
SCALES = (0.0, 0.25, 0.5, 2.0)
CAPTION = (
    "How many later tokens of a prompt point where the first sink points (|cos| > 0.9), behind every block: mean over "
    "prompts; and the same around an ordinary token. The dashed line is the formation block that is explained."
)


@dataclass(frozen=True, eq=False)
class SecondarySinks:
    """One secondary sink of each prompt that has one."""

    prompts: Int[Tensor, " sink"]
    """The prompts."""
    positions: Int[Tensor, " sink"]
    """Where it stands."""
    blocks: Int[Tensor, " sink"]
    """The block that makes it."""
    lifetime: Int[Tensor, " sink"]
    """In how many blocks it is one."""

    def subset(self, chosen: Int[Tensor, " chosen"]) -> SecondarySinks:
        """Some of them, by their numbers."""
        return SecondarySinks(self.prompts[chosen], self.positions[chosen], self.blocks[chosen], self.lifetime[chosen])


def run(
    study: sl.Study,
    *,
    least: Annotated[int, "blocks in which a token must be alike: fewer are noise", sl.Between(1)] = 5,
) -> sl.Findings:
    hidden = study.activations(sites.RESID_POST, range(study.shape.n_layers))
    states = torch.stack([x.float().cpu() for x in hidden.values()])  # [layer prompt pos d_model]
    other = study.ordinary_position("secondary_sinks/ordinary")
    (held, lifetime), (held_other, lifetime_other) = (alike_to(study, states, who) for who in (study.sinks, other))
    like_first = max(study.shape.n_layers - BELOW_FIRST, least)
    share, control = (study.mean((x >= least).any(-1).float()) for x in (lifetime, lifetime_other))
    secondary = one_each(held, lifetime, least)
    parts = [there(share, control, least), *made_by(study, secondary)]
    verdict = sl.analysis.verdict_of(CLAIM, parts)
    numbers: dict[str, sl.Estimate | float] = {
        "secondary sinks in a prompt": study.mean(((lifetime >= least) & (lifetime < like_first)).sum(-1).float()),
        "of these, like the first": study.mean((lifetime >= like_first).sum(-1).float()),
        "secondary sinks in a prompt, in the range of the largest growth alone (as released)": study.mean(
            (in_one_range(study, states).sum(0) >= least).sum(-1).float()
        ),
    }
    numbers |= {f"prompts with one of level {level}": float(n) for level, n in levels(secondary).items()}
    numbers |= stagewise(study, secondary) | steering(study, secondary)
    axes = {"layer": range(len(held)), "prompt": range(study.batch.n)}
    formation = study.formation.layer
    marks = {"the first sink": held, "an ordinary token": held_other}
    tables = [sl.analysis.tidy(x.sum(-1).float(), axes, around=who, formation=formation) for who, x in marks.items()]
    return sl.Findings(verdict, pd.concat(tables, ignore_index=True), CAPTION, numbers)


def alike_to(study: sl.Study, states: Tensor, who: Tensor) -> tuple[Tensor, Tensor]:
    """Which later tokens are alike to one, ``[layer prompt pos]``, where the first sink lives; the most blocks of one
    event for which each is, ``[prompt pos]``.
    """
    n, length = study.batch.n, study.batch.length
    alike = metrics.alike(states, states[:, torch.arange(n), who]) > ALIKE
    alike &= torch.arange(length) > who[:, None]
    alike[:, torch.arange(n), study.sinks] = False
    held, lifetime = torch.zeros_like(alike), torch.zeros(n, length, dtype=torch.long)
    for lives in ranges(study, states):
        here = alike & lives[..., None]
        held |= here
        lifetime = torch.maximum(lifetime, here.sum(0))
    return held, lifetime


def ranges(study: sl.Study, states: Tensor) -> list[Tensor]:
    """For every event the blocks behind which the sink lives, ``[layer prompt]``: before the next event at most."""
    norm = metrics.vector_norm(states[:, torch.arange(study.batch.n), study.sinks])
    starts = [step.blocks[0] for step in study.formation.steps] or [study.formation.layer]
    ends, lives = [*starts[1:], len(norm)], []
    for start, end in zip(starts, ends, strict=True):
        first, alive = max(start - 1, 0), torch.zeros_like(norm, dtype=torch.bool)
        if end - first > 1:
            alive[first:end] = metrics.alive(norm[first:end])
        lives.append(alive)
    return lives


def in_one_range(study: sl.Study, states: Tensor) -> Tensor:
    """As :func:`alike_to`, where the released code looks: between the largest growth and the largest fall of all."""
    rows = torch.arange(study.batch.n)
    sink = states[:, rows, study.sinks]
    held = (metrics.alike(states, sink) > ALIKE) & metrics.alive(metrics.vector_norm(sink))[..., None]
    return held & (torch.arange(study.batch.length) > study.sinks[:, None])


def one_each(held: Tensor, lifetime: Tensor, least: int) -> SecondarySinks:
    """Of every prompt that has some the one that lives longest."""
    longest, where = lifetime.max(-1)
    prompts = (longest >= least).nonzero()[:, 0]
    positions = where[prompts]
    blocks = held[:, prompts, positions].int().argmax(0)
    return SecondarySinks(prompts, positions, blocks, longest[prompts])


def levels(secondary: SecondarySinks) -> dict[str, int]:
    """How many prompts have one of each level."""
    pairs = zip(secondary.blocks.tolist(), secondary.lifetime.tolist(), strict=True)
    names = [f"(block {block}, {lifetime} blocks)" for block, lifetime in pairs]
    return {name: names.count(name) for name in sorted(set(names))}


def there(share: sl.Estimate, control: sl.Estimate, least: int) -> sl.analysis.Part:
    return sl.analysis.judge(
        "quantity",
        "there",
        "Later tokens become sinks like the first one for some blocks.",
        statistic=f"share of prompts in which a later token points where the first sink does (|cos| > {ALIKE}) for "
        f"{least} blocks or more",
        estimate=share,
        control="the same around an ordinary token",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {HALF} and above the control's",
        conditions=[sl.analysis.above(share, HALF), sl.analysis.above(share, control)],
    )


def of_block(study: sl.Study, secondary: SecondarySinks) -> tuple[Any, SecondarySinks, int] | None:
    """The prompts whose secondary sink is made in the block that makes most of them, with the study of these."""
    if not len(secondary.prompts) or int(block := secondary.blocks.mode().values) == 0:
        return None
    few = secondary.subset((secondary.blocks == block).nonzero()[:, 0])
    rows = few.prompts.tolist()
    here = replace(study, batch=study.batch.subset(rows), given=dict(study.given))
    sinks = tuple(study.formation.sink_positions[row] for row in rows)
    here.formation = replace(study.formation, sink_positions=sinks)
    return here, few, int(block)


def made_by(study: sl.Study, secondary: SecondarySinks) -> list[sl.analysis.Part]:
    """Is it made on the way on which the first sink is made, and by that MLP?"""
    name, sentence = "by the MLP", "The MLP of the block that makes them is what makes them."
    if (chosen := of_block(study, secondary)) is None:
        return [sl.analysis.unmeasured("cause", name, sentence, "there is no secondary sink to ask it of")]
    here, few, block = chosen
    estimate, control = (here.mean(lost(here, few, block, site)) for site in (sites.MLP_OUT, sites.ATTN_OUT))
    return [
        sl.analysis.judge(
            "cause",
            name,
            sentence,
            statistic=f"share of a secondary sink's attention that goes when block {block}'s MLP writes there what it "
            "writes at an ordinary token",
            estimate=estimate,
            control="the same for what attention writes in that block",
            control_estimate=control,
            rule=f"holds when the whole interval lies above {HALF} and above the control's",
            conditions=[sl.analysis.above(estimate, HALF), sl.analysis.above(estimate, control)],
        )
    ]


def lost(
    study: sl.Study, secondary: SecondarySinks, block: int, site: sl.HookSite, scale: float | None = None
) -> Float[Tensor, " prompt"]:
    """Share of the attention above an ordinary token's that goes, while the secondary sink lives, when what the block
    writes at ``site`` is ``scale`` times what it is; without one, the mean of what it is at ordinary tokens.
    """
    where = tuple((position,) for position in secondary.positions.tolist())
    last = min(block + 1 + int(secondary.lifetime.min()), study.shape.n_layers)  # behind those it is alike
    layers = tuple(range(block + 1, last))
    ordinary = study.ordinary.clone()
    ordinary[torch.arange(len(where)), secondary.positions] = False
    wrote = study.activations(site, (block,))[block].float()
    if scale is None:
        values = wrote[ordinary.to(wrote.device)].mean(0).expand(len(wrote), -1)
    else:
        values = scale * wrote[torch.arange(len(wrote)), secondary.positions.to(wrote.device)]
    patch = sl.Patch(site, (block,), where, edits.PerPrompt("written", {block: values}))
    readouts = [
        sl.readouts.attention_received("attention", layers, where, study.batch.n),
        sl.readouts.attention_ordinary("ordinary", layers, ordinary.float()),
    ]
    result = study.run([patch], readouts)
    before, usual = (result.runs["base"][name] for name in ("attention", "ordinary"))
    return (before - result.values["attention"][0]) / (before - usual)


def stagewise(study: sl.Study, secondary: SecondarySinks) -> dict[str, sl.Estimate]:
    """Cosine with the first sink on the MLP's way, of the secondary sinks and of ordinary tokens."""
    if (chosen := of_block(study, secondary)) is None:
        return {}
    here, few, block = chosen
    other, rows, numbers = here.ordinary_position("secondary_sinks/stagewise", ()), torch.arange(len(few.prompts)), {}
    for name, site in STAGES.items():
        try:
            x = here.activations(site, (block,))[block].float().cpu()
        except (sl.NotApplicableError, sl.EngineError):  # no dense MLP, no norm in front of it
            continue
        for who, positions in (("a secondary sink", few.positions), ("an ordinary token", other)):
            cosine = metrics.cosine(x[rows, positions], x[rows, here.sinks])
            numbers[f"cosine with the first sink in block {block}, {name}, {who}"] = here.mean(cosine)
    return numbers


def steering(study: sl.Study, secondary: SecondarySinks) -> dict[str, sl.Estimate]:
    """What scaling the MLP's write takes away of a secondary sink's attention."""
    if (chosen := of_block(study, secondary)) is None:
        return {}
    here, few, block = chosen
    name = f"attention that a secondary sink loses when the MLP of block {block} writes"
    return {f"{name} {x:g} times as much": here.mean(lost(here, few, block, sites.MLP_OUT, x)) for x in SCALES}


def draw(findings: sl.Findings):
    lines = findings.table.groupby(["around", "layer"], sort=False).value.mean().reset_index()
    titles = {"layer": "block", "value": "tokens that point there", "around": ""}
    figure = sl.viz.line(lines, "layer", "value", series="around", titles=titles)
    return sl.viz.mark(figure, x=int(findings.table.formation.iloc[0]))


ANALYSIS = sl.Analysis(
    name="secondary_sinks",
    title="Other sinks than the first",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="3 levels in QwQ-32B, 6 in Qwen3-14B (arXiv 2512.22213)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
