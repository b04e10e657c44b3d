"""The line that says how far a call is."""

from __future__ import annotations

from typing import Any

import pytest

from sinklens.errors import InputError
from sinklens.records import progress
from sinklens.records.progress import progress_of


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)


@pytest.mark.usefixtures("watched")
def test_the_caller_s_own_function_is_called_and_nothing_written(capsys: Any) -> None:
    calls = []
    with progress_of(lambda *numbers: calls.append(numbers), "sweep") as told:
        assert told is not None
        told(1, 2)
    assert calls == [(1, 2)] and capsys.readouterr().err == ""


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("given", [None, True])
def test_a_line_where_somebody_looks_which_goes_when_it_is_done(capsys: Any, given: Any) -> None:
    with progress_of(given, "sweep") as told:
        assert told is not None
        told(500, 2000)
    written = capsys.readouterr().err
    assert "sweep: 500 of 2,000 rows (25%)" in written and written.endswith("\r\x1b[K")


def test_no_line_where_nobody_looks_or_none_is_wanted(capsys: Any) -> None:
    for given in (None, False):
        with progress_of(given, "sweep") as told:
            assert told is None
    assert capsys.readouterr().err == ""
    with (
        pytest.raises(InputError, match="progress must be True, False or a function, not of type int"),
        progress_of(
            3,  # pyright: ignore[reportArgumentType]
            "sweep",
        ),
    ):
        pass
