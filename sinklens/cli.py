"""The command line: ``sinklens chain``, ``find`` and ``models``.

Exit codes: 0 done; 2 a mistake in arguments or input, told in one sentence; 1 anything else. Results go to stdout,
progress and remarks to stderr. torch and transformers are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

if TYPE_CHECKING:
    from sinklens.engine import Progress
    from sinklens.prompts import PromptBatch


class _Commands(typer.core.TyperGroup):
    """Mistakes in the arguments are told like those in the input: one sentence, exit code 2."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _usage_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _usage_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Causal interpretability of attention sinks: per-stage scores of the proposed chain, on any model.",
)


class Dtype(StrEnum):
    """Floating-point formats a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Pair(StrEnum):
    """How a sink is made at the target."""

    block_aggregation = "block_aggregation"
    amplify_variance = "amplify_variance"


class Backend(StrEnum):
    """TransformerLens classes."""

    auto = "auto"
    hooked = "hooked"
    bridge = "bridge"


ModelOption = Annotated[str, typer.Option(help="A name from `sinklens models`, a Hugging Face id, or a local folder.")]
LengthOption = Annotated[int, typer.Option(help="Tokens in every prompt.")]
PromptsOption = Annotated[
    str,
    typer.Option(help="`passages` (in the package), `random` (random tokens), or a file: one text a line, or .jsonl."),
]
CountOption = Annotated[int, typer.Option("--n", help="Number of prompts.")]
BosOption = Annotated[bool, typer.Option("--bos/--no-bos", help="Put the tokenizer's BOS in front of every prompt.")]
DeviceOption = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:1`.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Floating-point format of the model.")]
BackendOption = Annotated[Backend, typer.Option(help="TransformerLens class to load the model as.")]
SeedOption = Annotated[int, typer.Option(help="Fixes every random draw.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback()
def _app() -> None:
    """Causal interpretability of attention sinks."""


@app.command()
def chain(
    model: ModelOption = "smollm2",
    target: Annotated[str, typer.Option(help="Position that is made a sink, or `natural` for the data's own.")] = "10",
    pair: Annotated[Pair, typer.Option(help="How the sink is made at the target.")] = Pair.block_aggregation,
    strength: Annotated[float, typer.Option(help="Lambda of amplify_variance.")] = 8.0,
    pair_layers: Annotated[
        str | None, typer.Option(help="Blocks of that intervention, such as `0-2` or `0,3`; see the documentation.")
    ] = None,
    length: LengthOption = 64,
    n: CountOption = 16,
    prompts: PromptsOption = "passages",
    bos: BosOption = False,
    readout_blocks: Annotated[int, typer.Option(min=1, help="Blocks after formation to measure attention in.")] = 4,
    control_draws: Annotated[int, typer.Option(min=1, help="Repetitions of what is drawn at random.")] = 3,
    min_gap: Annotated[float, typer.Option(help="Exclude prompts whose metric the pair moves by less.")] = 0.01,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    memory_budget: Annotated[float | None, typer.Option(help="GiB for one forward pass's activations.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/chain"),
    force: Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Score every stage of the attention-sink chain, with controls and intervals."""
    with _errors():
        from sinklens.results import check_out

        wanted = _target(target, length)
        if n < 2:
            _fail(_TOO_FEW.format(f"--n is {n}"))
        for name, value, least in (("--min-gap", min_gap, 0.0), ("--strength", strength, -math.inf)):
            if not (math.isfinite(value) and value >= least):
                _fail(f"{name} {value} must be a finite number" + (f", {least} or more" if least == 0 else ""))
        if memory_budget is not None and not 0 < memory_budget < math.inf:
            _fail(f"--memory-budget {memory_budget} must be a number of GiB, more than 0")
        blocks = None if pair_layers is None else _blocks(pair_layers)
        check_out(out, force=force)
        with _progress() as (step, rows):
            loaded, batch = _load(step, model, device, dtype, backend, prompts, n, length, bos, seed)
            if batch.n < 2:
                _fail(_TOO_FEW.format(f"only {batch.n} in {batch.source} has {length} tokens or more"))
            from sinklens.chain import run_chain

            step("scoring the chain")
            result = run_chain(
                loaded, batch, target=wanted, pair=pair.value, strength=strength, pair_layers=blocks,
                readout_blocks=readout_blocks, control_draws=control_draws, min_gap=min_gap, seed=seed, progress=rows,
                memory_budget=None if memory_budget is None else int(memory_budget * 2**30),
            )  # fmt: skip
            result.config["command"] = _command()
            result.save(out, force=force)
            step("writing the report")
            page = _report(out)
        _print_chain(result, out, page, as_json)


