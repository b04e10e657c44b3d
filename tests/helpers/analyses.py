"""A study of a random model, and an analysis of it that needs no sink."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import pandas as pd

from sinklens.analysis.base import Analysis, Findings, verdict
from sinklens.prompts import from_tokens
from sinklens.statistics import Estimate
from sinklens.study import Study
from tests.helpers.tiny import tiny_model, tiny_tokens

GIVEN = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}


def study(**changes: Any) -> Study:
    model = tiny_model("llama")
    settings: dict[str, Any] = {"given": dict(GIVEN)} | changes
    return Study(model, from_tokens(model, tiny_tokens(3, 16)), **settings)


def simple(
    study: Study,
    *,
    positions: Annotated[tuple[int, ...], "positions to read"] = (2, 4),
    strengths: Annotated[tuple[float, ...], "strengths"] = (1.0, 2.5),
    axis: Annotated[Literal["prompts", "global"], "an axis"] = "prompts",
    top: Annotated[int, "how many"] = 3,
) -> Findings:
    table = pd.DataFrame({"position": positions, "value": [float(p) * len(strengths) for p in positions]})
    mean = study.mean(table.value.tolist())
    said = verdict("It is so.", f"value over {axis}", mean, "nothing", Estimate(0.0), "above 0", mean.above(0))
    return Findings(said, table, "A caption.", {"top": float(top), "none": math.nan, "mean": mean})


def draw(findings: Findings) -> Any:
    from sinklens import viz

    return viz.points(findings.table, "position", "value")


SIMPLE = Analysis("simple", "A simple thing", "It is so.", simple, draw, "figure 0")
