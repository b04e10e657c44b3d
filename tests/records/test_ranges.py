"""Ranges of whole numbers, as they are written on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinklens.errors import InputError
from sinklens.records.ranges import Between, check_arguments, names, numbers, parse, read, short

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


@pytest.mark.parametrize("text", ["0-999999999999", "9" * 5000, "1-3:99999999", "10000000"])
def test_numbers_that_no_model_has(text: str) -> None:
    with pytest.raises(InputError, match="goes beyond 9999999") as error:
        parse("layers", text)
    assert len(str(error.value)) < 200


def test_numbers_in_every_form() -> None:
    arrays = (np.array([3, 1]), torch.tensor([3, 1]), [np.int64(3), torch.tensor(1)])
    for form in (*arrays, (1, 3, 3), {1, 3}, iter([1, 3])):
        assert read("layers", form) == (1, 3)  # pyright: ignore[reportArgumentType]: an array is no Iterable[int] to it
    for one in (2, np.int32(2), torch.tensor(2), np.array(2)):
        assert read("layers", one) == (2,)  # pyright: ignore[reportArgumentType]: as above
    truths = (True, [True, False], np.array([True, False]), torch.tensor([True]), [True, 3], [3, np.False_])
    for wrong in (*truths, 1.5, [1.5], torch.tensor([1.0]), None):
        with pytest.raises(InputError):
            read("layers", wrong)  # pyright: ignore[reportArgumentType]: the point of the test
    with pytest.raises(InputError, match="goes beyond"):
        read("layers", range(10**12))


def test_arguments_are_held_to_their_annotations() -> None:
    def function(
        study: object,
        *,
        draws: Annotated[int, "how many", Between(1, 10)] = 3,
        scale: float = 1.0,
        top: int | None = None,
        kind: Literal["one", "two"] = "one",
        free: Any = None,
        word: str | None = None,
        yes: bool = False,
        call: Callable[[int], None] | None = None,
        several: str | int | Sequence[int] = "all",
    ) -> None: ...

    check_arguments(function, {"draws": np.int64(10), "scale": 2, "top": None, "kind": "two", "free": object()})
    check_arguments(function, {"word": "w", "yes": np.bool_(True), "call": print, "several": [1, 2]})
    check_arguments(function, {"draws": 99, "kind": "three"}, limits=False)
    for name, value, message in (
        ("draws", True, "whole number"),
        ("scale", "1.5", "finite number"),
        ("scale", False, "finite number"),
        ("word", 5, "word 5 must be a text"),
        ("yes", 1, "must be True or False"),
        ("call", "print", "must be a function"),
        ("draws", 0, "draws 0 must be a whole number, from 1 to 10"),
        ("draws", 11, "from 1 to 10"),
        ("draws", 2.0, "whole number"),
        ("draws", None, "whole number"),
        ("draws", 10**5000, "thousands of digits must be"),
        ("scale", math.nan, "scale nan must be a finite number$"),
        ("scale", 10**400, "finite number"),
        ("scale", "wide", "finite number"),
        ("top", "3", "whole number"),
        ("kind", "three", "must be one of one, two"),
    ):
        with pytest.raises(InputError, match=message):
            check_arguments(function, {name: value})


def test_lists_of_names() -> None:
    assert names("--only", " a,b ,, c") == ("a", "b", "c")
    with pytest.raises(InputError, match="--only is empty"):
        names("--only", " , ")


def test_the_limits_of_a_tuple_are_those_of_each_of_its_numbers() -> None:
    def function(*, dims: Annotated[tuple[int, ...], "help", Between(1)] = (1,)) -> None: ...

    check_arguments(function, {"dims": (1, 3)})
    for wrong in ((0,), (3, 0), (1.5,), (True,), 0):
        with pytest.raises(InputError, match="dims"):
            check_arguments(function, {"dims": wrong})
