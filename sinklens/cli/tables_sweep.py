"""Tables of a sweep for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from sinklens.records.text import NONE, effect_text, interval_text, number
from sinklens.sweeps.result import SweepResult

_NAMES = {"stage": "stage", "edit": "edit", "direction": "direction", "readout": "readout"}
_PLACES = {"layer": "layer", "position": "position", "unit": "unit"}


def overview_table(result: SweepResult) -> Table:
    """Mean and strongest effect of every stage, edit, direction and readout."""
    columns = _NAMES | {"cells": "cells", "effect": "mean over cells", "strongest": "strongest"} | _PLACES
    what = "Effects" if result.config["method"] == "exact" else "Effects estimated from gradients"
    title = f"{what}, mean over prompts: 0 is the run that was patched, 1 the pair's other run"
    return _table(title, result.overview().to_dict("records"), columns)


def strongest_table(result: SweepResult, n: int = 10) -> Table:
    """The cells with the largest effects."""
    rows = result.strongest(n).to_dict("records")
    columns = _NAMES | _PLACES | {"effect": "effect", "effect_std": "sd", "n": "n", "n_excluded": "excluded"}
    estimated = "" if result.config["method"] == "exact" else ", by estimates"
    return _table(f"The {len(rows)} strongest cells{estimated}", rows, columns)


def verified_table(verified: pd.DataFrame, n: int = 10) -> Table:
    """Of the patches of a screened sweep that were run, the cells with the largest exact effects."""
    keys = ["stage", "layer", "window", "position", "unit", "edit", "direction", "readout", "kind"]
    both = pd.DataFrame(verified, columns=[*keys, "estimate", "effect"])
    means = pd.DataFrame(both.groupby(keys, observed=True, dropna=False, as_index=False).mean())
    rows = means.loc[means.effect.abs().nlargest(n).index].to_dict("records")
    columns = _NAMES | _PLACES | {"estimate": "estimate", "effect": "exact effect", "kind": "run as"}
    return _table(f"The {len(rows)} strongest of the {verified.patch.nunique():,} patches that were run", rows, columns)


def judged_table(judged: pd.DataFrame) -> Table:
    """How well estimates rank exact effects, on the random sample."""
    rows = judged.to_dict("records")
    for row in rows:
        for name in ("spearman", "spearman_size", "kendall"):
            row[name] = f"{effect_text(row[name])} {interval_text(row[f'{name}_low'], row[f'{name}_high'])}".strip()
    columns = {
        "readout": "readout",
        "n": "patches",
        "spearman": "Spearman",
        "spearman_size": "of sizes",
        "kendall": "Kendall",
        "largest_missed": "largest effect not among the strongest",
    }
    return _table("Estimated and exact effects in the random sample", rows, columns)


def _table(title: str, rows: Sequence[Mapping[Any, Any]], columns: Mapping[str, str]) -> Table:
    """Columns in which nothing is given are left out."""
    cells = {column: [_cell(row, column) for row in rows] for column in columns}
    shown = [column for column, texts in cells.items() if column in _NAMES or any(text != NONE for text in texts)]
    table = Table(title=title)
    for column in shown:
        table.add_column(columns[column], justify="left" if column in _NAMES else "right", no_wrap=True)
    for texts in zip(*(cells[column] for column in shown), strict=True):
        table.add_row(*(escape(text) for text in texts))
    return table


def _cell(row: Mapping[Any, Any], column: str) -> str:
    value = row.get(column)
    if value is None or value is pd.NA or value != value:
        return NONE
    if column in ("effect", "strongest", "estimate", "largest_missed"):
        return effect_text(float(value))
    if column == "effect_std":
        return number(float(value), 2)
    if column == "layer" and row["window"] != value:
        return f"{int(value)}-{int(row['window'])}"
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of whole numbers beside missing ones
        value = int(value)
    return f"{value:,}" if column == "cells" else str(value)
