"""A part that says whether its rule says the same at other tokens or lengths."""

from __future__ import annotations

from dataclasses import replace

from sinklens.analysis import above, elsewhere, judge, unmeasured
from sinklens.statistics import Estimate

HIGH, OPEN, LOW = (Estimate(value, value - 0.1, value + 0.1, 8) for value in (0.9, 0.5, 0.1))
PART = judge(
    "cause", "mask", "It does.", statistic="share", estimate=HIGH, rule="above 0.5", conditions=[above(HIGH, 0.5)]
)


def told(**places: Estimate) -> str:
    part = elsewhere(PART, {place.replace("_", " "): [above(x, 0.5)] for place, x in places.items()})
    assert replace(part, detail="") == PART, "its own answer is its rule's"
    return part.detail


def test_agreement_is_said_in_few_words():
    assert told(token_5=HIGH, token_20=HIGH) == "the same at token 5 and token 20"


def test_every_place_that_differs_is_named_with_its_answer():
    detail = told(token_5=LOW, token_20=HIGH, token_40=OPEN, token_50=LOW)
    assert detail == (
        "it depends on where one asks: does not hold at token 5 and token 50, undecided at token 40, "
        "the same at token 20"
    )


def test_what_was_said_before_stays():
    part = elsewhere(replace(PART, detail="median 0.9"), {"32 tokens": [above(LOW, 0.5)]})
    assert part.detail == "median 0.9; it depends on where one asks: does not hold at 32 tokens"


def test_nothing_is_said_of_what_was_not_asked_or_not_measured():
    assert elsewhere(PART, {}) is PART
    missing = unmeasured("cause", "mask", "It does.", "no sink")
    assert elsewhere(missing, {"32 tokens": [above(LOW, 0.5)]}) is missing
