"""Scores held against what the claim predicts of them, and the same in sentences."""

from __future__ import annotations

import pytest

from sinklens.chain.verdicts import summary, verdict
from tests.helpers.made_results import made_result


@pytest.mark.parametrize(
    ("effect", "low", "high", "predicted", "expected"),
    [
        (0.99, 0.98, 1.0, 1, "agrees"),
        (0.65, 0.6, 0.7, 1, "partly"),
        (0.3, 0.2, 0.4, 1, "against"),
        (-0.8, -0.9, -0.7, 1, "against"),
        (1.4, 1.3, 1.5, 1, "beyond"),
        (0.5, 0.4, 0.6, 1, "unclear"),
        (0.1, 0.0, 0.2, 0, "agrees"),
        (-0.3, -0.4, -0.2, 0, "partly"),
        (1.8, 1.7, 1.9, 0, "against"),
        (0.6, float("nan"), float("nan"), 1, "partly"),
        (float("nan"), float("nan"), float("nan"), 1, "not measured"),
        (0.6, 0.5, 0.7, float("nan"), "no prediction"),
    ],
)
def test_verdicts(effect, low, high, predicted, expected):
    assert verdict(effect, low, high, predicted) == expected


def test_summary_is_computed_and_speaks_against_as_well_as_for():
    lead, parts = summary(made_result())
    said = {name: " ".join(sentences) for name, sentences in parts}
    assert "through 2 of 2 stages (1 of them by construction)" in lead
    assert "of 2 edits" in lead and "1 came out as it predicts, 1 spoke against it" in lead
    assert "Against the claim: moment match of value aggregation" in said["Mechanisms"]
    assert "As predicted: query direction removed of QK locking" in said["Mechanisms"]
    assert "More than the whole: QK locking (denoise 1.370; predicted 1)" in said["Transplants"]
    assert "In value aggregation it is exactly 1 because" in said["Transplants"]
    assert "value for transplant of QK locking (denoise 0.810; predicted 0)" in said["Controls"]


def test_summary_turns_with_the_numbers():
    result = made_result()
    chosen = result.scores.edit == "moment_match"
    result.scores.loc[chosen, ["effect", "ci_low", "ci_high"]] = [0.9, 0.88, 0.93]
    lead, _ = summary(result)
    assert "2 came out as it predicts, 0 spoke against it" in lead


def test_names_from_right_to_left_do_not_carry_a_sentence_along():
    result = made_result()
    result.scores["stage"] = [stage.replace("qk_locking", "שלום") for stage in result.scores.stage]
    said = " ".join(sentence for _, sentences in summary(result)[1] for sentence in sentences)
    assert "\u2068שלום\u2069 (denoise 1.370" in said
