"""How far the runs of a folder agree, as a section of its report: at several targets, or on several sets of prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.chain.agree import agreement_count, compared
from sinklens.records.text import NONE, number

FILE = "agreement.json"
VERDICT, VALUE = "verdict: ", "value: "
"""What the columns of one run begin with."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far runs agree."""

    table: pd.DataFrame
    """A row for every verdict (:func:`sinklens.chain.agree.compare`)."""
    over: str = ""
    """What the runs are, in words; empty where that was not noted."""


def read_agreement(folder: Path) -> Agreement | None:
    """What :func:`sinklens.analysis.replicate.save_agreement` has left in a folder; ``None`` where there is none.

    Raises:
        ValueError: it is not what that writes.
        OSError: it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    rows, over = (data.get("agreement"), data.get("over", "")) if isinstance(data, Mapping) else (None, "")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError("it holds no table of agreement")
    if not rows:
        return None  # of runs that have no verdict
    for row in rows:
        for key, value in row.items():
            if isinstance(value, Mapping | list):
                raise ValueError(f"{key} is not a single value")
    table = pd.DataFrame(rows)
    if missing := {"part", "what", "control", "n_runs", "same", "least", "most"} - set(table):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return Agreement(table, over if isinstance(over, str) else "")


def agreement_section(agreement: Agreement | None) -> dict[str, Any] | None:
    """The line, and a table with a row for every verdict, those that differ first; ``None`` where nothing compares."""
    if agreement is None:
        return None
    table = agreement.table
    names = [str(column).removeprefix(VERDICT) for column in table if str(column).startswith(VERDICT)]
    own = compared(table)
    if not names or not own:
        return None
    # Sorting is stable: within each half rows stay as the runs have them.
    rows = sorted(own, key=lambda row: bool(row["same"]))
    return {
        "told": f"{agreement_count(table, agreement.over or f'all {len(names)} runs')}.",
        "head": ["Part", "What", "Same", *names],
        "rows": [
            [str(row["part"]), str(row["what"]), "yes" if row["same"] else "no", *(_cell(row, name) for name in names)]
            for row in rows
        ],
    }


def _cell(row: Mapping[Any, Any], name: str) -> str:
    verdict, value = row[VERDICT + name], row.get(VALUE + name)
    if not isinstance(verdict, str):
        return NONE
    if not isinstance(value, int | float) or not math.isfinite(value):
        return verdict
    return f"{verdict} ({number(float(value))})"
