"""A stage's verdict in two parts: does its own readout differ between the runs, and do its edits say it is the cause?

An edit's effect is on the side of its prediction when it is beyond one half; so is its control's, and then the part
holds. The transplant says that the effect passes through the place; the mechanism edits, by what the claim names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sinklens.chain.result import ChainResult
from sinklens.chain.rules import Condition, Part, above, below, judge, together, unmeasured, which
from sinklens.chain.verdicts import HALF, Finding, findings
from sinklens.pairs.choice import is_natural
from sinklens.records.printable import isolated
from sinklens.records.text import number, pretty
from sinklens.statistics import Estimate, mean_estimate

CHANGE = 0.1
"""The least change of a stage's readout that counts, as a share of the larger of its two means."""
CAUSE_RULE = (
    f"holds when the whole interval of the effect lies on the side of {HALF:g} that the claim predicts, and that of "
    "each control on its own side, in every direction; does not hold when one lies wholly on the other side"
)


def quantity_part(result: ChainResult, stage: str, claim: str = "") -> Part:
    """Does the stage's own readout rise in the run with the sink?"""
    sentence = claim or str(result.config.get("claims", {}).get(stage, stage))
    values = {run: np.asarray(found[stage], float) for run, found in result.runs.items() if stage in found}
    if is_natural(result.config) or not {"base", "anchored"} <= set(values):
        reason = "there is no run without the natural sink" if is_natural(result.config) else "it has no readout here"
        return unmeasured("quantity", "readout", sentence, reason)
    base, anchored = values["base"], values["anchored"]
    scale = max(np.abs(base).mean(), np.abs(anchored).mean())
    with np.errstate(invalid="ignore", divide="ignore"):
        change = mean_estimate((anchored - base) / scale, int(result.config.get("seed", 0)))
    return judge(
        "quantity",
        "readout",
        sentence,
        statistic="rise of the stage's readout in the run with the sink, as a share of the larger "
        f"({number(base.mean())} to {number(anchored.mean())})",
        estimate=change,
        rule=f"holds when the whole interval lies above {CHANGE:g}; does not hold when it lies below",
        conditions=[above(change, CHANGE)],
    )


def cause_part(
    result: ChainResult,
    stage: str,
    edit: str,
    controls: Sequence[str] | None = None,
    *,
    name: str = "",
    sentence: str = "",
) -> Part:
    """Do an edit and what stands beside it do what the claim predicts?

    Args:
        result: a scored chain.
        stage: the stage.
        edit: the edit that changes what the claim names and nothing else.
        controls: what changes the rest: controls of the edit, or other edits of the stage; all its controls by default.
        name: short name of the part; the edit's by default.
        sentence: the sentence that it judges; the stage's claim by default.
    """
    name, sentence = name or pretty(edit), sentence or str(result.config.get("claims", {}).get(stage, stage))
    of_stage = [item for item in findings(result) if item.stage == stage]
    own = [item for item in of_stage if item.edit == edit and not item.control]
    beside = [item for item in of_stage if _stands_beside(item, edit, controls)]
    wanted = None if controls is None else set(controls) - {item.control or item.edit for item in beside}
    if not own or wanted:
        skipped = result.config.get("not_applicable", {})
        why = next((skipped[key] for key in (f"{stage}/{x}" for x in (edit, *(wanted or ()))) if key in skipped), "")
        return unmeasured("cause", name, sentence, why or f"{pretty(edit)} was not run")
    worst = max(own, key=lambda item: item.short_of if np.isfinite(item.short_of) else np.inf)
    nearest = [item for item in beside if item.direction == worst.direction]
    first = max(nearest, key=lambda item: item.short_of if np.isfinite(item.short_of) else np.inf, default=None)
    return judge(
        "cause",
        name,
        sentence,
        statistic=f"effect of {pretty(edit)} on the {_sink(result)} ({worst.direction}; the claim predicts "
        f"{number(worst.predicted)})" + (", the worst direction" if len(own) > 1 else ""),
        estimate=_estimate(worst),
        control="" if first is None else f"{pretty(first.control or first.edit)} (predicted {number(first.predicted)})",
        control_estimate=None if first is None else _estimate(first),
        rule=CAUSE_RULE,
        conditions=[condition for item in (*own, *beside) for condition in _conditions(item)],
        detail=_beside_the_mean(result, worst),
    )


def stage_parts(result: ChainResult, stage: str) -> tuple[Part, ...]:
    """A stage's parts: its quantity, and every edit of its mechanism (the transplant, where it has none)."""
    own = [item for item in findings(result) if item.stage == stage and not item.control]
    edits = list(dict.fromkeys(item.edit for item in own if item.kind == "mechanism")) or ["transplant"]
    causes = [cause_part(result, stage, edit) for edit in edits if _has_prediction(own, edit)]
    return (quantity_part(result, stage), *causes)


def stages_in_words(result: ChainResult) -> list[str]:
    """A sentence for every stage: its verdict, and which parts hold."""
    sentences = []
    for stage in dict.fromkeys(result.scores.stage):
        parts = stage_parts(result, stage)
        said = together([part.outcome for part in parts])
        told = f" ({which(parts)})" if which(parts) else ""
        sentences.append(f"{isolated(pretty(stage))}: {said}{isolated(told) if told else ''}.")
    return sentences


def _has_prediction(own: Sequence[Finding], edit: str) -> bool:
    return any(np.isfinite(item.predicted) for item in own if item.edit == edit)


def _stands_beside(item: Finding, edit: str, controls: Sequence[str] | None) -> bool:
    if item.edit == edit:
        return bool(item.control) and (controls is None or item.control in controls)
    return not item.control and controls is not None and item.edit in controls


def _conditions(item: Finding) -> list[Condition]:
    estimate = _estimate(item)
    if not np.isfinite(item.predicted):
        return []
    if item.predicted > HALF:
        return [above(estimate, HALF)]  # doing more than all does not speak against the claim
    return [below(estimate, HALF), above(estimate, -HALF)]


def _estimate(item: Finding) -> Estimate:
    return Estimate(item.effect, item.low, item.high, item.n)


def _rows(table: pd.DataFrame, item: Finding) -> pd.Series:
    same = (table.stage == item.stage) & (table.edit == item.edit)
    return same & (table.control == item.control) & (table.direction == item.direction)


def _sink(result: ChainResult) -> str:
    return "natural sink" if is_natural(result.config) else f"sink made at position {result.config['target']}"


def _beside_the_mean(result: ChainResult, item: Finding) -> str:
    scores = result.scores
    if "median" not in scores or "share" not in scores:
        return ""
    row = scores[_rows(scores, item)].iloc[0]
    return f"median {number(row['median'])}, beyond one half in {row['share']:.0%} of the prompts"
