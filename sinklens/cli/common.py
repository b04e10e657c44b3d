"""What the commands have in common: options, loading, progress, and how mistakes are told.

torch and transformers are imported inside functions, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from sinklens.cli.words import in_own_words, words_of
from sinklens.records.ranges import MOST_REPEATS, SEEDS, integers, shown

if TYPE_CHECKING:
    from sinklens.analysis.suite import SuiteResult
    from sinklens.engine.run import Progress
    from sinklens.models.view import Model
    from sinklens.pairs.choice import Target
    from sinklens.prompts import PromptBatch


class Commands(typer.core.TyperGroup):
    """Mistakes in the arguments are told like those in the input: one sentence, exit code 2."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Parse the arguments."""
        with usage_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with usage_errors():
            return super().invoke(ctx)


class Command(typer.core.TyperCommand):
    """A command to which one may say ``--bos`` for ``--bos always``, and ``--no-bos`` for ``--bos never``; what goes
    wrong in it is told in its own words.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments."""
        return super().parse_args(ctx, spelt_out(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with words_of(self.params):
            return super().invoke(ctx)


def spelt_out(args: list[str]) -> list[str]:
    """The arguments with ``--bos`` and ``--no-bos`` as an option with a value."""
    found: list[str] = []
    for arg, after in zip(args, [*args[1:], ""], strict=False):
        if arg == "--no-bos":
            found += ["--bos", Bos.never.value]
        elif arg == "--bos" and (not after or after.startswith("-")):
            found += [arg, Bos.always.value]
        else:
            found.append(arg)
    return found


class Bos(StrEnum):
    """Who decides whether a beginning-of-sequence token stands in front of the prompts."""

    auto = "auto"
    always = "always"
    never = "never"


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
LossOption = Annotated[
    bool,
    typer.Option(
        "--loss",
        help="Also what every edit of the chain does to the loss, beside its control: every row then runs to the end "
        "of the model, which takes about 4 times as long (SmolLM2, 4 prompts of 32 tokens).",
    ),
]
PromptsOption = Annotated[
    str,
    typer.Option(
        help="`passages` (in the package), `random` (random tokens), or a file: every line is a prompt of its own, or "
        "every object of a .jsonl file, whose text may have several lines."
    ),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        help="Prompts from a Hugging Face data set in place of --prompts: NAME[:CONFIG][@SPLIT], such as wikitext, or "
        "a folder on this machine. Needs the extra `datasets`."
    ),
]
CountOption = Annotated[int, typer.Option("--n", help="Number of prompts.")]
BosOption = Annotated[
    Bos,
    typer.Option(
        help="Begin prompts with the tokenizer's BOS: as it does itself, always (`--bos` alone), or never (`--no-bos`)."
    ),
]
ReplicateOption = Annotated[
    int | None,
    typer.Option(min=2, max=MOST_REPEATS, help="Do all of it on so many disjoint sets of --n prompts, and compare."),
]
DeviceOption = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:1`.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Floating-point format of the model.")]
BackendOption = Annotated[Backend, typer.Option(help="TransformerLens class to load the model as.")]
SeedOption = Annotated[int, typer.Option(min=0, max=int(SEEDS.most), help="Fixes every random draw.")]
MemoryOption = Annotated[float | None, typer.Option(help="GiB for one forward pass's activations.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier run.")]
BlockOption = Annotated[
    int | None, typer.Option("--block", "--layer", help="Explain this block instead of the strongest.")
]
EventOption = Annotated[
    int | None,
    typer.Option(min=1, help="Explain this formation event (`sinklens find` lists them) by its strongest block."),
]
EventsOption = Annotated[
    str | None,
    typer.Option(help="Formation event to explain (`sinklens find` lists them), or `all`: a folder for each in --out."),
]
NeuronsOption = Annotated[str | None, typer.Option(help="Take these super neurons, such as 3,17, and look for none.")]
DimsOption = Annotated[str | None, typer.Option(help="Take these outlier dimensions and look for none.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


MOST_GIB = 2**20
"""What no machine has; a larger budget is a slip."""


def floats(option: str, text: str) -> tuple[float, ...]:
    """``1,2.5`` as ``(1.0, 2.5)``; anything else is the user's mistake."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        fail(f"{option} {shown(text)!r} must be numbers such as 1,2,4")
    return found


def given_formation(
    block: int | None, super_neurons: str | None, outlier_dims: str | None, event: int | None = None
) -> dict[str, Any]:
    """What the user says of the formation, as :class:`sinklens.Study` takes it."""
    if block is not None and event is not None:
        fail(f"give --block {block} or --event {event}, not both")
    found: dict[str, Any] = {} if block is None else {"layer": block}
    if event is not None:
        found["event"] = event
    if super_neurons is not None:
        found["super_neurons"] = integers("--super-neurons", super_neurons)
    if outlier_dims is not None:
        found["outlier_dims"] = integers("--outlier-dims", outlier_dims)
    return found


ALL = "all"
"""What stands for every event."""


def given_events(
    block: int | None, super_neurons: str | None, outlier_dims: str | None, event: str | None
) -> tuple[int | str | None, dict[str, Any]]:
    """``--event`` as a number, :data:`ALL` or nothing; and what the user says of the formation."""
    if event is not None and event != ALL and not _is_event(event):
        fail(f"--event {shown(event)!r} must be the number of an event, such as 1, or all: sinklens find lists them")
    which = event if event is None or event == ALL else int(event)
    given = given_formation(block, super_neurons, outlier_dims, which if isinstance(which, int) else None)
    if which == ALL and given:
        fail(
            "--event all explains each event by its own super neurons: leave out --block, --super-neurons and "
            "--outlier-dims, or give the number of one event"
        )
    return which, given


def _is_event(text: str) -> bool:
    return text.isdecimal() and text.isascii() and 1 <= len(text) <= 4 and int(text) > 0


def budget(gib: float | None) -> int | None:
    """``--memory-budget`` in bytes."""
    if gib is None:
        return None
    if not 0 < gib <= MOST_GIB:
        fail(f"--memory-budget {gib} must be a number of GiB, more than 0 and at most {MOST_GIB:,}")
    return max(1, int(gib * 2**30))


def load(
    step: Callable[[str], None],
    *,
    model: str,
    device: str,
    dtype: Dtype,
    backend: Backend,
    prompts: str,
    n: int,
    length: int,
    bos: Bos,
    seed: int,
    dataset: str | None = None,
    devices: int = 1,
    sets: int | None = None,
) -> tuple[Model, PromptBatch]:
    """The model and the prompts that the options name; with ``sets`` enough for so many sets of ``n``, if there are."""
    # os.path and not Path: it says no to a name that is too long instead of raising.
    if prompts not in ("passages", "random") and not os.path.exists(os.path.expanduser(prompts)):
        fail(f"--prompts {shown(prompts, 80)!r} is neither passages nor random nor a file that exists: check the path")
    if dataset is not None and prompts != "passages":
        fail(f"give --prompts {shown(prompts, 80)} or --dataset {shown(dataset, 80)}, not both")
    step("loading torch and the model")
    from sinklens import prompts as make
    from sinklens.models.load import load_model
    from sinklens.prompts.sources import N_PASSAGES

    loaded = load_model(model, device=device, dtype=dtype.value, backend=backend.value, devices=devices)
    _check_weights(loaded)
    leading, several = bos.value, n * (sets or 1)
    if dataset is not None:
        return loaded, _of_dataset(loaded, dataset, several, sets is not None, length=length, prepend_bos=leading)
    if prompts == "passages":
        number = several if sets is None else min(several, N_PASSAGES)
        return loaded, make.natural(loaded, n=number, length=length, prepend_bos=leading)
    if prompts == "random":
        return loaded, make.random_tokens(loaded, n=several, length=length, seed=seed, prepend_bos=leading)
    batch = make.from_file(loaded, prompts, n=several, length=length, prepend_bos=leading)
    if sets is not None and batch.is_grouped:  # no text may be in two sets, so more of them may be needed
        batch = make.from_file(loaded, prompts, length=length, prepend_bos=leading)
    return loaded, batch


def _of_dataset(model: Model, dataset: str, n: int, in_sets: bool, **options: Any) -> PromptBatch:
    from sinklens import prompts as make
    from sinklens.prompts.datasets import from_words

    name, config, split = from_words(dataset)
    batch = make.from_dataset(model, name, config, split=split, n=n, **options)
    if in_sets and batch.is_grouped:  # no text may be in two sets, so more of them may be needed
        batch = make.from_dataset(model, name, config, split=split, n=None, **options)
    return batch


def _check_weights(model: Model) -> None:
    """Activations would not be finite either, but by then nothing says where that came from."""
    from sinklens.models.view import damaged_weight

    if (name := damaged_weight(model)) is not None:
        fail(f"the model's weight {name} holds NaN or infinite values: get the model again, or use another")


def command_line() -> str:
    """The command as it was given."""
    import shlex

    return shlex.join(["sinklens", *sys.argv[1:]])


@contextlib.contextmanager
def progress() -> Iterator[tuple[Any, Progress]]:
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
def errors() -> Iterator[None]:
    """The user's mistakes as one sentence and exit code 2, the engine's refusals as one and exit code 1."""
    from sinklens.errors import EngineError, InputError
    from sinklens.records.files import cannot_write

    try:
        with _remarks():
            yield
    except InputError as error:
        fail(in_own_words(str(error)))
    except BrokenPipeError:
        raise  # the reader of the output has gone
    except OSError as error:  # a full disk under the output, most of all
        fail(str(cannot_write(error.filename or "the output", error, "choose another place")))
    except MemoryError:
        fail("there is not enough memory for this: ask for fewer or shorter prompts, or for less at once")
    except EngineError as error:
        typer.echo(f"sinklens: {in_own_words(str(error))}", err=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _remarks() -> Iterator[None]:
    """Warnings and log records of sinklens as lines like our own; those of others as they come."""
    logger, show = logging.getLogger("sinklens"), warnings.showwarning
    here, said = str(Path(__file__).parents[1]), set[str]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    def say(message: str) -> None:
        if message not in said:  # once, wherever it comes from
            said.add(message)
            note(message)

    def ours(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if filename.startswith(here):
            say(str(message))
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
def usage_errors() -> Iterator[None]:
    """Typer's own mistakes as one sentence."""
    try:
        yield
    except Exception as error:
        # Typer's own exceptions have no public base class. The one that shows the help is no mistake to explain.
        if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
            raise
        message = " ".join(error.format_message().split()).rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
        where = getattr(getattr(error, "ctx", None), "command_path", "sinklens")
        fail(f"{message}; see {where} --help")


def fail(sentence: str) -> NoReturn:
    """Tell the user's mistake on one line, and exit with 2; what is too long to be a name is cut."""
    sentence = " ".join(part.strip() for part in sentence.splitlines())  # a name may hold line ends
    told = re.sub(r"\S{400,}", lambda match: f"{match[0][:80]}...{match[0][-40:]}", sentence)
    typer.echo(f"sinklens: {told}", err=True)
    raise typer.Exit(2)


def write_report(out: Path) -> Path | None:
    """Write the report of a run; None, and a remark, where what it needs is not installed.

    Ends the command with one sentence where there is no room for it.
    """
    from sinklens.errors import InputError, WriteError

    try:
        from sinklens.pages.page import report

        return report(out)
    except WriteError as error:
        fail(f"{in_own_words(str(error))}; the numbers are saved in {out}: sinklens report {out} writes the page")
    except InputError as error:  # plotly or circuitsvis is missing, or of another version: the numbers are saved
        typer.echo(f"no report.html: {in_own_words(str(error))}", err=True)
        return None


def results_line(out: Path, page: Path | None) -> str:
    """Where results and their page are."""
    return f"Results: {out}" + (f"; report: {page}" if page else "")


def write_pages(folders: Iterable[Path], as_json: bool, *, besides: Iterable[Path] = ()) -> None:
    """Write the pages of finished runs, which nobody has to wait for to see the results, and say where they are.

    Those of ``besides`` come first, and are not told of.
    """
    from sinklens.cli.tables import console

    sys.stdout.flush()
    told = tuple(folders)
    with progress() as (step, _):
        step("writing the report")
        pages = {folder: write_report(folder) for folder in dict.fromkeys([*besides, *told])}
    if not as_json:
        for folder in told:
            console().print(results_line(folder, pages[folder]), markup=False, soft_wrap=True)


def note(message: str) -> None:
    """Tell the user something besides the results, in the command line's words."""
    typer.echo(f"sinklens: note: {in_own_words(message)}", err=True)


def left_out(suite: SuiteResult) -> None:
    """Name the sets of prompts that could not be scored; ends the command with the first's reason when none could."""
    lost = [part for part in suite.parts.values() if part.status != "done"]
    for part in lost:
        note(f"{part.name} is left out: {part.reason}")
    if len(lost) == len(suite.parts):
        fail(in_own_words(lost[0].reason))


TOO_FEW = "the chain compares variances over prompts, so it needs at least 2 of them, and {}"


def targets_of(text: str, length: int) -> list[Target]:
    """``--target`` as positions that prompts of ``length`` tokens have, or natural: one, or several with commas.

    Raises:
        InputError: one is neither.
    """
    from sinklens.pairs.choice import check_targets, target_from_text

    targets: list[Target] = [target_from_text(part) for part in text.split(",")]
    check_targets(targets, length)
    return targets
