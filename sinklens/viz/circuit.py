"""A circuit as a drawn graph.

The graph goes from left to right as the forward pass does, a column for every block that has a node in it: its heads
below, its MLP and super neurons behind and above them. An edge is as wide as its effect (wider no more from 1 on;
dashed: below 0), and has the colour of the input by which it is read; a click on an input in the legend hides its
edges, a double click all others. Pointed at, an edge says its effect in both directions with intervals. What is drawn
is computed by functions of its own (:func:`circuit_nodes`, :func:`circuit_edges`), which need no plotting library.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sinklens.circuits import Circuit, Node
from sinklens.errors import InputError
from sinklens.records.text import number, pretty
from sinklens.viz.charts import COLOURS, INK, need_plotly, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BRANCHES = {"gate": 0, "linear": 1, "in": 2, "q": 3, "k": 4, "v": 5}
"""Inputs in the order of the legend, and which of the colours each has; any other has that of ink."""
SYMBOLS = {"embed": "triangle-right", "head": "circle", "kv": "circle-open", "mlp": "square", "super": "star"}
"""How a node is drawn, by its kind."""
HEADS = ("embed", "head", "kv")
"""Kinds of nodes that lie below."""
METHODS = ("exact", "eap_ig", "eap")
"""Where an edge has several effects, the first of these that it has is drawn."""
MOST_EDGES = 200
"""No more edges are drawn: those of the largest effects."""
WIDEST = 12.0
"""Pixels of an edge whose effect is 1 or more."""
DIRECTIONS = ("denoise", "noise")


def check_circuit(result: object) -> None:
    """Make sure of what is to be drawn.

    Raises:
        InputError: it is no circuit.
    """
    if not isinstance(result, Circuit):
        what = type(result).__name__
        raise InputError(f"this draws what sl.circuit found, or Circuit.load(folder), not of type {what}")


def circuit_nodes(circuit: Circuit) -> pd.DataFrame:
    """The nodes of a circuit and where they lie: one row for each.

    Columns: node, kind, block, column (of the block, from the left, with the MLP half a place behind the heads), row
    (heads around 0, MLPs above all of them).

    Raises:
        InputError: it is no circuit, or one without an edge.
    """
    check_circuit(circuit)
    nodes = circuit.nodes
    if not nodes:
        raise InputError("the circuit has no edge: there is nothing to draw")
    blocks = {block: place for place, block in enumerate(sorted({node.block for node in nodes}))}
    columns: dict[float, list[Node]] = {}
    for node in nodes:
        columns.setdefault(blocks[node.block] + 0.45 * (node.kind not in HEADS), []).append(node)
    above = max((len(those) for those in columns.values() if those[0].kind in HEADS), default=0) / 2 + 0.7
    places = []
    for column, those in columns.items():
        lowest = -(len(those) - 1) / 2 if those[0].kind in HEADS else above
        for row, node in enumerate(those):
            place = {"node": node.name, "kind": node.kind, "block": node.block}
            places.append({**place, "column": column, "row": lowest + row})
    return pd.DataFrame(places)


def circuit_edges(circuit: Circuit) -> pd.DataFrame:
    """The edges of a circuit with what is said of each: one row for an edge and direction, the largest first.

    Columns: sender, receiver, branch, direction, method, effect, ci_low, ci_high, n, and loss (of the sink when the
    edge goes; NaN where that was not measured).
    """
    check_circuit(circuit)
    key = ["sender", "receiver", "branch"]
    names = pd.DataFrame([(str(e.sender), str(e.receiver), e.branch) for e in circuit.kept], columns=key)
    rows: Any = names.merge(circuit.edges, on=key)
    order = {method: place for place, method in enumerate(METHODS)}
    rows = rows.assign(better=rows.method.map(lambda method: order.get(method, len(order))))
    rows = rows.sort_values("better", kind="stable").drop_duplicates([*key, "direction"])
    rows = rows.merge(circuit.minimality[[*key, "loss"]], on=key, how="left")
    rows = rows.iloc[np.argsort(-rows.effect.abs().fillna(0).to_numpy(), kind="stable")]
    return rows[[*key, "direction", "method", "effect", "ci_low", "ci_high", "n", "loss"]].reset_index(drop=True)


def circuit_figure(circuit: Circuit, *, vertical: bool = False) -> Figure:
    """The circuit as a graph: nodes by block, edges as wide as their effects.

    Args:
        circuit: what was found.
        vertical: blocks below one another: for narrow screens.

    Raises:
        InputError: plotly is not installed, it is no circuit, or one without an edge.
    """
    go, _ = need_plotly()
    nodes: Any = circuit_nodes(circuit)
    edges = circuit_edges(circuit)
    places = {row["node"]: (row["column"], row["row"]) for row in nodes.to_dict("records")}
    of_edge = _by_edge(edges)
    beside: dict[tuple[str, str], int] = {}  # edges between the same nodes, which must not lie on one another
    named = []
    for edge, rows in of_edge.items():
        number = beside[edge[:2]] = beside.get(edge[:2], -1) + 1
        named.append(_edge_trace(go, edge, rows, _curve(places[edge[0]], places[edge[1]], number), vertical))
    shown: set[str] = set()
    for trace in named:  # one line of the legend for each input
        trace.showlegend = trace.legendgroup not in shown
        shown.add(trace.legendgroup)
    figure = go.Figure([*named, _node_trace(go, nodes, vertical)])
    _graph_axes(figure, nodes, vertical)
    directions = [name for name in DIRECTIONS if (edges.direction == name).any()]
    tall = int(nodes.groupby("column").row.count().max())
    height = 130 + (64 * (len(set(nodes.column)) + 1) if vertical else max(260, 36 * tall + 60))
    legend = {"orientation": "h", "y": 1, "yref": "container", "yanchor": "top", "title": {"text": "read as "}}
    figure.update_layout(legend=legend, updatemenus=_buttons(of_edge, directions))
    return styled(figure, height, margin={"l": 10, "r": 10, "t": 90, "b": 40})


def _by_edge(edges: Any) -> dict[tuple[str, str, str], Any]:
    """The strongest edges, weakest first so that strong ones lie on top; rows by edge."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for row in edges.itertuples():
        groups.setdefault((row.sender, row.receiver, row.branch), []).append(row)
    strongest = list(groups.items())[:MOST_EDGES]
    return dict(reversed(strongest))


