"""Several models side by side: what they were found to do, and, where they were trained here, how they came to it.

A run is a folder: of a model that was trained (:mod:`sinklens.lab.train`), of ``sinklens all``, of a chain or of an
analysis. Runs that differ in their seed alone are one *arm*. What an arm has is the mean over its seeds, with the
interval that a t-distribution gives for so few; arms are compared seed by seed, since two arms of one seed have seen
the same data in the same order and started from the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.replicate import save_agreement, verdict_agreement
from sinklens.chain.agree import agreement_text, compared
from sinklens.chain.result import ChainResult
from sinklens.errors import InputError
from sinklens.lab.runs import Run, read_run
from sinklens.records.files import atomic_folder, write_json
from sinklens.records.summaries import html, summary
from sinklens.records.text import NONE, interval_text, number, pretty

KEYS = ["measure", "position"]
"""Columns that name a number of a watched model; it is the mean over the blocks where it has one in each."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What several runs have to say beside one another."""

    runs: tuple[Run, ...]
    """The runs, in the order in which they were given."""
    reference: str | None
    """The arm that others are compared with; None where fewer than two were trained."""
    verdicts: pd.DataFrame
    """One row for every verdict and score that a run has (:func:`sinklens.verdict_agreement`); empty without."""
    curves: pd.DataFrame
    """What was watched in training: ``arm``, ``seed``, ``step``, ``tokens``, ``measure``, ``layer``, ``position``,
    ``value``; empty where nothing was trained."""
    finals: pd.DataFrame
    """One row for every measure and arm at the end of training (:func:`final_values`)."""

    def __repr__(self) -> str:
        return summary(self, f"{len(self.runs)} runs", ", ".join(self.arms), self.told)

    def _repr_html_(self) -> str:
        return html(repr(self), self.finals if len(self.finals) else self.verdicts)

    @property
    def arms(self) -> list[str]:
        """The arms, in the order of the runs."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def told(self) -> str:
        """A line on how far the verdicts agree; empty where there are none."""
        several = len(self.verdicts) and compared(self.verdicts)
        return agreement_text(self.verdicts, f"{sum(bool(run.results) for run in self.runs)} runs") if several else ""

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write the tables as Parquet, and what was compared as ``compare.json``, as a whole or not at all.

        Raises:
            InputError: the folder exists and ``force`` is not set, or cannot be written.
        """
        with atomic_folder(out, force=force) as folder:
            if len(self.verdicts):
                save_agreement(self.verdicts, folder)
            for name, table in (("curves", self.curves), ("finals", self.finals)):
                if len(table):
                    table.to_parquet(folder / f"{name}.parquet", index=False)
            runs = [run.summary() for run in self.runs]
            write_json(folder / "compare.json", {"runs": runs, "reference": self.reference, "told": self.told})
        return Path(out)


def compare(
    runs: Sequence[str | Path] | Mapping[str, ChainResult | AnalysisResult | Sequence[ChainResult | AnalysisResult]],
    *,
    reference: str | None = None,
) -> Comparison:
    """Put runs side by side.

    Args:
        runs: folders of trained models, of ``sinklens all``, of chains, of analyses, and folders that hold such; or
            results in memory by the name of the model.
        reference: the arm that others are compared with; ``softmax`` where it was trained, else the first.

    Raises:
        InputError: a folder that holds nothing of the kind, two runs of one name, no such reference, or arms that were
            trained on other data.
    """
    if isinstance(runs, Mapping):
        read = [Run.of_results(name, results) for name, results in runs.items()]
    else:
        read = [run for path in runs for run in read_run(Path(path))]
    if len(read) < 2:
        raise InputError(f"a comparison takes two runs or more, and {'there is one' if read else 'there is none'}.")
    read = _told_apart(read)
    named = {run.name: run for run in read}
    if len(named) < len(read):
        twice = next(name for name in named if sum(run.name == name for run in read) > 1)
        raise InputError(f"two runs are called {twice!r}: give each once, or rename a folder.")
    found = {name: run.results for name, run in named.items() if run.results}
    curves = _curves([run for run in read if run.watched is not None])
    chosen = _reference(curves, reference)
    return Comparison(
        tuple(read),
        chosen,
        verdict_agreement(found) if found else pd.DataFrame(),
        curves,
        final_values(curves, chosen) if chosen else pd.DataFrame(),
    )


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with the settings in their arms' names by which runs of one variant differ (but for the seed)."""
    found: list[Run] = []
    for run in runs:
        alike = [other.settings for other in runs if other.arm == run.arm and other.settings is not None]
        apart = [
            f"{name} {value}"
            for name, value in (run.settings or {}).items()
            if name != "seed" and any(other.get(name) != value for other in alike)
        ]
        found.append(replace(run, arm=", ".join([run.arm, *apart])))
    return found


