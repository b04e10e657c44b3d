"""The command of an analysis: the options that all have, and its own, read off the signature of its ``run``."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sinklens.analysis.base import Analysis, AnalysisResult
from sinklens.analysis.run import run_analysis
from sinklens.cli.common import (
    Backend,
    BackendOption,
    BlockOption,
    BosOption,
    CountOption,
    DeviceOption,
    DimsOption,
    Dtype,
    DtypeOption,
    ForceOption,
    JsonOption,
    LengthOption,
    MemoryOption,
    ModelOption,
    NeuronsOption,
    PromptsOption,
    SeedOption,
    budget,
    command_line,
    errors,
    floats,
    given_formation,
    integers,
    load,
    progress,
    usage_errors,
    write_report,
)
from sinklens.study import Study

_PARSERS: dict[Any, Callable[[str, str], tuple]] = {tuple[int, ...]: integers, tuple[float, ...]: floats}


def run_command(analysis: Analysis, args: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run an analysis as a command of its own; ends by SystemExit with the exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=_help(analysis))(_command(analysis))
    with usage_errors():
        raise SystemExit(app(args=None if args is None else list(args), prog_name=prog, standalone_mode=False) or 0)


def _help(analysis: Analysis) -> str:
    paper = f"\n\nIn the paper: {analysis.paper}." if analysis.paper else ""
    return f"{analysis.title}. The claim: {analysis.claim}{paper}"


def _command(analysis: Analysis) -> Callable[..., None]:
    own = list(inspect.signature(analysis.run).parameters.values())[1:]
    hints = typing.get_type_hints(analysis.run, include_extras=True)
    parsers = {p.name: _PARSERS[_plain(hints[p.name])] for p in own if _plain(hints[p.name]) in _PARSERS}

    def command(**values: Any) -> None:
        options = {p.name: values.pop(p.name) for p in own}
        with errors():
            for name, parse in parsers.items():
                default = analysis.options[name]
                text = options[name]
                options[name] = default if text == _text(default) else parse(f"--{name.replace('_', '-')}", text)
            _run(analysis, options, **values)

    common = list(inspect.signature(_run, eval_str=True).parameters.values())[2:]
    extra = [
        inspect.Parameter(
            p.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_text(p.default) if p.name in parsers else p.default,
            annotation=_annotation(hints[p.name], p.name in parsers),
        )
        for p in own
    ]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*extra, *common)]
    parameters = [p.replace(default=Path(f"runs/{analysis.name}")) if p.name == "out" else p for p in parameters]
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _plain(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _annotation(hint: Any, as_text: bool) -> Any:
    line = typing.get_args(hint)[1] if typing.get_origin(hint) is Annotated else ""
    return Annotated[str if as_text else _plain(hint), typer.Option(help=line)]


def _text(default: Sequence[float]) -> str:
    return ",".join(f"{item:g}" for item in default)


def _run(
    analysis: Analysis,
    options: dict[str, Any],
    model: ModelOption = "smollm2",
    length: LengthOption = 64,
    n: CountOption = 32,
    prompts: PromptsOption = "passages",
    bos: BosOption = False,
    block: BlockOption = None,
    super_neurons: NeuronsOption = None,
    outlier_dims: DimsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    memory_budget: MemoryOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs"),
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    from sinklens.records.files import check_out

    given, allowed = given_formation(block, super_neurons, outlier_dims), budget(memory_budget)
    check_out(out, force=force)
    with progress() as (step, rows):
        loaded, batch = load(step, model, device, dtype, backend, prompts, n, length, bos, seed)
        step(analysis.title)
        study = Study(loaded, batch, seed=seed, memory_budget=allowed, given=given, progress=rows)
        result = run_analysis(analysis, study, **options)
        result.config["command"] = command_line()
        result.save(out, force=force)
        step("writing the report")
        page = write_report(out)
    _print(result, out, page, as_json)


def _print(result: AnalysisResult, out: Path, page: Path | None, as_json: bool) -> None:
    from sinklens.cli.tables import console, verdict_table

    if as_json:
        sys.stdout.write((out / "summary.json").read_text(encoding="utf-8") + "\n")
        return
    screen = console()
    screen.print(verdict_table(result))
    screen.print(f"Results: {out}" + (f"; report: {page}" if page else ""), markup=False, soft_wrap=True)


def main(analysis: Analysis) -> None:
    """What ``python analyses/NAME.py`` does: the same as ``sinklens analyse NAME``."""
    run_command(analysis)
