"""Metrics against values worked out by hand; the arithmetic stands in the tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.decomposition import TruncatedSVD
from torch import Tensor
from torch.testing import assert_close

from sinklens import metrics
from sinklens.errors import InputError

NAN = math.nan


def t(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


def test_alpha_by_hand() -> None:
    assert_close(metrics.alpha(PATTERN), t((1 + 0.6 + 0.5 + 0.7) / 4, (0.4 + 0.3 + 0.1) / 3, 0.3 / 2, 0.1)[None, None])
    assert metrics.alpha(torch.ones(1, 1, 1, 1)).item() == 1
    half = PATTERN.bfloat16()
    assert_close(metrics.alpha(half), metrics.alpha(half.float()))


def test_alpha_against_its_formula() -> None:
    pattern = drawn(3, 2, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf).softmax(-1)
    # (1 / (T - k)) sum_i A[i, k], k from 0: a causal pattern has nothing above the diagonal to add.
    assert_close(metrics.alpha(pattern), pattern.sum(-2) / torch.arange(7, 0, -1))


def test_received_at_lengths_by_hand() -> None:
    received = metrics.received_at_lengths(PATTERN, [1, 2, 3, 4])
    expected = t(
        [NAN, NAN, NAN, NAN],  # one token: nobody comes later
        [0.6, NAN, NAN, NAN],
        [(0.6 + 0.5) / 2, 0.3, NAN, NAN],
        [(0.6 + 0.5 + 0.7) / 3, (0.3 + 0.1) / 2, 0.1, NAN],
    )
    assert_close(received, expected[None, None], equal_nan=True)
    with_self = metrics.received_at_lengths(PATTERN, [1, 3], include_self=True)
    expected = t([1, NAN, NAN, NAN], [(1 + 0.6 + 0.5) / 3, (0.4 + 0.3) / 2, 0.2, NAN])
    assert_close(with_self, expected[None, None], equal_nan=True)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_received_at_lengths_is_that_of_the_cut_pattern(include_self: bool, dtype: torch.dtype) -> None:
    pattern = drawn(2, 3, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf).softmax(-1).to(dtype)
    lengths = [20, 5, 1, 5]  # in any order, twice as well
    received = metrics.received_at_lengths(pattern, lengths, include_self=include_self)
    assert received.shape == (2, 3, 4, 20) and received.dtype == torch.float32
    for i, length in enumerate(lengths):
        cut = metrics.attention_received(pattern[..., :length, :length], include_self=include_self)
        assert_close(received[..., i, :length], cut, equal_nan=True)
        assert received[..., i, length:].isnan().all()


def test_received_at_lengths_does_not_know_what_follows() -> None:
    later_unknown = PATTERN.clone()
    later_unknown[..., 3, :] = NAN
    received = metrics.received_at_lengths(later_unknown, [3, 4])
    assert_close(received[..., 0, :], metrics.received_at_lengths(PATTERN, [3])[..., 0, :], equal_nan=True)
    assert received[..., 1, :].isnan().all()


@pytest.mark.parametrize("lengths", [[0], [5], [2, -1]])
def test_received_at_lengths_refuses_what_the_pattern_has_not(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="between 1 and the pattern's 4"):
        metrics.received_at_lengths(PATTERN, lengths)


def test_sink_rate_by_hand() -> None:
    received = t([[0.9, 0.1, 0.31], [0.2, 0.1, 0.3]], [[0.4, 0.2, 0.0], [0.5, 0.2, 0.0]])
    # More than 0.3, not 0.3 itself: three of four, none, one of four (0.3 in float32 is not above 0.3 in float32).
    assert_close(metrics.sink_rate(received, eps=0.3), t(3 / 4, 0, 1 / 4))
    assert_close(metrics.sink_rate(received, eps=0.15), t(1, 1 / 2, 1 / 2))


def test_sink_rate_without_leading_axes() -> None:
    assert_close(metrics.sink_rate(t(0.9, 0.1)), t(1, 0))


def test_sink_rate_is_missing_where_the_attention_is() -> None:
    assert_close(metrics.sink_rate(metrics.attention_received(PATTERN)), t(1, 0, 0, NAN), equal_nan=True)


def test_sink_rate_compares_each_prompt_and_head_before_it_averages() -> None:
    # alpha_0 of four (prompt, layer, head): their mean, 0.325, is above 0.3, but only one of them is.
    assert_close(metrics.sink_rate(t(1, 0.1, 0.1, 0.1).view(2, 1, 2, 1)), t(1 / 4))


def test_sink_rate_of_alpha_has_no_missing_position() -> None:
    # alpha is 0.7, 0.27, 0.15 and 0.1; of a lone token, its attention to itself.
    assert_close(metrics.sink_rate(metrics.alpha(PATTERN)), t(1, 0, 0, 0))
    assert_close(metrics.sink_rate(metrics.alpha(torch.ones(1, 1, 1, 1))), t(1))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_robust_z_of_values_that_are_equal_but_for_rounding(dtype: torch.dtype) -> None:
    """Which of them a kernel rounds otherwise does not decide what is an outlier; a real difference does."""
    eps = torch.finfo(dtype).eps
    x = torch.tensor([3.0, 3.0, 3.0, 3.0 * (1 + 2 * eps), 3.0 * (1 - eps), 30.0], dtype=dtype)
    assert_close(metrics.robust_z(x), torch.tensor([NAN] * 5 + [math.inf]), equal_nan=True)
    x = torch.tensor([3.0, 3.0 * (1 + 100 * eps), 3.0 * (1 - 100 * eps), 3.0 * (1 + 200 * eps), 30.0], dtype=dtype)
    assert metrics.robust_z(x).isfinite().all()


def test_robust_z_where_most_values_are_equal() -> None:
    assert_close(metrics.robust_z(t(0, 0, 0, 5, -5)), t(NAN, NAN, NAN, math.inf, -math.inf), equal_nan=True)


def test_massive_activations_by_hand() -> None:
    # Median magnitude 0.1: both bounds are 100, to be exceeded. The second state's is 0.2, and 150 < 200.
    x = t([[0.1, -0.1], [0.1, -150]], [[0.2, -0.2], [0.2, -150]])
    expected = torch.tensor([[[False, False], [False, True]], [[False, False], [False, False]]])
    assert torch.equal(metrics.massive_activations(x), expected)
    assert torch.equal(metrics.massive_activations(x[0]), expected[0])
    assert torch.equal(metrics.massive_activations(x, relative=500)[1], expected[0])
    assert not metrics.massive_activations(x, absolute=150).any()
    assert not metrics.massive_activations(x / 2).any()  # 1500 times the median, but only 75


def test_massive_activations_take_the_median_between_two_middle_values() -> None:
    # The middle values 0.05 and 0.25 make it 0.15, so 140 is too little; the lower of them would let it pass.
    assert not metrics.massive_activations(t([0.01, 0.05], [0.25, 140])).any()
    assert metrics.massive_activations(t([0.01, 0.05], [0.25, 160])).sum() == 1
    # Five values have one in the middle.
    assert metrics.massive_activations(t([0.01, 0.05, 0.15, 0.25, 140])).sum() == 0
    assert metrics.massive_activations(t([0.01, 0.05, 0.15, 0.25, 160])).sum() == 1


def test_massive_activations_of_zeros_nan_and_one_value() -> None:
    assert not metrics.massive_activations(torch.zeros(2, 3)).any()
    assert metrics.massive_activations(t([0, 0, 0, 101], [0, 0, 0, 99])).sum() == 1
    assert not metrics.massive_activations(t([1e6])).any()  # it is its own median
    found = metrics.massive_activations(t([0.1, 0.1, NAN], [0.1, 200, NAN]))
    assert found.nonzero().tolist() == [[1, 1]]
    assert not metrics.massive_activations(torch.full((2, 2), NAN)).any()


def test_massive_activations_in_bfloat16() -> None:
    x = torch.full((4, 8), 0.1)
    x[0, 3] = -20000
    assert torch.equal(metrics.massive_activations(x.bfloat16()), metrics.massive_activations(x))
    assert metrics.massive_activations(x.bfloat16()).nonzero().tolist() == [[0, 3]]


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


def test_top_energy_share_by_hand() -> None:
    x = t([3, 0, -4, 0], [1, -1, 1, -1], [0, 0, 0, 0], [1, NAN, 0, 0])
    assert_close(metrics.top_energy_share(x, 1), t(16 / 25, 1 / 4, NAN, NAN), equal_nan=True)
    assert_close(metrics.top_energy_share(x, 2), t(1, 2 / 4, NAN, NAN), equal_nan=True)
    assert_close(metrics.top_energy_share(x[:2], 0), t(0, 0))
    assert_close(metrics.top_energy_share(x[None, :2], 4), t([1, 1]))
    assert metrics.top_energy_share(t(-7), 1).item() == 1
    assert metrics.top_energy_share(torch.tensor([1000.0, 0, 1000.0], dtype=torch.float16), 1).item() == 0.5


def test_top_energy_share_is_the_energy_share_of_the_largest() -> None:
    x = drawn(64)
    largest = x.abs().argsort(descending=True).tolist()
    for k in (1, 5, 64):
        assert_close(metrics.top_energy_share(x, k), metrics.energy_share(x, largest[:k]))


def test_top_1_over_the_median_by_hand() -> None:
    assert_close(metrics.top1_over_median(t([4, -1, 2], [-9, 3, 3])), t(2, 3))
    assert metrics.top1_over_median(t(0, 0, 3)).isinf()


def test_excess_kurtosis_by_hand() -> None:
    # Two equal halves: m4 = m2^2. One of d: 1 / (p (1 - p)) - 6 with p = 1 / d.
    x = t([1, -1, 1, -1], [0, -8, 0, 0])
    assert_close(metrics.excess_kurtosis(x), t(1 - 3, 1 / (0.25 * 0.75) - 6))
    one = torch.zeros(576)
    one[7] = 5
    assert metrics.excess_kurtosis(one).item() == pytest.approx(576 * 576 / 575 - 6, rel=1e-5)


def test_excess_kurtosis_where_all_are_equal() -> None:
    # 0.1 three times has a mean that is not 0.1 in every arithmetic; what is left must not be taken for a tail.
    assert metrics.excess_kurtosis(t([0, 0, 0], [0.1, 0.1, 0.1], [1, NAN, 2])).isnan().all()
    assert metrics.excess_kurtosis(t(3)).isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_excess_kurtosis_against_scipy(dtype: torch.dtype) -> None:
    x = (drawn(3, 4, 50).pow(3) * 1e-3 + 0.5).to(dtype)
    found = metrics.excess_kurtosis(x)
    assert found.shape == (3, 4) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), scipy.stats.kurtosis(x.double().numpy(), axis=-1), rtol=1e-5, atol=1e-5)


def test_gini_by_hand() -> None:
    x = t([2, -2, 2, 2], [0, 0, -9, 0], [1, 2, 3, 4], [0, 0, 0, 0], [1, NAN, 1, 1])
    # 1 to 4: the six pairs differ by 10 in all, counted twice, over 2 * 4 * 10.
    assert_close(metrics.gini(x), t(0, 3 / 4, 20 / 80, NAN, NAN), equal_nan=True)
    assert metrics.gini(t(5)).item() == 0
    assert metrics.gini(x[None]).shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gini_against_all_pairs(dtype: torch.dtype) -> None:
    x = (drawn(2, 3, 40).exp() * drawn(2, 3, 40, seed=1).sign()).to(dtype)
    size = x.double().abs().numpy()
    pairs = np.abs(size[..., :, None] - size[..., None, :]).mean((-2, -1))
    np.testing.assert_allclose(metrics.gini(x).numpy(), pairs / (2 * size.mean(-1)), rtol=1e-5)
    assert_close(metrics.gini(1000 * x.float()), metrics.gini(x.float()))


# -- Norms ------------------------------------------------------------------------------------------------------------


def test_vector_norm_by_hand() -> None:
    x = t([[3, -4], [0, 0]], [[5, 12], [NAN, 1]])
    assert_close(metrics.vector_norm(x), t([5, 0], [13, NAN]), equal_nan=True)
    assert metrics.vector_norm(t(-7)).item() == 7


def test_vector_norm_in_half_precision() -> None:
    x = torch.full((4,), 60000.0, dtype=torch.float16)  # the norm itself is beyond 65504
    assert metrics.vector_norm(x).item() == 120000
    ones = torch.ones(1000, dtype=torch.bfloat16)
    assert metrics.vector_norm(ones).item() == pytest.approx(math.sqrt(1000), rel=1e-6)


# -- Effective rank ---------------------------------------------------------------------------------------------------


def test_effective_rank_by_hand() -> None:
    x = torch.stack([torch.eye(3), torch.ones(3, 3), torch.diag(t(2, 1, 1)), torch.zeros(3, 3)])
    # Equal singular values; a single one; 1/2, 1/4 and 1/4, which have an entropy of 1.5 bits; none.
    assert_close(metrics.effective_rank(x), t(3, 1, 2**1.5, NAN), equal_nan=True)
    assert metrics.effective_rank(t([-3, 4])).item() == pytest.approx(1)  # one vector


def test_effective_rank_of_a_matrix_that_is_not_finite_leaves_the_others() -> None:
    x = torch.eye(2).repeat(3, 1, 1)
    x[1, 0, 0], x[2, 1, 1] = NAN, math.inf
    assert_close(metrics.effective_rank(x), t(2, NAN, NAN), equal_nan=True)


def test_effective_rank_of_a_collapsed_matrix_is_not_rounding() -> None:
    # In float32, 200 singular values that should be zero would add nearly 1e-3.
    signs = (20_000 * drawn(200, 1)).round() @ drawn(1, 300, seed=1).sign()
    assert metrics.effective_rank(signs).item() == pytest.approx(1, abs=1e-6)
    assert metrics.effective_rank(drawn(200, 300)).item() > 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (30, 4)])
def test_effective_rank_against_numpy_and_scipy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = drawn(*shape).to(dtype)
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    found = metrics.effective_rank(x)
    np.testing.assert_allclose(found.numpy(), np.exp(scipy.stats.entropy(values, axis=-1)), rtol=1e-5)
    assert_close(metrics.effective_rank(1000 * x.mT), metrics.effective_rank(1000 * x))


# -- Rank correlation -------------------------------------------------------------------------------------------------


def scipy_tau(x: Tensor, y: Tensor) -> np.ndarray:
    return np.array([[scipy.stats.kendalltau(a, b)[0] for b in y.numpy()] for a in x.numpy()])


def test_kendall_tau_by_hand() -> None:
    x = t([1, 2, 3, 4], [4, 3, 2, 1], [1, 1, 2, 2])
    y = t([1, 2, 3, 4], [1, 3, 2, 4], [5, 5, 5, 9])
    # Six pairs. One exchange loses two of them: 4 / 6. Ties: (1, 1, 2, 2) unties 4 pairs, (5, 5, 5, 9) unties 3.
    expected = t(
        [1, 4 / 6, 3 / math.sqrt(6 * 3)],
        [-1, -4 / 6, -3 / math.sqrt(6 * 3)],
        [4 / math.sqrt(4 * 6), (3 - 1) / math.sqrt(4 * 6), 2 / math.sqrt(4 * 3)],
    )
    assert_close(metrics.kendall_tau(x, y), expected)


@pytest.mark.parametrize("n", [2, 5, 64, 65, 150])  # below, at and above the size of a tile
def test_kendall_tau_against_scipy_without_ties(n: int) -> None:
    x, y = drawn(4, n), drawn(3, n, seed=1)
    np.testing.assert_allclose(metrics.kendall_tau(x, y).numpy(), scipy_tau(x, y), atol=1e-6)


@pytest.mark.parametrize("levels", [2, 3, 10])
@pytest.mark.parametrize("n", [7, 130])
def test_kendall_tau_against_scipy_with_ties(levels: int, n: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    x = torch.randint(levels, (5, n), generator=generator).float()
    y = torch.cat([torch.randint(levels, (3, n), generator=generator).float(), drawn(1, n)])
    np.testing.assert_allclose(metrics.kendall_tau(x, y).numpy(), scipy_tau(x, y), atol=1e-6)


def test_kendall_tau_is_missing_without_an_order() -> None:
    x = t([1, 2, 3], [7, 7, 7], [1, NAN, 3])
    expected = t([1, NAN, NAN], [NAN, NAN, NAN], [NAN, NAN, NAN])
    assert_close(metrics.kendall_tau(x, x), expected, equal_nan=True)
    assert metrics.kendall_tau(t([1.0]), t([2.0])).isnan().all()  # one value has no pair


def test_kendall_tau_knows_only_the_order() -> None:
    x, y = drawn(3, 40), drawn(2, 40, seed=1)
    assert_close(metrics.kendall_tau(x.exp(), 5 * y - 3), metrics.kendall_tau(x, y), rtol=0, atol=0)
    assert_close(metrics.kendall_tau(x, x).diagonal(), torch.ones(3), rtol=0, atol=0)
    assert_close(metrics.kendall_tau(x.bfloat16(), y), metrics.kendall_tau(x.bfloat16().float(), y), rtol=0, atol=0)
    # Infinite values and those that float32 would tie have an order too, and -0 is 0.
    close = torch.tensor([[-math.inf, 1.0, 1.0 + 1e-12, math.inf, math.inf]], dtype=torch.float64)
    assert_close(metrics.kendall_tau(close, t([0, 1, 2, 3, 3])), t([1.0]))
    assert_close(metrics.kendall_tau(t([-0.0, 0.0, 1.0]), t([2, 2, 3])), t([1.0]))


def test_kendall_tau_in_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = drawn(4, 23).round(decimals=1), drawn(3, 23, seed=1)
    whole = metrics.kendall_tau(x, y)
    for most in (0, 4 * 7 * 5**2):  # bytes for single pairs, and for tiles of five by five
        monkeypatch.setattr("sinklens.metrics.correlation._TILE_BYTES", most)
        assert_close(metrics.kendall_tau(x, y), whole, rtol=0, atol=0)


def test_kendall_tau_refuses_rows_of_two_lengths() -> None:
    with pytest.raises(ValueError, match="not 3 and 4"):
        metrics.kendall_tau(drawn(2, 3), drawn(2, 4))


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


@pytest.mark.parametrize("seed", range(3))
def test_principal_direction_against_scikit_learn(seed: int) -> None:
    vectors = (drawn(100, 6, seed=seed) + drawn(6, seed=seed + 10)).double()
    fitted = TruncatedSVD(n_components=1, algorithm="arpack").fit(vectors.numpy())
    expected = np.asarray(fitted.components_)[0]
    found = metrics.principal_direction(vectors).numpy()
    np.testing.assert_allclose(found, expected * np.sign(expected @ vectors.mean(0).numpy()), atol=1e-6)


def test_principal_direction_of_every_leading_entry() -> None:
    vectors = drawn(2, 3, 20, 5) + drawn(2, 3, 1, 5, seed=1)
    found = metrics.principal_direction(vectors)
    assert found.shape == (2, 3, 5)
    one_by_one = torch.stack([torch.stack([metrics.principal_direction(v) for v in row]) for row in vectors])
    assert_close(found, one_by_one, rtol=0, atol=1e-6)


def test_principal_direction_of_one_vector_and_in_bfloat16() -> None:
    assert_close(metrics.principal_direction(t([-3, 4])), t(-3 / 5, 4 / 5))
    vectors = (drawn(50, 4) + 1).bfloat16()
    assert_close(metrics.principal_direction(vectors), metrics.principal_direction(vectors.float()))


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


def test_position_variance_by_hand() -> None:
    # Three prompts, two positions, three dimensions; (0, 1, 2) has variance 1, times its scale squared.
    steps = t(0, 1, 2)[:, None, None]
    x = 7 + steps * t([1, 2, 6], [0, 0, 3])
    assert_close(metrics.position_variance(x), t((1 + 4 + 36) / 3, 9 / 3))
    assert_close(metrics.position_variance(x, "median"), t(4, 0))
    # Of an even number the median lies between the two middle ones.
    assert_close(metrics.position_variance(x[..., 1:], average="median"), t((4 + 36) / 2, 9 / 2))
    assert_close(metrics.position_variance(x[[0, 2], ..., :1]), t(2, 0))  # two prompts: (0 - 2)^2 / 2


def test_position_variance_takes_heads_for_dimensions() -> None:
    x = drawn(6, 5, 3, 4)
    for average in ("mean", "median"):
        assert_close(metrics.position_variance(x, average), metrics.position_variance(x.flatten(2), average))
    expected = x.double().numpy().var(axis=0, ddof=1).mean((1, 2))
    np.testing.assert_allclose(metrics.position_variance(x).numpy(), expected, rtol=1e-5)


def test_position_variance_far_from_zero_in_bfloat16_and_with_nan() -> None:
    x = drawn(50, 2, 8)
    assert_close(metrics.position_variance(x + 4096), metrics.position_variance(x), rtol=1e-2, atol=0)
    half = x.bfloat16()
    assert_close(metrics.position_variance(half), metrics.position_variance(half.float()))
    x[3, 1, 2] = NAN
    for average in ("mean", "median"):
        assert metrics.position_variance(x, average).isnan().tolist() == [False, True]


def test_position_variance_refuses_one_prompt_and_unknown_averages() -> None:
    with pytest.raises(ValueError, match="at least two prompts, not 1"):
        metrics.position_variance(torch.ones(1, 4, 3))
    with pytest.raises(ValueError, match="unknown average 'mode': mean or median"):
        metrics.position_variance(torch.ones(2, 4, 3), "mode")  # type: ignore[arg-type]  (what it refuses)


def test_variance_over_that_of_later_positions_by_hand() -> None:
    variance = t([8, 1, 2, 3], [2, 6, 4, 2])  # of the later ones the medians are 2 and 4
    assert_close(metrics.relative_to_later(variance), t([4, 0.5, 1, 1.5], [0.5, 1.5, 1, 0.5]))
    assert_close(metrics.first_over_later(variance), torch.tensor((4 * 0.5) ** 0.5))


# -- Other sinks ------------------------------------------------------------------------------------------------------


def test_the_mean_of_others_leaves_oneself_out() -> None:
    assert_close(metrics.mean_of_others(t([1, 0], [3, 4], [5, 2])), t([4, 3], [3, 1], [2, 2]))
    with pytest.raises(InputError, match="at least two"):
        metrics.mean_of_others(t([1, 0]))


def test_the_share_that_is_a_constant_by_hand() -> None:
    same, opposite = t([3, 4], [3, 4], [3, 4]), t([1, 0], [-1, 0])
    assert_close(metrics.constant_share(same), torch.ones(3))
    assert_close(metrics.constant_share(opposite), t(-3, -3))  # |1 - (-1)|^2 = 4 of a squared norm of 1
    # (2, 0) for (1, 1) and (2, 1) for (1, 0), (1, 1) for (2, 0.5): what is left is 2 of 2, 2 of 4 and so on.
    assert_close(metrics.constant_share(t([2, 0], [1, 1])), t(1 - 2 / 4, 1 - 2 / 2))


def test_the_ratio_of_gradients_by_hand() -> None:
    gradient = t([[3, 4], [0, 1], [2, 0]], [[0, 1], [1, 0], [0, 6]])
    assert_close(metrics.gradient_ratio(gradient, torch.tensor([0, 2])), t(5 / 1.5, 6))


def test_what_a_norm_does_to_gradients_by_hand() -> None:
    before, at_norm, through = t([2, 0]), t([3, 4]), t([0, 1.5])
    flow = metrics.gradient_flow(before, at_norm, through)
    assert_close(torch.cat(flow), t(5 / 2, 1.5 / 5, 2.5 / 2))


@pytest.mark.parametrize("centred", [False, True])
def test_the_way_back_through_a_norm_is_autograd_s(centred: bool) -> None:
    h, gradient = drawn(3, 8).double().requires_grad_(), drawn(3, 8, seed=1).double()
    wide = h - h.mean(-1, keepdim=True) if centred else h
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 0.01).sqrt()
    (expected,) = torch.autograd.grad(normed, h, gradient)
    found = metrics.back_through_norm(h.detach(), gradient, 0.01, centred=centred)
    assert_close(found, expected.float())


def test_a_sink_lives_from_its_largest_growth_to_its_largest_fall() -> None:
    norm = t([1, 1, 9], [9, 2, 1], [10, 9, 2], [8, 9, 3], [1, 8, 4])
    expected = [[False, True, True, True, False], [False, False, True, True, False], [False, False, True, True, True]]
    assert metrics.alive(norm).T.tolist() == expected
    assert metrics.alive(t(1, 5, 6, 7)).tolist() == [False, True, True, True]


def test_likeness_is_the_magnitude_of_a_cosine() -> None:
    hidden = t([[2, 0], [0, 3], [-4, 0], [1, 1]])
    assert_close(metrics.alike(hidden, t([5, 0])), t([1, 0, 1, 0.5**0.5]))


def test_the_stable_rank_by_hand() -> None:
    assert_close(metrics.stable_rank(torch.eye(3)), torch.tensor(3.0))
    assert_close(metrics.stable_rank(torch.diag(t(2, 1))), torch.tensor(5 / 4))
    assert_close(metrics.stable_rank(torch.ones(4, 3)), torch.tensor(1.0))


# -- All of them ------------------------------------------------------------------------------------------------------

VECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "alike": lambda x: metrics.alike(x, x[..., 0, :]),
    "alive": metrics.alive,
    "back_through_norm": lambda x: metrics.back_through_norm(x, x),
    "constant_share": metrics.constant_share,
    "cosine": lambda x: metrics.cosine(x, x),
    "dominance_ratio": metrics.dominance_ratio,
    "effective_rank": metrics.effective_rank,
    "energy_share": lambda x: metrics.energy_share(x, [0, 2]),
    "excess_kurtosis": metrics.excess_kurtosis,
    "gini": metrics.gini,
    "gradient_flow": lambda x: metrics.gradient_flow(x, x, x).bloat,
    "gradient_ratio": lambda x: metrics.gradient_ratio(x, torch.zeros(3, dtype=torch.long, device=x.device)),
    "mean_of_others": metrics.mean_of_others,
    "kendall_tau": lambda x: metrics.kendall_tau(x[0], x[1]),
    "massive_activations": metrics.massive_activations,
    "first_over_later": lambda x: metrics.first_over_later(x[0].abs()),
    "position_variance": metrics.position_variance,
    "principal_direction": metrics.principal_direction,
    "quantised_absmax": lambda x: metrics.quantised_absmax(x, 4, (-1,)),
    "quantised_minmax": lambda x: metrics.quantised_minmax(x, 4, (1,)),
    "relative_error": lambda x: metrics.relative_error(x / 2, x),
    "relative_to_later": lambda x: metrics.relative_to_later(x[0]),
    "relative_deviation": lambda x: metrics.relative_deviation(x[0], x[0, 0].float(), x[0, 0, 0].float()),
    "robust_z": metrics.robust_z,
    "stable_rank": metrics.stable_rank,
    "top1_over_median": metrics.top1_over_median,
    "top_energy_share": lambda x: metrics.top_energy_share(x, 2),
    "vector_norm": metrics.vector_norm,
}
PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "alpha": metrics.alpha,
    "attention_entropy": metrics.attention_entropy,
    "attention_received": metrics.attention_received,
    "effective_values": metrics.effective_values,
    "normalised_rows": lambda x: metrics.normalised_rows(x)[0],
    "received_at_lengths": lambda x: metrics.received_at_lengths(x, [1, 3]),
    "sink_rate": metrics.sink_rate,
}


@pytest.mark.parametrize("name", metrics.__all__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metrics_stay_on_the_device_of_their_input(name: str, dtype: torch.dtype) -> None:
    """The meta device computes nothing, but refuses operands from elsewhere and shows no values to Python."""
    x = torch.ones(2, 3, 5, 5, dtype=dtype, device="meta")
    result = PATTERNS[name](x) if name in PATTERNS else VECTORS[name](x[0])
    assert result.device.type == "meta"
    assert result.dtype == (torch.bool if name in ("massive_activations", "alive") else torch.float32)


@pytest.mark.parametrize("name", metrics.__all__)
def test_metrics_leave_their_input_alone(name: str) -> None:
    x = drawn(2, 3, 5, 5).softmax(-1)
    before = x.clone()
    _ = PATTERNS[name](x) if name in PATTERNS else VECTORS[name](x[0])
    assert torch.equal(x, before)


def test_every_metric_is_tested_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in metrics.__all__ if f"metrics.{name}(" not in source] == []
