"""Ranges of whole numbers, as they are written on the command line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklens.errors import InputError
from sinklens.records.ranges import numbers, parse, short

ranges = st.sets(st.integers(0, 40), min_size=1, max_size=5).map(lambda found: tuple(sorted(found)))


@pytest.mark.parametrize(
    "text, found",
    [
        ("0-3", (0, 1, 2, 3)),
        ("1-9:4", (1, 5, 9)),
        ("3,5,7-9", (3, 5, 7, 8, 9)),
        (" 4 , 2-3 ", (2, 3, 4)),
        ("7,7,7", (7,)),
        ("all", tuple(range(10))),
        (5, (5,)),
        (range(2, 5), (2, 3, 4)),
        ([np.int64(4), 1], (1, 4)),
    ],
)
def test_ranges(text: Any, found: tuple[int, ...]) -> None:
    assert numbers("layers", text, 10, "blocks") == found


@pytest.mark.parametrize(
    "given, message",
    [
        ("", "layers is empty: write whole numbers such as 0-29"),
        ("  ", "layers is empty"),
        ([], "layers is empty"),
        ("9-3", "layers '9-3' runs backwards: write 3-9"),
        ("1-9:0", "layers '1-9:0' has a step of 0"),
        ("3:4", "layers '3:4' is not a range"),
        ("a", "layers 'a' is not a range"),
        ("1,,2", "layers '1,,2' is not a range"),
        ("-1", "layers '-1' is not a range"),
        ("1.5", "layers '1.5' is not a range"),
        ([1.5], r"layers \[1.5\] is not a range"),
        ([True], "layers is empty"),
        ([-1, 3], "layers -1: blocks are 0-9"),
        ("8-12", "layers 10, 11, 12: blocks are 0-9"),
        ("10-99", "layers 10, 11, 12, 13 and 86 more: blocks are 0-9"),
    ],
)
def test_ranges_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        numbers("layers", given, 10, "blocks")


@given(ranges)
def test_a_range_written_out_is_itself(found: tuple[int, ...]) -> None:
    assert parse("layers", ",".join(map(str, found))) == found
    assert short(found, 100) == ", ".join(map(str, found))