def _edge_trace(go: Any, edge: tuple[str, str, str], rows: Sequence[Any], curve: Any, vertical: bool) -> Any:
    branch, (along, across) = edge[2], curve
    x, y = (across, -along) if vertical else (along, across)
    effect = _effect(rows, _first(rows))
    return go.Scatter(
        x=x.round(4).tolist(),
        y=y.round(4).tolist(),
        mode="lines",
        line={"width": _width(effect), "color": _colour(branch), "dash": _dash(effect), "simplify": False},
        opacity=0.75,
        name=branch,
        legendgroup=branch,
        legendrank=1000 + list(BRANCHES).index(branch) if branch in BRANCHES else 1100,
        text=_said(edge, rows),
        hovertemplate="%{text}<extra></extra>",
    )


def _curve(start: tuple[float, float], end: tuple[float, float], number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points from a node to another: leaving and arriving in the direction of the forward pass, bent away from what
    lies between two nodes of one row, and from the ``number`` edges that the two have already.
    """
    t = np.linspace(0, 1, 25)
    far = start[1] == end[1] and end[0] - start[0] > 0.6
    bend = 0.28 * far * min(3.0, end[0] - start[0]) + 0.3 * number
    smooth = t * t * (3 - 2 * t)
    return start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * smooth + bend * np.sin(np.pi * t)


def _first(rows: Sequence[Any]) -> str:
    there = [row.direction for row in rows]
    return next((name for name in DIRECTIONS if name in there), there[0])


def _effect(rows: Sequence[Any], direction: str) -> float:
    return next((float(row.effect) for row in rows if row.direction == direction), float("nan"))


def _width(effect: float) -> float:
    return 0.5 if np.isnan(effect) else round(1.0 + (WIDEST - 1.0) * min(1.0, abs(effect)), 2)


def _dash(effect: float) -> str:
    return "dot" if effect < 0 else "solid"


def _colour(branch: str) -> str:
    return COLOURS[BRANCHES[branch]] if branch in BRANCHES else INK


def _said(edge: tuple[str, str, str], rows: Sequence[Any]) -> str:
    """What an edge says when it is pointed at."""
    sender, receiver, branch = (html.escape(part, quote=False) for part in edge)
    lines = [f"{sender} → {receiver} ({branch})"]
    for row in rows:
        interval = "" if pd.isna(row.ci_low) else f" [{number(row.ci_low)}, {number(row.ci_high)}]"
        lines.append(f"{pretty(row.direction)} {number(row.effect)}{interval}, n = {row.n}, {pretty(row.method)}")
    if not pd.isna(rows[0].loss):
        lines.append(f"without it the circuit loses {number(rows[0].loss)} of the sink")
    return "<br>".join(lines)


def _node_trace(go: Any, nodes: Any, vertical: bool) -> Any:
    along, across = nodes.column, nodes.row
    return go.Scatter(
        x=(across if vertical else along).tolist(),
        y=(-along if vertical else across).tolist(),
        mode="markers+text",
        marker={"size": 13, "color": INK, "symbol": [SYMBOLS.get(kind, "diamond") for kind in nodes.kind]},
        text=[html.escape(_short(name), quote=False) for name in nodes.node],
        textposition="middle right" if vertical else "bottom center",
        textfont={"size": 11},
        hovertext=[html.escape(name, quote=False) for name in nodes.node],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
        cliponaxis=False,
    )


def _short(name: str) -> str:
    """``3.5`` for a head: circles are heads."""
    return name.removeprefix("head ")


def _graph_axes(figure: Figure, nodes: Any, vertical: bool) -> None:
    ticks = nodes.drop_duplicates("column").groupby("block").column.mean()
    names = ["embedding" if block < 0 else f"block {block}" for block in ticks.index]
    low, high = float(nodes["row"].min()) - 0.8, float(nodes["row"].max()) + 1.4
    if vertical:
        along, across = figure.update_yaxes, figure.update_xaxes
        ticks, span = -ticks, [-(float(nodes.column.max()) + 0.5), 0.4]
    else:
        along, across = figure.update_xaxes, figure.update_yaxes
        span = [-0.4, float(nodes.column.max()) + 0.5]
    along(tickvals=ticks.tolist(), ticktext=names, range=span, showgrid=False, zeroline=False, automargin=True)
    across(visible=False, range=[low, high])


def _buttons(of_edge: Mapping[tuple[str, str, str], Sequence[Any]], directions: Sequence[str]) -> list[dict[str, Any]]:
    """Whose effects the widths are, where there are two directions."""
    if len(directions) < 2:
        return []
    traces = list(range(len(of_edge)))
    buttons = []
    for name in directions:
        effects = [_effect(rows, name) for rows in of_edge.values()]
        dashes = [_dash(x) for x in effects]
        styles = {"line.width": [_width(x) for x in effects], "line.dash": dashes}
        buttons.append({"label": f"width: {name}", "method": "restyle", "args": [styles, traces]})
    # Light in dark mode, too: plotly lights up the one that is pointed at.
    look = {"bgcolor": "#dfe3e8", "font": {"color": "#1b1f24"}, "showactive": False}
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "direction": "right", "type": "buttons"}
    return [{**place, **look, "buttons": buttons, "pad": {"b": 6}}]
