"""Which verdicts change with BOS, length, seed and prompts: `python -m tests.helpers.flips runs/flips 8`.

Every analysis is run once as usual, and once for each change of one thing, on a few prompts of the default model. The
table goes between the marks in analyses/README.md. What was measured already is kept, as in `sinklens all`: only
analyses whose code has changed are run again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.analysis.discovery import folder, list_analyses
from sinklens.analysis.replicate import results_of, verdict_agreement
from sinklens.analysis.suite import run_all
from sinklens.models.load import load_model
from sinklens.models.view import Model
from sinklens.prompts import PromptBatch, natural
from sinklens.records.text import number
from sinklens.study import Study
from tests.helpers.readme import ORDER

README = folder() / "README.md"
BEGIN, END = "<!-- flips: make flips -->", "<!-- end of flips -->"
"""What stands above the table and below it."""
MODEL, N_PROMPTS, LENGTH = "smollm2", 8, 64
BASE = "as usual"
CHANGES: Mapping[str, Mapping[str, Any]] = {
    BASE: {},
    "BOS in front": {"prepend_bos": "always"},
    "32 tokens": {"length": 32},
    "seed 1": {"seed": 1},
    "other prompts": {"skip": True},
}
"""What is changed, one thing at a time."""
SAME = "="


def study(
    model: Model, n: int, *, prepend_bos: Any = "auto", length: int = LENGTH, seed: int = 0, skip: bool = False
) -> Study:
    """The study of one setting; with ``skip`` on passages that the others do not have."""
    batch: PromptBatch = natural(model, 2 * n if skip else n, length, prepend_bos=prepend_bos)
    return Study(model, batch.subset(range(n, 2 * n)) if skip else batch, seed)


def measure(model: Model, out: Path, n: int = N_PROMPTS, only: Sequence[str] = ()) -> pd.DataFrame:
    """Every analysis at every setting, one row each (see :func:`sinklens.verdict_agreement`)."""
    names = list(only) or list(list_analyses())
    found = {}
    for i, (name, change) in enumerate(CHANGES.items()):
        here = study(model, n, **change)
        told = run_all(here, out / f"{i}-{name.replace(' ', '-')}", only=names, begins=partial(_says, name))
        found[name] = results_of(told)
    return verdict_agreement(found)


def _says(change: str, analysis: str, number_of: int, of: int) -> None:
    sys.stderr.write(f"{change} [{number_of}/{of}] {analysis}\n")


def flips(measured: pd.DataFrame, n: int = N_PROMPTS) -> str:
    """The table: verdicts that are as usual are not repeated, and a line says how many never change."""
    others = [name for name in CHANGES if name != BASE]
    lines = [f"| analysis | {' | '.join([BASE, *others])} |", "|---" * (len(others) + 2) + "|"]
    rows = sorted(measured.to_dict("records"), key=lambda row: _rank(row["part"]))
    for row in rows:
        usual = row[f"verdict: {BASE}"]
        cells = [_cell(row, BASE), *(_cell(row, name, usual) for name in others)]
        lines.append(f"| `{row['part']}` | {' | '.join(cells)} |")
    never = sum(all(row[f"verdict: {name}"] == row[f"verdict: {BASE}"] for name in others) for row in rows)
    said = (
        f"{never} of {len(rows)} verdicts are the same whatever is changed ({n} prompts; `{SAME}`: as usual, with its "
        "statistic)."
    )
    return "\n".join([*lines, "", said])


def _cell(row: Mapping[str, Any], name: str, usual: Any = None) -> str:
    verdict, value = row[f"verdict: {name}"], number(float(row[f"value: {name}"]))
    if not isinstance(verdict, str):
        return "failed"
    said = SAME if verdict == usual else verdict if usual is None else f"**{verdict}**"
    return said if value == "–" else f"{said} ({value})"


def _rank(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def with_flips(readme: str, new: str) -> str:
    """A README's text with another table between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    where, size = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else N_PROMPTS
    text = flips(measure(load_model(MODEL), where, size), size)
    README.write_text(with_flips(README.read_text(encoding="utf-8"), text), encoding="utf-8")
