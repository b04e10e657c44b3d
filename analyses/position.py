"""Which token becomes the sink: the first one, whichever it is, or one of a kind (BOS, a delimiter, a repeated one)?

    sinklens analyse position

A sink has been seen on BOS, on the first token of whatever text (Gu et al., ICLR 2025), on delimiters (Sun et al., COLM
2024) and, where one token is repeated, on many (Yona et al., arXiv 2503.08908). The same prompts are read with another
token first, with a BOS or a delimiter in front, and with the first token exchanged for one further on: a token that is
looked at for what it *is* takes the sink along, and one that is looked at for where it *stands* leaves it.

In a prompt of one repeated token, a model that knows positions by rotation alone averages equal values, whatever it
attends to: every hidden state is that of the first token, so that all are as large as a sink. A model with learned
positions can tell them apart.

Pitfall: the most attended position is asked for, which there is in every prompt; how much it receives stands beside it.
"""

from __future__ import annotations

from typing import Annotated

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

import sinklens as sl
from sinklens import metrics, sites
from sinklens.models.view import bos_token, tokenizer_of

CLAIM = "The first token is the sink, whichever it is; in a prompt of one repeated token all tokens are like it."
MOST = 0.9  # ours: of prompts
HALF = 0.5  # ours
AS_IS, OTHER_FIRST, EXCHANGED = "as they are", "another first token", "first token exchanged"
REPEATED, BOS = "one token repeated", "BOS in front"
DELIMITERS = {"newline in front": "\n", "full stop in front": "."}
CAPTION = (
    "Attention received from later queries behind the formation block (mean over heads), and the norm of the hidden "
    "state that leaves it over that of the first token, by position: means over prompts, for every kind of prompt."
)


def run(
    study: sl.Study,
    *,
    position: Annotated[int, "where the first token goes that is exchanged", sl.Between(1)] = 10,
) -> sl.Findings:
    (moved,) = study.targets((position,))
    kinds = prompts(study, moved)
    received, norm = {}, {}
    for kind, tokens in kinds.items():
        received[kind], norm[kind] = read(study, tokens)
    first = {kind: study.mean((x.argmax(-1) == 0).float()) for kind, x in received.items() if kind != REPEATED}
    changed = {kind: share for kind, share in first.items() if kind != AS_IS}
    weakest = min(changed, key=lambda kind: changed[kind].low)
    taken_along = study.mean((received[EXCHANGED].argmax(-1) == moved).float())
    like = {kind: study.mean(x[:, 1:].mean(-1)) for kind, x in norm.items()}
    parts = [
        is_first(first[AS_IS], study.batch.length),
        whichever(weakest, changed[weakest], taken_along),
        all_alike(like[REPEATED], like[AS_IS]),
    ]
    verdict = sl.analysis.verdict_of(CLAIM, parts)
    numbers = {f"share of prompts whose first token is most attended, {kind}": share for kind, share in first.items()}
    numbers |= {f"attention that the first token receives, {k}": study.mean(x[:, 0]) for k, x in received.items()}
    numbers |= {f"norm of later tokens over the first's, {kind}": x for kind, x in like.items()} | delimiters(
        study, received
    )
    tables = []
    for quantity, values in (("attention received", received), ("norm over the first's", norm)):
        for kind, x in values.items():
            axes = {"position": range(x.shape[1])}
            tables.append(sl.analysis.tidy(x.nanmean(0), axes, kind=kind, quantity=quantity))
    return sl.Findings(verdict, pd.concat(tables, ignore_index=True), CAPTION, numbers)


def prompts(study: sl.Study, moved: int) -> dict[str, Int[Tensor, "prompt pos"]]:
    """The same prompts with something else in front, or elsewhere."""
    tokens, kinds = study.batch.tokens, {AS_IS: study.batch.tokens}
    others = tokens[:, 1:].flatten()
    drawn = others[torch.randint(len(others), (len(tokens),), generator=study.generator("position/first"))]
    kinds[OTHER_FIRST] = torch.cat([drawn[:, None], tokens[:, 1:]], 1)
    exchanged = tokens.clone()
    exchanged[:, 0], exchanged[:, moved] = tokens[:, moved], tokens[:, 0]
    kinds[EXCHANGED] = exchanged
    kinds[REPEATED] = tokens[:, moved : moved + 1].expand_as(tokens).contiguous()
    in_front = {} if (bos := bos_token(study.model)) is None else {BOS: bos}
    if (tokenizer := tokenizer_of(study.model)) is not None:
        for name, text in DELIMITERS.items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            in_front |= {name: ids[-1]} if len(ids) else {}
    for name, token in in_front.items():
        kinds[name] = torch.cat([torch.full_like(tokens[:, :1], token), tokens[:, :-1]], 1)
    return kinds


