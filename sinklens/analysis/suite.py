"""Everything in one go: formation, chain, every analysis, and the report, in one folder that can be taken up again.

Every part writes a folder of its own, as a whole or not at all, and ``run.json`` says of each part what it was made
with. A part is done again only when that has changed: the model's weights, the prompts, the dtype, the seed, an
option, or the code itself. A part that fails is recorded with its reason, and the others still run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sinklens.analysis.base import Analysis, AnalysisResult
from sinklens.analysis.corrections import parts_table
from sinklens.analysis.discovery import list_analyses
from sinklens.analysis.run import config_of, load_analysis, run_analysis
from sinklens.chain.result import ChainResult
from sinklens.chain.run import score_chain
from sinklens.errors import EngineError, InputError, NoSinkError, NotApplicableError, WriteError
from sinklens.formation import check_given, formation_from_json, formation_to_json
from sinklens.models.state import check_bare
from sinklens.pairs import PairChoice
from sinklens.records.files import FULL, cannot_write, check_out, holds_something, remove_leftovers, write_json
from sinklens.records.plain import check_kinds, to_plain
from sinklens.records.provenance import package_digest
from sinklens.records.ranges import shown
from sinklens.study import Study

logger = logging.getLogger(__name__)

Status = Literal["done", "not measurable", "failed"]
CHAIN, FORMATION = "chain", "formation"
"""Names of the parts that are no analyses."""


@dataclass(frozen=True)
class Part:
    """One part of a run."""

    name: str
    """``formation``, ``chain``, or the analysis's name."""
    status: Status
    """Done, not measurable (with the reason), or failed (with the reason)."""
    reason: str = ""
    """Why it failed, or cannot be measured."""
    seconds: float = 0.0
    """Wall-clock time that it took when it was run."""
    key: dict[str, Any] = field(default_factory=dict)
    """What it was made with."""
    reused: bool = False
    """Whether it was there already."""


@dataclass(frozen=True)
class SuiteResult:
    """What was run."""

    folder: Path
    """Where the results are."""
    parts: dict[str, Part]
    """By name, in the order in which they ran."""

    @property
    def failed(self) -> list[str]:
        """Names of the parts that failed."""
        return [name for name, part in self.parts.items() if part.status == "failed"]


Watch = Callable[[str, int, int], None]
"""``(part, number, of how many)``, called when a part begins."""
Told = Callable[[Part], None]
"""Called when a part ends."""


def run_all(
    study: Study,
    out: str | Path,
    *,
    target: int = 10,
    loss: bool = False,
    only: Sequence[str] = (),
    analyses: Sequence[Analysis | str | Path] = (),
    config: Mapping[str, Any] | None = None,
    begins: Watch = lambda _name, _number, _of: None,
    ends: Told = lambda _part: None,
) -> SuiteResult:
    """Run the formation, the chain and every analysis into a folder; finished parts of it are kept.

    Args:
        study: model, prompts and seed.
        out: the folder; one that an earlier run left is taken up again.
        target: position that the chain makes a sink.
        loss: whether the chain also reads what every edit does to the loss, as :func:`sinklens.run_chain` does.
        only: names of the parts to run (all by default).
        analyses: further ones, themselves or ``.py`` files that have one; they run after the package's.
        config: what else to record, such as the command line.
        begins: called when a part begins.
        ends: called when a part ends.

    Raises:
        InputError: a part that does not exist, a folder that is not one of an earlier run, or a target, block,
            event, neuron or dimension that the prompts or the model do not have, or hooks on the model: nothing has
            been written then.
        WriteError: there is no room; what was finished is kept, and taken up when there is.
    """
    if not isinstance(study, Study):
        raise InputError(f"give a Study(model, prompts), not something of type {type(study).__name__}")
    out = Path(out)
    own = {name: load_analysis(name) for name in list_analyses()}
    known = own | further(analyses, [FORMATION, CHAIN, *own])
    names = [FORMATION, CHAIN, *known]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise InputError(f"there is no part {', '.join(unknown)}: the parts are {', '.join(names)}")
    chosen = [name for name in names if not only or name in only]
    _check(study, target)
    earlier = earlier_parts(out)
    keys = {name: _key(study, target, loss and name == CHAIN, known.get(name)) for name in chosen}
    suite = _Suite(study, out, target, loss, known)
    # What is there stays on record until it is done again: a run that is interrupted has lost nothing.
    parts = {name: part for name, part in earlier.items() if name in names}
    write_record(out, study, parts, config or {})  # first of all: what has it can be taken up
    for number, name in enumerate(chosen, start=1):
        begins(name, number, len(chosen))
        part = suite.part(name, keys[name], earlier.get(name))
        parts[name] = part
        write_record(out, study, {name: parts[name] for name in names if name in parts}, config or {})
        ends(part)
    listed = {name: parts[name] for name in names if name in parts}
    write_record(out, study, listed, config or {}, judged_parts(out, parts))
    return SuiteResult(out, listed)


