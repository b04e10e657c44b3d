"""One self-contained HTML page of a run, to read, to keep and to send: it needs no network and no other file.

The page holds plotly.js and CircuitsVis once each. Everything that comes from the data is escaped, the page forbids
itself (by a content security policy) to fetch anything, and the CircuitsVis views sit in a sandboxed frame.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinklens import _report_content as content
from sinklens import viz
from sinklens._files import write_text
from sinklens._format import pretty
from sinklens._optional import need
from sinklens._verdicts import summary
from sinklens.errors import InputError
from sinklens.results import ChainResult

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ATTENTION_BUDGET = 400_000
"""Attention values that the page may hold: beyond it only the heads that attend most to the sink are shown."""


def report(run: str | Path | ChainResult, out: str | Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run: the folder that a chain was saved in, or a result.
        out: file to write; ``report.html`` in the folder by default. A result that has no folder needs it.

    Returns:
        The file written. It appears as a whole or not at all.

    Raises:
        InputError: the folder holds no finished run, the file cannot be written, or plotly or circuitsvis is missing.
    """
    if isinstance(run, ChainResult):
        if out is None:
            raise InputError("a result has no folder of its own: say where to write with report(result, 'report.html')")
        result, path = run, Path(out)
    else:
        result, path = ChainResult.load(run), Path(out) if out is not None else Path(run) / "report.html"
    if path.is_dir():
        path = path / "report.html"
    write_text(path, render(result))
    return path


def render(result: ChainResult) -> str:
    """The page as text.

    Raises:
        InputError: plotly or circuitsvis is missing.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sinklens", "data"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lead, paragraphs = summary(result)
    return environment.get_template("report.html.j2").render(
        plotly_script=need("plotly.offline").get_plotlyjs(),
        lead=lead,
        paragraphs=paragraphs,
        figures=_figures(result),
        attention=_attention(result),
        **content.sections(result),
    )


def _figures(result: ChainResult) -> dict[str, str]:
    """Plots as JSON that may stand inside a script element, by name."""
    figures = {
        "scores": viz.scores_figure(result),
        "scores-narrow": viz.scores_figure(result, stacked=True),
    }
    if len(result.formation.profile):
        figures["onset"] = viz.onset_figure(result)
    for direction in viz.directions(result.matrix):
        figures[f"matrix-{direction}"] = viz.matrix_figure(result, direction)
    return {name: _plain(figure) for name, figure in figures.items()}


def _plain(figure: Figure) -> str:
    figure.layout.template = None  # the page has its own, one for light and one for dark
    data = json.loads(figure.to_json() or "{}")
    text = json.dumps({"data": data["data"], "layout": data["layout"]}, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _attention(result: ChainResult) -> dict[str, Any] | None:
    """The page of the CircuitsVis frame, and what its caption says; None when the run has no attention."""
    if not result.attention:
        return None
    heads, shown = _heads(result)
    names = {run: f"{pretty(run)} run" for run in ("base", "anchored") if run in result.attention}
    names |= {run: f"{pretty(run)} run" for run in result.attention if run not in names}
    page = viz.attention_html({name: viz.attention_view(result, run, heads) for run, name in names.items()})
    return {
        "page": page,
        "heads": shown,
        "runs": list(names.values()),
        "block": result.formation.layer + 1,
        "tokens": min(64, len(result.tokens[0])),
        "beyond": _target(result) >= 64,
    }


def _heads(result: ChainResult) -> tuple[list[int] | None, str]:
    pattern = next(iter(result.attention.values()))[0, :, :64, :64]
    most = max(1, ATTENTION_BUDGET // (pattern[0].numel() * len(result.attention)))
    if len(pattern) <= most:
        return None, f"all {len(pattern)} heads"
    key = min(_target(result), pattern.shape[-1] - 2)
    received = sum(attention[0, :, key + 1 :, key].float().mean(-1) for attention in result.attention.values())
    strongest = sorted(received.topk(most).indices.tolist())  # pyright: ignore[reportAttributeAccessIssue]  (a tensor)
    return strongest, f"the {most} of {len(pattern)} heads that attend most to the sink"


def _target(result: ChainResult) -> int:
    """Position of the sink in the prompt that is shown."""
    target = result.config["target"]
    return target if isinstance(target, int) else result.formation.sink_positions[0]
