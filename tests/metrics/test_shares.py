"""Shares of attention rows that need not sum to one; the largest dimension over the median one."""

from __future__ import annotations

import torch

from sinklens.metrics import normalised_rows, top1_over_median


def test_rows_are_divided_by_their_magnitudes():
    pattern = torch.tensor([[[[0.5, 0.0], [0.6, -0.2]]]])
    shares, sums = normalised_rows(pattern)
    torch.testing.assert_close(shares, torch.tensor([[[[1.0, 0.0], [0.75, -0.25]]]]))
    torch.testing.assert_close(sums, torch.tensor([[[0.5, 0.4]]]))


def test_a_softmax_pattern_stays_as_it_is_and_a_row_of_zeros_too():
    pattern = torch.rand(2, 3, 4, 4).softmax(-1)
    pattern[0, 0, 0] = 0
    shares, sums = normalised_rows(pattern)
    torch.testing.assert_close(shares, pattern)
    assert sums[0, 0, 0] == 0


def test_the_largest_over_the_median():
    x = torch.tensor([[1.0, -2.0, 3.0, -12.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(top1_over_median(x), torch.tensor([12 / 2.5, 1.0]))
