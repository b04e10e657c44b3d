"""Random draws for edits and controls: always from a generator, on the CPU, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def random_orthonormal(d: int, rank: int, generator: torch.Generator) -> Float[Tensor, "d rank"]:
    """Orthonormal columns of a Gaussian matrix: a uniformly random subspace of R^d, on the CPU, in float32."""
    return torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q


def rotate_rows(rows: Float[Tensor, "neuron d_model"], generator: torch.Generator) -> Float[Tensor, "neuron d_model"]:
    """``rows`` after one random rotation of R^d: norms and mutual angles kept, sparsity gone."""
    d = rows.shape[-1]
    return (rows.detach().cpu().float() @ random_orthonormal(d, d, generator)).to(rows)


def random_permutations(n: int, size: int, generator: torch.Generator) -> Int[Tensor, "n size"]:
    """``n`` independent random permutations of ``size`` entries."""
    return torch.stack([torch.randperm(size, generator=generator) for _ in range(n)])
