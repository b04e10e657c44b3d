"""Commands read off signatures: ``name: Annotated[type, "one line of help"] = default`` says all there is to say.

A parameter of a type that a command line knows becomes an option as it is; for other types, a :class:`Form` says how
their values are written and read.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from sinklens.cli.command import Command
from sinklens.cli.mistakes import errors, usage_errors
from sinklens.errors import InputError
from sinklens.records.ranges import Between, check_number, hints_of, limits_of


@dataclass(frozen=True)
class Form:
    """How values of a type are written on the command line."""

    read: Callable[[str, Any], Any] = lambda _option, written: written
    """``(option, as it was written) -> value``; says what is wrong."""
    write: Callable[[Any], Any] = lambda value: value
    """A default as one would write it; ``None`` stays."""
    type: Any = str
    """What typer is to read."""


@dataclass(frozen=True)
class Option:
    """A parameter as an option."""

    parameter: inspect.Parameter
    """The parameter."""
    hint: Any
    """Its type."""
    line: str
    """Its help."""
    limits: Between | None
    """The values that it may have."""
    form: Form | None
    """How it is written; ``None``: as typer does."""
    flag: str | None
    """Its name on the command line, where that is another than the parameter's."""

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.parameter.name

    @property
    def written(self) -> str:
        """Name of the option."""
        return self.flag or f"--{self.name.replace('_', '-')}"

    @property
    def possible(self) -> bool:
        """Whether values can be written on a command line."""
        return self.form is not None or _is_plain(self.hint)

    def for_typer(self) -> inspect.Parameter:
        """The parameter that typer makes the option of."""
        kind = self.hint if self.form is None else self.form.type
        if self.form is not None and _optional(self.hint):
            kind = kind | None
        whole = self.limits if self.hint in (int, int | None) else None
        least, most = (None, math.inf) if whole is None else (whole.least, whole.most)
        limits: dict[str, Any] = {"min": least, "max": None if most == math.inf else most}
        names = () if self.flag is None else (self.flag,)
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self._default(),
            annotation=Annotated[kind, typer.Option(*names, help=self.line, **limits)],
        )

    def value(self, written: Any) -> Any:
        """What was written, as the function takes it."""
        if written == self._default():
            return self.parameter.default
        value = written if self.form is None else self.form.read(self.written, written)
        if isinstance(value, float):
            check_number(self.written, value, self.limits or Between(-math.inf))
        return value

    def _default(self) -> Any:
        default = self.parameter.default
        return default if self.form is None or default is None else self.form.write(default)


def options_of(
    function: Callable[..., Any], forms: Mapping[Any, Form], flags: Mapping[str, str] | None = None
) -> list[Option]:
    """The parameters of a function that have a default.

    Args:
        function: any, with ``Annotated`` types.
        forms: by type, how values are written.
        flags: names of options that differ from the parameters'.
    """
    hints = hints_of(function)
    options = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            continue
        given = hints.get(parameter.name, type(parameter.default))  # without an annotation the default says the type
        extra = typing.get_args(given) if typing.get_origin(given) is Annotated else ()
        hint, limits = limits_of(given)
        options.append(
            Option(
                parameter=parameter,
                hint=hint,
                line=next((item for item in extra if isinstance(item, str)), ""),
                limits=limits,
                form=_form(hint, forms),
                flag=(flags or {}).get(parameter.name),
            )
        )
    return options


def command_of(options: Sequence[Option], run: Callable[..., None]) -> Callable[..., None]:
    """A function whose signature typer can read: ``options``, then those of ``run`` but its first parameter.

    ``run`` is called with the values of ``options`` by name, and with its own.

    Raises:
        InputError: an option that is called like one of ``run``'s.
    """
    common = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
    check_names(options, common)

    def command(**values: Any) -> None:
        with errors():
            run({option.name: option.value(values.pop(option.name)) for option in options}, **values)

    parameters = [
        *(option.for_typer() for option in options),
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in common),
    ]
    write_out(command, parameters)
    return command


def write_out(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Give a function these parameters, as far as typer can see."""
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def check_names(options: Sequence[Option], common: Sequence[inspect.Parameter]) -> None:
    """Make sure that no option is called like one that every such command has.

    Raises:
        InputError: one is.
    """
    taken = {"--help", *(flag for parameter in common for flag in flags_of(parameter))}
    parameters = {parameter.name for parameter in common}
    for option in options:
        if option.written in taken or option.name in parameters:
            reserved = ", ".join(sorted(flag.removeprefix("--") for flag in taken))
            raise InputError(
                f"the option {option.name!r} has the name of one that every such command has: call it otherwise "
                f"(reserved are {reserved})"
            )


def flags_of(parameter: inspect.Parameter) -> list[str]:
    """What a parameter of a command is called on the command line."""
    extra = typing.get_args(parameter.annotation) if typing.get_origin(parameter.annotation) is Annotated else ()
    # Typer's first positional argument is a default, unless it stands in an annotation: then it is a name.
    named = [(getattr(item, "default", ""), *(getattr(item, "param_decls", None) or ())) for item in extra]
    given = [name for names in named for name in names if isinstance(name, str) and name.startswith("--")]
    return given or [f"--{parameter.name.replace('_', '-')}"]


def run_alone(command: Callable[..., None], help: str, args: Sequence[str] | None, prog: str | None) -> None:
    """Run a function as a command of its own; ends by SystemExit with the exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=help, cls=Command)(command)
    with usage_errors():
        raise SystemExit(app(args=None if args is None else list(args), prog_name=prog, standalone_mode=False) or 0)


def _form(hint: Any, forms: Mapping[Any, Form]) -> Form | None:
    return next((form for kind, form in forms.items() if hint in (kind, kind | None)), None)


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _is_plain(hint: Any) -> bool:
    """Whether typer reads values of a type by itself."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [kind for kind in kinds if kind is not type(None)]
    return len(kinds) == 1 and (kinds[0] in (int, float, str, bool) or typing.get_origin(kinds[0]) is Literal)
