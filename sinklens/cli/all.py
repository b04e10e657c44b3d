"""``sinklens all``: one display over all parts, and the table of verdicts at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sinklens.cli.common import (
    TOO_FEW,
    Backend,
    BackendOption,
    BlockOption,
    Bos,
    BosOption,
    CountOption,
    DeviceOption,
    DimsOption,
    Dtype,
    DtypeOption,
    EventOption,
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
    fail,
    given_formation,
    load,
    write_report,
)
from sinklens.records.ranges import names


def everything(
    model: ModelOption = "smollm2",
    target: Annotated[int, typer.Option(help="Position that the chain makes a sink.")] = 10,
    length: LengthOption = 64,
    n: CountOption = 32,
    prompts: PromptsOption = "passages",
    bos: BosOption = Bos.auto,
    block: BlockOption = None,
    event: EventOption = None,
    super_neurons: NeuronsOption = None,
    outlier_dims: DimsOption = None,
    only: Annotated[str | None, typer.Option(help="Only these parts, such as `formation,onset`.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    backend: BackendOption = Backend.auto,
    seed: SeedOption = 0,
    memory_budget: MemoryOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; an earlier run's is taken up again.")] = Path(
        "runs/all"
    ),
    as_json: JsonOption = False,
) -> None:
    """Find the formation, score the chain, run every analysis, write the report; can be interrupted and taken up."""
    with errors():
        from sinklens.pairs import PairChoice

        PairChoice(target).check(length)
        if n < 2:
            fail(TOO_FEW.format(f"--n is {n}"))
        given = given_formation(block, super_neurons, outlier_dims, event)
        chosen = () if only is None else names("--only", only)
        allowed = budget(memory_budget)
        run_everything(
            lambda step: load(
                step,
                model=model,
                device=device,
                dtype=dtype,
                backend=backend,
                prompts=prompts,
                n=n,
                length=length,
                bos=bos,
                seed=seed,
            ),
            out,
            target=target,
            only=chosen,
            seed=seed,
            memory_budget=allowed,
            given=given,
            as_json=as_json,
        )


def run_everything(
    load: Callable[[Callable[[str], None]], tuple[Any, Any]],
    out: Path,
    *,
    target: int,
    only: tuple[str, ...],
    seed: int,
    memory_budget: int | None,
    given: dict[str, Any],
    as_json: bool,
) -> None:
    """Run every part, write the report, print the verdicts; exit code 1 when a part failed."""
    from sinklens.analysis.suite import check_folder

    check_folder(out)  # before the model is loaded
    with _display() as display:
        model, batch = load(display.step)
        from sinklens.analysis.suite import run_all
        from sinklens.study import Study

        study = Study(model, batch, seed, memory_budget, given, display.rows)
        config = {"command": command_line()}
        result = run_all(study, out, target=target, only=only, config=config, begins=display.begins, ends=display.ends)
        display.step("writing the report")
        page = write_report(out)
    if as_json:
        sys.stdout.write((out / "run.json").read_text(encoding="utf-8") + "\n")
    else:
        _print(result, batch, page)
    if result.failed:
        typer.echo(f"sinklens: {len(result.failed)} part(s) failed: {', '.join(result.failed)}", err=True)
        raise typer.Exit(1)


def _print(result: Any, batch: Any, page: Path | None) -> None:
    from sinklens.cli.tables import console, verdicts_table
    from sinklens.prompts import prompts_text

    screen = console()
    screen.print(verdicts_table(result))
    screen.print(prompts_text(batch.record()), markup=False)
    screen.print(f"Results: {result.folder}" + (f"; report: {page}" if page else ""), markup=False, soft_wrap=True)


class _Display:
    """Progress over all parts: two bars on a terminal, a line for every part elsewhere."""

    def __init__(self, bar: Any, terminal: bool) -> None:
        self.bar, self.terminal = bar, terminal
        self.parts = bar.add_task("loading", total=None)
        self.patches = bar.add_task("", total=None, visible=False)
        self.place = ""

    def step(self, text: str) -> None:
        self.bar.update(self.parts, description=text)

    def rows(self, done: int, total: int) -> None:
        self.bar.update(self.patches, description="patched rows", completed=done, total=total, visible=done < total)

    def begins(self, name: str, number: int, of: int) -> None:
        self.place = f"[{number}/{of}]"
        self.bar.update(self.parts, description=name, completed=number - 1, total=of)
        self.bar.update(self.patches, visible=False)

    def ends(self, part: Any) -> None:
        told = "unchanged, kept" if part.reused else f"{part.status}, {part.seconds:.1f} s"
        text = f"{self.place} {part.name}: {told}" + (f" ({part.reason})" if part.reason else "")
        if self.terminal:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            typer.echo(text, err=True)


@contextlib.contextmanager
def _display() -> Iterator[_Display]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    terminal = sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not terminal) as bar:
        yield _Display(bar, terminal)
