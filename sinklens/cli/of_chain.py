"""The chains that ``sinklens chain`` scores: of one event or every one, at several targets, on several sets of prompts.

Each of several is written in a folder of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinklens.analysis.replicate import replicate_into, save_agreement
from sinklens.analysis.suite import Part, write_record
from sinklens.chain.agree import agreement, agreement_text, run_chains
from sinklens.chain.result import ChainResult
from sinklens.chain.run import run_chain
from sinklens.cli.command import command_line
from sinklens.cli.fitting import show
from sinklens.cli.inputs import EventInputs
from sinklens.cli.mistakes import left_out
from sinklens.cli.remarks import note
from sinklens.cli.tables import chain_footer, chain_table, console
from sinklens.errors import EngineError, InputError, NoSinkError, NotApplicableError
from sinklens.formation import Formation, explained, find_formation
from sinklens.formation.result import FormationStep
from sinklens.models.view import Model
from sinklens.pairs.choice import Target
from sinklens.prompts import PromptBatch
from sinklens.records.files import atomic_folder
from sinklens.records.text import join
from sinklens.stages import LINKED
from sinklens.study import Study


@dataclass(frozen=True)
class Job:
    """What is to be scored, how, and where it goes."""

    model: Model
    """The model."""
    batch: PromptBatch
    """Prompts."""
    given: dict[str, Any]
    """What the user says of the formation."""
    targets: list[Target]
    """Where a sink is made."""
    links: bool
    """Whether the two links are scored with the six stages."""
    options: dict[str, Any]
    """The other arguments of :func:`sinklens.run_chain`."""
    out: Path
    """The folder."""
    force: bool
    """Whether it may replace an earlier run's."""
    step: Callable[[str], None]
    """Told what is being done."""

    @property
    def arguments(self) -> dict[str, Any]:
        """All that :func:`sinklens.run_chain` is told besides the prompts, the target and the formation."""
        return {**({"stages": LINKED} if self.links else {}), **self.options}

    def formation(self, **given: Any) -> Formation:
        """Where the sink forms."""
        return find_formation(self.model, self.batch, memory_budget=self.options["memory_budget"], **given)


@dataclass(frozen=True)
class Chain:
    """A chain, and where it was written."""

    title: str
    """What it is of, where there are several."""
    result: ChainResult
    """Its scores."""
    out: Path
    """Its folder."""


@dataclass(frozen=True)
class Chains:
    """The chains that a command has scored."""

    each: list[Chain]
    """One, or several."""
    agreement: str | None = None
    """How far several agree, in a line."""


def score(job: Job, inputs: EventInputs) -> Chains:
    """Score what is asked for, and write it."""
    if inputs.replicate is not None:
        return _several_sets(job, inputs.replicate, inputs.n)
    if len(job.targets) > 1:
        return _several_targets(job)
    return _every_event(job) if inputs.every_event else _one(job)


def _one(job: Job) -> Chains:
    """One chain, in the folder itself."""
    job.step("scoring the chain")
    result = _scored(job, job.batch, job.formation(**job.given) if job.given else None)
    result.save(job.out, force=job.force)
    return Chains([Chain("", result, job.out)])


def _scored(job: Job, batch: PromptBatch, formation: Formation | None) -> ChainResult:
    """The chain of the first target on some prompts."""
    result = run_chain(job.model, batch, target=job.targets[0], formation=formation, **job.arguments)
    result.config["command"] = command_line()
    return result


