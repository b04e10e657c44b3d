"""Metrics against values worked out by hand; the arithmetic stands in the tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sinklens import metrics

NAN = math.nan


def t(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# One prompt, one head, four tokens; rows are queries and sum to 1, nothing above the diagonal.
PATTERN = t(
    [1.0, 0.0, 0.0, 0.0],
    [0.6, 0.4, 0.0, 0.0],
    [0.5, 0.3, 0.2, 0.0],
    [0.7, 0.1, 0.1, 0.1],
)[None, None]


# -- Attention received -----------------------------------------------------------------------------------------------


def test_attention_received_by_hand() -> None:
    received = metrics.attention_received(PATTERN)
    # Key 0: queries 1, 2, 3. Key 1: queries 2, 3. Key 2: query 3. Key 3: nobody comes later.
    assert_close(received, t((0.6 + 0.5 + 0.7) / 3, (0.3 + 0.1) / 2, 0.1, NAN)[None, None], equal_nan=True)
    assert received.dtype == torch.float32


def test_attention_received_with_the_query_itself() -> None:
    alpha = metrics.attention_received(PATTERN, include_self=True)
    assert_close(alpha, t((1 + 0.6 + 0.5 + 0.7) / 4, (0.4 + 0.3 + 0.1) / 3, (0.2 + 0.1) / 2, 0.1)[None, None])


def test_attention_received_keeps_prompts_and_heads_apart() -> None:
    one_hot = torch.zeros(4, 4)
    one_hot[:, 0] = 1
    pattern = torch.stack([torch.stack([PATTERN[0, 0], one_hot]), torch.stack([one_hot, torch.eye(4)])])
    received = metrics.attention_received(pattern)
    assert received.shape == (2, 2, 4)
    assert_close(received[0, 0], metrics.attention_received(PATTERN)[0, 0], equal_nan=True)
    assert_close(received[0, 1], t(1, 0, 0, NAN), equal_nan=True)
    assert_close(received[1, 0], t(1, 0, 0, NAN), equal_nan=True)
    assert_close(received[1, 1], t(0, 0, 0, NAN), equal_nan=True)  # attention to oneself is no sink


def test_attention_received_ignores_what_a_causal_pattern_cannot_have() -> None:
    rubbish = PATTERN + torch.full((4, 4), 9.0).triu(1)
    assert_close(metrics.attention_received(rubbish), metrics.attention_received(PATTERN), equal_nan=True)


def test_attention_received_of_one_token() -> None:
    assert metrics.attention_received(torch.ones(1, 1, 1, 1)).isnan().all()
    assert metrics.attention_received(torch.ones(1, 1, 1, 1), include_self=True).item() == 1


def test_attention_received_sums_in_float32() -> None:
    length = 600  # added up in bfloat16, which has 8 bits, the sum would stop growing at 256
    pattern = torch.zeros(1, 1, length, length, dtype=torch.bfloat16)
    pattern[..., 0] = 1
    assert metrics.attention_received(pattern)[0, 0, 0].item() == 1


def test_sink_rate_by_hand() -> None:
    received = t([[0.9, 0.1, 0.31], [0.2, 0.1, 0.3]], [[0.4, 0.2, 0.0], [0.5, 0.2, 0.0]])
    # More than 0.3, not 0.3 itself: three of four, none, one of four (0.3 in float32 is not above 0.3 in float32).
    assert_close(metrics.sink_rate(received, eps=0.3), t(3 / 4, 0, 1 / 4))
    assert_close(metrics.sink_rate(received, eps=0.15), t(1, 1 / 2, 1 / 2))


def test_sink_rate_without_leading_axes() -> None:
    assert_close(metrics.sink_rate(t(0.9, 0.1)), t(1, 0))


def test_sink_rate_is_missing_where_the_attention_is() -> None:
    assert_close(metrics.sink_rate(metrics.attention_received(PATTERN)), t(1, 0, 0, NAN), equal_nan=True)


# -- Entropy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_entropy_and_effective_values_of_a_uniform_row(n: int) -> None:
    row = torch.zeros(1, 1, 1, 64)
    row[..., :n] = 1 / n
    assert metrics.attention_entropy(row).item() == pytest.approx(math.log(n), abs=1e-6)
    assert metrics.effective_values(row).item() == pytest.approx(n, rel=1e-5)


def test_entropy_of_a_one_hot_row_is_exactly_zero() -> None:
    row = t(0, 1, 0, 0)[None, None, None]
    assert metrics.attention_entropy(row).item() == 0
    assert metrics.effective_values(row).item() == 1


def test_entropy_and_effective_values_by_hand() -> None:
    row = t(0.5, 0.25, 0.25)[None, None, None]
    assert metrics.attention_entropy(row).item() == pytest.approx(1.5 * math.log(2))  # 1.5 bits
    assert metrics.effective_values(row).item() == pytest.approx(1 / (0.25 + 0.0625 + 0.0625))
    assert metrics.attention_entropy(PATTERN).shape == metrics.effective_values(PATTERN).shape == (1, 1, 4)


# -- Outliers ---------------------------------------------------------------------------------------------------------


def test_robust_z_by_hand() -> None:
    # Median 3; absolute deviations 2, 1, 0, 1, 97, so the MAD is 1.
    assert_close(metrics.robust_z(t(1, 2, 3, 4, 100)), t(-2, -1, 0, 1, 97) / 1.4826)


def test_robust_z_between_two_middle_values() -> None:
    # Median 2.5; absolute deviations 1.5, 0.5, 0.5, 7.5, so the MAD is 1.
    assert_close(metrics.robust_z(t(1, 2, 3, 10)), t(-1.5, -0.5, 0.5, 7.5) / 1.4826)


def test_robust_z_goes_along_the_last_axis_and_forgets_shift_and_scale() -> None:
    x = t(1, 2, 3, 4, 100)
    z = metrics.robust_z(torch.stack([x, 7 * x - 5, -x]))
    assert_close(z, torch.stack([metrics.robust_z(x), metrics.robust_z(x), -metrics.robust_z(x)]))


def test_robust_z_is_the_ordinary_one_on_normal_data() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    z = metrics.robust_z(x)
    assert z.std().item() == pytest.approx(1, abs=0.02)
    assert z.median().item() == pytest.approx(0, abs=1e-4)


def test_robust_z_where_most_values_are_equal() -> None:
    assert_close(metrics.robust_z(t(0, 0, 0, 5, -5)), t(NAN, NAN, NAN, math.inf, -math.inf), equal_nan=True)


# -- Dominance --------------------------------------------------------------------------------------------------------


def test_dominance_ratio_by_hand() -> None:
    x = t([1, -1, 1, -1], [0, -8, 0, 0], [3, -4, 1, 0], [0, 0, 0, 0])
    assert_close(metrics.dominance_ratio(x), t(1, 4, 4 / 2, NAN), equal_nan=True)


def test_energy_share_by_hand() -> None:
    x = t([3, 4, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0])
    assert_close(metrics.energy_share(x, [0]), t(9 / 25, 1 / 4, NAN), equal_nan=True)
    assert_close(metrics.energy_share(x, (1, 3)), t(16 / 25, 1 / 2, NAN), equal_nan=True)
    assert_close(metrics.energy_share(x[:2], range(4)), t(1, 1))
    assert_close(metrics.energy_share(x[:2], []), t(0, 0))


def test_energy_share_does_not_overflow_in_half_precision() -> None:
    x = torch.tensor([1000.0, 0.0, 1000.0], dtype=torch.float16)  # its square is beyond 65504
    assert metrics.energy_share(x, [0]).item() == 0.5


# -- Alignment --------------------------------------------------------------------------------------------------------


def test_cosine_by_hand() -> None:
    x = t([1, 0], [3, 4], [2, 2], [0, 0])
    y = t([0, 5], [4, 3], [-1, -1], [1, 0])
    assert_close(metrics.cosine(x, y), t(0, 24 / 25, -1, 0))
    assert_close(metrics.cosine(x[:3], y[1]), t(4 / 5, 24 / 25, 14 / (5 * math.sqrt(8))))  # one direction for all


def test_principal_direction_by_hand() -> None:
    # The Gram matrix [[8, 0], [0, 2]] has the first axis on top; the mean says which way along it.
    assert_close(metrics.principal_direction(t([2, 1], [2, -1])), t(1, 0))
    assert_close(metrics.principal_direction(t([-2, 1], [-2, -1])), t(-1, 0))


def test_principal_direction_is_not_centred() -> None:
    # All the variance lies along the second axis, all the length along the first.
    assert_close(metrics.principal_direction(t([10, 1], [10, -1], [10, 0])), t(1, 0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [3, 200])  # fewer and more vectors than dimensions
def test_principal_direction_against_numpy(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, 8)) + rng.normal(size=8)
    expected = np.linalg.svd(vectors)[2][0]
    expected *= np.sign(expected @ vectors.mean(0))
    found = metrics.principal_direction(torch.tensor(vectors))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert found.norm().item() == pytest.approx(1, abs=1e-6)
    assert found @ torch.tensor(vectors).float().mean(0) > 0
    np.testing.assert_allclose(metrics.principal_direction(-torch.tensor(vectors)).numpy(), -expected, atol=1e-6)


# -- Variance ---------------------------------------------------------------------------------------------------------


def test_relative_deviation_by_hand() -> None:
    x, mean = t([1, 2], [3, -2], [0, 0]), t(0, 0)
    # Mean squares 2.5, 6.5 and 0, in units of 2.
    assert_close(metrics.relative_deviation(x, mean, torch.tensor(2.0)), t(1.25, 3.25, 0))
    assert_close(metrics.relative_deviation(x + t(5, 7), t(5, 7), torch.tensor(2.0)), t(1.25, 3.25, 0))


def test_relative_deviation_of_the_population_itself_is_one() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    mean = x.mean(0)
    variance = (x - mean).pow(2).mean()
    assert metrics.relative_deviation(x, mean, variance).mean().item() == pytest.approx(1, abs=1e-5)


def test_every_metric_is_tested_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in metrics.__all__ if f"metrics.{name}(" not in source] == []
