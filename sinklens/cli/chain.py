"""``sinklens chain``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sinklens.cli.common import (
    ALL,
    TOO_FEW,
    Backend,
    BackendOption,
    BlockOption,
    Bos,
    BosOption,
    CountOption,
    DatasetOption,
    DeviceOption,
    DimsOption,
    Dtype,
    DtypeOption,
    EventsOption,
    ForceOption,
    JsonOption,
    LengthOption,
    LossOption,
    MemoryOption,
    ModelOption,
    NeuronsOption,
    Pair,
    PromptsOption,
    ReplicateOption,
    SeedOption,
    budget,
    command_line,
    errors,
    fail,
    given_events,
    left_out,
    load,
    note,
    progress,
    targets_of,
    write_pages,
)
from sinklens.records.ranges import MOST_REPEATS, integers


def chain(
    model: ModelOption = "smollm2",
    target: Annotated[
        str,
        typer.Option(
            help="Position that is made a sink, or `natural` for the data's own; several, such as `5,10,20`: a folder "
            "for each in --out, and whether their verdicts agree."
        ),
    ] = "10",
    pair: Annotated[Pair, typer.Option(help="How the sink is made at the target.")] = Pair.block_aggregation,
    metric: Annotated[
        str,
        typer.Option(
            help="What is measured of the sink: attention_received, alpha, sink_rate, residual_norm, dominance, "
            "logit_diff, loss or kl."
        ),
    ] = "attention_received",
    strength: Annotated[float, typer.Option(help="Lambda of amplify_variance.")] = 8.0,
    pair_layers: Annotated[
        str | None, typer.Option(help="Blocks of that intervention, such as `0-2` or `0,3`; see the documentation.")
    ] = None,
    length: LengthOption = 64,
    n: CountOption = 16,
    prompts: PromptsOption = "passages",
    dataset: DatasetOption = None,
    bos: BosOption = Bos.auto,
    block: BlockOption = None,
    event: EventsOption = None,
    super_neurons: NeuronsOption = None,
    outlier_dims: DimsOption = None,
    links: Annotated[
        bool,
        typer.Option("--links", help="Two more stages between W_O and the super neurons: what carries one's write."),
    ] = False,
    readout_blocks: Annotated[int, typer.Option(min=1, help="Blocks after formation to measure attention in.")] = 4,
    control_draws: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Repetitions of random draws.")] = 3,
    min_gap: Annotated[float, typer.Option(help="Exclude prompts whose metric the pair moves by less.")] = 0.01,
    loss: LossOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    replicate: ReplicateOption = None,
    memory_budget: MemoryOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/chain"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every stage of the attention-sink chain, with controls and intervals."""
    with errors():
        from sinklens.records.files import check_out

        wanted = targets_of(target, length)
        if n < 2:
            fail(TOO_FEW.format(f"--n is {n}"))
        for name, value, least in (("--min-gap", min_gap, 0.0), ("--strength", strength, -math.inf)):
            if not (math.isfinite(value) and value >= least):
                fail(f"{name} {value} must be a finite number" + (f", {least} or more" if least == 0 else ""))
        bytes_allowed = budget(memory_budget)
        which, given = given_events(block, super_neurons, outlier_dims, event)
        blocks = None if pair_layers is None else integers("--pair-layers", pair_layers)
        if (which == ALL) + (len(wanted) > 1) + (replicate is not None) > 1:
            fail("give --event all, several targets or --replicate, one of the three")
        if replicate is None:
            check_out(out, force=force)
        else:
            from sinklens.analysis.suite import earlier_parts

            earlier_parts(out)
        with progress() as (step, rows):
            loaded, batch = load(
                step,
                model=model,
                device=device,
                dtype=dtype,
                backend=backend,
                prompts=prompts,
                dataset=dataset,
                n=n,
                length=length,
                bos=bos,
                seed=seed,
                sets=replicate,
            )
            if batch.n < 2:
                fail(TOO_FEW.format(f"only {batch.n} in {batch.source} has {length} tokens or more"))
            from sinklens.stages import LINKED

            options = {
                **({"stages": LINKED} if links else {}),
                "target": wanted[0],
                "pair": pair.value,
                "metric": metric,
                "strength": strength,
                "pair_layers": blocks,
                "readout_blocks": readout_blocks,
                "control_draws": control_draws,
                "min_gap": min_gap,
                **({"loss": True} if loss else {}),
                "seed": seed,
                "progress": rows,
                "memory_budget": bytes_allowed,
            }
            if replicate is not None:
                chains, told = _several_sets(loaded, batch, given, options, out, force, step, (replicate, n))
            elif len(wanted) > 1:
                chains, told = _several_targets(loaded, batch, given, options | {"target": wanted}, out, force, step)
            else:
                run = _all_events if which == ALL else _one_event
                chains, told = run(loaded, batch, given, options, out, force, step), None
        _print_chains(chains, as_json, told)
        write_pages([chain.out for chain in chains], as_json, besides=[out])


@dataclass(frozen=True)
class _Chain:
    """A chain, and where it was written."""

    title: str
    result: Any
    out: Path


def _one_event(
    model: Any, batch: Any, given: dict, options: dict, out: Path, force: bool, step: Callable[[str], None]
) -> list[_Chain]:
    """One chain, in the folder itself."""
    from sinklens.chain.run import run_chain
    from sinklens.formation import find_formation

    step("scoring the chain")
    budget = options["memory_budget"]
    formation = find_formation(model, batch, memory_budget=budget, **given) if given else None
    result = run_chain(model, batch, formation=formation, **options)
    result.config["command"] = command_line()
    result.save(out, force=force)
    return [_Chain("", result, out)]


