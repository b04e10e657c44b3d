"""What a report is about: chains, circuits and analyses that a folder holds, and what it ought to hold and does not.

A folder is read as it is found: a part that is unfinished or damaged is listed with the reason, and the others are
shown. Nothing in it is trusted to have the type that it should.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from sinklens.analysis.base import AnalysisResult
from sinklens.analysis.several import EVENTS, SETS
from sinklens.chain.result import ChainResult
from sinklens.circuits import Circuit
from sinklens.errors import InputError
from sinklens.formation import Formation, formation_from_json
from sinklens.mitigation.result import FILE as MITIGATION_FILE
from sinklens.mitigation.result import MitigationResult
from sinklens.pages.agreement import FILE, Agreement, read_agreement
from sinklens.records.text import join

Result: TypeAlias = ChainResult | Circuit | AnalysisResult | MitigationResult
"""What a part holds."""
CHAIN_FILE, CIRCUIT_FILE, ANALYSIS_FILE = "chain.json", "circuit.json", "summary.json"
RECORD_FILE, FORMATION_FILE = "run.json", "formation.json"
READ: dict[str, Callable[[Path], Result]] = {
    CHAIN_FILE: ChainResult.load,
    CIRCUIT_FILE: Circuit.load,
    ANALYSIS_FILE: AnalysisResult.load,
    MITIGATION_FILE: MitigationResult.load,
}
"""What a folder of a part has, and what reads it."""
RECORD_FILES = (RECORD_FILE, EVENTS.record, SETS.record)
"""What is written beside folders of parts, or of several runs."""
_TABLES = ("scores.parquet", "effects.parquet", "edges.parquet", "table.parquet")
_LEFT_OVER = (*_TABLES, "figure.json", "attention.safetensors")
"""A folder that has one of these, and no summary, was begun and not finished."""


@dataclass(frozen=True, eq=False)
class Part:
    """A chain, a circuit, an analysis, or a run of mitigations."""

    name: str
    """Name of its folder, or the analysis's."""
    place: str
    """Folder relative to the run's; empty where it is the run's."""
    result: Result
    """What was found."""


@dataclass(frozen=True)
class Missing:
    """A part that is not in the report."""

    name: str
    """Its name."""
    status: str
    """Failed, not measurable, damaged, unfinished or missing."""
    reason: str
    """Why."""


@dataclass(frozen=True)
class Run:
    """A run of everything in a folder of several (:mod:`sinklens.analysis.several`), which has a report of its own."""

    title: str
    """What it is of."""
    place: str
    """Its folder, relative to the one that holds them."""
    page: str
    """Its report, relative to the same; empty where there is none yet."""
    parts: str
    """How many parts it has, and which of them failed."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """Everything that a report shows."""

    name: str
    """Name of the folder; empty for a result in memory."""
    parts: list[Part]
    """Chains first, then circuits, then analyses in the paper's order."""
    missing: list[Missing] = field(default_factory=list)
    """What is not there, and why."""
    record: dict[str, Any] = field(default_factory=dict)
    """Content of ``run.json``."""
    formation: Formation | None = None
    """Content of ``formation.json``."""
    agreement: Agreement | None = None
    """How far the runs in it agree."""
    runs: list[Run] = field(default_factory=list)
    """Runs of everything in it, each with a report of its own."""

    @property
    def chains(self) -> list[tuple[Part, ChainResult]]:
        """The chains."""
        return [(part, part.result) for part in self.parts if isinstance(part.result, ChainResult)]

    @property
    def circuits(self) -> list[tuple[Part, Circuit]]:
        """The circuits."""
        return [(part, part.result) for part in self.parts if isinstance(part.result, Circuit)]

    @property
    def analyses(self) -> list[tuple[Part, AnalysisResult]]:
        """The analyses."""
        return [(part, part.result) for part in self.parts if isinstance(part.result, AnalysisResult)]

    @property
    def mitigations(self) -> list[tuple[Part, MitigationResult]]:
        """The runs of mitigations."""
        return [(part, part.result) for part in self.parts if isinstance(part.result, MitigationResult)]


def of_result(result: Result) -> Gathered:
    """A report of one result in memory."""
    name = result.name if isinstance(result, AnalysisResult) else kind_of(result)
    return Gathered("", [Part(name, "", result)])


def gather(folder: Path) -> Gathered:
    """Read a run's folder: a chain's, a circuit's, an analysis's, or one that holds such folders.

    Raises:
        InputError: it does not exist, cannot be read, or holds nothing to report.
    """
    try:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: give the folder of a run")
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        own = [name for name in READ if (folder / name).is_file()]
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror or error}): check its permissions") from error
    record, missing = _record(folder)
    runs = _runs(folder, record)
    places = {run.place for run in runs}
    parts = [part for name in own for part in _load(folder, name, "", missing)]
    if own and not parts and not inside:
        raise InputError(missing[-1].reason)
    for path in inside:
        parts += [] if path.name in places else _inside(path, missing)
    missing = _explained(missing, parts, record, places)
    if not parts and not missing and not runs:
        raise InputError(f"{folder} holds no {', '.join(READ)}, and no folder with one: give a run's folder")
    formation, agreement = _formation(folder, missing), _agreement(folder, missing)
    return Gathered(folder.resolve().name, sorted(parts, key=_order), missing, record, formation, agreement, runs)