def _every_event(job: Job) -> Chains:
    """A chain for every event; one that cannot be scored is named, and left out.

    Raises:
        InputError: none can be scored.
    """
    # Without super neurons: those of one event must not stand in the way of the others.
    formation = job.formation(super_neurons=())
    results, parts, mistakes = {}, {}, []
    for event in formation.steps:
        job.step(f"scoring the chain of event {event}")
        name, began = f"event-{event.number}", time.perf_counter()
        try:
            results[name] = _of_event(job, formation, event)
            parts[name] = Part(name, "done", seconds=time.perf_counter() - began)
        except EngineError:
            raise  # nothing of such a run is to be trusted
        except InputError as error:
            mistakes.append(error)
            measurable = not isinstance(error, (NoSinkError, NotApplicableError))
            parts[name] = Part(name, "failed" if measurable else "not measurable", str(error))
            note(f"event {event} is left out: {error}")
    if not results:
        raise mistakes[0]
    _save(job, formation, results, parts)
    titles = {f"event-{event.number}": f"Event {event}, explained by block {event.layer}" for event in formation.steps}
    return Chains(_chains(results, job.out, titles))


def _of_event(job: Job, formation: Formation, event: FormationStep) -> ChainResult:
    memory = job.options["memory_budget"]
    return _scored(job, job.batch, explained(job.model, job.batch, formation, event.layer, memory_budget=memory))


def _save(
    job: Job,
    formation: Formation,
    results: Mapping[str, ChainResult],
    parts: dict[str, Part],
    besides: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write chains by the names of their folders, a record of them, and what is written ``besides``."""
    with atomic_folder(job.out, force=job.force) as folder:
        for name, result in results.items():
            result.save(folder / name)
        besides(folder)
        study = Study.of(job.model, job.batch, formation, seed=job.options["seed"])
        write_record(folder, study, parts, {"command": command_line()})


def _several_targets(job: Job) -> Chains:
    """A chain for every target, and a line on how far they agree."""
    job.step(f"scoring the chain at {len(job.targets)} targets")
    formation = job.formation(**job.given)
    found = run_chains(job.model, job.batch, targets=job.targets, formation=formation, **job.arguments)
    table, over = agreement(found), f"targets {join([str(target) for target in job.targets])}"
    results = {f"target-{target}": result for target, result in found.items()}
    for result in results.values():
        result.config["command"] = command_line()
    parts = {name: Part(name, "done") for name in results}
    _save(job, formation, results, parts, lambda folder: save_agreement(table, folder, over))
    titles = {f"target-{target}": f"Target {target}" for target in job.targets}
    return Chains(_chains(results, job.out, titles), agreement_text(table, over))


def _several_sets(job: Job, sets: int, n: int) -> Chains:
    """A chain for every set of ``n`` prompts, and a line on how far they agree."""
    options, stages = dict(job.options), LINKED if job.links else ()
    study = Study(job.model, job.batch, options["seed"], options["memory_budget"], job.given, options.pop("progress"))
    suite, results, told = replicate_into(
        study,
        sets,
        job.out,
        lambda each: _scored(job, each.batch, each.formation if job.given else None),
        ChainResult.load,
        n=n,
        options={"target": job.targets[0], **options, "stages": [stage.name for stage in stages]},
        config={"command": command_line()},
        fresh=job.force,
        begins=lambda name, _number, of: job.step(f"scoring the chain on {name} of {of}"),
    )
    left_out(suite)
    return Chains(_chains(results, job.out, {name: name for name in results}), told)


def _chains(results: Mapping[str, ChainResult], out: Path, titles: Mapping[str, str]) -> list[Chain]:
    """The chains of a folder, by the names of their own folders in it."""
    return [Chain(titles[name], result, out / name) for name, result in results.items()]


def print_chains(chains: Chains, as_json: bool) -> None:
    """Print tables, or what was written as JSON: a list where there are several."""
    if as_json:
        texts = [(chain.out / "chain.json").read_text(encoding="utf-8") for chain in chains.each]
        sys.stdout.write((f"[{','.join(texts)}]" if chains.each[0].title else texts[0]) + "\n")
        return
    screen = console()
    for chain in chains.each:
        if chain.title:
            screen.print(chain.title, markup=False)
        show(screen, chain_table(chain.result))
        for line in chain_footer(chain.result):
            screen.print(line, markup=False)
    if chains.agreement is not None:
        screen.print(chains.agreement, markup=False, soft_wrap=True)