def read(study: sl.Study, tokens: Int[Tensor, "prompt pos"]) -> tuple[Float[Tensor, "prompt pos"], ...]:
    """Attention received behind formation, and the norm that leaves the formation block over the first token's."""
    batch = sl.prompts.from_tokens(study.model, tokens)
    here = sl.Study.of(study.model, batch, seed=study.seed, memory_budget=study.memory_budget, rows=study.rows)
    attention = sl.Readout(
        "attention", sites.PATTERN, study.after_formation(), lambda a, _: metrics.attention_received(a).mean(1)
    )
    block = (study.formation.layer,)
    readings = here.measure(
        [attention, sl.Readout("norm", sites.RESID_POST, block, lambda x, _: metrics.vector_norm(x))]
    )
    received = readings["attention"].mean(0)[:, :-1]  # the last token has no later query
    return received, readings["norm"][0] / readings["norm"][0, :, :1]


def is_first(share: sl.Estimate, length: int) -> sl.analysis.Part:
    return sl.analysis.judge(
        "quantity",
        "first",
        "The first token is the sink.",
        statistic="share of prompts whose most attended token behind the formation block is the first",
        estimate=share,
        control="by chance",
        control_estimate=sl.Estimate(1 / length),
        rule=f"holds when the whole interval lies above {MOST}",
        conditions=[sl.analysis.above(share, MOST)],
    )


def whichever(kind: str, share: sl.Estimate, taken_along: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "cause",
        "whichever it is",
        "It is where it stands, not what it is.",
        statistic="share of prompts whose most attended token is the first when that is another, the lowest of several "
        f"kinds ({kind})",
        estimate=share,
        control="share in which the token that stood first takes the sink along to where it is put",
        control_estimate=taken_along,
        rule=f"holds when the whole interval lies above {MOST} and the control's below {1 - MOST:.1g}",
        conditions=[sl.analysis.above(share, MOST), sl.analysis.below(taken_along, 1 - MOST)],
    )


def all_alike(like: sl.Estimate, control: sl.Estimate) -> sl.analysis.Part:
    return sl.analysis.judge(
        "cause",
        "repeated",
        "In a prompt of one repeated token all tokens are like the first.",
        statistic="norm of the hidden states of later tokens that leave the formation block over the first's, a token "
        "repeated",
        estimate=like,
        control="the same in the prompts as they are",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {HALF} and the control's below",
        conditions=[sl.analysis.above(like, HALF), sl.analysis.below(control, HALF)],
    )


def delimiters(study: sl.Study, received: dict[str, Float[Tensor, "prompt pos"]]) -> dict[str, sl.Estimate]:
    """How much more attention a later delimiter receives than another later token; nothing where there is none."""
    marks = torch.tensor([[not any(c.isalnum() for c in text) for text in row] for row in study.batch.labels])[:, 1:-1]
    if not marks.any():
        return {}
    values, nan = received[AS_IS][:, 1:], torch.tensor(torch.nan)
    of = {mark: torch.where(marks == mark, values, nan).nanmean(-1) for mark in (True, False)}
    return {"attention that a later delimiter receives over another later token": study.mean(of[True] / of[False])}


def draw(findings: sl.Findings):
    titles = {"value": "", "kind": ""}
    table = findings.table
    figure = sl.viz.line(table, "position", "value", series="kind", facet="quantity", titles=titles, log_y=True)
    return figure.update_yaxes(matches=None, showticklabels=True)


ANALYSIS = sl.Analysis(
    name="position",
    title="Which token is the sink",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="Sink_1 on repeated tokens: 62% (GPT-2 XL), 0% (Mistral, Llama) (Gu et al., ICLR 2025)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