def _curves(trained: Sequence[Run]) -> pd.DataFrame:
    """What was watched in all of them, where they were watched on the same held-out tokens."""
    if not trained:
        return pd.DataFrame()
    for run in trained:
        if run.data != trained[0].data:
            raise InputError(
                f"{trained[0].name} and {run.name} were trained and watched on different data, so their numbers do not "
                "compare: compare runs of the same data, tokenizer and length."
            )
    found: list[Any] = [run.watched for run in trained]
    tables = [table.assign(run=run.name, arm=run.arm, seed=run.seed) for table, run in zip(found, trained, strict=True)]
    return pd.concat(tables, ignore_index=True)


def _reference(curves: pd.DataFrame, asked: str | None) -> str | None:
    arms = list(dict.fromkeys(curves["arm"])) if len(curves) else []
    if asked is not None and asked not in arms:
        raise InputError(f"there is no trained arm {asked!r}: the arms are {', '.join(arms) or 'none'}.")
    return asked or ("softmax" if "softmax" in arms else arms[0] if arms else None)


def final_values(curves: pd.DataFrame, reference: str) -> pd.DataFrame:
    """What arms have at the end of training, and by how much they differ from the reference.

    A run's value is the mean over blocks of its last step; an arm's the mean over its seeds, with the 95% interval of a
    t-distribution; a difference that of the seeds which both arms have, each with its own.

    Args:
        curves: as :attr:`Comparison.curves`.
        reference: the arm that others are compared with.

    Returns:
        ``measure``, ``position``, ``arm``, ``step``, ``n`` seeds, ``value``, ``sd``, ``low``, ``high``; ``difference``,
        ``difference_low``, ``difference_high`` over ``n_paired`` seeds, NaN for the reference itself. Intervals of one
        seed are NaN.
    """
    frame: Any = curves
    last = frame[frame["step"] == frame.groupby("run")["step"].transform("max")]
    each = last.groupby([*KEYS, "arm", "seed"], dropna=False, sort=False)[["value", "step"]].mean().reset_index()
    rows = []
    for key, table in each.groupby(KEYS, dropna=False, sort=False):
        by_seed = table.pivot(index="seed", columns="arm", values="value")
        for arm in dict.fromkeys(table["arm"]):
            value, low, high, n = t_interval(by_seed[arm])
            row = dict(zip(KEYS, key, strict=True)) | {"arm": arm, "n": n, "value": value, "sd": by_seed[arm].std()}
            row |= {"low": low, "high": high, "step": int(table.loc[table["arm"] == arm, "step"].max())}
            apart = arm != reference and reference in by_seed
            paired = t_interval(by_seed[arm] - by_seed[reference]) if apart else (np.nan, np.nan, np.nan, 0)
            names = ("difference", "difference_low", "difference_high", "n_paired")
            rows.append(row | dict(zip(names, paired, strict=True)))
    return pd.DataFrame(rows)


def texts_of(finals: pd.DataFrame) -> list[list[str]]:
    """A line for every measure and arm of :func:`final_values`, as a table shows it: measure, arm, seeds, value,
    difference. Of the measures of a position that of the first.
    """
    rows: Any = finals.to_dict("records")
    return [
        [
            pretty(row["measure"]) + ("" if pd.isna(row["position"]) else ", first token"),
            str(row["arm"]),
            str(row["n"]),
            _with(row["value"], row["low"], row["high"]),
            _with(row["difference"], row["difference_low"], row["difference_high"]),
        ]
        for row in rows
        if pd.isna(row["position"]) or row["position"] == 0
    ]


def _with(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return NONE
    return number(value) + ("" if np.isnan(low) else f" {interval_text(low, high)}")


def t_interval(values: Any, level: float = 0.95) -> tuple[float, float, float, int]:
    """Mean of a few independent values, the interval of a t-distribution, and their number; NaN where there is none."""
    from scipy.stats import t

    kept = values.dropna()
    n = len(kept)
    if n < 2:
        return (float(kept.iloc[0]) if n else np.nan), np.nan, np.nan, n
    half = t.ppf((1 + level) / 2, n - 1) * kept.std() / np.sqrt(n)
    return float(kept.mean()), float(kept.mean() - half), float(kept.mean() + half), n
