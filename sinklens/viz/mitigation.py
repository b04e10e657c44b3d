"""Harm against what is left of the sink: one point a mitigation, and one for its control."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sinklens.viz.charts import points

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MITIGATION, CONTROL = "mitigation", "its control"


def mitigation_points(table: pd.DataFrame) -> pd.DataFrame:
    """Tidy: ``mitigation``, ``which``, ``left`` (the first token's share over the untouched model's), ``change`` of the
    loss with ``low`` and ``high``, of :attr:`sinklens.MitigationResult.table`.
    """
    rows: Any = table.to_dict("records")
    usual = rows[0]["first_share"]
    found = [
        {
            "mitigation": row["mitigation"],
            "which": which,
            "left": row[f"{before}first_share"] / usual,
            "change": row[f"{before}loss_change"],
            "low": row[f"{before}loss_change_low"],
            "high": row[f"{before}loss_change_high"],
        }
        for row in rows[1:]
        for which, before in ((MITIGATION, ""), (CONTROL, "control_"))
    ]
    there = [row for row in found if np.isfinite(row["left"]) and np.isfinite(row["change"])]
    return pd.DataFrame(there, columns=list(found[0]) if found else None)


def mitigation_figure(table: pd.DataFrame) -> Figure:
    """The change of the loss against what is left of the first token's share of attention.

    Args:
        table: as :attr:`sinklens.MitigationResult.table` has it.
    """
    titles = {"left": "first token's share of attention, over the untouched model's", "change": "more loss per token"}
    drawn = mitigation_points(table)
    options: dict[str, Any] = {"series": "which", "low": "low", "high": "high", "hover": ["mitigation"], "height": 460}
    figure = points(drawn, "left", "change", titles=titles | {"which": ""}, **options)
    rows: Any = drawn.to_dict("records")
    for row in (row for row in rows if row["which"] == MITIGATION):
        place, text = {"x": row["left"], "y": row["change"]}, html.escape(str(row["mitigation"]))
        figure.add_annotation(**place, text=text, showarrow=False, yshift=12, font={"size": 11})
    return figure
