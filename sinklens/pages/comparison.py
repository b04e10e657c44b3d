"""One self-contained page of a comparison: what was trained, watched and found, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.errors import need
from sinklens.lab.compare import Comparison, texts_of
from sinklens.lab.runs import Run
from sinklens.pages.agreement import Agreement, agreement_section
from sinklens.pages.figures import from_disk
from sinklens.pages.page import data_of, digest_of
from sinklens.records.files import write_text
from sinklens.records.printable import templates
from sinklens.records.text import NONE, join, pretty
from sinklens.viz.training import by_block, training_curve


def comparison_report(comparison: Comparison, out: str | Path) -> Path:
    """Write the page of a comparison.

    Args:
        comparison: what :func:`sinklens.compare` gave.
        out: file to write, as a whole or not at all.

    Raises:
        InputError: it cannot be written, or plotly is missing.
    """
    path = Path(out)
    write_text(path, comparison_page(comparison))
    return path


def comparison_page(comparison: Comparison) -> str:
    """The page as text."""
    plotly = need("plotly.offline").get_plotlyjs()
    figures, shown = _figures(comparison.curves)
    texts = {"plotly": plotly, "page": data_of("report.js")}
    names = [run.name for run in comparison.runs]
    return (
        templates("sinklens.pages")
        .get_template("comparison.html.j2")
        .render(
            title=f"{len(names)} runs side by side",
            subtitle=join(names),
            lead=comparison.told,
            runs=[_run(run) for run in comparison.runs],
            reference=comparison.reference,
            finals=texts_of(comparison.finals),
            shown=shown,
            agreement=agreement_section(Agreement(comparison.verdicts)) if len(comparison.verdicts) else None,
            figures=figures,
            texts=texts,
            policy=" ".join(f"'sha256-{digest_of(text)}'" for text in texts.values()),
        )
    )


def _run(run: Run) -> list[str]:
    models = sorted({str(result.provenance.get("model")) for result in run.results})
    seed, parameters, tokens = (NONE if x is None else f"{x:,}" for x in (run.seed, run.parameters, run.tokens))
    return [run.name, run.arm, seed, parameters, tokens, join(models) if models else NONE, str(len(run.results))]


def _figures(curves: pd.DataFrame) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Every measure over training, and by block where it has one in each; the first position's alone, of several."""
    figures: dict[str, str] = {}
    shown: list[dict[str, Any]] = []
    if not len(curves):
        return figures, shown
    tables: Any = curves.groupby("measure", sort=False)
    for measure, table in tables:
        position = None if table["position"].isna().all() else int(table["position"].min())
        names = [f"{measure}-training"]
        figures[names[0]] = _drawn(training_curve(curves, str(measure), position=position))
        if not table["layer"].isna().all():
            names.append(f"{measure}-blocks")
            figures[names[1]] = _drawn(by_block(curves, str(measure), position=position))
        shown.append({"title": pretty(measure), "position": position, "names": names})
    return figures, shown


def _drawn(figure: Any) -> str:
    return from_disk(json.loads(figure.to_json()))