@app.command()
def find(
    model: ModelOption = "smollm2",
    length: LengthOption = 64,
    n: CountOption = 16,
    prompts: PromptsOption = "passages",
    bos: BosOption = False,
    layer: Annotated[int | None, typer.Option(help="Explain this block instead of the strongest.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find where the sink forms: blocks, super neurons, outlier dimensions."""
    with _errors():
        with _progress() as (step, _rows):
            loaded, batch = _load(step, model, device, dtype, backend, prompts, n, length, bos, seed)
            from sinklens.formation import find_formation

            step("finding the formation block")
            formation = find_formation(loaded, batch, layer=layer)
        from dataclasses import asdict

        from sinklens.results import to_plain
        from sinklens.tables import console, formation_tables

        if as_json:
            data = asdict(formation) | {"profile": formation.profile.to_dict("records")}
            print(json.dumps(to_plain(data), indent=1))  # noqa: T201  (the command's output)
            return
        for table in formation_tables(formation):
            console().print(table)


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the models that have a short name."""
    with _errors():
        from dataclasses import asdict

        from rich.table import Table

        from sinklens.models import list_models
        from sinklens.results import to_plain
        from sinklens.tables import console

        found = [asdict(item) for item in list_models()]
        if as_json:
            print(json.dumps(to_plain(found), indent=1))  # noqa: T201  (the command's output)
            return
        table = Table(title="Models with a short name")
        for name in found[0]:
            table.add_column(name, overflow="fold")
        for item in found:
            table.add_row(*("" if value is None else str(value) for value in item.values()))
        console().print(table)
        console().print("Any other model: give a Hugging Face id or a local folder to --model.")


_TOO_FEW = "the chain compares variances over prompts, so it needs at least 2 of them, and {}"


def _target(text: str, length: int) -> int | str:
    if text == "natural":
        return text
    try:
        target = int(text)
    except ValueError:
        _fail(f"--target {text!r} must be a position such as 10, or natural")
    if length < 3:
        _fail(f"--length {length} must be at least 3: a target needs earlier and later tokens")
    if target == 0:
        _fail("--target 0 has no earlier tokens to aggregate: choose a later position, or natural")
    if not 0 < target < length - 1:
        _fail(f"--target {target} must be in 1..{length - 2}: with --length {length} it needs later tokens")
    return target


def _blocks(text: str) -> tuple[int, ...]:
    ends: list[list[int]] = []
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        found = sorted({block for part in ends for block in range(part[0], part[-1] + 1)})
    except ValueError:
        found = []
    if not found or any(len(part) > 2 for part in ends):
        _fail(f"--pair-layers {text!r} must be blocks such as 0-2 or 0,3")
    return tuple(found)


def _load(step, model, device, dtype, backend, prompts, n, length, bos, seed) -> tuple[Any, PromptBatch]:  # noqa: ANN001
    # os.path and not Path: it says no to a name that is too long instead of raising.
    if prompts not in ("passages", "random") and not os.path.exists(os.path.expanduser(prompts)):
        _fail(f"--prompts {prompts!r} is neither passages nor random nor a file that exists: check the path")
    step("loading torch and the model")
    from sinklens import prompts as make
    from sinklens.models import load_model

    loaded = load_model(model, device=device, dtype=dtype.value, backend=backend.value)
    _check_weights(loaded)
    if prompts == "passages":
        return loaded, make.natural(loaded, n=n, length=length, prepend_bos=bos)
    if prompts == "random":
        return loaded, make.random_tokens(loaded, n=n, length=length, seed=seed, prepend_bos=bos)
    return loaded, make.from_file(loaded, prompts, n=n, length=length, prepend_bos=bos)


def _check_weights(model: Any) -> None:
    """Activations would not be finite either, but by then nothing says where that came from."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            name = name.replace("._original_component", "")  # a bridge's wrapping
            _fail(f"the model's weight {name} holds NaN or infinite values: get the model again, or use another")


def _report(out: Path) -> Path | None:
    from sinklens.errors import InputError

    try:
        from sinklens.report_page import report

        return report(out)
    except InputError as error:  # plotly or circuitsvis is not installed: the numbers are saved all the same
        typer.echo(f"no report.html: {error}", err=True)
        return None


def _print_chain(result: Any, out: Path, page: Path | None, as_json: bool) -> None:
    from sinklens.tables import chain_footer, chain_table, console

    if as_json:
        sys.stdout.write((out / "chain.json").read_text(encoding="utf-8") + "\n")
        return
    screen = console()
    screen.print(chain_table(result))
    for line in chain_footer(result):
        screen.print(line, markup=False)
    screen.print(f"Results: {out}" + (f"; report: {page}" if page else ""), markup=False, soft_wrap=True)


def _command() -> str:
    import shlex

    return shlex.join(["sinklens", *sys.argv[1:]])


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Any, Progress]]:
    """A bar on stderr when that is a terminal; nothing otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("starting", total=None)

        def step(text: str) -> None:
            bar.update(task, description=text)

        def rows(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield step, rows


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """The user's mistakes as one sentence and exit code 2, the engine's refusals as one and exit code 1."""
    from sinklens.errors import EngineError, InputError

    try:
        with _remarks():
            yield
    except InputError as error:
        _fail(str(error))
    except EngineError as error:
        typer.echo(f"sinklens: {error}", err=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _remarks() -> Iterator[None]:
    """Warnings and log records of sinklens as lines like our own; those of others as they come."""
    logger, show = logging.getLogger("sinklens"), warnings.showwarning
    here = str(Path(__file__).parent)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            typer.echo(f"sinklens: note: {record.getMessage()}", err=True)

    def ours(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if filename.startswith(here):
            typer.echo(f"sinklens: note: {message}", err=True)
        else:
            show(message, category, filename, *rest)

    handler = Handler(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = ours
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Typer's own exceptions have no public base class. The one that shows the help is no mistake to explain.
        if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
            raise
        message = " ".join(error.format_message().split()).rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
        where = getattr(getattr(error, "ctx", None), "command_path", "sinklens")
        _fail(f"{message}; see {where} --help")


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"sinklens: {sentence}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Entry point of the ``sinklens`` command."""
    try:
        app()
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): not an error, but Python would say so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
