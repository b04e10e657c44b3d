"""The command of a sweep: the options that all have, and the arguments of :func:`sinklens.sweep` as options."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sinklens import find_formation
from sinklens import sweep as function
from sinklens.cli.display import sweep_display
from sinklens.cli.fitting import show
from sinklens.cli.inputs import Inputs, with_inputs
from sinklens.cli.options import JsonOption
from sinklens.cli.signature import Form, command_of, options_of, run_alone
from sinklens.cli.tables import console
from sinklens.cli.tables_sweep import judged_table, overview_table, strongest_table, verified_table
from sinklens.errors import InputError
from sinklens.pairs.ablations import EditLike
from sinklens.pairs.choice import Target, target_from_text
from sinklens.prompts import prompts_text
from sinklens.readouts.named import ReadoutLike
from sinklens.records.plain import to_plain
from sinklens.records.ranges import Range, integers, names, one_of_several, shown
from sinklens.sweeps.companions import Companions, read_companions
from sinklens.sweeps.execution import Execution
from sinklens.sweeps.places import Place
from sinklens.sweeps.request import Request
from sinklens.sweeps.result import SweepResult
from sinklens.sweeps.run import prepare, run_sweep


def _companions(option: str, texts: list[str]) -> list[str]:
    """What is given to ``--with``, as it is: only an edit or a place in it that is not known is told with the text."""
    for text in texts:
        try:
            read_companions(text)
        except InputError as error:
            told = str(error) if str(error).startswith("companion ") else f"{option} {shown(text)}: {error}"
            raise InputError(told) from None
    return texts


NAMES = Form(names, ",".join)
FORMS = {
    Place | Sequence[Place]: NAMES,
    EditLike | Sequence[EditLike]: NAMES,
    ReadoutLike | Sequence[ReadoutLike]: NAMES,
    str | Sequence[str]: NAMES,
    Companions: Form(_companions, list, list[str]),
    Range: Form(),  # ranges are read by the request
    Sequence[int]: Form(integers),
    Target: Form(lambda _option, text: target_from_text(text), str),
    tuple[int, int]: Form(one_of_several),
}
"""How the arguments of a sweep are written."""
FLAGS = {"companions": "--with"}
"""Options that have another name than the argument."""
ON_ALL = ("out", "force", "memory_budget")
"""Arguments that commands have another form for."""
OPTIONS = options_of(function, FORMS, FLAGS)


def run_command(about: str, args: Sequence[str]) -> None:
    """Run the command; ends by SystemExit with the exit code."""
    own = [option for option in OPTIONS if option.possible and option.name not in ON_ALL]
    run_alone(command_of(own, _run), about, args, "sinklens sweep")


@with_inputs(n=8, without=("seed", "replicate"))
def _run(
    options: dict[str, Any],
    *,
    inputs: Inputs,
    devices: Annotated[int, typer.Option(min=1, help="GPUs that one model's blocks are spread over.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results; the same sweep is taken up there again.")] = Path(
        "runs/sweep"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier sweep has left there.")] = False,
    as_json: JsonOption = False,
) -> None:
    given = inputs.given()
    spec = {
        "model": inputs.model,
        "dtype": inputs.dtype.value,
        "backend": inputs.backend.value,
        "devices": devices,
    }
    defaults = {option.name: option.parameter.default for option in OPTIONS}
    chosen = {**defaults, **options, "out": out, "force": force, "model_spec": spec}
    chosen["memory_budget"] = inputs.bytes_allowed()
    request, execution = Request.of(chosen), Execution.of(chosen)
    # All that can be said before the model is loaded.
    request.check_length(inputs.length)
    prepare(execution)
    began = time.monotonic()
    # The seed is an argument of the sweep, and prompts are drawn by the same.
    result = _sweep(request, execution, replace(inputs, seed=request.seed), devices, given)
    if as_json:
        _print_json(result, out)
    else:
        _print(result, execution, time.monotonic() - began)


def _sweep(request: Request, execution: Execution, inputs: Inputs, devices: int, given: dict[str, Any]) -> SweepResult:
    """Load what is named, and sweep; ``given`` is what the user says of the formation."""
    try:
        with sweep_display() as display:
            model, batch = inputs.load(display.step, devices=devices)
            if given:
                display.step("finding the formation block")
                formation = find_formation(model, batch, memory_budget=execution.memory_budget, **given)
                request = replace(request, formation=formation)
            display.step("planning")
            execution = replace(execution, progress=display.rows, planned=display.planned)
            return run_sweep(model, batch, request, execution)
    except KeyboardInterrupt as error:
        told = str(error).partition(";")[0] or "interrupted"
        typer.echo(f"sinklens: {told}; run the same command again to go on", err=True)
        raise typer.Exit(130) from None


def _print_json(result: SweepResult, out: Path) -> None:
    data = {**result.record, "overview": result.overview().to_dict("records"), "folder": str(out)}
    print(json.dumps(to_plain(data), indent=1, ensure_ascii=False))  # noqa: T201  (the command's output)


def _print(result: SweepResult, execution: Execution, seconds: float) -> None:
    screen, out = console(), execution.out
    missing = result.missing
    if missing:
        whose = "other shards" if execution.shard else "other processes"
        line = f"{len(missing):,} of {len(result.task_ids()):,} tasks are left to {whose}; results so far: {out}"
        screen.print(line, markup=False, soft_wrap=True)
        return
    show(screen, overview_table(result), strongest_table(result))
    if odd := result.n_nonfinite():
        line = f"{odd:,} rows have no value: the patched run's activations or readout were not finite there"
        screen.print(line, markup=False, soft_wrap=True)
    verified = result.verified
    if verified is not None:
        show(screen, verified_table(verified), judged_table(result.judged()))
    screen.print(prompts_text(result.config), markup=False)
    screen.print(f"{len(result):,} rows in {seconds:.1f} s. Results: {out}", markup=False, soft_wrap=True)
