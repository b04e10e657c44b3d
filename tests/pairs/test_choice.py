"""The choice of a pair: what is refused before any model is there, and its record."""

from __future__ import annotations

from typing import Any

import pytest

from sinklens.errors import InputError
from sinklens.pairs import PairChoice, is_natural
from sinklens.pairs.choice import target_from_text


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"target": "first"}, None, "target 'first' must be a position such as 10, or natural"),
        ({"target": 1.5}, None, "target 1.5 must be a position"),
        ({"target": 0}, None, "target 0 has no earlier tokens.*choose a later position, or target natural"),
        ({"target": 11}, 12, r"target 11 must be in 1\.\.10.*12 tokens.*later tokens"),
        ({"target": -1}, 12, r"target -1 must be in 1\.\.10"),
        ({"target": 1}, 2, "prompts of 2 tokens must be at least 3 long"),
        ({"kind": "natural"}, None, "unknown pair 'natural': block_aggregation or amplify_variance"),
        ({"strength": float("inf")}, None, "strength inf must be a finite number"),
    ],
)
def test_what_is_wrong_is_refused_before_a_model_is_there(options: dict[str, Any], length, message):
    with pytest.raises(InputError, match=message):
        PairChoice(**options).check(length)


@pytest.mark.parametrize(
    ("choice", "length"),
    [
        (PairChoice(1), 3),
        (PairChoice(10), 12),
        (PairChoice(100), None),
        (PairChoice("natural"), 2),
        (PairChoice(strength=-3.0, kind="amplify_variance"), 64),
    ],
)
def test_what_is_right_is_not(choice, length):
    choice.check(length)


@pytest.mark.parametrize(
    "choice",
    [
        PairChoice(),
        PairChoice("natural"),
        PairChoice(3, layers=(0, 2)),
        PairChoice(3, "amplify_variance", 2.5),
        PairChoice(3, "amplify_variance", axis="global"),
    ],
)
def test_a_record_says_what_was_chosen(choice):
    record = choice.record()
    assert record["target"] == choice.target and record["strength"] == choice.amplification
    assert record["pair_layers"] == (None if choice.layers is None else list(choice.layers))
    assert record.get("pair_axis", "prompts") == choice.axis
    assert is_natural(record) is choice.is_natural


def test_records_do_not_tell_choices_apart_that_make_the_same_pair():
    assert PairChoice("natural", "amplify_variance", 3.0).record() == PairChoice("natural").record()
    assert PairChoice(3, strength=3.0).record() == PairChoice(3).record()


def test_a_target_as_text():
    assert [target_from_text(text) for text in ("10", "natural", "here")] == [10, "natural", "here"]
    with pytest.raises(InputError, match="target 'natural' is no position"):
        assert PairChoice("natural").position
