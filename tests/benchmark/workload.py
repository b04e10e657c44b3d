"""A sweep as data: prompts, cells to patch, and where the readout is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.errors import InputError

Cell = tuple[int, int]
"""``(block, position)``."""


@dataclass(frozen=True, eq=False)
class Workload:
    """Every cell is patched on every prompt; a *patch* is one cell on one prompt."""

    clean: Int[Tensor, "prompt pos"]
    """Tokens of the run that is patched."""
    corrupt: Int[Tensor, "prompt pos"]
    """Tokens of the run that ``resid_pre`` is taken from: each clean prompt's own, permuted."""
    cells: tuple[Cell, ...]
    """What is patched, in order of blocks."""
    readouts: tuple[int, ...]
    """Consecutive blocks in which attention is read, none of them before a patched one; the mean over them counts."""
    target: int = 0
    """Position whose attention received is read."""

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return len(self.clean)

    @property
    def n_patches(self) -> int:
        """Cells times prompts."""
        return len(self.cells) * self.n_prompts

    @property
    def length(self) -> int:
        """Tokens in a prompt."""
        return self.clean.shape[1]

    @property
    def layers(self) -> tuple[int, ...]:
        """The patched blocks."""
        return tuple(sorted({layer for layer, _ in self.cells}))

    def part(self, n_cells: int, seed: int = 0) -> Workload:
        """The same sweep with a random part of its cells."""
        return replace(self, cells=_drawn(self.cells, n_cells, seed))

    def first_prompts(self, n: int) -> Workload:
        """The same sweep on the first ``n`` prompts."""
        return replace(self, clean=self.clean[:n], corrupt=self.corrupt[:n])


def grid(layers: range, positions: range) -> tuple[Cell, ...]:
    """All cells of some blocks and positions, in order of blocks."""
    return tuple((layer, position) for layer in layers for position in positions)


def make_workload(
    n_patches: int,
    cells: tuple[Cell, ...],
    length: int,
    readouts: tuple[int, ...],
    d_vocab: int,
    *,
    target: int = 0,
    seed: int = 0,
) -> Workload:
    """A sweep of ``n_patches``: a random part of ``cells`` on one prompt, or on as many prompts as it takes.

    The number of prompts is a power of two, so that a number of patches that is one comes out exactly. Prompts are
    random tokens; the source run has the same tokens in another order.

    Raises:
        InputError: fewer than one patch, or prompts too short to have later queries.
    """
    if n_patches < 1 or length < 4:
        raise InputError(f"{n_patches} patches of prompts of {length} tokens: give at least 1 patch and 4 tokens")
    n_prompts = 1
    while n_prompts * len(cells) < n_patches:
        n_prompts *= 2
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, d_vocab, (n_prompts, length), generator=generator)
    corrupt = torch.stack([row[torch.randperm(length, generator=generator)] for row in clean])
    chosen = _drawn(cells, max(1, n_patches // n_prompts), seed)
    return Workload(clean, corrupt, chosen, readouts, target)


def _drawn(cells: tuple[Cell, ...], n: int, seed: int) -> tuple[Cell, ...]:
    """``n`` of the cells, drawn at random, in their order: on average they cost what all of them do."""
    if n >= len(cells):
        return cells
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))
    return tuple(cells[i] for i in sorted(order[:n].tolist()))
