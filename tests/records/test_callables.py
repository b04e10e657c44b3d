"""Whose code something is: a package's, or the user's own."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sinklens.records.callables import is_library, is_packages_own, read_by


def test_whose_a_module_is() -> None:
    assert all(is_library(name) for name in ("json", "torch.nn", "numpy", "sinklens.edits", "builtins", "sys"))
    assert not any(is_library(name) for name in ("__main__", "tests.helpers", "a_notebook"))


def test_a_file_of_the_users_may_have_the_name_of_one_of_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ModuleType("profile")
    mine.__file__ = str(tmp_path / "profile.py")
    monkeypatch.setitem(sys.modules, "profile", mine)
    assert not is_library("profile")
    monkeypatch.undo()
    assert is_library("profile")


def test_a_function_that_took_over_a_packages_name_is_not_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = torch.nn.functional.softmax
    assert is_packages_own(softmax) and is_packages_own(torch.no_grad)

    @functools.wraps(softmax)
    def mine(*args: Any, **options: Any) -> Any:
        return softmax(*args, **options)

    for function in (mine, torch.no_grad()(mine)):
        monkeypatch.setattr(torch.nn.functional, "softmax", function)
        assert not is_packages_own(torch.nn.functional.softmax)


def test_what_a_function_reads_by_name() -> None:
    def function(x: Any) -> Any:
        import json

        def inner() -> Any:
            return torch.nn.functional.gelu(x), sys

        return inner, json.loads, (torch or x).cos, "a text"

    read = read_by(function.__code__)
    assert read.paths == (("sys",), ("torch",), ("torch", "nn", "functional", "gelu"))
    assert read.imports == ("json",)
    assert {"loads", "cos", "gelu"} <= read.names and "a text" in read.texts
