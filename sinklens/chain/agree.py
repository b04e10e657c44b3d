"""Do several runs of the same experiments agree? At several targets, or on several disjoint sets of prompts.

Every score and verdict is a row: in how many of the runs the verdict is the same, and how far apart the estimates are.
One run's interval says how sure its number is on prompts like these; whether the *verdict* would have come out the same
on others, only others tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sinklens.chain.result import ChainResult
from sinklens.chain.run import run_chain
from sinklens.chain.verdicts import findings
from sinklens.formation import Formation, find_formation
from sinklens.formation.find import given_event
from sinklens.models.view import Model
from sinklens.pairs.choice import Target, check_targets
from sinklens.prompts import PromptBatch, check_batch
from sinklens.records.text import join, number

MOST_TOLD = 6
"""Differing verdicts of which a line says how they differ; of more it has the names."""


@dataclass(frozen=True)
class Said:
    """One number of a run, and what the run says by it."""

    part: str
    """The stage or the analysis."""
    what: str
    """Which of its numbers."""
    verdict: str
    """The verdict."""
    value: float
    """The estimate."""
    control: bool = False
    """Whether it is a control."""


def run_chains(
    model: Model,
    batch: PromptBatch,
    *,
    targets: Sequence[Target],
    formation: Formation | None = None,
    event: int | None = None,
    **options: Any,
) -> dict[Target, ChainResult]:
    """:func:`sinklens.run_chain` at several targets; the formation is looked for once.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        batch: equal-length prompts.
        targets: positions that are made a sink, or ``"natural"``.
        formation: where the sink forms; found if not given.
        event: number of the formation event to explain, in place of ``formation``.
        options: further options of :func:`sinklens.run_chain`, the same for all.

    Returns:
        The result of each target, in the order of ``targets``.

    Raises:
        NoSinkError, InputError, EngineError: as for :func:`sinklens.run_chain`; a target that is named twice.
    """
    check_batch(model, batch)
    check_targets(targets, batch.length)
    given = given_event(event, formation)
    if formation is None:
        formation = find_formation(model, batch, **given, memory_budget=options.get("memory_budget"))
    return {target: run_chain(model, batch, target=target, formation=formation, **options) for target in targets}


def said_by_chain(result: ChainResult) -> list[Said]:
    """Every score of a chain with its verdict."""
    return [
        Said(f.stage, _what(f.edit, f.control, f.direction), f.verdict, f.effect, bool(f.control))
        for f in findings(result)
    ]


def agreement(results: Mapping[Any, ChainResult]) -> pd.DataFrame:
    """How far chains agree, one row a score: see :func:`compare`.

    Args:
        results: the runs by name: of :func:`run_chains`, or of disjoint sets of prompts.
    """
    return compare({str(name): said_by_chain(result) for name, result in results.items()})


def compare(runs: Mapping[str, Sequence[Said]]) -> pd.DataFrame:
    """How far runs agree, one row for each number that any of them has.

    Returns:
        ``part``, ``what``, ``control``; ``n_runs`` that have it, ``n_same`` of them with the most frequent ``verdict``,
        whether these are all (``same``); ``mean``, ``least``, ``most`` and ``spread`` (``most - least``) of the
        estimates; and every run's own, ``verdict: NAME`` and ``value: NAME``.
    """
    rows: dict[tuple[str, str], dict[str, Said]] = {}
    for name, said in runs.items():
        for item in said:
            rows.setdefault((item.part, item.what), {})[name] = item
    return pd.DataFrame([_row(found, list(runs)) for found in rows.values()])


def _row(found: Mapping[str, Said], names: Sequence[str]) -> dict[str, Any]:
    first = next(iter(found.values()))
    verdict, times = Counter(item.verdict for item in found.values()).most_common(1)[0]
    values = np.array([item.value for item in found.values()], dtype=float)
    finite = values[np.isfinite(values)]
    least, most = (finite.min(), finite.max()) if len(finite) else (np.nan, np.nan)
    row: dict[str, Any] = {"part": first.part, "what": first.what, "control": first.control}
    row |= {"n_runs": len(found), "n_same": times, "same": times == len(found), "verdict": verdict}
    row |= {"mean": finite.mean() if len(finite) else np.nan, "least": least, "most": most, "spread": most - least}
    for name in names:
        item = found.get(name)
        row[f"verdict: {name}"] = None if item is None else item.verdict
        row[f"value: {name}"] = np.nan if item is None else item.value
    return row


def agreement_text(table: pd.DataFrame, over: str) -> str:
    """One line: how many verdicts (of edits, not of controls) are the same in all runs, and which are not.

    Args:
        table: of :func:`compare`.
        over: what the runs are, such as ``targets 5, 10 and 20``.
    """
    own = compared(table)
    differ = [row for row in own if not row["same"]]
    if not own:
        return f"There is nothing to compare between {over}."
    head = agreement_count(table, over)
    if not differ:
        return f"{head}."
    if len(differ) > MOST_TOLD:
        others = join([f"{row['part']} {row['what']}" for row in differ])
        return f"{head}; they differ in {others} (the table has how)."
    names = [str(column).removeprefix("verdict: ") for column in table if str(column).startswith("verdict: ")]
    each = []
    for row in differ:
        verdicts = [f"{name} {row[f'verdict: {name}']}" for name in names if isinstance(row[f"verdict: {name}"], str)]
        each.append(f"{row['part']} {row['what']} ({', '.join(verdicts)}; {_range(row)})")
    return f"{head}; they differ in {join(each, '; ')}."


def agreement_count(table: pd.DataFrame, over: str) -> str:
    """How many verdicts of :func:`compared` are the same in all runs."""
    own = compared(table)
    return f"{sum(row['same'] for row in own)} of {len(own)} verdicts are the same for {over}"


def compared(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """The rows of a table of :func:`compare` whose verdicts are compared: of edits and claims, in two runs or more."""
    return [row for row in table.to_dict("records") if not row["control"] and row["n_runs"] > 1]


def _range(row: Mapping[str, Any]) -> str:
    least, most = number(row["least"]), number(row["most"])
    return least if least == most else f"from {least} to {most}"


def _what(edit: str, control: str, direction: str) -> str:
    return f"{edit}, control {control}, {direction}" if control else f"{edit}, {direction}"
