"""``sinklens all``: one display over all parts, and the table of verdicts at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
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
    JsonOption,
    LengthOption,
    LossOption,
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
    given_events,
    load,
    note,
    progress,
    results_line,
    write_report,
)
from sinklens.cli.words import in_own_words
from sinklens.records.ranges import names, shown

MITIGATIONS = "mitigations"
"""What `--with` calls them, and their folder."""


def everything(
    model: ModelOption = "smollm2",
    target: Annotated[int, typer.Option(help="Position that the chain makes a sink.")] = 10,
    loss: LossOption = False,
    length: LengthOption = 64,
    n: CountOption = 32,
    prompts: PromptsOption = "passages",
    dataset: DatasetOption = None,
    bos: BosOption = Bos.auto,
    block: BlockOption = None,
    event: EventsOption = None,
    super_neurons: NeuronsOption = None,
    outlier_dims: DimsOption = None,
    only: Annotated[str | None, typer.Option(help="Only these parts, such as `formation,onset`.")] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="Further analyses (other-sinks, circuits), mitigations, or a .py file with an analysis; repeatable.",
        ),
    ] = None,
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
        which, given = given_events(block, super_neurons, outlier_dims, event)
        if which == ALL and replicate is not None:
            fail("give --event all or --replicate, one of the two")
        chosen = () if only is None else names("--only", only)
        analyses, mitigated = _own(with_ or [])
        if mitigated and (which == ALL or replicate is not None):
            fail("--with mitigations goes with one event and one set of prompts: leave out --event all or --replicate")
        allowed = budget(memory_budget)
        run_everything(
            lambda step: load(
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
            ),
            out,
            target=target,
            loss=loss,
            only=chosen,
            analyses=analyses,
            mitigated=mitigated,
            seed=seed,
            memory_budget=allowed,
            given=given,
            as_json=as_json,
            every_event=which == ALL,
            sizes=None if replicate is None else (replicate, n),
        )


def _own(given: list[str]) -> tuple[list[Any], bool]:
    """The analyses of groups and of files, read before anything is loaded; and whether there are mitigations."""
    if not given:
        return [], False
    from sinklens.analysis.discovery import list_analyses, list_groups
    from sinklens.analysis.run import load_analysis
    from sinklens.analysis.suite import CHAIN, FORMATION, further

    groups, names = list_groups(), []
    words = dict.fromkeys(name for each in given for name in ([each] if each.endswith(".py") else each.split(",")))
    for word in words:
        if word == MITIGATIONS:
            continue
        if word not in groups and not word.endswith(".py"):
            known = ", ".join([*groups, MITIGATIONS])
            fail(f"--with {shown(word)} must be a group ({known}), or a .py file with an analysis")
        names += list(list_analyses(group=word)) if word in groups else [word]
    analyses = [load_analysis(name) for name in names]
    return list(further(analyses, [FORMATION, CHAIN, *list_analyses(), MITIGATIONS]).values()), MITIGATIONS in words


def run_everything(
    load: Callable[[Callable[[str], None]], tuple[Any, Any]],
    out: Path,
    *,
    target: int,
    loss: bool,
    only: tuple[str, ...],
    analyses: Sequence[Any] = (),
    mitigated: bool = False,
    seed: int,
    memory_budget: int | None,
    given: dict[str, Any],
    as_json: bool,
    every_event: bool = False,
    sizes: tuple[int, int] | None = None,
) -> None:
    """Run every part, write the report, print the verdicts; exit code 1 when a part failed.

    With ``every_event`` for each event, and with ``sizes`` on so many sets of so many prompts, all in a folder of their
    own.
    """
    from sinklens.analysis.several import EVENTS, SETS
    from sinklens.analysis.suite import check_folder

    kind = EVENTS if every_event else SETS if sizes is not None else None
    check_folder(out, *(() if kind is None else (kind.record, kind.run)))  # before the model is loaded
    with _display() as display:
        model, batch = load(display.step)
        from sinklens.analysis.suite import run_all
        from sinklens.study import Study

        study = Study(model, batch, seed, memory_budget, given, display.rows)
        options: dict[str, Any] = {
            "target": target,
            "loss": loss,
            "only": only,
            "analyses": analyses,
            "config": {"command": command_line()},
        }
        options |= {"begins": display.begins, "ends": display.ends}
        if kind is None:
            runs, several = [_Run("", run_all(study, out, **options), study.batch)], None
        else:
            several = _several(study, sizes, display.step)
            runs = _run_several(study, several, out, display, options)
    _print_all(runs, as_json, several)
    sys.stdout.flush()
    if mitigated:
        _mitigate(study, out)
    if kind is None:
        write_report(out)  # which nobody has to wait for to see the result
    if not as_json:
        _print_folders(runs)
    failed = [f"{run.name}/{part}".lstrip("/") for run in runs for part in run.result.failed]
    if failed:
        parts = "1 part" if len(failed) == 1 else f"{len(failed)} parts"
        typer.echo(f"sinklens: {parts} failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _mitigate(study: Any, out: Path) -> None:
    """What takes the sink away, and what that costs, in a folder beside the analyses."""
    from sinklens.cli.mitigate import mitigate_into

    with progress() as (step, rows):
        reason = mitigate_into(out / MITIGATIONS, study, step, rows)
    if reason:
        note(f"{MITIGATIONS} are left out: {reason}")


@dataclass(frozen=True)
class _Run:
    """A run of everything."""

    name: str
    result: Any
    batch: Any


def _several(study: Any, sizes: tuple[int, int] | None, step: Callable[[str], None]) -> Any:
    """What is run more than once: on sets of prompts, or for every event."""
    from sinklens.analysis.several import of_events, of_sets

    if sizes is not None:
        return of_sets(study, *sizes)
    step("looking for the formation events")
    several = of_events(study)
    for name, reason in several.left_out.items():
        note(f"{name} is left out: {reason}")
    return several


def _run_several(study: Any, several: Any, out: Path, display: _Display, options: dict[str, Any]) -> list[_Run]:
    """Everything for each of ``several``, with a report in each folder and one over all."""
    from sinklens.analysis.several import run_several

    runs: list[_Run] = []

    def starts(name: str) -> None:
        display.of_set = f"{name} "

    def finished(name: str, result: Any) -> None:
        display.step("writing the report")
        runs.append(_Run(name, result, several.studies[name].batch))
        write_report(out / name)

    run_several(study, several, out, starts=starts, finished=finished, **options)
    write_report(out)
    return runs


def _print_all(runs: list[_Run], as_json: bool, several: Any) -> None:
    """The verdicts of every run, and how far they agree where there are several."""
    if as_json:
        texts = [(run.result.folder / "run.json").read_text(encoding="utf-8") for run in runs]
        sys.stdout.write((texts[0] if several is None else f"[{','.join(texts)}]") + "\n")
        return
    for run in runs:
        if several is not None:
            typer.echo(several.titles[run.name])
        _print(run.result, run.batch)
    if several is not None:
        _print_agreement(runs, several.over)


def _print_agreement(runs: list[_Run], over: str) -> None:
    """A table and two lines on how far the runs agree, on the chain and on the analyses."""
    import pandas as pd

    from sinklens.analysis.replicate import AGREEMENT
    from sinklens.analysis.suite import CHAIN
    from sinklens.chain.agree import agreement_text
    from sinklens.cli.fitting import show
    from sinklens.cli.tables import agreement_table, console

    folder = runs[0].result.folder.parent
    table, screen = pd.read_parquet(folder / f"{AGREEMENT}.parquet"), console()
    if table.empty or len(runs) < 2:
        return
    of_analyses, of_chain = table.query("what == 'verdict'"), table.query("what != 'verdict'")
    show(screen, agreement_table(of_analyses))
    for what, rows in (("Analyses", of_analyses), (CHAIN.capitalize(), of_chain)):
        if len(rows):
            screen.print(f"{what}: {agreement_text(rows, over)}", markup=False, soft_wrap=True)
    screen.print(
        f"Agreement: {folder / AGREEMENT}.parquet; report: {folder / 'report.html'}", markup=False, soft_wrap=True
    )


def _print(result: Any, batch: Any) -> None:
    from sinklens.cli.fitting import show
    from sinklens.cli.tables import console, verdicts_table
    from sinklens.prompts import prompts_text

    screen = console()
    show(screen, verdicts_table(result))
    screen.print(prompts_text(batch.record()), markup=False)


def _print_folders(runs: list[_Run]) -> None:
    """Where every run and its page are."""
    from sinklens.cli.tables import console

    for run in runs:
        page = run.result.folder / "report.html"
        line = results_line(run.result.folder, page if page.exists() else None)
        console().print(line, markup=False, soft_wrap=True)


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
        text = f"{self.place} {part.name}: {told}" + (f" ({in_own_words(part.reason)})" if part.reason else "")
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
