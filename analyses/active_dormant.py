"""Are there heads that are dormant on one kind of text, looking at the sink, and active on another?

    sinklens analyse active_dormant

Guo et al. (arXiv 2410.13835) found a head of Llama-2 that looks at the sink on one kind of text and elsewhere on
another: the sink is where a head waits for its trigger. Two kinds are made here of the same tokens: the prompts as they
are, and *copied* ones, whose second half says the first one again, which is the trigger of all that continues what has
been there before (the task of Guo et al., in natural words). Random tokens are read besides. Attention is read from the
queries of the second half alone, so that position plays no part.

A head *switches* when it has a sink on one kind (more than 0.3 of its attention there) and on the other neither that
nor within 0.2 of it. The null gives every prompt's two readings to the two kinds at random. If switching is what such
heads are for, silencing them must cost more where they are awake than where they are dormant, and more than as many
other heads there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import sinklens as sl
from sinklens import edits, sites, statistics

CLAIM = "Some heads look at the sink on one kind of text and are active on another, where they are needed."
LEAST = 0.05  # ours: one head in twenty
APART = 0.2  # ours
NATURAL, COPIED, RANDOM = "as they are", "copied", "random tokens"
CAPTION = (
    "Attention that the sink receives from the second half of the prompts, for every head behind the formation block: "
    "prompts as they are against prompts whose second half says the first again (means over prompts)."
)

Heads = Sequence[tuple[int, int]]
"""Block and head."""


def run(
    study: sl.Study,
    *,
    eps: Annotated[float, "attention received with which a head has a sink", sl.Between(0, 1)] = 0.3,
    draws: Annotated[int, "draws of the null, and of other heads", sl.Between(1, 100_000)] = 200,
) -> sl.Findings:
    layers = study.after_formation(None)
    kinds = {NATURAL: study, COPIED: copied(study), RANDOM: study.random}
    share = {kind: shares(here, study, layers) for kind, here in kinds.items()}  # [prompt layer head]
    switched = switches(share[NATURAL].mean(0), share[COPIED].mean(0), eps)

    def share_of_heads(prompts: np.ndarray) -> float:
        one, other = (share[kind][prompts].mean(0) for kind in (NATURAL, COPIED))
        return float(switches(one, other, eps).float().mean())

    estimate, null = study.bootstrap(share_of_heads), nulls(study, share, eps, draws)
    heads = [(layers[i], j) for i, j in switched.nonzero().tolist()]
    verdict = sl.analysis.verdict_of(CLAIM, [there(estimate, null), needed(study, kinds, heads, layers)])
    drop = (share[NATURAL].mean(0) - share[COPIED].mean(0)).flatten()
    numbers: dict[str, sl.Estimate | float] = {
        "heads that switch": float(len(heads)),
        "heads that have a sink in the prompts as they are, share": float(
            (share[NATURAL].mean(0) > eps).float().mean()
        ),
        "largest fall of a head's sink, as they are to copied": float(drop.max()),
    }
    numbers |= {f"attention that the sink receives, {kind}": study.mean(x.mean((1, 2))) for kind, x in share.items()}
    places = pd.MultiIndex.from_product([layers, range(study.shape.n_heads)], names=["layer", "head"])
    columns = {kind.replace(" ", "_"): x.mean(0).flatten().double().numpy() for kind, x in share.items()}
    table = pd.DataFrame(columns | {"switches": switched.flatten().numpy()}, index=places).reset_index()
    return sl.Findings(verdict, table, CAPTION, numbers)


def copied(study: sl.Study) -> sl.Study:
    """The same study on prompts whose second half is their first."""
    half = study.batch.length // 2
    rest = study.batch.length - half
    first = study.batch.tokens[:, :half]
    tokens = torch.cat([first, first.repeat(1, 2)[:, :rest]], 1)
    batch = sl.prompts.from_tokens(study.model, tokens, groups=study.batch.groups)
    here = replace(study, batch=batch, given=dict(study.given))
    here.formation = study.formation
    return here


def shares(here: sl.Study, study: sl.Study, layers: tuple[int, ...]) -> Float[Tensor, "prompt layer head"]:
    """Attention that the position of the sink receives from the queries of the second half."""
    half = here.batch.length // 2

    def received(pattern: Tensor, rows: sl.Rows) -> Tensor:
        sinks = study.sinks.to(pattern.device)[rows.prompts]
        late = pattern[:, :, half:].float()
        return late.take_along_dim(sinks[:, None, None, None], -1)[..., 0].mean(-1)

    return here.measure([sl.Readout("share", sites.PATTERN, layers, received)])["share"].transpose(0, 1)


def switches(
    one: Float[Tensor, "layer head"], other: Float[Tensor, "layer head"], eps: float
) -> Bool[Tensor, "layer head"]:
    """Which heads have a sink on one of two kinds of text, and none on the other."""
    return ((one > eps) != (other > eps)) & ((one - other).abs() > APART)


def nulls(study: sl.Study, share: dict[str, Tensor], eps: float, draws: int) -> sl.Estimate:
    """The share of heads that switch when the two readings of every prompt change places at random."""
    drawn = study.generator("active_dormant/null")
    both, switching = torch.stack([share[NATURAL], share[COPIED]]), []
    for _ in range(draws):
        swap = torch.rand(study.batch.n, generator=drawn) < 0.5
        one, other = (torch.where(swap[:, None, None], both[1 - i], both[i]).mean(0) for i in (0, 1))
        switching.append(float(switches(one, other, eps).float().mean()))
    return statistics.null_estimate(switching)


def there(share: sl.Estimate, null: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "quantity",
        "switch",
        "Some heads look at the sink on one kind of text and not on another.",
        statistic="share of the heads behind formation that switch between the prompts as they are and copied ones",
        estimate=share,
        control="the same with the two readings of each prompt exchanged at random",
        control_estimate=null,
        rule=f"holds when the whole interval lies above {LEAST} and above 95% of the null's draws",
        conditions=[sl.analysis.above(share, LEAST), sl.analysis.above(share, null)],
    )


def needed(study: sl.Study, kinds: dict[str, sl.Study], heads: Heads, layers: tuple[int, ...]) -> sl.analysis.Part:
    """The cause: are they needed where they are awake?"""
    name, sentence = "needed where active", "Where they are active they are needed."
    rest = [(layer, head) for layer in layers for head in range(study.shape.n_heads) if (layer, head) not in heads]
    if not heads or len(rest) < len(heads):
        return sl.analysis.unmeasured("cause", name, sentence, "no head switches" if not heads else "most heads switch")
    drawn = study.generator("active_dormant/others")
    others = [[rest[i] for i in torch.randperm(len(rest), generator=drawn)[: len(heads)]] for _ in range(3)]
    added = {kind: loss_added(kinds[kind], [heads, *others]) for kind in (NATURAL, COPIED)}
    awake, dormant = (added[kind][0] for kind in (COPIED, NATURAL))
    more, control = study.mean(awake - dormant), study.mean((added[COPIED] - added[NATURAL])[1:].mean(0))
    return sl.analysis.judge(
        "cause",
        name,
        sentence,
        statistic="loss of the second half that silencing these heads adds: on copied prompts more than on the "
        "prompts as they are, nats a token",
        estimate=more,
        control="the same for as many other heads behind formation (mean over draws)",
        control_estimate=control,
        rule="holds when the whole interval lies above 0 and above the control's",
        conditions=[sl.analysis.above(more, 0.0), sl.analysis.above(more, control)],
        detail=f"on copied prompts {statistics.estimate_text(study.mean(awake))}, as they are "
        f"{statistics.estimate_text(study.mean(dormant))}",
    )


def loss_added(study: sl.Study, sets: Sequence[Heads]) -> Float[Tensor, "set prompt"]:
    """What silencing each set of heads adds to the loss of the second half."""
    everywhere, patches = tuple(range(study.batch.length)), []
    for heads in sets:
        blocks = sorted({layer for layer, _ in heads})
        units = [tuple(head for layer, head in heads if layer == block) for block in blocks]
        parts = [
            sl.Patch(sites.Z, (block,), everywhere, edits.Constant(), chosen)
            for block, chosen in zip(blocks, units, strict=True)
        ]
        patches.append(replace(parts[0], also=tuple(parts[1:])))
    late = sl.readouts.next_token_loss("loss", study.batch.tokens, study.shape.n_layers, study.batch.length // 2)
    return study.run(patches, [late]).added(patches, "loss")


def draw(findings: sl.Findings):
    titles = {"as_they_are": "sink's attention, prompts as they are", "copied": "sink's attention, copied prompts"}
    table = findings.table
    named = table.assign(name=[f"{a}.{b}" for a, b in zip(table["layer"], table["head"], strict=True)])
    return sl.viz.points(named, "as_they_are", "copied", series="switches", titles=titles, hover=("name",))


ANALYSIS = sl.Analysis(
    name="active_dormant",
    title="Heads that are active or dormant",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="active-dormant heads (Guo et al., arXiv 2410.13835)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
