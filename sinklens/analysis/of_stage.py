"""A stage as an analysis: its effects, its controls, and a verdict by the chain's own measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import pandas as pd

from sinklens.analysis.base import Analysis, Findings, verdict_of
from sinklens.chain.run import score_chain
from sinklens.chain.stage_verdicts import stage_parts
from sinklens.chain.verdicts import Finding, findings
from sinklens.formation.result import READOUT_BLOCKS
from sinklens.pairs import PairChoice
from sinklens.pairs.effects import MIN_GAP
from sinklens.stages import Stage
from sinklens.statistics import Estimate
from sinklens.study import Study
from sinklens.viz.charts import bars, mark

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ORDER = ("does not hold", "undecided", "holds", "not measurable")
"""Outcomes of parts: the one that speaks most against the claim comes first."""


def of_stage(stage: Stage, title: str, paper: str = "", *, group: str = "") -> Analysis:
    """An analysis that scores ``stage`` alone, on a sink made at a target.

    The verdict has a part for every mechanism edit (the transplant, where the stage has none), and one for the stage's
    own readout: the effect that is farthest from its prediction comes first.

    Args:
        stage: the stage.
        title: heading of its section in reports.
        paper: the figure of the paper that it answers to, if any.
        group: the group that it is run with, in place of with all others.
    """

    def run(
        study: Study,
        *,
        target: Annotated[int, "position that is made a sink"] = 10,
        readout_blocks: Annotated[int, "blocks after formation to measure attention in"] = READOUT_BLOCKS,
        control_draws: Annotated[int, "repetitions of what is drawn at random"] = 3,
        min_gap: Annotated[float, "exclude prompts whose metric the pair moves by less"] = MIN_GAP,
    ) -> Findings:
        (position,) = study.targets((target,))
        result = score_chain(
            study,
            PairChoice(position),
            stages=(stage,),
            readout_blocks=readout_blocks,
            control_draws=control_draws,
            min_gap=min_gap,
            views=False,
        )
        quantity, *causes = stage_parts(result, stage.name)
        causes.sort(key=lambda part: ORDER.index(part.outcome))
        table = result.scores.drop(columns=["layers", "units", "strength"])
        numbers = {_name(item): _estimate(item) for item in findings(result)}
        caption = "Effects with 95% intervals over prompts: 1 is all of the sink, 0 none. Controls carry their names."
        return Findings(verdict_of(stage.claim, [*causes, quantity]), table, caption, numbers)

    return Analysis(stage.name, title, stage.claim, run, _draw, paper, code=stage.readout, group=group)


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
