"""Figures as JSON that may stand in the page: a chain's own, and what analyses left in ``figure.json``.

A figure from disk is not trusted. plotly reads a subset of HTML in every text, links among it, so that all tags but
those that only style are turned into text; pictures from elsewhere are dropped; points that need WebGL are drawn as
others are; text that would take a whole axis is cut. What plotly makes of the rest is drawn under a policy that runs no
script of the data's and fetches nothing.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from sinklens import viz
from sinklens.chain.result import ChainResult
from sinklens.errors import InputError
from sinklens.records.plain import to_plain
from sinklens.viz.chain import directions
from sinklens.viz.circuitsvis import script_json

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

MOST_BYTES = 1_500_000
"""Of one figure's JSON: beyond it the page says where the figure is instead of holding it."""
LONGEST = 80
"""Letters of a label."""
_STYLE_TAG = re.compile(r"<(?!/?(?:b|i|em|strong|sub|sup|extra)>|br ?/?>)")


def chain_figures(result: ChainResult) -> dict[str, str]:
    """A chain's plots by name."""
    figures = {"scores": viz.scores_figure(result), "scores-narrow": viz.scores_figure(result, stacked=True)}
    if len(result.formation.profile):
        figures["onset"] = viz.onset_figure(result)
    for direction in directions(result.matrix):
        figures[f"matrix-{direction}"] = viz.matrix_figure(result, direction)
    return {name: page_figure(figure) for name, figure in figures.items()}


def page_figure(figure: Figure) -> str:
    """A figure of our own as JSON that may stand in the page."""
    return _text(_plain(figure))


def mitigation_json(table: pd.DataFrame) -> str:
    """The figure of mitigations, harm against what is left of the sink."""
    return _text(_plain(viz.mitigation_figure(table)))


def _plain(figure: Figure) -> dict[str, Any]:
    return json.loads(figure.to_json() or "{}")


def from_disk(figure: Any) -> str:
    """A figure of plotly's JSON.

    Raises:
        InputError: it is no such figure, or too large for a page.
    """
    data = figure.get("data") if isinstance(figure, dict) else None
    layout = figure.get("layout", {}) if isinstance(figure, dict) else None
    if not (isinstance(data, list) and all(isinstance(trace, dict) for trace in data) and isinstance(layout, dict)):
        raise InputError("figure.json holds no plotly figure")
    text = _text({"data": [_trace(trace) for trace in data], "layout": layout})
    if len(text) > MOST_BYTES:
        raise InputError(f"figure.json is too large for this page ({len(text) / 1e6:.1f} MB)")
    return text


def _trace(trace: dict[str, Any]) -> dict[str, Any]:
    kind = trace.get("type")
    return {**trace, "type": kind.removesuffix("gl")} if kind in ("scattergl", "scatterpolargl") else trace


def _text(figure: dict[str, Any]) -> str:
    layout = {name: value for name, value in figure["layout"].items() if name != "template"}  # the page has its own
    return script_json(to_plain(_Cleaner().clean({"data": figure["data"], "layout": layout})))


class _Cleaner:
    """Makes every text of a figure plain; two labels that differ still do when they are cut."""

    def __init__(self) -> None:
        self.labels: dict[str, str] = {}
        self.taken: set[str] = set()

    def clean(self, value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            kept = {name: item for name, item in value.items() if not _fetches(name, item)}
            return {name: self.clean(item, name) for name, item in kept.items()}
        if isinstance(value, list):
            return [self.clean(item, key) for item in value]
        if not isinstance(value, str) or key == "bdata":
            return value
        safe = _STYLE_TAG.sub("&lt;", value)
        if key.endswith("template") or len(safe) <= LONGEST:
            return safe
        return safe if "<" in safe and len(safe) <= 5 * LONGEST else self._cut(re.sub("<[^>]*>", " ", safe), key)

    def _cut(self, text: str, key: str) -> str:
        if key in ("text", "hovertext"):  # titles and notes may be long; they break no axis, and are no categories
            return text[: 5 * LONGEST]
        if text not in self.labels:
            cut, number = f"{text[: LONGEST - 1]}…", 2
            while cut in self.taken:
                cut, number = f"{text[: LONGEST - 5]}… ({number})", number + 1
            self.taken.add(cut)
            self.labels[text] = cut
        return self.labels[text]


def _fetches(name: str, value: Any) -> bool:
    places = ("source", "href", "src", "topojsonURL")
    return name in places and isinstance(value, str) and not value.startswith("data:image/")
