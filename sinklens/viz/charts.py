"""Charts of tidy tables, all in one look: lines, points, bars, histograms and heatmaps, made with plotly express.

Each takes a table and the names of its columns and returns a plotly figure. Series differ by colour *and* by symbol or
dash. Columns of lower and upper ends become error bars. Text from the table is escaped, because plotly reads some HTML.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pandas as pd

from sinklens.errors import need
from sinklens.records.text import pretty

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK = "#444444"
"""Colour of marks that must stand out from any background; the report replaces it in dark mode."""
COLOURS = ("#2f7fbc", "#d9661f", "#8a8a8a", "#7a5aa6", "#3f8f4f", "#b8447a")
"""In the order of series; distinguishable with any colour vision, and on white as on black."""
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star")
_DASHES = ("solid", "dot", "dash", "dashdot", "longdash", "longdashdot")


def need_plotly() -> tuple[ModuleType, ModuleType]:
    """``plotly.graph_objects`` and ``plotly.subplots``."""
    return need("plotly.graph_objects"), need("plotly.subplots")


def line(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    series: str | None = None,
    low: str | None = None,
    high: str | None = None,
    facet: str | None = None,
    titles: Mapping[str, str] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    height: int = 380,
) -> Figure:
    """Lines with markers, one for every value of ``series``; ``facet`` draws one panel for every value of its column.

    Args:
        table: tidy, one point a row.
        x, y: columns.
        series: column that tells the lines apart.
        low, high: columns of the ends of an interval, drawn as error bars.
        facet: column that tells the panels apart.
        titles: what a column is called in the figure, with its unit.
        log_x, log_y: logarithmic axes.
        height: of one row of panels, pixels.
    """
    shown, names = _prepared(table, series, facet, titles)
    figure = need("plotly.express").line(
        shown,
        x=x,
        y=y,
        markers=True,
        line_dash=series,
        symbol=series,
        line_dash_sequence=_DASHES,
        symbol_sequence=_SYMBOLS,
        log_x=log_x,
        log_y=log_y,
        **_errors(shown, y, low, high),
        **_common(series, facet, names),
    )
    return _finished(figure, shown, facet, height)


def points(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    series: str | None = None,
    low: str | None = None,
    high: str | None = None,
    facet: str | None = None,
    titles: Mapping[str, str] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    hover: Sequence[str] = (),
    height: int = 380,
) -> Figure:
    """Points (see :func:`line`); ``hover`` names further columns to show when one is pointed at."""
    shown, names = _prepared(table, series, facet, titles)
    figure = need("plotly.express").scatter(
        shown,
        x=x,
        y=y,
        symbol=series,
        symbol_sequence=_SYMBOLS,
        log_x=log_x,
        log_y=log_y,
        hover_data=list(hover),
        **_errors(shown, y, low, high),
        **_common(series, facet, names),
    )
    return _finished(figure, shown, facet, height)


def bars(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    series: str | None = None,
    low: str | None = None,
    high: str | None = None,
    facet: str | None = None,
    titles: Mapping[str, str] | None = None,
    height: int = 380,
) -> Figure:
    """Bars beside one another (see :func:`line`); an ``x`` of text gives one group for every value."""
    shown, names = _prepared(table, series, facet, titles, x)
    figure = need("plotly.express").bar(
        shown,
        x=x,
        y=y,
        barmode="group",
        pattern_shape=series,
        **_errors(shown, y, low, high),
        **_common(series, facet, names),
    )
    figure.update_traces(marker_pattern_solidity=0.3)
    return _finished(figure, shown, facet, height)


def histogram(
    table: pd.DataFrame,
    x: str,
    *,
    series: str | None = None,
    facet: str | None = None,
    titles: Mapping[str, str] | None = None,
    bins: int = 40,
    share: bool = True,
    height: int = 380,
) -> Figure:
    """Histograms laid over one another; ``share``: each series sums to 1, so that a null of many draws compares."""
    shown, names = _prepared(table, series, facet, titles)
    figure = need("plotly.express").histogram(
        shown,
        x=x,
        nbins=bins,
        barmode="overlay",
        opacity=0.6,
        histnorm="probability" if share else None,
        **_common(series, facet, names),
    )
    figure.update_yaxes(title_text="share" if share else "count", col=1)
    return _finished(figure, shown, facet, height)


def heatmap(
    wide: pd.DataFrame, *, value: str, x: str, y: str, centre: float | None = None, digits: str = ".2f"
) -> Figure:
    """A heatmap of a wide table: its index downwards, its columns across, with its numbers when there are few.

    Args:
        wide: rows and columns by name.
        value, x, y: what the cells, the columns and the rows are.
        centre: where the colours turn, for values of either sign.
        digits: format of the numbers.
    """
    few = wide.size <= 400
    figure = need("plotly.express").imshow(
        wide.set_axis([_text(c) for c in wide.columns], axis=1).set_axis([_text(i) for i in wide.index]),
        text_auto=digits if few else False,
        aspect="auto",
        labels={"x": x, "y": y, "color": value},
        color_continuous_scale="Blues" if centre is None else "RdBu",
        color_continuous_midpoint=centre,
    )
    return styled(figure, 120 + 26 * min(40, max(6, len(wide))))


def mark(figure: Figure, *, x: float | None = None, y: float | None = None, text: str = "") -> Figure:
    """Draw a dashed line at ``x`` or ``y`` in every panel: a null, a threshold, what a claim predicts."""
    common: dict[str, Any] = {"line": {"color": INK, "width": 1.5, "dash": "dash"}}
    if text:  # an empty note has a place all the same, and a logarithmic axis would reach to 10 to the power of it
        common["annotation_text"] = html.escape(text, quote=False)
    if x is not None:
        figure.add_vline(x=x, **common)
    if y is not None:
        figure.add_hline(y=y, **common)
    return figure


def styled(figure: Figure, height: int, **layout: Any) -> Figure:
    """The common look; no theme or other global state of plotly is touched."""
    layout = {"margin": {"l": 10, "r": 10, "t": 50, "b": 50}} | layout
    figure.update_layout(template="plotly_white", height=height, font={"size": 12}, hovermode="closest", **layout)
    return figure


def _text(value: object) -> str:
    return html.escape(pretty(value), quote=False)


def _prepared(table: pd.DataFrame, series: str | None, facet: str | None, titles: Any, *also: str) -> tuple[Any, dict]:
    shown = table.copy()
    for column in {series, facet, *also} - {None}:
        shown[column] = [_text(value) for value in shown[column]]
    return shown, {name: pretty(name) for name in table.columns} | dict(titles or {})


def _errors(table: pd.DataFrame, y: str, low: str | None, high: str | None) -> dict[str, Any]:
    if low is None or high is None:
        return {}
    return {"error_y": (table[high] - table[y]).fillna(0), "error_y_minus": (table[y] - table[low]).fillna(0)}


def _common(series: str | None, facet: str | None, names: dict[str, str]) -> dict[str, Any]:
    return {
        "color": series,
        "facet_col": facet,
        "facet_col_wrap": 2 if facet else 0,
        "facet_col_spacing": 0.08 if facet else None,  # room for the tick labels of a panel on the right
        "labels": names,
        "color_discrete_sequence": list(COLOURS),
    }


def _finished(figure: Figure, table: pd.DataFrame, facet: str | None, height: int) -> Figure:
    # A panel is titled "column=value": the value says enough.
    figure.for_each_annotation(lambda note: note.update(text=note.text.split("=", 1)[-1]))
    panels = 1 if facet is None else (len(table[facet].unique()) + 1) // 2
    legend = {"orientation": "h", "y": 1, "yref": "container", "yanchor": "top"}
    return styled(figure, 60 + height * panels, legend=legend)