def _inside(path: Path, missing: list[Missing]) -> list[Part]:
    try:
        inside = {item.name for item in path.iterdir()}
    except OSError as error:
        missing.append(Missing(path.name, "damaged", f"the folder cannot be read ({error.strerror or error})"))
        return []
    files = [name for name in READ if name in inside]
    parts = [part for name in files for part in _load(path, name, path.name, missing)]
    if not files and RECORD_FILE in inside:
        missing.append(Missing(path.name, "left out", "it holds a run of its own: report that folder by itself"))
    elif not files and inside & set(_LEFT_OVER):
        names = ", ".join(sorted(inside & set(_LEFT_OVER)))
        missing.append(Missing(path.name, "unfinished", f"its folder has {names}, but no summary: run it again"))
    return parts


def _load(folder: Path, file: str, place: str, missing: list[Missing]) -> list[Part]:
    name = place or folder.resolve().name
    try:
        return [Part(name, place, READ[file](folder))]
    except InputError as error:
        missing.append(Missing(name, "damaged", str(error)))
    except Exception as error:  # whatever is wrong with one part's files, the others are shown
        reason = " ".join(str(error).split())
        missing.append(Missing(name, "damaged", f"{file} cannot be used ({type(error).__name__}: {reason})"))
    return []


def _record(folder: Path) -> tuple[dict[str, Any], list[Missing]]:
    path = next((folder / file for file in RECORD_FILES if (folder / file).is_file()), None)
    if path is None:
        return {}, []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, [Missing(path.name, "damaged", " ".join(str(error).split()))]
    return (data, []) if isinstance(data, dict) else ({}, [Missing(path.name, "damaged", "it holds no record")])


def _runs(folder: Path, record: Mapping[str, Any]) -> list[Run]:
    """The runs that the record of several names, as far as their folders are there."""
    found = []
    for name, title in mapping(mapping(record.get("config")).get("runs")).items():
        place = folder / str(name)
        if place.parent == folder and (place / RECORD_FILE).is_file():
            page = f"{name}/report.html" if (place / "report.html").is_file() else ""
            found.append(Run(str(title), str(name), page, _counted(_record(place)[0])))
    return found


def _counted(record: Mapping[str, Any]) -> str:
    """How many parts a record has, and which of them failed."""
    parts = mapping(record.get("parts"))
    failed = [str(name) for name, part in parts.items() if mapping(part).get("status") == "failed"]
    return f"{len(parts)} part{'s' * (len(parts) != 1)}" + (f"; failed: {join(failed)}" if failed else "")


def _formation(folder: Path, missing: list[Missing]) -> Formation | None:
    path = folder / FORMATION_FILE
    if not path.is_file():
        return None
    try:
        return formation_from_json(json.loads(path.read_text(encoding="utf-8")))
    except Exception as error:  # as above
        missing.append(Missing(FORMATION_FILE, "damaged", " ".join(str(error).split()) or type(error).__name__))
        return None


def _agreement(folder: Path, missing: list[Missing]) -> Agreement | None:
    try:
        return read_agreement(folder)
    except Exception as error:  # as above
        missing.append(Missing(FILE, "damaged", " ".join(str(error).split()) or type(error).__name__))
        return None


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` where it is a mapping; an empty one where the data has something else."""
    return value if isinstance(value, Mapping) else {}


def _explained(missing: list[Missing], parts: list[Part], record: Mapping[str, Any], places: set[str]) -> list[Missing]:
    """With what the run's own record says of parts that are not there."""
    here = {part.name for part in parts} | {item.name for item in missing} | places
    explained = list(missing)
    for name, entry in mapping(record.get("parts")).items():
        status, reason = str(mapping(entry).get("status") or "unknown"), str(mapping(entry).get("reason") or "")
        if status == "failed" or (name not in here and status != "done"):
            stale = "; what is shown is an earlier result" if name in here else ""
            explained.append(Missing(str(name), status, (reason or "no reason was recorded") + stale))
        elif name not in here and name != "formation":
            explained.append(Missing(str(name), "missing", "it was run, but its folder is not here"))
    return explained


def kind_of(result: ChainResult | Circuit | MitigationResult) -> str:
    """What a part that is no analysis is called."""
    return {ChainResult: "chain", Circuit: "circuit", MitigationResult: "mitigations"}[type(result)]


def _order(part: Part) -> tuple[int, float, str]:
    if not isinstance(part.result, AnalysisResult):
        return ("chain", "circuit", "mitigations").index(kind_of(part.result)), 0.0, part.name
    figure = re.search(r"\d+", str(part.result.paper))
    return 3, float(figure[0][:9]) if figure else float("inf"), part.name
