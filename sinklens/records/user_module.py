"""A Python file of the user's, run as a module of its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from sinklens.errors import InputError


def run_file(path: Path, prefix: str) -> ModuleType:
    """Run a file; it is a module of the name ``prefix`` and the file's own.

    Raises:
        InputError: there is none, or it cannot be run.
    """
    if not os.path.isfile(path):  # not Path's, which raises where a name is too long
        raise InputError(f"there is no file {path}: check the path")
    spec = importlib.util.spec_from_file_location(f"{prefix}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the module that they are defined in
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with a file of the user's
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be run ({type(error).__name__}: {reason}): correct it") from error
    return module
