"""Errors that sinklens raises on purpose.

`InputError` is the user's mistake and carries one sentence that says what to do; the command line prints that sentence
without a traceback and exits with status 2. `EngineError` is ours, or a hook's: the run must not be trusted.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["EditError", "EngineError", "InputError", "NoSinkError", "NotApplicableError", "WriteError", "need"]


class InputError(ValueError):
    """The input cannot be used as it is; the message is one sentence that says what to do about it."""


class NoSinkError(InputError):
    """The model shows no attention sink where one is needed; the message carries the numbers that were measured."""


class NotApplicableError(InputError):
    """The question cannot be asked of this model; the message says in one sentence why not."""


class WriteError(InputError):
    """Results cannot be written: no room, no permission; the message names the place and says what to do."""


class EngineError(RuntimeError):
    """A run broke a promise of the engine: an unknown hook name, a hook that never fired, a value not finite."""


class EditError(EngineError, InputError):
    """An edit or a readout of the caller's does what none may; the message names it and says what."""


def need(name: str, extra: str = "viz") -> ModuleType:
    """Import an optional module, which the extra ``extra`` installs.

    Raises:
        InputError: when its package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is installed, but broken: that is not for us to explain
        raise InputError(f"{package} is not installed: pip install 'sinklens[{extra}]'") from error
