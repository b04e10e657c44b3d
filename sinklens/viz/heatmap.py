"""One heatmap for wide tables and for sweeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from sinklens.errors import InputError
from sinklens.sweeps.result import SweepResult
from sinklens.sweeps.tensor import LabelledTensor
from sinklens.viz import charts
from sinklens.viz.sweep import sweep_heatmap

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def heatmap(
    source: pd.DataFrame | SweepResult | LabelledTensor,
    *,
    value: str | None = None,
    x: str | None = None,
    y: str | None = None,
    **options: Any,
) -> Figure:
    """A heatmap of a wide table, or of a sweep: layer by position, mean over prompts, a panel for each stage and so on.

    Args:
        source: a wide table with its rows and columns by name, a sweep's result, or a tensor cut from one.
        value: for a table what its cells are called; for a sweep what is drawn, the effect by default.
        x: for a table what its columns are called; for a sweep the axis across.
        y: for a table what its rows are called; for a sweep the axis downwards.
        options: for a table ``centre`` (where the colours turn) and ``digits``; for a sweep ``readout`` and ``columns``
            (panels beside one another).

    Raises:
        InputError: plotly is not installed, the sweep has no such axes, or it is neither table nor sweep.
    """
    if isinstance(source, pd.DataFrame):
        return charts.heatmap(source, value=value or "value", x=x or "column", y=y or "row", **options)
    if not isinstance(source, SweepResult | LabelledTensor):
        raise InputError(
            f"a heatmap is of a table, a sweep, or a tensor cut from one, not of type {type(source).__name__}; of a "
            "chain, viz.matrix_figure(result, 'denoise') and viz.scores_figure(result) draw figures"
        )
    return sweep_heatmap(source, value=value, x=x, y=y, **options)
