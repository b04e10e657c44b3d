"""Rounding to few bits: by hand, and against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from sinklens.metrics import quantised_absmax, quantised_minmax, relative_error


def test_absmax_by_hand() -> None:
    """Three bits: -3 to 3 times a third of the largest."""
    x = tensor([[3.0, 1.4, -0.4], [30.0, 1.4, -6.0]])
    assert quantised_absmax(x, 3, (-1,)).tolist() == [[3, 1, 0], [30, 0, -10]]
    assert quantised_absmax(x, 3, (0, 1)).tolist() == [[0, 0, 0], [30, 0, -10]]


def test_minmax_by_hand() -> None:
    """Two bits: four levels from the least to the largest, of every row, and of every column."""
    x = tensor([[0.0, 1.4, 2.6, 3.0], [-10.0, 20.0, 4.0, -6.0]])
    assert quantised_minmax(x, 2, (-1,)).tolist() == [[0, 1, 3, 3], [-10, 20, 0, -10]]
    pairs = tensor([[0.0, 5.0], [3.0, 5.0], [1.2, 5.0]])
    assert quantised_minmax(pairs, 2, (0,)).tolist() == [[0, 5], [3, 5], [1, 5]]


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_minmax_as_a_loop(bits: int) -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = quantised_minmax(x, bits, (1,))
    for i in range(3):
        for k in range(5):
            column = x[i, :, k].double().tolist()
            low, step = min(column), (max(column) - min(column)) / (2**bits - 1)
            expected = [round((value - low) / step) * step + low for value in column]
            assert found[i, :, k].tolist() == pytest.approx(expected, abs=1e-5)


def test_an_outlier_spoils_what_shares_its_scale() -> None:
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 1e4
    per_tensor = relative_error(quantised_absmax(x, 8, (1, 2)), x)[0]
    per_token = relative_error(quantised_absmax(x, 8, (2,)), x)[0]
    assert (per_tensor[1:] == 1).all() and per_tensor[0] < 0.01
    assert (per_token[1:] < 0.02).all()


def test_error_by_hand() -> None:
    found = relative_error(tensor([[3.0, 0.0], [0, 0], [0, 0]]), tensor([[3.0, 4.0], [2.0, 0], [0, 0]]))
    assert found[:2].tolist() == pytest.approx([0.8, 1.0])
    assert math.isnan(found[2])


def test_zeros_stay() -> None:
    zeros = torch.zeros(2, 3)
    assert torch.equal(quantised_absmax(zeros, 8, (1,)), zeros)
    assert torch.equal(quantised_minmax(zeros + 7, 4, (0,)), zeros + 7)
