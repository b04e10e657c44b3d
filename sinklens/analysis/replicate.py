"""The same on several disjoint sets of prompts: does another draw of prompts give the same verdict?

Each set is a run of its own, in a folder of its own, and looks for the formation itself. A part of a run that is there
already is kept when it was made with the same model, prompts and options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from sinklens.analysis.base import Analysis, AnalysisResult
from sinklens.analysis.suite import (
    CHAIN,
    Part,
    Parts,
    SuiteResult,
    Told,
    Watch,
    earlier_parts,
    part_key,
    write_record,
)
from sinklens.chain.agree import Said, agreement_text, compare, said_by_chain
from sinklens.chain.result import ChainResult
from sinklens.errors import InputError
from sinklens.models.state import check_bare
from sinklens.records.files import write_json, writing
from sinklens.records.plain import to_plain
from sinklens.study import Study

Result = TypeVar("Result", ChainResult, AnalysisResult)
T = TypeVar("T")
AGREEMENT = "agreement"
"""Name of the files that say how far runs agree: a table in Parquet, and the same in JSON."""


def set_names(sets: int) -> list[str]:
    """Names of so many sets, which are also those of their folders."""
    return [f"set-{i}" for i in range(1, sets + 1)]


def sets_of(study: Study, sets: int, n: int | None = None) -> dict[str, Study]:
    """So many studies on disjoint sets of a study's prompts, by name.

    Raises:
        InputError: there are too few prompts.
    """
    return dict(zip(set_names(sets), study.disjoint(sets, n), strict=True))


def replicate(study: Study, sets: int, run: Callable[[Study], T], *, n: int | None = None) -> dict[str, T]:
    """``run`` on so many disjoint sets of a study's prompts.

    Args:
        study: model, all prompts and seed.
        sets: how many sets.
        run: what is done with each, such as ``lambda study: sl.score_chain(study, sl.PairChoice(10))``.
        n: prompts in each set; as many as there are for all by default.

    Returns:
        What ``run`` gave for each set, by its name; :func:`sinklens.agreement` and :func:`verdict_agreement` compare.

    Raises:
        InputError: there are too few prompts.
    """
    return {name: run(each) for name, each in sets_of(study, sets, n).items()}


def said_by(result: ChainResult | AnalysisResult) -> list[Said]:
    """Every score of a chain with its verdict; the verdict of an analysis with its statistic."""
    if isinstance(result, ChainResult):
        return said_by_chain(result)
    found = result.findings.verdict
    value = float("nan") if found.estimate is None else found.estimate.value
    return [Said(result.name, "verdict", found.outcome, value)]


def verdict_agreement(results: Mapping[str, Sequence[ChainResult | AnalysisResult]]) -> pd.DataFrame:
    """How far runs of the same analyses (and chains) agree: see :func:`sinklens.chain.agree.compare`.

    Args:
        results: what each run found, by the run's name.
    """
    return compare({name: [said for result in found for said in said_by(result)] for name, found in results.items()})


def save_agreement(table: pd.DataFrame, out: Path, over: str = "") -> None:
    """Write ``agreement.parquet`` and ``agreement.json`` into a folder.

    Args:
        table: of :func:`verdict_agreement`.
        out: the folder.
        over: what the runs are, in words, such as ``events 1 and 2``.

    Raises:
        WriteError: it cannot be written.
    """
    with writing(out):
        table.to_parquet(out / f"{AGREEMENT}.parquet", index=False)
    write_json(
        out / f"{AGREEMENT}.json", {"over": over, "agreement": [to_plain(row) for row in table.to_dict("records")]}
    )


class _Sets(Parts):
    """One chain or analysis on several sets of prompts."""

    def __init__(
        self,
        studies: Mapping[str, Study],
        out: Path,
        run: Callable[[Study], Result],
        load: Callable[[Path], Result],
    ) -> None:
        self.studies, self.out, self.run, self.load = studies, out, run, load
        self.results: dict[str, Any] = {}

    def reuse(self, name: str) -> bool:
        try:
            self.results[name] = self.load(self.out / name)
        except Exception:  # whatever is wrong with what is there, it is made again
            return False
        return True

    def make(self, name: str) -> tuple[Any, str]:
        result = self.run(self.studies[name])
        result.save(self.out / name, force=True)
        self.results[name] = result
        return "done", ""


def replicate_into(
    study: Study,
    sets: int,
    out: str | Path,
    run: Callable[[Study], Result],
    load: Callable[[Path], Result],
    *,
    n: int | None = None,
    options: Mapping[str, Any] | None = None,
    analysis: Analysis | None = None,
    config: Mapping[str, Any] | None = None,
    fresh: bool = False,
    begins: Watch = lambda _name, _number, _of: None,
    ends: Told = lambda _part: None,
) -> tuple[SuiteResult, dict[str, Result], str]:
    """One chain or analysis on disjoint sets of prompts, each in a folder of its own; finished ones are kept.

    Args:
        study: model, all prompts and seed.
        sets: how many sets.
        out: the folder; one that the same command left is taken up again.
        run: what makes a set's result.
        load: what reads one back.
        n: prompts in each set.
        options: all that ``run`` was told: with others, finished sets are made again.
        analysis: the analysis, where it is one.
        config: what else to record, such as the command line.
        fresh: whether to make again what is there.
        begins: called when a set begins.
        ends: called when a set ends.

    Returns:
        What became of every set, their results, and a line on how far these agree.

    Raises:
        InputError: there are too few prompts, the folder holds something else, or there are hooks on the model.
        WriteError: there is no room.
    """
    check_bare(study.model, "a folder (out)", "use replicate, which keeps its results in memory")
    out = Path(out)
    studies = sets_of(study, sets, n)
    earlier = earlier_parts(out)
    if earlier and not set(earlier) <= set(set_names(len(earlier))):
        raise InputError(f"{out} holds a run that is not of several sets of prompts: choose another folder (out=)")
    earlier = {} if fresh else earlier
    made, parts = _Sets(studies, out, run, load), dict[str, Part]()
    record = {"sets": sets, **(config or {})}
    write_record(out, study, {name: part for name, part in earlier.items() if name in studies}, record)
    for number, (name, each) in enumerate(studies.items(), start=1):
        begins(name, number, sets)
        key = part_key(each, analysis, options or {}, {"options": options or {}})
        parts[name] = made.part(name, key, earlier.get(name))
        write_record(out, study, parts, record)
        ends(parts[name])
    table = verdict_agreement({name: [result] for name, result in made.results.items()})
    over = f"{len(made.results)} disjoint sets of {next(iter(studies.values())).batch.n} prompts"
    save_agreement(table, out, over)
    return SuiteResult(out, parts), made.results, agreement_text(table, over)


def all_agreement(folder: Path, parts: Mapping[str, SuiteResult], over: str) -> pd.DataFrame:
    """How far runs of everything agree, read from their folders, and written beside them.

    Args:
        folder: where the runs' folders are.
        parts: what ran, by the run's name.
        over: what the runs are, in words.
    """
    found = {name: results_of(result) for name, result in parts.items()}
    table = verdict_agreement(found)
    save_agreement(table, folder, over)
    return table


def results_of(suite: SuiteResult) -> list[ChainResult | AnalysisResult]:
    """What a run of everything has found, read from its folder; parts that failed are not there."""
    results: list[ChainResult | AnalysisResult] = []
    for name, part in suite.parts.items():
        place = suite.folder / name
        if part.status == "failed" or not place.is_dir():
            continue
        if name == CHAIN:
            results += [ChainResult.load(place)] if part.status == "done" else []
        else:
            results.append(AnalysisResult.load(place))
    return results
