"""Attention of some queries at a time: nobody needs the pattern of whole prompts to read or edit a few of its rows.

``[row, head, query, key]`` of prompts of thousands of tokens does not fit anywhere. What a readout sums over queries,
or an edit writes at a position, needs the rows of these queries alone, and a sum can be taken in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.engine.packed.layout import Layout, to_device


@dataclass(frozen=True, eq=False)
class Piece:
    """Queries of consecutive rows, and where they lie in a padded ``[row, width]``."""

    tokens: Int[Tensor, " token"]
    """Packed tokens, in order."""
    rows: slice
    """Rows that they are in."""
    width: int
    """The most that one row has."""
    slot: Int[Tensor, " token"]
    """Place of each in ``[row * width]``."""
    last: bool
    """Whether it is the last piece."""
    whole: bool
    """Whether it is the only one."""

    @property
    def n_rows(self) -> int:
        """How many rows."""
        return self.rows.stop - self.rows.start

    def padded(self, x: Float[Tensor, "token *rest"]) -> Float[Tensor, "row width *rest"]:
        """One entry for every place; zeros where there is no token."""
        out = x.new_zeros(self.n_rows * self.width, *x.shape[1:])
        out[self.slot] = x
        return out.view(self.n_rows, self.width, *x.shape[1:])

    def packed(self, full: Float[Tensor, "row width *rest"]) -> Float[Tensor, "token *rest"]:
        """The inverse of :meth:`padded`."""
        return full.reshape(-1, *full.shape[2:])[self.slot]


def pieces(tokens: Int[Tensor, " token"], layout: Layout, at_most: int) -> list[Piece]:
    """Packed tokens, in order, in pieces of at most so many."""
    mine = tokens.cpu().numpy()
    row = np.searchsorted(layout.offsets, mine, side="right") - 1
    return list(_pieces(tokens, mine, row, layout.device, at_most))


def _pieces(tokens: Tensor, mine: np.ndarray, row: np.ndarray, device: torch.device, at_most: int) -> Iterator[Piece]:
    for begin in range(0, len(mine), at_most):
        end = min(begin + at_most, len(mine))
        here = row[begin:end]
        first, last = int(here[0]), int(here[-1])
        within = np.arange(end - begin) - np.searchsorted(here, here)
        width = int(within.max()) + 1
        slot = to_device((here - first) * width + within, device)
        yield Piece(tokens[begin:end], slice(first, last + 1), width, slot, end == len(mine), end - begin == len(mine))
