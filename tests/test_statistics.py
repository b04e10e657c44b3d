"""Estimates and nulls, against numbers that can be worked out and against other ways to compute them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from sinklens.errors import InputError
from sinklens.metrics import position_variance
from sinklens.statistics import (
    Estimate,
    bootstrap_estimate,
    bootstrap_interval,
    drawn_estimate,
    drawn_interval,
    estimate_text,
    generator,
    interval_text,
    mean_estimate,
    null_estimate,
    permutation_p,
    random_orders,
    resampled_curves,
)

NAN = math.nan


def test_an_interval_is_above_or_below_as_a_whole():
    estimate = Estimate(0.5, 0.4, 0.6, 9)
    assert estimate.above(0.39) and not estimate.above(0.4) and not estimate.above(0.5)
    assert estimate.below(0.61) and not estimate.below(0.6)


def test_without_an_interval_nothing_is_above_or_below():
    assert not Estimate(5.0).above(0) and not Estimate(5.0).below(10)


def test_a_mean_leaves_out_what_is_not_finite_and_counts_the_rest():
    found = mean_estimate([1.0, math.nan, 3.0, math.inf], seed=0)
    assert (found.value, found.n) == (2.0, 2)
    assert found.low == 1.0 and found.high == 3.0


def test_a_mean_of_nothing_is_nan():
    found = mean_estimate(torch.tensor([math.nan]), seed=0)
    assert math.isnan(found.value) and found.n == 0


def test_the_bootstrap_of_a_mean_agrees_with_scipy():
    values = np.random.default_rng(0).normal(3.0, 1.0, 40)
    mine = bootstrap_estimate(lambda chosen: values[chosen].mean(), 40, seed=1, n_resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2))
    assert mine.value == pytest.approx(values.mean())
    assert mine.low == pytest.approx(theirs.confidence_interval.low, abs=0.03)
    assert mine.high == pytest.approx(theirs.confidence_interval.high, abs=0.03)


def test_the_bootstrap_is_over_prompts_and_not_over_numbers():
    """Ten prompts, each repeated in a hundred numbers: the interval must be that of ten, not that of a thousand."""
    per_prompt = np.random.default_rng(0).normal(0.0, 1.0, 10)
    repeated = np.repeat(per_prompt[:, None], 100, axis=1)
    found = bootstrap_estimate(lambda chosen: repeated[chosen].mean(), 10, seed=0, n_resamples=2000)
    width = found.high - found.low
    assert width == pytest.approx(2 * 1.96 * per_prompt.std() / 10**0.5, rel=0.15)


def test_a_vectorised_bootstrap_is_the_same():
    values = np.random.default_rng(0).normal(size=12)
    one = bootstrap_estimate(lambda chosen: values[chosen].mean(), 12, seed=3)
    many = bootstrap_estimate(lambda chosen: values[chosen].mean(-1), 12, seed=3, vectorized=True)
    assert (one.value, one.low, one.high) == pytest.approx((many.value, many.low, many.high))


def test_a_bootstrap_of_one_prompt_has_no_interval():
    found = bootstrap_estimate(lambda chosen: float(chosen.sum()), 1, seed=0)
    assert found.value == 0 and math.isnan(found.low)


def test_a_null_has_its_mean_and_range():
    found = null_estimate(np.arange(1001.0))
    assert (found.value, found.low, found.high, found.n) == (500.0, 25.0, 975.0, 1001)


def test_a_p_value_counts_the_observation_itself():
    assert permutation_p(10.0, np.zeros(99)) == 0.01
    assert permutation_p(0.0, np.zeros(99)) == 1.0
    assert permutation_p(-1.0, np.zeros(99), "less") == 0.01


def test_p_values_under_the_null_are_uniform():
    rng = np.random.default_rng(0)
    found = [permutation_p(rng.normal(), rng.normal(size=99)) for _ in range(500)]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_a_draw_depends_on_its_name_and_the_seed_alone():
    first = torch.rand(4, generator=generator(0, "a"))
    assert torch.equal(first, torch.rand(4, generator=generator(0, "a")))
    assert not torch.equal(first, torch.rand(4, generator=generator(0, "b")))
    assert not torch.equal(first, torch.rand(4, generator=generator(1, "a")))


def test_resampled_curves_are_the_variances_of_every_block_on_the_prompts_drawn():
    blocks = [torch.randn(5, 4, 3, generator=generator(0, name)) for name in "ab"]
    prompts = np.array([0, 2, 2, 4, 1])
    for average in ("mean", "median"):
        expected = torch.stack([position_variance(x[prompts], average) for x in blocks])
        torch.testing.assert_close(resampled_curves(blocks, average)(prompts), expected)


def test_random_orders_are_permutations_each_its_own():
    orders = random_orders((3, 50, 6), generator(0, "orders"))
    assert torch.equal(orders.sort(-1).values, torch.arange(6).expand(3, 50, 6))
    assert len(orders.flatten(0, 1).unique(dim=0)) > 100
    assert torch.equal(orders, random_orders((3, 50, 6), generator(0, "orders")))


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(1).normal(size=16)
    np.random.seed(5)
    first = bootstrap_interval(values, seed=3)
    np.random.seed(6)
    assert bootstrap_interval(values, seed=3) == first
    assert bootstrap_interval(list(values), seed=3) == first
    assert bootstrap_interval(values, seed=4) != first


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval([0.7] * 5, seed=0) == (0.7, 0.7)


@pytest.mark.parametrize("values", [[], [1.0], [NAN, 1.0], [NAN, NAN], [math.inf, 1.0]])
def test_bootstrap_of_fewer_than_two_values_is_missing(values: list[float]) -> None:
    assert np.isnan(bootstrap_interval(values, seed=0)).all()


def test_bootstrap_leaves_out_what_is_missing() -> None:
    values = [0.1, 0.5, 0.9, 0.3]
    assert bootstrap_interval([0.1, NAN, 0.5, 0.9, 0.3], seed=0) == bootstrap_interval(values, seed=0)


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_bootstrap_against_one_written_out(level: float) -> None:
    values = np.random.default_rng(2).exponential(size=24)
    rng = np.random.default_rng(99)
    means = values[rng.integers(0, len(values), size=(50_000, len(values)))].mean(1)
    tail = 50 * (1 - level)
    expected = np.percentile(means, [tail, 100 - tail])
    # 2000 resamples: the ends of a 95% interval scatter by about a twentieth of a standard error.
    found = bootstrap_interval(values, seed=0, level=level)
    np.testing.assert_allclose(found, expected, atol=0.25 * means.std())
    assert found[0] < values.mean() < found[1]


# --- prompts of one text, and what was drawn beside them


def test_prompts_that_share_a_text_are_drawn_together() -> None:
    # Two passages of each text are the same: there is as much to know as from one of each.
    once = np.random.default_rng(0).normal(size=12)
    twice, groups = np.repeat(once, 2), np.repeat(np.arange(12), 2).tolist()
    grouped, alone = mean_estimate(twice, 0, groups), mean_estimate(once, 0)
    assert (grouped.value, grouped.n, grouped.n_groups) == (pytest.approx(alone.value), 24, 12)
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high), abs=1e-12)
    independent = mean_estimate(twice, 0)
    assert independent.n_groups is None
    assert grouped.high - grouped.low > 1.2 * (independent.high - independent.low)
    assert estimate_text(grouped).endswith("n = 24 of 12 texts")
    assert estimate_text(independent).endswith("n = 24")


def test_what_an_interval_is_over_is_said_where_it_is_no_prompts():
    """Ten rotations of eight prompts are no ten prompts."""
    turned = mean_estimate([0.1, 0.2, 0.6], 0, over="rotations")
    assert estimate_text(turned).endswith("], n = 3 rotations")
    assert interval_text(turned).startswith("0.3") and interval_text(turned).endswith("] over 3 rotations")
    null = null_estimate(np.arange(11.0))
    assert estimate_text(null).endswith("n = 11 draws") and interval_text(null) == "5 [0.250, 9.75]"
    assert interval_text(mean_estimate([0.5], 0, over="rotations")) == "0.500"


def test_groups_of_one_change_nothing() -> None:
    values = np.random.default_rng(1).normal(size=9)
    own = [f"text {i}" for i in range(9)]
    assert mean_estimate(values, 3, own) == mean_estimate(values, 3)
    assert bootstrap_interval(values, 3, groups=own) == bootstrap_interval(values, 3)

    def statistic(chosen: np.ndarray) -> float:
        return float(values[chosen].std())

    assert bootstrap_estimate(statistic, 9, 3, groups=own) == bootstrap_estimate(statistic, 9, 3)


def test_the_cluster_bootstrap_by_hand() -> None:
    # Texts {0, 0}, {6}: their resamples are both once, or one twice: means 2 (a half), 0 and 6 (a quarter each).
    values, groups = [0.0, 0.0, 6.0], ["a", "a", "b"]
    assert bootstrap_interval(values, 0, level=0.6, groups=groups) == (0.0, 6.0)
    low, high = bootstrap_interval(values, 0, level=0.4, groups=groups)
    assert (low, high) == (2.0, 2.0)
    assert np.isnan(bootstrap_interval([1.0, 2.0], 0, groups=["a", "a"])).all()
    assert np.isnan(bootstrap_interval([1.0, NAN, 2.0], 0, groups=["a", "b", "a"])).all()
    with pytest.raises(InputError, match="name a text for 2 prompts, and there are 3"):
        bootstrap_interval(values, 0, groups=["a", "b"])


@pytest.mark.parametrize("vectorized", [False, True])
def test_a_statistic_is_computed_on_whole_texts(vectorized: bool) -> None:
    groups = ["a", "b", "a", "c", "c", "c"]
    seen = []

    def statistic(chosen: np.ndarray):
        rows = chosen if vectorized else chosen[None]
        seen.extend(rows.tolist())
        return rows.mean(-1) if vectorized else float(rows.mean())

    found = bootstrap_estimate(statistic, 6, 0, n_resamples=50, groups=groups, vectorized=vectorized)
    assert (found.value, found.n, found.n_groups, len(seen)) == (2.5, 6, 3, 51)
    for chosen in seen[1:]:
        times = Counter(chosen)
        assert times[0] == times[2] and times[3] == times[4] == times[5]
        assert times[0] + times[1] + times[3] == 3


def test_an_interval_is_wider_where_draws_differ_and_the_same_where_they_do_not() -> None:
    prompts = np.random.default_rng(2).normal(size=10)
    same = np.repeat(prompts[:, None], 3, axis=1)
    alone = bootstrap_interval(prompts, 5)
    assert drawn_interval(same, 5) == pytest.approx(alone, abs=1e-12)
    assert drawn_interval(prompts[:, None], 5) == alone
    differ = same + np.array([-1.0, 0.0, 1.0])  # the mean over draws of every prompt is what it was
    low, high = drawn_interval(differ, 5)
    assert high - low > 1.3 * (alone[1] - alone[0])
    assert drawn_estimate(differ, 5).value == pytest.approx(prompts.mean())


def test_draws_that_differ_by_hand() -> None:
    # All prompts are alike, two draws 0 and 4: a resample of the draws is 0, 2 (twice as often) or 4.
    values = np.tile([0.0, 4.0], (6, 1))
    assert drawn_interval(values, 0, level=0.6) == (0.0, 4.0)
    assert drawn_interval(values, 0, level=0.4) == (2.0, 2.0)
    assert bootstrap_interval(values.mean(1), 0) == (2.0, 2.0)


def test_draws_of_grouped_prompts_and_of_prompts_without_a_value() -> None:
    values = np.array([[0.0, 4.0], [0.0, 4.0], [NAN, NAN], [2.0, 6.0]])
    found = drawn_estimate(values, 0, ["a", "a", "b", "c"])
    assert (found.value, found.n, found.n_groups) == (pytest.approx(8 / 3), 3, 2)
    assert (found.low, found.high) == (0.0, 6.0)
    assert drawn_estimate(np.full((3, 2), NAN), 0).n == 0
