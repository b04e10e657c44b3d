"""Tables for the terminal: models side by side."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sinklens.cli.tables import console
from sinklens.lab.compare import Comparison, texts_of
from sinklens.records.plain import to_plain


def print_comparison(comparison: Comparison, page: Path, *, as_json: bool) -> None:
    """Print what was compared, and where it was written to."""
    if as_json:
        tables = {"finals": comparison.finals, "verdicts": comparison.verdicts}
        data = {name: [to_plain(row) for row in table.to_dict("records")] for name, table in tables.items()}
        print(json.dumps({"told": comparison.told, "reference": comparison.reference, **data, "page": str(page)}))  # noqa: T201
        return
    out = console()
    if len(comparison.finals):
        out.print(_finals(comparison))
    if comparison.told:
        out.print(Text(comparison.told))
    out.print(Text(f"{page}"))


def _finals(comparison: Comparison) -> Table:
    table = Table(title="After training: mean over seeds [95% interval]")
    for name in ("measure", "arm", "seeds", "value", f"difference from {comparison.reference}"):
        table.add_column(name)
    previous = ""
    for measure, *cells in texts_of(comparison.finals):
        if previous and measure != previous:
            table.add_section()
        table.add_row(*map(Text, ("" if measure == previous else measure, *cells)))
        previous = measure
    return table
