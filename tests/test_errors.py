"""Errors: which are the user's, and what is said when a package is missing."""

from __future__ import annotations

import json

import pytest

from sinklens.errors import EngineError, InputError, NoSinkError, NotApplicableError, need


def test_the_user_s_mistakes_are_input_errors_and_ours_are_not() -> None:
    for kind in (NoSinkError, NotApplicableError):
        assert issubclass(kind, InputError)
    assert issubclass(InputError, ValueError) and not issubclass(EngineError, InputError)


def test_a_missing_package_is_said_with_the_way_to_install_it() -> None:
    with pytest.raises(InputError, match=r"^no_such_package is not installed: pip install 'sinklens\[ray\]'$"):
        need("no_such_package.part", "ray")
    assert need("json") is json


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_for_sinklens.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        need("broken_for_sinklens")
