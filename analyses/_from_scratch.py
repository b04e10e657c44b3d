"""An analysis from scratch, to be copied: a question, a measurement, a control, a rule stated before the number.

    python analyses/_from_scratch.py --prompts texts.txt

Do late queries attend to the sink as much as early ones? Of the queries behind a token, the later half's attention to
it is divided by the earlier half's. What a query gives an ordinary token it shares out among ever more tokens, so that
there the ratio falls: that is the control. A sink should not be diluted.

`run` takes a study (`sl.Study`: model, prompts, and where the sink forms) and options with defaults; what stands beside
their types in `Annotated` is their line of help. The command line, the saved table, the report's section and resuming
are read off it. Names that options cannot have: see "Adding an analysis" in README.md.
"""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

import sinklens as sl

CLAIM = "Late queries attend to the sink as much as early ones do."


def run(
    study: sl.Study,
    *,
    least: Annotated[float, "ratio of late to early attention that is still as much", sl.Between(0, 1)] = 0.8,
) -> sl.Findings:
    blocks = study.after_formation()
    pattern = sl.Readout("pattern", sl.sites.PATTERN, blocks, lambda pattern, _rows: pattern.float().mean(1))
    attention = study.measure([pattern])["pattern"].mean(0)  # [prompt query key], mean over heads and blocks
    tokens = {"sink": study.sinks, "ordinary": study.ordinary_position("from_scratch/ordinary")}
    ratios = {who: late_over_early(attention, position) for who, position in tokens.items()}
    sink, ordinary = (study.mean(ratios[who]) for who in tokens)
    part = sl.analysis.judge(
        "quantity",
        "not diluted",
        CLAIM,
        statistic="attention of the later half of queries over that of the earlier half, to the sink",
        estimate=sink,
        control="the same for an ordinary token",
        control_estimate=ordinary,
        rule=f"holds when the whole interval lies above {least:g}, and the control's below it",
        conditions=[sl.analysis.above(sink, least), sl.analysis.below(ordinary, least)],
    )
    rows = [(who, prompt, ratio) for who, each in ratios.items() for prompt, ratio in enumerate(each)]
    table = pd.DataFrame(rows, columns=["token", "prompt", "ratio"])
    caption = "Attention of the later half of queries over that of the earlier half, a prompt at a time."
    verdict = sl.analysis.verdict_of(CLAIM, [part])
    return sl.Findings(verdict, table, caption)


def late_over_early(attention: Float[Tensor, "prompt query key"], position: Int[Tensor, " prompt"]) -> list[float]:
    """For each prompt, the later half of the queries behind its position over the earlier half; NaN without two."""
    ratios = []
    for of_prompt, key in zip(attention, position.tolist(), strict=True):
        received = of_prompt[key + 1 :, key]
        half = len(received) // 2
        ratios.append(float(received[-half:].mean() / received[:half].mean()) if half else float("nan"))
    return ratios


def draw(findings: sl.Findings):
    return sl.viz.histogram(findings.table, "ratio", series="token")


ANALYSIS = sl.Analysis(name="dilution", title="Is the sink diluted by length", claim=CLAIM, run=run, draw=draw)

if __name__ == "__main__":
    sl.main(ANALYSIS)
