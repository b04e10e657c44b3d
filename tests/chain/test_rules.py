"""Verdicts in parts: every word is reachable, and none is said without the power to say it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from sinklens.chain.rules import above, below, judge, judged, of_bool, rare, together, unmeasured, which, within
from sinklens.chain.stage_verdicts import cause_part, quantity_part, stage_parts, stages_in_words
from sinklens.statistics import Estimate, drawn_interval, holm, null_estimate, permutation_p
from tests.helpers.made_results import made_result


def part(outcome, name="a"):
    if outcome == "not measurable":
        return unmeasured("cause", name, "It is so.", "it has no such thing")
    ends = {"holds": (0.8, 0.9), "does not hold": (0.1, 0.2), "undecided": (0.4, 0.6)}[outcome]
    estimate = Estimate(sum(ends) / 2, *ends, 16)
    conditions = [above(estimate, 0.5)]
    return judge("quantity", name, "It is so.", statistic="s", estimate=estimate, rule="r", conditions=conditions)


@pytest.mark.parametrize("outcome", ["holds", "does not hold", "undecided", "not measurable"])
def test_every_outcome_of_a_part_is_reachable(outcome):
    made = part(outcome)
    assert made.outcome == outcome
    assert bool(made.reason) == (outcome in ("undecided", "not measurable"))


@pytest.mark.parametrize(
    ("outcomes", "word"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "does not hold"], "holds in part"),
        (["does not hold", "does not hold"], "does not hold"),
        (["not measurable", "not measurable"], "not measurable"),
        (["undecided"], "undecided"),
        (["holds", "undecided"], "undecided"),  # it would be "holds" or "holds in part"
        (["does not hold", "undecided"], "undecided"),
        (["holds", "does not hold", "undecided"], "holds in part"),  # whichever way the third turns out
        (["holds", "not measurable"], "holds in part"),  # what was not measured has not been seen to hold
        (["does not hold", "not measurable"], "does not hold"),
        (["undecided", "not measurable"], "undecided"),
        (["holds", "undecided", "not measurable"], "holds in part"),
        ([], "not measurable"),
    ],
)
def test_parts_together(outcomes, word):
    assert together(outcomes) == word


def test_the_word_never_depends_on_the_order_of_the_parts():
    words = ("holds", "does not hold", "undecided", "not measurable")
    for outcomes in product(words, repeat=3):
        assert together(outcomes) == together(outcomes[::-1])


def test_which_parts_hold_is_said():
    parts = [part("holds", "first"), part("does not hold", "second"), part("holds", "third")]
    assert which(parts) == "first and third: holds; second: does not hold"
    assert which(parts[:1]) == ""


# -- Conditions --------------------------------------------------------------------------------------------------------


def test_an_interval_on_one_side_decides_and_one_over_the_threshold_does_not():
    assert above(Estimate(0.7, 0.6, 0.8), 0.5).answer == "met"
    assert above(Estimate(0.3, 0.2, 0.4), 0.5).answer == "missed"
    assert above(Estimate(0.7, 0.4, 0.9), 0.5).answer == "open"
    assert below(Estimate(0.3, 0.2, 0.4), 0.5).answer == "met"
    assert below(Estimate(0.7, 0.6, 0.8), 0.5).answer == "missed"
    assert [c.answer for c in within(Estimate(0.0, -0.01, 0.02), 0.05)] == ["met", "met"]


def test_the_smallest_effect_is_the_half_width_of_the_interval():
    condition = above(Estimate(0.7, 0.6, 0.9), 0.5)
    assert condition.smallest == pytest.approx(0.15)
    # Against a control both intervals have to be cleared.
    assert above(Estimate(0.7, 0.6, 0.9), Estimate(0.1, 0.0, 0.1)).smallest == pytest.approx(0.2)


def test_p_of_an_interval_is_the_normal_one():
    # Three standard errors above the threshold: 0.00135; the half-width is 1.96 of them.
    assert above(Estimate(0.8, 0.8 - 0.196, 0.8 + 0.196), 0.5).p == pytest.approx(0.00135, rel=0.01)
    assert above(Estimate(0.2, 0.2 - 0.196, 0.2 + 0.196), 0.5).p == pytest.approx(1 - 0.00135, rel=0.01)
    assert above(Estimate(1, 1, 1), 0.5).p == pytest.approx(1 / 2001)  # never 0
    assert above(Estimate(0.5, 0.5, 0.5), 0.5).p == 1


def test_a_control_is_cleared_by_whole_intervals():
    control = Estimate(0.4, 0.3, 0.5)
    assert above(Estimate(0.7, 0.6, 0.8), control).answer == "met"
    assert above(Estimate(0.5, 0.4, 0.6), control).answer == "open"
    assert above(Estimate(0.1, 0.0, 0.2), control).answer == "missed"


def test_what_is_too_little_to_matter_is_missed():
    same = Estimate(1.0, 0.98, 1.02)
    assert below(same, 1.0).answer == "open"
    assert below(same, 1.0, least=0.05).answer == "missed"
    assert below(Estimate(0.9, 0.8, 1.02), 1.0, least=0.05).answer == "open"


@pytest.mark.parametrize(("low", "high"), [(math.nan, math.nan), (0.1, math.nan)])
def test_without_an_interval_nothing_is_decided(low, high):
    assert judged([above(Estimate(0.1, low, high), 0.5)]) == "undecided"
    assert judged([above(Estimate(0.9, low, high), 0.5)]) == "undecided"


def test_no_power_is_never_a_denial():
    """Two prompts that disagree, and nine heads: the run could not have seen the effect, so it does not deny it."""
    few = Estimate(0.2, -0.5, 0.9, 2)
    assert judged([above(few, 0.5)]) == "undecided"
    nine = null_estimate(np.random.default_rng(0).normal(0, 0.25, 2000))
    assert rare(Estimate(-0.05, -0.1, 0.0), nine, 0.4, sought=0.3, alternative="less").answer == "open"
    many = null_estimate(np.random.default_rng(0).normal(0, 0.05, 2000))
    assert rare(Estimate(-0.05, -0.1, 0.0), many, 0.2, sought=0.3, alternative="less").answer == "missed"
    assert rare(Estimate(-0.4, -0.5, -0.3), many, 0.001, sought=0.3, alternative="less").answer == "met"
    assert judge(
        "quantity",
        "a",
        "s",
        statistic="s",
        estimate=Estimate(math.nan),
        rule="r",
        conditions=[above(Estimate(math.nan), 0.5)],
    ).outcome == ("not measurable")


def test_a_rule_is_missed_where_one_condition_is_and_its_p_is_the_largest():
    estimate = Estimate(0.7, 0.6, 0.8)
    conditions = [above(estimate, 0.5), above(estimate, 0.65), of_bool(True)]
    made = judge("cause", "a", "s", statistic="s", estimate=estimate, rule="r", conditions=conditions)
    assert made.outcome == "undecided" and made.p_value == conditions[1].p > conditions[0].p
    assert judged([*conditions, of_bool(False)]) == "does not hold"
    assert judged([]) == "undecided"


# -- Many at once ------------------------------------------------------------------------------------------------------


def test_holm_against_a_hand_computed_example():
    # Sorted: .005 x 4, .01 x 3, .03 x 2, .04 x 1; the last may not be below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == pytest.approx([1, 1])
    assert holm([]) == []


def test_holm_does_not_count_what_has_no_p():
    adjusted = holm([0.02, math.nan, 0.01])
    assert adjusted[0] == pytest.approx(0.02) and adjusted[2] == pytest.approx(0.02) and math.isnan(adjusted[1])


def test_draws_that_differ_widen_the_interval():
    """Two rotations, one of which does all and one nothing, on prompts that are alike."""
    values = np.array([[1.0] * 8, [0.0] * 8])
    assert drawn_interval(values.T, 0) == (0, 1)
    alike = np.array([np.linspace(0, 1, 8)] * 3)
    low, high = drawn_interval(alike.T, 0)
    assert 0.2 < low < 0.5 < high < 0.8
    assert np.isnan(drawn_interval(values[:, :1].T, 0)).all()
    holed = np.where(np.arange(8) == 3, np.nan, values)
    assert drawn_interval(holed.T, 0) == (0, 1)


def test_permutations_of_few_things_have_no_power():
    null = null_estimate([-1.0, 1.0])  # two heads have two orders
    p = permutation_p(-1.0, [-1.0, 1.0], "less")
    assert rare(Estimate(-1, -1, -1), null, p, sought=0.3, alternative="less").answer == "open"


# -- Stages ------------------------------------------------------------------------------------------------------------


def with_readouts(base, anchored):
    result = made_result()
    runs = {
        run: found | {"qk_locking": values}
        for (run, found), values in zip(result.runs.items(), (base, anchored), strict=True)
    }
    return replace(result, runs=runs)


def test_a_stage_has_a_quantity_and_its_edits():
    result = with_readouts([1.0, 1.2], [5.0, 5.5])
    quantity, cause = stage_parts(result, "qk_locking")
    assert (quantity.about, quantity.outcome) == ("quantity", "holds")
    assert (cause.about, cause.name, cause.outcome) == ("cause", "query direction removed", "holds")
    said = stages_in_words(result)
    assert any("QK locking" in sentence and "holds" in sentence for sentence in said)


def test_a_readout_that_stays_does_not_hold():
    assert quantity_part(with_readouts([1.0, 1.0], [1.01, 1.01]), "qk_locking").outcome == "does not hold"
    assert quantity_part(with_readouts([1.0, 1.0], [0.9, 1.9]), "qk_locking").outcome == "undecided"
    natural = quantity_part(made_result(natural=True), "qk_locking")
    assert natural.outcome == "not measurable" and "natural" in natural.reason


def test_an_edit_is_judged_with_what_stands_beside_it():
    result = made_result()
    moments = cause_part(result, "value_aggregation", "moment_match")
    assert moments.outcome == "does not hold" and moments.control.startswith("same norm")
    # The transplant passes, but so does the value's, which should do nothing.
    assert cause_part(result, "qk_locking", "transplant").outcome == "does not hold"
    assert cause_part(result, "qk_locking", "transplant", ()).outcome == "holds"
    absent = cause_part(result, "qk_locking", "something")
    assert absent.outcome == "not measurable" and "was not run" in absent.reason


def test_an_effect_over_one_half_and_below_is_undecided():
    result = made_result()
    chosen = (result.scores.edit == "query_direction_removed") & (result.scores.direction == "noise")
    result.scores.loc[chosen, ["effect", "ci_low", "ci_high"]] = [0.6, 0.4, 0.8]
    assert cause_part(result, "qk_locking", "query_direction_removed").outcome == "undecided"
