"""Does a window of recent keys break without the first token, and does one kept token repair it?

    sinklens analyse streaming --length 128 --window 32

StreamingLLM (Xiao et al., ICLR 2024): a cache of the latest keys alone breaks a model as soon as the first token falls
out of it, and keeping a few first tokens repairs it, for attention goes on needing its sink. Every query is shown its
own key, the latest ones, and the first 0, 1, 2, 4 or 8, in all blocks: keys and values are what a cache would hold that
is trimmed after every token. Loss is of the tokens from whose window the first ones have gone, in all arms.

What repairs: a token more, or a sink? One ordinary token is kept in the first one's place as a control. And a sink is
made at a later token (it may attend only to itself up to the formation block): there the window must break less, if
that key alone is kept and the first is not, than the same key helps where it is no sink.

Positions are kept as they are, which shifts nothing. As StreamingLLM has it they count in the cache, which takes rotary
embeddings: the loss with these stands beside it. Pitfall: a window loses what it has lost to read, sink or not; that
share no kept token repairs. Early or small models are known not to break (27.9 for 18.5 of a vanilla 160M model).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

import sinklens as sl
from sinklens import edits, sites

CLAIM = "A window of recent keys breaks the model without the first token, and one kept sink repairs it."
BREAKS = 0.5  # ours, nats a token
MOST = 0.8  # ours
CLEAN, MADE = "base", "anchored"
KEPT, REINDEXED, ORDINARY = "positions kept", "positions in the cache", "an ordinary token kept instead"
CAPTION = (
    "Loss added by a window of {window} recent keys, by how many first tokens are kept: positions as they are, or "
    "counted in the cache; and with one ordinary token kept in their place (means with 95% intervals)."
)


def run(
    study: sl.Study,
    *,
    window: Annotated[int, "recent keys, besides the query's own; a quarter of the prompt by default"] = 0,
    first: Annotated[tuple[int, ...], "numbers of first tokens that are kept"] = (0, 1, 2, 4, 8),
    target: Annotated[int, "where a sink is made; 0: the first of 10, 5, 20 that fits"] = 0,
) -> sl.Findings:
    recent, counts = window or max(1, study.batch.length // 4), tuple(sorted({0, 1, *first}))
    begin = recent + counts[-1] + 2
    if begin > study.batch.length - 2:
        raise sl.InputError(
            f"a window of {recent} and {counts[-1]} first tokens leaves nothing of {study.batch.length}"
        )
    position = study.targets((target,))[0] if target else sl.analysis.induced(study)
    added, notes = losses(study, recent, counts, position, begin)
    verdict = sl.analysis.verdict_of(CLAIM, [breaks(study, added), enough(study, added), any_sink(study, added)])
    rows = []
    for (arm, kept), x in added.items():
        estimate = study.mean(x)
        rows.append({"arm": arm, "kept": kept, "added": estimate.value, "low": estimate.low, "high": estimate.high})
    numbers = {f"loss added, {arm}, {kept} kept": study.mean(x) for (arm, kept), x in added.items()}
    return sl.Findings(verdict, pd.DataFrame(rows), CAPTION.format(window=recent) + notes, numbers)


Added = dict[tuple[str, int], Float[Tensor, " prompt"]]
"""Loss added, by arm and how many tokens are kept."""


def losses(study: sl.Study, recent: int, counts: tuple[int, ...], later: int, begin: int) -> tuple[Added, str]:
    """What every window adds to the loss of the tokens from ``begin`` on, with and without a sink made at ``later``;
    and what could not be asked.
    """
    every, n = tuple(range(study.shape.n_layers)), study.batch.n
    queries = tuple(range(1, study.batch.length))
    ordinary = study.ordinary_position("streaming/ordinary", (0, later))[:, None]

    def patch(kept: Tensor, run: str = CLEAN) -> sl.Patch:
        edit = edits.MaskKeys(keep=seen(study.batch.length, recent, kept))
        return sl.Patch(sites.PATTERN, every, queries, edit, run=run)

    arms = {(KEPT, s): patch(torch.arange(s).expand(n, -1)) for s in counts}
    arms[ORDINARY, 1] = patch(ordinary)
    induced = torch.full((n, 1), later)
    arms["the later token kept, which is no sink", 1] = patch(induced)
    arms["a sink made: nothing kept", 0] = patch(induced[:, :0], MADE)
    arms["a sink made: it is kept", 1] = patch(induced, MADE)
    sink = sl.Patch(sites.PATTERN, study.up_to_formation, (later,), edits.AttendSelf())
    loss = sl.readouts.next_token_loss("loss", study.batch.tokens, study.shape.n_layers, begin)
    patches = list(arms.values())
    result = study.run(patches, [loss], {CLEAN: (), MADE: (sink,)})
    added = dict(zip(arms, result.added(patches, "loss"), strict=True))
    try:
        for s in [s for s in counts if s]:
            hooks = sl.interventions.evict(study.model, recent, s, positions="reindexed")
            with study.model.hooks(hooks):
                added[REINDEXED, s] = study.measure([replace(loss)])["loss"][0] - result.runs[CLEAN]["loss"]
        added[REINDEXED, 0] = added[KEPT, 0]  # only distances between recent keys are left
    except sl.NotApplicableError as error:
        return added, f" Positions in the cache are left out: {error}."
    return added, ""


def seen(length: int, recent: int, kept: Tensor) -> Bool[Tensor, "prompt query key"]:
    """Which keys every query sees: its own, the ``recent`` before it, and those ``kept`` ``[prompt kept]``."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    always = torch.zeros(len(kept), 1, length, dtype=torch.bool).scatter(-1, kept[:, None], True)
    return (key <= query) & ((query - key <= recent) | always)


