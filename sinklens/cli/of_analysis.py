"""The command of an analysis: the options that all have, and its own, read off the signature of its ``run``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sinklens.analysis.base import Analysis, AnalysisResult
from sinklens.analysis.replicate import replicate_into
from sinklens.analysis.run import run_analysis
from sinklens.analysis.suite import earlier_parts
from sinklens.cli.common import (
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
    EventOption,
    ForceOption,
    JsonOption,
    LengthOption,
    MemoryOption,
    ModelOption,
    NeuronsOption,
    PromptsOption,
    ReplicateOption,
    SeedOption,
    budget,
    command_line,
    errors,
    floats,
    given_formation,
    left_out,
    load,
    progress,
    write_pages,
)
from sinklens.cli.fitting import show
from sinklens.cli.signature import Form, command_of, options_of, run_alone
from sinklens.cli.tables import console, verdict_table
from sinklens.errors import InputError
from sinklens.prompts import prompts_text
from sinklens.records.files import check_out
from sinklens.records.ranges import integers, names
from sinklens.study import Study


def _text(default: Sequence[float]) -> str:
    return ",".join(f"{item:g}" for item in default)


FORMS = {
    tuple[int, ...]: Form(integers, _text),
    tuple[float, ...]: Form(floats, _text),
    tuple[str, ...]: Form(names, ",".join),
}
"""How lists are written."""


def run_command(analysis: Analysis, args: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run an analysis as a command of its own; ends by SystemExit with the exit code."""
    with errors():
        command = _command(analysis)
    run_alone(command, _help(analysis), args, prog)


def _help(analysis: Analysis) -> str:
    paper = f"\n\nIn the paper: {analysis.paper}." if analysis.paper else ""
    return f"{analysis.title}. The claim: {analysis.claim}{paper}"


def _command(analysis: Analysis) -> Callable[..., None]:
    bare = [name for name, default in analysis.options.items() if default is inspect.Parameter.empty]
    if bare:
        raise InputError(f"the option {bare[0]!r} of {analysis.name} has no default: give it one")
    run = partial(_run, analysis, out=Path(f"runs/{analysis.name}"))
    # What cannot be written on a command line (a function, a table) is for Python alone.
    return command_of([option for option in options_of(analysis.run, FORMS) if option.possible], run)


def _run(
    analysis: Analysis,
    options: dict[str, Any],
    model: ModelOption = "smollm2",
    length: LengthOption = 64,
    n: CountOption = 32,
    prompts: PromptsOption = "passages",
    dataset: DatasetOption = None,
    bos: BosOption = Bos.auto,
    block: BlockOption = None,
    event: EventOption = None,
    super_neurons: NeuronsOption = None,
    outlier_dims: DimsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    replicate: ReplicateOption = None,
    memory_budget: MemoryOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    given, allowed = given_formation(block, super_neurons, outlier_dims, event), budget(memory_budget)
    if replicate is None:
        check_out(out, force=force)
    else:
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
        step(analysis.title)
        study = Study(loaded, batch, seed=seed, memory_budget=allowed, given=given, progress=rows)
        if replicate is not None:
            _several_sets(analysis, study, options, out, as_json, (replicate, n), fresh=force)
            return
        result = run_analysis(analysis, study, **options)
        result.config["command"] = command_line()
        result.save(out, force=force)
    _print(result, out, as_json)
    write_pages([out], as_json)


def _several_sets(
    analysis: Analysis,
    study: Study,
    options: dict[str, Any],
    out: Path,
    as_json: bool,
    sizes: tuple[int, int],
    *,
    fresh: bool,
) -> None:
    """The analysis on every set of prompts, each in a folder of its own, and how far they agree."""
    (sets, n), command = sizes, {"command": command_line()}

    def run(each: Study) -> AnalysisResult:
        result = run_analysis(analysis, each, **options)
        result.config.update(command)
        return result

    suite, results, agree = replicate_into(
        study,
        sets,
        out,
        run,
        AnalysisResult.load,
        n=n,
        options=analysis.options | options,
        analysis=analysis,
        config=command,
        fresh=fresh,
    )
    left_out(suite)
    if as_json:
        texts = [(out / name / "summary.json").read_text(encoding="utf-8") for name in results]
        sys.stdout.write(f"[{','.join(texts)}]\n")
    else:
        for name, result in results.items():
            console().print(name, markup=False)
            _print(result, out / name, as_json=False)
        console().print(agree, markup=False, soft_wrap=True)
    write_pages([out / name for name in results], as_json, besides=[out])


def _print(result: AnalysisResult, out: Path, as_json: bool) -> None:
    if as_json:
        sys.stdout.write((out / "summary.json").read_text(encoding="utf-8") + "\n")
        return
    screen = console()
    show(screen, verdict_table(result))
    screen.print(prompts_text(result.config), markup=False)


def main(analysis: Analysis) -> None:
    """What ``python analyses/NAME.py`` does: the same as ``sinklens analyse NAME``."""
    run_command(analysis)