def _all_events(
    model: Any, batch: Any, _given: dict, options: dict, out: Path, force: bool, step: Callable[[str], None]
) -> list[_Chain]:
    """A chain for every event, each in a folder of its own; one that cannot be scored is named, and left out.

    Raises:
        InputError: none can be scored.
    """
    from sinklens.analysis.suite import Part, write_record
    from sinklens.chain.run import run_chain
    from sinklens.errors import EngineError, InputError, NoSinkError, NotApplicableError
    from sinklens.formation import explained, find_formation
    from sinklens.records.files import atomic_folder
    from sinklens.study import Study

    budget = options["memory_budget"]
    # Without super neurons: those of one event must not stand in the way of the others.
    formation = find_formation(model, batch, super_neurons=(), memory_budget=budget)
    results, parts, errors = {}, {}, []
    for event in formation.steps:
        step(f"scoring the chain of event {event}")
        name, began = f"event-{event.number}", time.perf_counter()
        try:
            there = explained(model, batch, formation, event.layer, memory_budget=budget)
            results[name] = run_chain(model, batch, formation=there, **options)
            results[name].config["command"] = command_line()
            parts[name] = Part(name, "done", seconds=time.perf_counter() - began)
        except EngineError:
            raise  # nothing of such a run is to be trusted
        except InputError as error:
            errors.append(error)
            measurable = not isinstance(error, (NoSinkError, NotApplicableError))
            parts[name] = Part(name, "failed" if measurable else "not measurable", str(error))
            note(f"event {event} is left out: {error}")
    if not results:
        raise errors[0]
    with atomic_folder(out, force=force) as folder:
        for name, result in results.items():
            result.save(folder / name)
        study = Study.of(model, batch, formation, seed=options["seed"])
        write_record(folder, study, parts, {"command": command_line()})
    titles = {f"event-{event.number}": f"Event {event}, explained by block {event.layer}" for event in formation.steps}
    return _chains(results, out, titles)


def _several_targets(
    model: Any, batch: Any, given: dict, options: dict, out: Path, force: bool, step: Callable[[str], None]
) -> tuple[list[_Chain], str]:
    """A chain for every target, each in a folder of its own, and a line on how far they agree."""
    from sinklens.analysis.replicate import save_agreement
    from sinklens.analysis.suite import Part, write_record
    from sinklens.chain.agree import agreement, agreement_text, run_chains
    from sinklens.formation import find_formation
    from sinklens.records.files import atomic_folder
    from sinklens.records.text import join
    from sinklens.study import Study

    targets = options.pop("target")
    step(f"scoring the chain at {len(targets)} targets")
    formation = find_formation(model, batch, memory_budget=options["memory_budget"], **given)
    results = run_chains(model, batch, targets=targets, formation=formation, **options)
    table, over = agreement(results), f"targets {join([str(target) for target in targets])}"
    with atomic_folder(out, force=force) as folder:
        for target, result in results.items():
            result.config["command"] = command_line()
            result.save(folder / f"target-{target}")
        save_agreement(table, folder, over)
        study = Study.of(model, batch, formation, seed=options["seed"])
        parts = {f"target-{target}": Part(f"target-{target}", "done") for target in targets}
        write_record(folder, study, parts, {"command": command_line()})
    named = {f"target-{target}": result for target, result in results.items()}
    chains = _chains(named, out, {f"target-{target}": f"Target {target}" for target in targets})
    return chains, agreement_text(table, over)


def _several_sets(
    model: Any,
    batch: Any,
    given: dict,
    options: dict,
    out: Path,
    force: bool,
    step: Callable[[str], None],
    sizes: tuple[int, int],
) -> tuple[list[_Chain], str]:
    """A chain for every set of prompts, each in a folder of its own, and a line on how far they agree."""
    from sinklens.analysis.replicate import replicate_into
    from sinklens.chain.result import ChainResult
    from sinklens.chain.run import run_chain
    from sinklens.study import Study

    (sets, n), told = sizes, {name: value for name, value in options.items() if name not in ("stages", "progress")}
    study = Study(model, batch, options["seed"], options["memory_budget"], given, options["progress"])

    def run(each: Study) -> ChainResult:
        formation = each.formation if given else None
        result = run_chain(model, each.batch, formation=formation, **options)
        result.config["command"] = command_line()
        return result

    suite, results, agree = replicate_into(
        study,
        sets,
        out,
        run,
        ChainResult.load,
        n=n,
        options=told | {"stages": [stage.name for stage in options.get("stages", ())]},
        config={"command": command_line()},
        fresh=force,
        begins=lambda name, _number, of: step(f"scoring the chain on {name} of {of}"),
    )
    left_out(suite)
    return _chains(results, out, {name: name for name in results}), agree


def _chains(results: Mapping[str, Any], out: Path, titles: Mapping[str, str]) -> list[_Chain]:
    """The chains of a folder, by the names of their own folders in it."""
    return [_Chain(titles[name], result, out / name) for name, result in results.items()]


def _print_chains(chains: list[_Chain], as_json: bool, agreement: str | None = None) -> None:
    from sinklens.cli.fitting import show
    from sinklens.cli.tables import chain_footer, chain_table, console

    if as_json:
        texts = [(chain.out / "chain.json").read_text(encoding="utf-8") for chain in chains]
        sys.stdout.write((f"[{','.join(texts)}]" if chains[0].title else texts[0]) + "\n")
        return
    screen = console()
    for chain in chains:
        if chain.title:
            screen.print(chain.title, markup=False)
        show(screen, chain_table(chain.result))
        for line in chain_footer(chain.result):
            screen.print(line, markup=False)
    if agreement is not None:
        screen.print(agreement, markup=False, soft_wrap=True)
