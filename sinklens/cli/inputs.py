"""What commands are run on: a model and prompts, and what the user says of where the sink forms.

A command has one parameter of type :class:`Inputs`; :func:`with_inputs` puts the options that these are in its place,
for typer to read. torch and transformers are imported when a model is loaded, so that ``--help`` is quick.
"""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinklens.cli.choices import Backend, Bos, Dtype
from sinklens.cli.mistakes import fail
from sinklens.cli.options import BackendOption
from sinklens.cli.signature import write_out
from sinklens.records.ranges import MOST_REPEATS, SEEDS, integers, shown

if TYPE_CHECKING:
    from sinklens.models.view import Model
    from sinklens.prompts import PromptBatch

ALL = "all"
"""What stands for every event."""
MOST_GIB = 2**20
"""What no machine has; a larger budget is a slip."""


@dataclass(frozen=True)
class Inputs:
    """The options that name a model and prompts, and what is known of the formation; its help says what each is."""

    model: Annotated[
        str,
        typer.Option(help="A name from `sinklens models`, a Hugging Face id, or a local folder."),
    ] = "smollm2"
    length: Annotated[int, typer.Option(help="Tokens in every prompt.")] = 64
    n: Annotated[int, typer.Option("--n", help="Number of prompts.")] = 32
    prompts: Annotated[
        str,
        typer.Option(
            help="`passages` (in the package), `random` (random tokens), or a file: every line is a prompt of its own, "
            "or every object of a .jsonl file, whose text may have several lines."
        ),
    ] = "passages"
    dataset: Annotated[
        str | None,
        typer.Option(
            # The help is read as Rich's markup, in which [@...] means something.
            help="Prompts from a Hugging Face data set in place of --prompts: NAME[:CONFIG]\\[@SPLIT], such as "
            "wikitext, or a folder on this machine. Needs the extra `datasets`."
        ),
    ] = None
    bos: Annotated[
        Bos,
        typer.Option(
            help="Begin prompts with the tokenizer's BOS: as it does itself, always (`--bos` alone), or never "
            "(`--no-bos`)."
        ),
    ] = Bos.auto
    block: Annotated[
        int | None, typer.Option("--block", "--layer", help="Explain this block instead of the strongest.")
    ] = None
    event: Annotated[
        int | None,
        typer.Option(min=1, help="Explain this formation event (`sinklens find` lists them) by its strongest block."),
    ] = None
    super_neurons: Annotated[
        str | None, typer.Option(help="Take these super neurons, such as 3,17, and look for none.")
    ] = None
    outlier_dims: Annotated[str | None, typer.Option(help="Take these outlier dimensions and look for none.")] = None
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:1`.")] = "auto"
    dtype: Annotated[Dtype, typer.Option(help="Floating-point format of the model.")] = Dtype.float32
    backend: BackendOption = Backend.auto
    seed: Annotated[int, typer.Option(min=0, max=int(SEEDS.most), help="Fixes every random draw.")] = 0
    replicate: Annotated[
        int | None,
        typer.Option(
            min=2, max=MOST_REPEATS, help="Do all of it on so many disjoint sets of --n prompts, and compare."
        ),
    ] = None
    memory_budget: Annotated[float | None, typer.Option(help="GiB for one forward pass's activations.")] = None

    def given(self) -> dict[str, Any]:
        """What the user says of the formation, as :class:`sinklens.Study` takes it."""
        return self._given(self.event)

    def _given(self, event: int | None) -> dict[str, Any]:
        if self.block is not None and event is not None:
            fail(f"give --block {self.block} or --event {event}, not both")
        found: dict[str, Any] = {} if self.block is None else {"layer": self.block}
        if event is not None:
            found["event"] = event
        if self.super_neurons is not None:
            found["super_neurons"] = integers("--super-neurons", self.super_neurons)
        if self.outlier_dims is not None:
            found["outlier_dims"] = integers("--outlier-dims", self.outlier_dims)
        return found

    def bytes_allowed(self) -> int | None:
        """``--memory-budget`` in bytes."""
        gib = self.memory_budget
        if gib is None:
            return None
        if not 0 < gib <= MOST_GIB:
            fail(f"--memory-budget {gib} must be a number of GiB, more than 0 and at most {MOST_GIB:,}")
        return max(1, int(gib * 2**30))

    def load(self, step: Callable[[str], None], *, devices: int = 1) -> tuple[Model, PromptBatch]:
        """The model, over so many devices, and the prompts: with ``replicate`` enough for all sets, if there are.

        Args:
            step: told what is being done.
            devices: GPUs that the model's blocks are spread over.
        """
        self._check_prompts()
        step("loading torch and the model")
        from sinklens.models.load import load_model
        from sinklens.models.view import damaged_weight

        model = load_model(
            self.model, device=self.device, dtype=self.dtype.value, backend=self.backend.value, devices=devices
        )
        # Activations would not be finite either, but by then nothing says where that came from.
        if (name := damaged_weight(model)) is not None:
            fail(f"the model's weight {name} holds NaN or infinite values: get the model again, or use another")
        return model, self._batch(model)

    def _check_prompts(self) -> None:
        """Make sure that there is something to read prompts from, and one thing only."""
        prompts = shown(self.prompts, 80)
        # os.path and not Path: it says no to a name that is too long instead of raising.
        if self.prompts not in ("passages", "random") and not os.path.exists(os.path.expanduser(self.prompts)):
            fail(f"--prompts {prompts!r} is neither passages nor random nor a file that exists: check the path")
        if self.dataset is not None and self.prompts != "passages":
            fail(f"give --prompts {prompts} or --dataset {shown(self.dataset, 80)}, not both")

    def _batch(self, model: Model) -> PromptBatch:
        from sinklens import prompts as make
        from sinklens.prompts.datasets import from_words
        from sinklens.prompts.sources import N_PASSAGES

        n, form = self.n * (self.replicate or 1), {"length": self.length, "prepend_bos": self.bos.value}
        if self.dataset is not None:
            name, config, split = from_words(self.dataset)
            return self._of_texts(functools.partial(make.from_dataset, model, name, config, split=split, **form), n)
        if self.prompts == "passages":
            return make.natural(model, n=n if self.replicate is None else min(n, N_PASSAGES), **form)
        if self.prompts == "random":
            return make.random_tokens(model, n=n, seed=self.seed, **form)
        return self._of_texts(functools.partial(make.from_file, model, self.prompts, **form), n)

    def _of_texts(self, read: Callable[..., PromptBatch], n: int) -> PromptBatch:
        """``n`` prompts, or all there are where no text may be in two sets, so that more of them may be needed."""
        batch = read(n=n)
        return read(n=None) if self.replicate is not None and batch.is_grouped else batch


@dataclass(frozen=True)
class EventInputs(Inputs):
    """The same for a command that can be run for every event, one after the other."""

    event: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]: typer reads a number, or this
        str | None,
        typer.Option(
            help="Formation event to explain (`sinklens find` lists them), or `all`: a folder for each in --out."
        ),
    ] = None

    @property
    def every_event(self) -> bool:
        """Whether every event is asked for."""
        return self.event == ALL

    def given(self) -> dict[str, Any]:
        """What the user says of the formation, as :class:`sinklens.Study` takes it; nothing for every event."""
        given = self._given(None if self.event is None or self.every_event else _event_number(self.event))
        if self.every_event and given:
            fail(
                "--event all explains each event by its own super neurons: leave out --block, --super-neurons and "
                "--outlier-dims, or give the number of one event"
            )
        return given


def _event_number(text: str) -> int:
    if not (text.isdecimal() and text.isascii() and 1 <= len(text) <= 4 and int(text) > 0):
        fail(f"--event {shown(text)!r} must be the number of an event, such as 1, or all: sinklens find lists them")
    return int(text)


Function = Callable[..., None]
"""A command as Python has it."""


def with_inputs(*, without: Sequence[str] = (), **defaults: Any) -> Callable[[Function], Function]:
    """Put the options of :class:`Inputs` in the place of a function's parameter of this type.

    Args:
        without: options that the command does not have.
        defaults: what is taken where the user says nothing, in place of the fields' own defaults.
    """

    def expanded(run: Function) -> Function:
        parameters = list(inspect.signature(run, eval_str=True).parameters.values())
        (place,) = (place for place, one in enumerate(parameters) if _is_inputs(one.annotation))
        inputs = parameters[place]
        if slips := {*without, *defaults} - {field.name for field in fields(inputs.annotation)}:
            raise TypeError(f"{', '.join(sorted(slips))}: there is no such option")
        options = [one for one in _options(inputs.annotation, defaults) if one.name not in without]

        @functools.wraps(run)
        def command(*args: Any, **values: Any) -> None:
            said = {one.name: values.pop(one.name) for one in options if one.name in values}
            run(*args, **values, **{inputs.name: inputs.annotation(**(defaults | said))})

        write_out(command, [*parameters[:place], *options, *parameters[place + 1 :]])
        return command

    return expanded


def _is_inputs(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Inputs)


def _options(kind: type[Inputs], defaults: dict[str, Any]) -> list[inspect.Parameter]:
    """A parameter for every field."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