def further(analyses: Sequence[Analysis | str | Path], taken: Sequence[str]) -> dict[str, Analysis]:
    """Analyses of the user's by name.

    Raises:
        InputError: a file that has none, something else, or a name that another part has.
    """
    found: dict[str, Analysis] = {}
    for item in [analyses] if isinstance(analyses, Analysis | str | Path) else analyses:
        analysis = item if isinstance(item, Analysis) else load_analysis(item)
        name = analysis.name
        if name in taken or name in found or not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise InputError(
                f"an analysis called {shown(name)} cannot be run beside the others: give it a name of letters, digits "
                "and _ that no other part has"
            )
        found[name] = analysis
    return found


def judged_parts(out: Path, parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """Every part of the verdicts that a folder holds, with its p-value as it is and corrected for their number."""
    results = {}
    for name, part in parts.items():
        if name not in (FORMATION, CHAIN) and part.status != "failed":
            try:
                results[name] = AnalysisResult.load(out / name)
            except InputError:  # of an earlier run, and damaged: it is made again when it is asked for
                continue
    return [to_plain(record) for record in parts_table(results).to_dict("records")]


def _check(study: Study, target: int) -> None:
    """Refuse, before any work, what would make parts fail, or a part pass for that of another model."""
    check_bare(study.model, "a folder (out)", "run one with run_chain or run_analysis")
    PairChoice(target).check(study.batch.length)
    told = {name: study.given.get(name) for name in ("layer", "super_neurons", "outlier_dims", "event")}
    if study.given:
        check_given(study.shape, *told.values())
    if told["event"] is not None:
        with contextlib.suppress(NoSinkError):  # that is for the parts to say
            study.formation  # noqa: B018  (which events there are is known when the sink is)


class Parts:
    """Runs parts of one folder."""

    out: Path
    """The folder."""

    def make(self, name: str) -> tuple[Status, str]:
        """Run a part and write its folder; gives its status, and why it cannot be measured."""
        raise NotImplementedError

    def reuse(self, name: str) -> bool:
        """Whether the part that is there can be read."""
        raise NotImplementedError

    def part(self, name: str, key: dict[str, Any], before: Part | None) -> Part:
        """One part: the one that is there if it was made with ``key``, or a new one."""
        if before is not None and before.status != "failed" and before.key == key and self.reuse(name):
            return Part(name, before.status, before.reason, before.seconds, key, reused=True)
        began = time.perf_counter()
        status, reason = "done", ""
        try:
            status, reason = self.make(name)
        except WriteError:
            raise  # the others could not be written either
        except (NoSinkError, NotApplicableError) as error:
            status, reason = "not measurable", str(error)
        except (InputError, EngineError) as error:
            status, reason = "failed", str(error)
        except Exception as error:  # whatever an analysis does wrong, the others still run
            if isinstance(error, OSError) and error.errno in FULL:
                raise cannot_write(error.filename or self.out, error) from error
            logger.debug("%s failed", name, exc_info=True)
            status, reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Part(name, status, reason, time.perf_counter() - began, key)


class _Suite(Parts):
    """The formation, the chain and the analyses."""

    def __init__(self, study: Study, out: Path, target: int, loss: bool, analyses: Mapping[str, Analysis]) -> None:
        self.study, self.out, self.target, self.loss, self.analyses = study, out, target, loss, analyses

    def reuse(self, name: str) -> bool:
        try:
            if name == FORMATION:
                data = json.loads((self.out / "formation.json").read_text(encoding="utf-8"))
                # The analyses that still have to run need not look for it again.
                self.study.formation = formation_from_json(data)
            elif name == CHAIN:
                ChainResult.load(self.out / name)
            else:
                AnalysisResult.load(self.out / name)
        except Exception:  # whatever is wrong with what is there, it is made again
            return False
        return True

    def make(self, name: str) -> tuple[Status, str]:
        study = self.study
        if name == FORMATION:
            write_json(self.out / "formation.json", formation_to_json(study.formation))
            return "done", ""
        if name == CHAIN:
            result = score_chain(study, PairChoice(self.target), loss=self.loss)
            result.save(self.out / name, force=True)
            return "done", ""
        found = run_analysis(self.analyses[name], study)
        found.save(self.out / name, force=True)
        outcome, reason = found.findings.verdict.outcome, found.findings.verdict.reason
        return ("not measurable", reason) if outcome == "not measurable" else ("done", "")


def _key(study: Study, target: int, loss: bool, analysis: Analysis | None) -> dict[str, Any]:
    chosen = {"target": target} | ({"loss": True} if loss else {})
    return part_key(study, analysis, {} if analysis is None else analysis.options, chosen)


def part_key(
    study: Study, analysis: Analysis | None, options: Mapping[str, Any], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides a part's numbers.

    Args:
        study: model, prompts and seed.
        analysis: the analysis; None for what is none.
        options: what the analysis is told.
        chosen: what else is told to what is none.
    """
    made = {name: study.provenance[name] for name in ("weight_digest", "prompts_digest", "dtype", "device")}
    if analysis is not None:
        return {**made, **config_of(analysis, study, options)}
    return to_plain({**made, "seed": study.seed, "given": study.given, **chosen, "code": package_digest()[:16]})


def check_folder(out: Path, record: str = "run.json", run: str = "an earlier run") -> None:
    """Make sure, before any work is done, that results can be put into ``out``.

    Args:
        out: the folder.
        record: the file that marks one which may be taken up.
        run: what such a folder is of.

    Raises:
        InputError: it is a file, holds something else, or cannot be written.
    """
    check_out(out, force=True)
    if out.is_dir():
        remove_leftovers(out)
        if holds_something(out) and not (out / record).is_file():
            raise InputError(f"{out} is not the folder of {run}: choose another folder (out=)")


def earlier_parts(out: Path) -> dict[str, Part]:
    """The parts of an earlier run in the same folder."""
    check_folder(out)
    record = out / "run.json"
    if not record.is_file():
        return {}
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        return {name: _read_part(name, part) for name, part in data["parts"].items()}
    except Exception as error:  # a file may hold anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{record} is damaged ({reason}): remove the folder, or choose another folder (out=)"
        ) from error


def _read_part(name: str, data: Mapping[str, Any]) -> Part:
    part = Part(name, **data)
    check_kinds({"reason": (part.reason, str), "seconds": (part.seconds, (int, float)), "key": (part.key, dict)})
    if part.status not in get_args(Status):
        raise ValueError(f"the status of {name} is {part.status!r}")
    return part


def write_record(
    out: Path,
    study: Study,
    parts: Mapping[str, Part],
    config: Mapping[str, Any],
    verdicts: Sequence[Mapping[str, Any]] = (),
    file: str = "run.json",
) -> None:
    """Write ``run.json``: what a folder of several parts has, why the rest is not there, and what verdicts say."""
    listed = {
        name: {k: v for k, v in asdict(part).items() if k not in ("name", "reused")} for name, part in parts.items()
    }
    data = {
        "config": {**study.batch.record(), "seed": study.seed, **config},
        "provenance": study.provenance,
        "parts": listed,
        **({"verdicts": list(verdicts)} if verdicts else {}),
    }
    write_json(out / file, data)
