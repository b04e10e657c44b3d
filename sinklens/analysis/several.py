"""Everything more than once: for every formation event, or on several disjoint sets of prompts.

Every run is one of :func:`sinklens.run_all`, in a folder of its own that can be taken up by itself. Beside these
folders stand a record of what was run, which marks the folder as one of this kind, and how far the runs' verdicts
agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sinklens.analysis.base import Analysis
from sinklens.analysis.replicate import all_agreement, sets_of
from sinklens.analysis.suite import Part, SuiteResult, Told, Watch, check_folder, run_all, write_record
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.formation import explained, find_formation
from sinklens.models.state import check_bare
from sinklens.records.text import join
from sinklens.study import Study


@dataclass(frozen=True)
class Kind:
    """Why everything is run more than once."""

    record: str
    """The file that marks such a folder."""
    run: str
    """What such a folder is of."""


EVENTS = Kind("events.json", "an earlier run of every event")
SETS = Kind("replicate.json", "an earlier run with --replicate")


@dataclass(frozen=True, eq=False)
class Several:
    """Runs of everything that belong together."""

    kind: Kind
    """What they are."""
    over: str
    """The same in words, such as ``events 1 and 2``."""
    studies: Mapping[str, Study]
    """What each is of, by the name of its folder."""
    titles: Mapping[str, str]
    """A heading for each."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """The runs that there cannot be, and why."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What else to record."""


def of_sets(study: Study, sets: int, n: int) -> Several:
    """Runs on so many disjoint sets of ``n`` prompts.

    Raises:
        InputError: there are too few prompts.
    """
    studies = sets_of(study, sets, n)
    over, titles = f"{sets} disjoint sets of {n} prompts", {name: name for name in studies}
    return Several(SETS, over, studies, titles, config={"sets": sets, "n_prompts": n})


def of_events(study: Study) -> Several:
    """A run for every formation event, explained by its strongest block; one that cannot be explained is left out.

    Raises:
        InputError: the study is told which block, event, neurons or dimensions to take.
        NoSinkError, NotApplicableError: there is no sink, or none of its events can be explained.
    """
    if any(study.given.get(name) is not None for name in ("layer", "event", "super_neurons", "outlier_dims")):
        raise InputError(
            "every event is explained by its own super neurons: leave out the block, the event, super neurons and "
            "outlier dimensions, or run everything for one event"
        )
    model, batch, budget = study.model, study.batch, study.memory_budget
    # Without super neurons: those of one event must not stand in the way of the others.
    formation = find_formation(model, batch, super_neurons=(), memory_budget=budget, **study.given)
    kept = {name: study.given[name] for name in ("neuron_z", "selectivity", "dim_z") if name in study.given}
    studies, left_out, errors = {}, {}, []
    for step in formation.steps:
        each = replace(study, given={**study.given, "event": step.number})
        try:
            each.formation = explained(model, batch, formation, step.layer, memory_budget=budget, **kept)
        except (NoSinkError, NotApplicableError) as error:
            left_out[f"event-{step.number}"] = str(error)
            errors.append(error)
        else:
            studies[f"event-{step.number}"] = each
    if not studies:
        raise errors[0]
    titles = {f"event-{step.number}": f"Event {step}, explained by block {step.layer}" for step in formation.steps}
    numbers = [name.removeprefix("event-") for name in studies]
    return Several(EVENTS, f"event{'s' * (len(numbers) > 1)} {join(numbers)}", studies, titles, left_out)


def run_all_events(study: Study, out: str | Path, **options: Any) -> dict[str, SuiteResult]:
    """:func:`sinklens.run_all` for every formation event, each in a folder of its own (``event-1``, ...).

    Args:
        study: model, prompts and seed.
        out: the folder; one that an earlier run left is taken up again.
        options: further arguments of :func:`run_several`.

    Returns:
        What was run, by the name of its folder; an event that cannot be explained is not there, and ``events.json``
        says why.

    Raises:
        InputError, NoSinkError, NotApplicableError: see :func:`of_events` and :func:`sinklens.run_all`.
        WriteError: there is no room.
    """
    check_folder(Path(out), EVENTS.record, EVENTS.run)
    return run_several(study, of_events(study), out, **options)


def run_several(
    study: Study,
    several: Several,
    out: str | Path,
    *,
    target: int = 10,
    loss: bool = False,
    only: Sequence[str] = (),
    analyses: Sequence[Analysis | str | Path] = (),
    config: Mapping[str, Any] | None = None,
    starts: Callable[[str], None] = lambda _name: None,
    finished: Callable[[str, SuiteResult], None] = lambda _name, _result: None,
    begins: Watch = lambda _name, _number, _of: None,
    ends: Told = lambda _part: None,
) -> dict[str, SuiteResult]:
    """Run everything for each of ``several``; what of it is there already is kept.

    Args:
        study: what they are made of.
        several: the runs.
        out: the folder that theirs are in.
        target: position that the chains make a sink.
        loss: whether the chains also read what every edit does to the loss.
        only: names of the parts to run (all by default).
        analyses: further ones, as :func:`sinklens.run_all` takes them.
        config: what else to record, such as the command line.
        starts: called with a run's name when it begins.
        finished: called with a run's name when it is done.
        begins: called when a part of a run begins.
        ends: called when a part of a run ends.

    Returns:
        What was run, by the name of its folder.

    Raises:
        InputError: the folder holds something else, or see :func:`sinklens.run_all`.
        WriteError: there is no room.
    """
    check_bare(study.model, "a folder (out)", "run one with run_chain or run_analysis")
    out = Path(out)
    check_folder(out, several.kind.record, several.kind.run)
    told = {**(config or {}), **several.config, "runs": dict(several.titles)}
    parts = {name: Part(name, "not measurable", reason) for name, reason in several.left_out.items()}
    results: dict[str, SuiteResult] = {}

    def record() -> None:
        listed = parts | {name: _as_part(name, result) for name, result in results.items()}
        order = [name for name in several.titles if name in listed]
        write_record(out, study, {name: listed[name] for name in order}, told, file=several.kind.record)

    record()  # first of all: what has it can be taken up
    for name, each in several.studies.items():
        starts(name)
        results[name] = run_all(
            each,
            out / name,
            target=target,
            loss=loss,
            only=only,
            analyses=analyses,
            config=config,
            begins=begins,
            ends=ends,
        )
        record()
        finished(name, results[name])
    all_agreement(out, results, several.over)
    return results


def _as_part(name: str, result: SuiteResult) -> Part:
    """A whole run as a part of several."""
    seconds = sum(part.seconds for part in result.parts.values())
    return Part(name, "done", f"failed: {join(result.failed)}" if result.failed else "", seconds)
