"""Figures of trained models: what was watched over training, and by block at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from sinklens.records.text import pretty
from sinklens.viz.charts import line

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def training_curve(curves: pd.DataFrame, measure: str, *, position: int | None = None, x: str = "tokens") -> Figure:
    """A measure over training: the mean of an arm's seeds, and from the least to the most of them.

    Args:
        curves: tidy, as :attr:`sinklens.lab.Comparison.curves`.
        measure: which.
        position: of which position, where it has one.
        x: ``tokens`` or ``step``; the start of training is left out, as the axis is logarithmic.
    """
    table = _of(curves, measure, position)
    each = table.groupby(["arm", "seed", "step", "tokens"], sort=False)["value"].mean().reset_index()
    # Arms have seen as many tokens at a step; where they have not, each has its own.
    drawn = each[each[x] > 0].groupby(["arm", x], sort=False)["value"].agg(["mean", "min", "max"]).reset_index()
    titles = {"mean": _title(measure, position), "tokens": "tokens trained on", "step": "step"}
    return line(drawn, x, "mean", series="arm", low="min", high="max", titles=titles, log_x=True)


def by_block(curves: pd.DataFrame, measure: str, *, position: int | None = None) -> Figure:
    """A measure by block at the end of training: the mean of an arm's seeds, and from the least to the most of them."""
    table = _of(curves, measure, position)
    table = table[table["layer"].notna()]
    last = table[table["step"] == table.groupby("run")["step"].transform("max")]
    drawn = last.groupby(["arm", "layer"], sort=False)["value"].agg(["mean", "min", "max"]).reset_index()
    titles = {"mean": _title(measure, position), "layer": "block"}
    return line(drawn, "layer", "mean", series="arm", low="min", high="max", titles=titles)


def _of(curves: Any, measure: str, position: int | None) -> Any:
    there = curves["measure"] == measure
    there &= curves["position"].isna() if position is None else curves["position"] == position
    return curves[there]


def _title(measure: str, position: int | None) -> str:
    return pretty(measure) + ("" if position is None else f", position {position}")
