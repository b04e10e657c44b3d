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
    ReplicateOption,
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
    replicate: ReplicateOption = None,
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
                sets=replicate,
            ),
            out,
            target=target,
            only=chosen,
            seed=seed,
            memory_budget=allowed,
            given=given,
            as_json=as_json,
            sizes=None if replicate is None else (replicate, n),
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
    sizes: tuple[int, int] | None = None,
) -> None:
    """Run every part, write the report, print the verdicts; exit code 1 when a part failed.

    With ``sizes``, all of it on so many sets of so many prompts, each in a folder of its own.
    """
    from sinklens.analysis.suite import check_folder

    if sizes is None:
        check_folder(out)  # before the model is loaded
    else:
        from sinklens.analysis.replicate import check_sets_folder

        check_sets_folder(out)
    with _display() as display:
        model, batch = load(display.step)
        from sinklens.analysis.suite import run_all
        from sinklens.study import Study

        study = Study(model, batch, seed, memory_budget, given, display.rows)
        studies = {"": study} if sizes is None else _sets(study, out, sizes)
        results, pages = {}, {}
        for name, each in studies.items():
            display.of_set = f"{name} " if name else ""
            config = {"command": command_line()}
            watch = {"begins": display.begins, "ends": display.ends}
            results[name] = run_all(each, out / name, target=target, only=only, config=config, **watch)
            display.step("writing the report")
            pages[name] = write_report(out / name)
    if as_json:
        texts = [(out / name / "run.json").read_text(encoding="utf-8") for name in results]
        sys.stdout.write((texts[0] if sizes is None else f"[{','.join(texts)}]") + "\n")
    else:
        for name, result in results.items():
            _print(result, studies[name].batch, pages[name])
    if sizes is not None:
        _compare(out, results, sizes[1], as_json)
    failed = [f"{name}/{part}".lstrip("/") for name, result in results.items() for part in result.failed]
    if failed:
        parts = "1 part" if len(failed) == 1 else f"{len(failed)} parts"
        typer.echo(f"sinklens: {parts} failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _sets(study: Any, out: Path, sizes: tuple[int, int]) -> dict[str, Any]:
    """A study for every set of prompts, by the name of its folder; marks the folder that they are in."""
    from sinklens.analysis.replicate import RECORD, sets_of
    from sinklens.records.files import write_json, writing

    sets, n = sizes
    studies = sets_of(study, sets, n)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, {"sets": sets, "n_prompts": n, "command": command_line()})
    return studies


def _compare(out: Path, results: dict[str, Any], n: int, as_json: bool) -> None:
    """How far the sets agree: a table beside their folders, and lines on the chain and on the analyses."""
    from sinklens.analysis.replicate import all_agreement
    from sinklens.analysis.suite import CHAIN
    from sinklens.chain.agree import agreement_text
    from sinklens.cli.fitting import show
    from sinklens.cli.tables import agreement_table, console

    table = all_agreement(out, results)
    if as_json or table.empty:
        return
    screen, over = console(), f"{len(results)} disjoint sets of {n} prompts"
    of_analyses, of_chain = table.query("what == 'verdict'"), table.query("what != 'verdict'")
    show(screen, agreement_table(of_analyses))
    for what, rows in (("Analyses", of_analyses), (CHAIN.capitalize(), of_chain)):
        if len(rows):
            screen.print(f"{what}: {agreement_text(rows, over)}", markup=False, soft_wrap=True)
    screen.print(f"Agreement: {out / 'agreement.parquet'}", markup=False, soft_wrap=True)


def _print(result: Any, batch: Any, page: Path | None) -> None:
    from sinklens.cli.fitting import show
    from sinklens.cli.tables import console, verdicts_table
    from sinklens.prompts import prompts_text

    screen = console()
    show(screen, verdicts_table(result))
    screen.print(prompts_text(batch.record()), markup=False)
    screen.print(f"Results: {result.folder}" + (f"; report: {page}" if page else ""), markup=False, soft_wrap=True)


class _Display:
    """Progress over all parts: two bars on a terminal, a line for every part elsewhere."""

    def __init__(self, bar: Any, terminal: bool) -> None:
        self.bar, self.terminal = bar, terminal
        self.parts = bar.add_task("loading", total=None)
        self.patches = bar.add_task("", total=None, visible=False)
        self.place = ""
        self.of_set = ""

    def step(self, text: str) -> None:
        self.bar.update(self.parts, description=text)

    def rows(self, done: int, total: int) -> None:
        self.bar.update(self.patches, description="patched rows", completed=done, total=total, visible=done < total)

    def begins(self, name: str, number: int, of: int) -> None:
        self.place = f"{self.of_set}[{number}/{of}]"
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
