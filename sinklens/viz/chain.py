"""Figures of a chain: scores, onset, chain matrix, and attention in CircuitsVis.

Every function returns its figure and shows nothing; what is drawn is computed by functions of its own (``score_rows``,
``onset_profile``, ``chain_matrix``), so that it can be checked, or drawn otherwise, without a plot. No theme or other
global state of plotly is touched.

Pitfall: an effect of 0 is an invisible bar. Look for its interval and for the tick of what the claim predicts.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sinklens.chain.result import ChainResult
from sinklens.errors import InputError
from sinklens.formation import Formation
from sinklens.records.text import heading, pretty
from sinklens.stages.base import experiment_kind
from sinklens.viz.charts import INK, need_plotly, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


TRANSPLANT, MECHANISM, CONTROL = "#2f7fbc", "#d9661f", "#8a8a8a"
"""Distinguishable with any colour vision, and on white as on black; each has its own pattern as well."""
DIVERGING = ((0.0, "#8c510a"), (1 / 3, "#f5f5f5"), (2 / 3, "#2b78b5"), (1.0, "#053061"))
"""Colours of the chain matrix from -1 to 2: brown below 0, blue at 1, dark blue above."""
KINDS = {
    "transplant": (TRANSPLANT, "", "transplant"),
    "mechanism": (MECHANISM, "/", "mechanism edit"),
    "control": (CONTROL, ".", "control"),
}
"""Kind of a row: colour, pattern, name in the legend."""
QUESTIONS = {"denoise": "denoise: is it sufficient?", "noise": "noise: is it necessary?"}
"""What each direction asks."""


def _label(name: object) -> str:
    # plotly reads a subset of HTML in text, links among it: names from the data must not be read so.
    return html.escape(pretty(name), quote=False)


def directions(table: pd.DataFrame) -> list[str]:
    """The directions that a table has, denoise first."""
    return [name for name in QUESTIONS if len(table) and (table.direction == name).any()]


def check_chain(result: object) -> None:
    """Make sure of what is to be drawn.

    Raises:
        InputError: it is no chain's result.
    """
    if not isinstance(result, ChainResult):
        what = type(result).__name__
        raise InputError(f"this draws the result of run_chain, or ChainResult.load(folder), not of type {what}")


def score_rows(result: ChainResult) -> pd.DataFrame:
    """The rows of the scores figure from top to bottom: a header for each stage, its edits, controls below their edit.

    Columns: row, stage, edit, control, kind (header, transplant, mechanism or control), label.

    Raises:
        InputError: it is no chain's result.
    """
    check_chain(result)
    records: list[dict[str, Any]] = []
    for number, (stage, group) in enumerate(result.scores.groupby("stage", sort=False), start=1):
        header = f"<b>{number} {html.escape(heading(stage), quote=False)}</b>"
        records.append({"stage": stage, "edit": "", "control": "", "kind": "header", "label": header})
        for edit, rows in group.groupby("edit", sort=False):
            controls = sorted(rows.control.unique(), key=bool)  # stable: the edit itself first
            for control in controls:
                kind = "control" if control else experiment_kind(str(edit))
                label = f"control: {_label(control)}" if control else _label(edit)
                records.append({"stage": stage, "edit": edit, "control": control, "kind": kind, "label": label})
    return pd.DataFrame(records).rename_axis("row").reset_index()


def scores_figure(result: ChainResult, *, stacked: bool = False) -> Figure:
    """Bars with 95% intervals of all effects, controls below their edits, and a tick at what the claim predicts.

    Args:
        result: a chain's result.
        stacked: put the directions below, not beside, each other: for narrow screens.

    Raises:
        InputError: plotly is not installed.
    """
    go, subplots = need_plotly()
    rows = score_rows(result)
    shown = directions(result.scores)
    n = len(shown)
    figure = subplots.make_subplots(
        rows=n if stacked else 1,
        cols=1 if stacked else n,
        shared_yaxes=not stacked,
        horizontal_spacing=0.03,
        vertical_spacing=0.06,
        subplot_titles=[QUESTIONS[d] for d in shown],
    )
    for index, direction in enumerate(shown):
        place = {"row": index + 1, "col": 1} if stacked else {"row": 1, "col": index + 1}
        data = rows.merge(result.scores[result.scores.direction == direction], on=["stage", "edit", "control"])
        for trace in _score_traces(go, data, index == 0):
            figure.add_trace(trace, **place)
    _score_axes(figure, rows, result.scores)
    height = (len(rows) * 21 + 60) * (n if stacked else 1) + (130 if stacked else 80)
    return styled(figure, height, margin={"l": 10, "r": 10, "t": 130 if stacked else 80, "b": 50})


def _score_traces(go: Any, data: pd.DataFrame, legend: bool) -> list[Any]:
    traces = []
    for kind, (colour, pattern, name) in KINDS.items():
        chosen = data.loc[(data.kind == kind) & data.effect.notna()]
        if chosen.empty:
            continue
        detail = np.stack([chosen.ci_low, chosen.ci_high, chosen.predicted, chosen.n], axis=-1)
        traces.append(
            go.Bar(
                x=chosen.effect.tolist(),
                y=chosen.row.tolist(),
                orientation="h",
                width=0.62,
                name=name,
                legendgroup=kind,
                showlegend=legend,
                marker={"color": colour, "line": {"color": colour, "width": 1}, "pattern": _pattern(pattern)},
                error_x=_interval(chosen),
                customdata=detail.tolist(),
                hovertext=chosen.label.tolist(),
                hovertemplate="%{hovertext}<br>effect %{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>"
                "predicted %{customdata[2]:.0f}, n = %{customdata[3]}<extra></extra>",
            )
        )
    predicted = data[data.predicted.notna()]
    marker = {"symbol": "line-ns", "size": 15, "line": {"color": INK, "width": 2.5}}
    traces.append(
        go.Scatter(
            x=predicted.predicted.tolist(),
            y=predicted.row.tolist(),
            mode="markers",
            marker=marker,
            name="predicted by the claim",
            legendgroup="predicted",
            showlegend=legend,
            hoverinfo="skip",
        )
    )
    return traces


def _pattern(shape: str) -> dict[str, Any]:
    return {"shape": shape, "fillmode": "replace", "size": 5, "solidity": 0.45} if shape else {}


def _interval(data: pd.DataFrame) -> dict[str, Any]:
    above, below = (data.ci_high - data.effect).fillna(0), (data.effect - data.ci_low).fillna(0)
    common = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 3, "color": INK}
    return {**common, "array": above.tolist(), "arrayminus": below.tolist()}


def _score_axes(figure: Figure, rows: pd.DataFrame, scores: pd.DataFrame) -> None:
    values = np.append(scores[["effect", "ci_low", "ci_high", "predicted"]].to_numpy(dtype=float).ravel(), [0, 1])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    pad = 0.06 * (high - low)
    figure.update_xaxes(
        range=[low - pad, high + pad],
        zeroline=False,
        title={"text": "effect", "standoff": 6},
        dtick=0.5 if high - low < 6 else None,
    )
    figure.update_yaxes(
        range=[len(rows) - 0.4, -0.6],
        tickvals=rows.row.tolist(),
        ticktext=rows.label.tolist(),
        showgrid=False,
        zeroline=False,
        automargin=True,
    )
    for index, (_, group) in enumerate(rows.groupby("stage", sort=False)):
        if index % 2 == 0:
            shade = {"fillcolor": INK, "opacity": 0.07, "line_width": 0, "layer": "below"}
            figure.add_hrect(y0=group.row.min() - 0.5, y1=group.row.max() + 0.5, row="all", col="all", **shade)
    for x in (0, 1):
        figure.add_vline(x=x, line={"color": INK, "width": 1, "dash": "dash"}, opacity=0.6, row="all", col="all")
    figure.update_annotations(font_size=13)  # the titles of the directions
    figure.update_layout(barmode="overlay", legend={"orientation": "h", "y": 1, "yref": "container", "yanchor": "top"})


def onset_profile(result: ChainResult | Formation) -> pd.DataFrame:
    """Attention in every block, and the residual norm entering it; the last row is the norm leaving the last block.

    Columns: layer, attention_sink, attention_other, norm_sink, norm_other.
    """
    profile = _formation(result).profile
    if profile.empty:
        raise InputError("the formation of this run has no profile: find it again with find_formation")
    entering = profile.loc[:, ["layer", "attention_sink", "attention_other"]]
    entering = entering.assign(norm_sink=profile.norm_sink_before, norm_other=profile.norm_other_before)
    last = profile.iloc[-1]
    end = {"layer": last.layer + 1, "norm_sink": last.norm_sink_after, "norm_other": last.norm_other_after}
    return pd.concat([entering, pd.DataFrame([end])], ignore_index=True).astype({"layer": int})


def _formation(result: ChainResult | Formation) -> Formation:
    if isinstance(result, Formation):
        return result
    check_chain(result)
    return result.formation


def onset_figure(result: ChainResult | Formation) -> Figure:
    """Attention to the sink in every block above the residual norm that enters it; formation blocks are shaded.

    What block ``b`` does lies between ``b`` and ``b + 1`` on the shared axis: that is where its band is.

    Raises:
        InputError: plotly is not installed, or the formation has no profile.
    """
    go, subplots = need_plotly()
    profile, formation = onset_profile(result), _formation(result)
    figure = subplots.make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    for row, quantity in ((1, "attention"), (2, "norm")):
        for trace in _onset_lines(go, profile, quantity):
            figure.add_trace(trace, row=row, col=1)
    for block in sorted({event.layer for event in formation.events} | {formation.layer}):
        chosen = block == formation.layer
        band = {"fillcolor": TRANSPLANT if chosen else INK, "opacity": 0.25 if chosen else 0.1, "line_width": 0}
        figure.add_vrect(x0=block, x1=block + 1, layer="below", row="all", col=1, **band)
    figure.add_annotation(
        x=formation.layer + 0.5,
        y=1,
        yref="paper",
        yanchor="bottom",
        showarrow=False,
        text=f"formation block {formation.layer}",
    )
    figure.update_yaxes(title_text="attention received", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(automargin=True)
    figure.update_yaxes(title_text="residual norm, entering", type="log", dtick=1, exponentformat="power", row=2, col=1)
    figure.update_xaxes(title={"text": "block", "standoff": 6}, row=2, col=1)
    figure.update_layout(legend={"orientation": "h", "y": 1, "yref": "container", "yanchor": "top"})
    return styled(figure, 520, margin={"l": 10, "r": 10, "t": 60, "b": 50})


def _onset_lines(go: Any, profile: pd.DataFrame, quantity: str) -> list[Any]:
    traces = []
    for who, name, colour, dash, symbol in (
        ("sink", "sink token", TRANSPLANT, "solid", "circle"),
        ("other", "other tokens", MECHANISM, "dot", "square"),
    ):
        shown = profile[profile[f"{quantity}_{who}"].notna()]
        trace = go.Scatter(
            x=shown.layer.tolist(),
            y=shown[f"{quantity}_{who}"].tolist(),
            mode="lines+markers",
            name=name,
            legendgroup=who,
            showlegend=quantity == "attention",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 6},
            hovertemplate=f"block %{{x}}: %{{y:.4g}}<extra>{name}</extra>",
        )
        traces.append(trace)
    return traces


def chain_matrix(result: ChainResult, direction: str) -> pd.DataFrame:
    """Effect of every stage's transplant (rows) on every readout (columns), in the chain's order; NaN where missing.

    Raises:
        InputError: the run has no such direction, or it is no chain's result.
    """
    check_chain(result)
    chosen = result.matrix[result.matrix.direction == direction] if len(result.matrix) else result.matrix
    if chosen.empty:
        raise InputError(f"this run has no chain matrix in direction {direction!r}")
    wide = chosen.pivot(index="stage", columns="readout", values="effect")
    return wide.loc[list(dict.fromkeys(chosen.stage)), list(dict.fromkeys(chosen.readout))].astype(float)


def matrix_figure(result: ChainResult, direction: str) -> Figure:
    """Heatmap of the chain matrix with its numbers written in; colours are clipped to [-1, 2], the numbers are not.

    Raises:
        InputError: plotly is not installed, or the run has no such direction.
    """
    go, _ = need_plotly()
    wide = chain_matrix(result, direction)
    values: list[list[float | None]] = [[None if np.isnan(x) else x for x in row] for row in wide.to_numpy()]
    heatmap = go.Heatmap(
        z=values,
        x=_axis_labels(wide.columns),
        y=_axis_labels(wide.index),
        text=[["" if x is None else _short(x) for x in row] for row in values],
        texttemplate="%{text}",
        zmin=-1,
        zmax=2,
        colorscale=[list(stop) for stop in DIVERGING],
        colorbar={"title": {"text": "effect"}, "thickness": 12, "tickvals": [-1, 0, 1, 2], "outlinewidth": 0},
        xgap=2,
        ygap=2,
        hoverongaps=False,
        hovertemplate="edit %{y}, read %{x}: %{z:.4g}<extra></extra>",
    )
    figure = go.Figure(heatmap)
    figure.update_xaxes(title_text="readout", showgrid=False, tickangle=-40, automargin=True)
    figure.update_yaxes(title_text="edited stage", autorange="reversed", showgrid=False, automargin=True)
    return styled(figure, 64 * 2 + 44 * len(wide) + 40, margin={"l": 10, "r": 10, "t": 20, "b": 10})


def _axis_labels(names: Sequence[object] | pd.Index) -> list[str]:
    return [_label(name) for name in names]


def _short(value: float) -> str:
    text = f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")