def breaks(study: sl.Study, added: Added) -> sl.analysis.Part:
    loss, control = study.mean(added[KEPT, 0]), study.mean(added[KEPT, 1])
    return sl.analysis.judge(
        "quantity",
        "breaks",
        "A window of recent keys breaks the model without the first token.",
        statistic="loss added by a window of recent keys alone, nats a token",
        estimate=loss,
        control="the same with the first token kept",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {BREAKS} and above the control's",
        conditions=[sl.analysis.above(loss, BREAKS), sl.analysis.above(loss, control)],
    )


def repaired(study: sl.Study, none: Tensor, kept: Tensor) -> sl.Estimate:
    """Share of the loss added without a kept token that is gone with one: of means, for single prompts lose little."""
    return study.bootstrap(lambda prompts: 1 - float(kept[prompts].mean() / none[prompts].mean()))


def enough(study: sl.Study, added: Added) -> sl.analysis.Part:
    share, control = (repaired(study, added[KEPT, 0], added[key]) for key in ((KEPT, 1), (ORDINARY, 1)))
    return sl.analysis.judge(
        "cause",
        "one is enough",
        "One kept first token repairs it.",
        statistic="share of the loss added by the window alone that is gone when the first token is kept",
        estimate=share,
        control="the same when one ordinary token is kept instead",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {MOST} and above the control's, and the window alone adds loss",
        conditions=[
            sl.analysis.above(share, MOST),
            sl.analysis.above(share, control),
            sl.analysis.above(study.mean(added[KEPT, 0]), 0.0),
        ],
    )


def any_sink(study: sl.Study, added: Added) -> sl.analysis.Part:
    share = repaired(study, added["a sink made: nothing kept", 0], added["a sink made: it is kept", 1])
    control = repaired(study, added[KEPT, 0], added["the later token kept, which is no sink", 1])
    return sl.analysis.judge(
        "cause",
        "any sink",
        "It is a sink that repairs it, whichever token that is.",
        statistic="share of the loss added by the window alone that is gone when a later token, made a sink, is kept",
        estimate=share,
        control="the same of that token where it is no sink",
        control_estimate=control,
        rule=f"holds when the whole interval lies above {MOST} and above the control's",
        conditions=[sl.analysis.above(share, MOST), sl.analysis.above(share, control)],
    )


def draw(findings: sl.Findings):
    table: Any = findings.table[findings.table.arm.isin((KEPT, REINDEXED, ORDINARY))]
    titles = {"kept": "first tokens kept", "added": "loss added, nats a token", "arm": ""}
    return sl.viz.line(table.sort_values("kept"), "kept", "added", series="arm", low="low", high="high", titles=titles)


ANALYSIS = sl.Analysis(
    name="streaming",
    title="A window of recent keys",
    claim=CLAIM,
    run=run,
    draw=draw,
    paper="Llama-2-7B: perplexity 3360 without, 11.9 with one first token, 10.5 with two (Xiao et al., ICLR 2024)",
    group="other-sinks",
)

if __name__ == "__main__":
    sl.main(ANALYSIS)
