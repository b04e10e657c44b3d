"""The analyses of the variance of aggregated values, each against a second computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens import metrics, statistics
from sinklens.prompts import from_tokens
from tests.tiny import tiny_tokens

GIVEN: dict[str, Any] = {"layer": 1, "super_neurons": [3, 7], "outlier_dims": [2, 5]}


def study_of(model: Any, n: int = 4, length: int = 24, **options: Any) -> sl.Study:
    return sl.Study(model, from_tokens(model, tiny_tokens(n, length)), given=GIVEN, **options)


@pytest.mark.parametrize("average", ["mean", "median"])
def test_resampled_variance_is_the_variance_of_the_drawn_prompts(average):
    x = torch.randn(6, 5, 2, 3, generator=torch.Generator().manual_seed(0)) + 3
    drawn = np.array([0, 2, 2, 5, 1, 2])
    expected = metrics.position_variance(x[drawn], average)
    torch.testing.assert_close(statistics.resampled_variance(x, average)(drawn), expected)
    assert (
        statistics.resampled_variance(x, average)(np.array([4] * 6)).tolist() == [0] * 5
    )  # exactly: not a ratio's noise


def test_a_variance_needs_two_prompts():
    for function in (metrics.position_variance, statistics.resampled_variance):
        with pytest.raises(sl.InputError, match="at least two prompts"):
            function(torch.randn(1, 5, 3))


def test_a_vectorized_bootstrap_draws_the_same_prompts():
    values = np.random.default_rng(0).normal(size=12)
    one = statistics.bootstrap_estimate(lambda drawn: values[drawn].mean(), 12, seed=3)
    many = statistics.bootstrap_estimate(lambda drawn: values[drawn].mean(-1), 12, seed=3, vectorized=True)
    assert (one.value, one.low, one.high) == pytest.approx((many.value, many.low, many.high))


def test_the_sink_comes_first_and_the_others_keep_their_order(tiny_llama):
    study = study_of(tiny_llama)
    sinks = study.formation.sink_positions
    positions = study.sink_first(torch.arange(24).expand(4, 24))
    for row, sink in zip(positions.tolist(), sinks, strict=True):
        assert row == [sink, *(p for p in range(24) if p != sink)]
    assert any(sinks)  # else nothing moved


def test_blocks_are_the_onset_unless_named(tiny_llama):
    study = study_of(tiny_llama)
    assert study.blocks() == study.onset
    assert study.blocks((3, 0, 3)) == (0, 3)
    with pytest.raises(sl.InputError, match=r"0\.\.3"):
        study.blocks((4,))
