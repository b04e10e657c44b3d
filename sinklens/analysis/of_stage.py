"""A stage as an analysis: its effects, its controls, and a verdict by the chain's own measure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import pandas as pd

from sinklens.analysis.base import Analysis, Findings, verdict
from sinklens.chain.run import score_chain
from sinklens.chain.verdicts import CLOSE, GOOD, Finding, findings, overall
from sinklens.pairs import PairChoice
from sinklens.stages import Stage
from sinklens.statistics import Estimate
from sinklens.study import Study
from sinklens.viz.charts import bars, mark

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

RULE = (
    f"holds when every effect is within {CLOSE:g} of what the claim predicts (or beyond a predicted 1) and no interval "
    "reaches the opposite outcome"
)


def of_stage(stage: Stage, title: str, paper: str = "") -> Analysis:
    """An analysis that scores ``stage`` alone, on a sink made at a target.

    The verdict is on the worst of its effects: that of the mechanism edits where the stage has any, else of the
    transplant.

    Args:
        stage: the stage.
        title: heading of its section in reports.
        paper: the figure of the paper that it answers to, if any.
    """

    def run(
        study: Study,
        *,
        target: Annotated[int, "position that is made a sink"] = 10,
        readout_blocks: Annotated[int, "blocks after formation to measure attention in"] = 4,
        control_draws: Annotated[int, "repetitions of what is drawn at random"] = 3,
        min_gap: Annotated[float, "exclude prompts whose metric the pair moves by less"] = 0.01,
    ) -> Findings:
        (position,) = study.targets((target,))
        result = score_chain(
            study,
            PairChoice(position),
            stages=(stage,),
            readout_blocks=readout_blocks,
            control_draws=control_draws,
            min_gap=min_gap,
        )
        found = findings(result)
        own = [item for item in found if not item.control]
        deciding = [item for item in own if item.kind == "mechanism"] or own
        worst = max(deciding, key=lambda item: -math.inf if math.isnan(item.short_of) else item.short_of)
        controls = [c for c in found if c.control and (c.edit, c.direction) == (worst.edit, worst.direction)]
        said = verdict(
            stage.claim,
            f"effect of {worst.edit} ({worst.direction}; the claim predicts {worst.predicted:g}), the worst of all",
            _estimate(worst),
            ", ".join(f"{c.control} (predicted {c.predicted:g})" for c in controls[:1]),
            _estimate(controls[0]) if controls else None,
            RULE,
            holds=overall(deciding) in GOOD,
        )
        table = result.scores.drop(columns=["layers", "units", "strength"])
        numbers = {_name(item): _estimate(item) for item in found if item is not worst}
        caption = "Effects with 95% intervals over prompts: 1 is all of the sink, 0 none. Controls carry their names."
        return Findings(said, table, caption, numbers)

    return Analysis(stage.name, title, stage.claim, run, _draw, paper, code=stage.readout)


def _estimate(item: Finding) -> Estimate:
    return Estimate(item.effect, item.low, item.high, item.n)


def _name(item: Finding) -> str:
    what = f"{item.edit}, control {item.control}" if item.control else item.edit
    return f"effect of {what} ({item.direction}; predicted {item.predicted:g})"


def _draw(findings: Findings) -> Figure:
    table: pd.DataFrame = findings.table
    what = [f"{edit}: {control}" if control else edit for edit, control in zip(table.edit, table.control, strict=True)]
    shown = table.assign(what=what)
    figure = bars(shown, "what", "effect", series="direction", low="ci_low", high="ci_high", titles={"what": ""})
    return mark(figure, y=1.0)
