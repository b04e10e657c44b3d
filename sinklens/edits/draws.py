"""Random draws for edits and controls: always from a generator, on the CPU, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from sinklens.errors import InputError


def random_orthonormal(d: int, rank: int, generator: torch.Generator) -> Float[Tensor, "d rank"]:
    """The first columns of a uniformly random rotation or reflection of R^d, on the CPU, in float32.

    They are those of a Gaussian matrix made orthonormal, with a positive diagonal in R, without which the columns that
    LAPACK gives lean to one side (Mezzadri 2007, "How to generate random matrices from the classical compact groups").
    Only as many numbers are drawn as there are entries.
    """
    return _qr(torch.randn(d, rank, generator=generator, dtype=torch.float32, device="cpu"))[0].float()


def rotate_rows(rows: Float[Tensor, "neuron d_model"], generator: torch.Generator) -> Float[Tensor, "neuron d_model"]:
    """``rows`` after one random rotation or reflection of R^d: norms and mutual angles kept, sparsity gone.

    It goes by what the rotation makes of an orthonormal basis of the rows, ``rows = R.T @ Q.T``: as many random
    orthonormal vectors as there are rows, instead of a whole d x d rotation.
    """
    d = rows.shape[-1]
    R = _qr(rows.detach().cpu().T)[1]
    return (R.T @ random_orthonormal(d, len(R), generator).double().T).to(rows)


def _qr(matrix: Float[Tensor, "d n"]) -> tuple[Float[Tensor, "d rank"], Float[Tensor, "rank n"]]:
    """The one QR decomposition, in float64, in which R's diagonal is positive."""
    Q, R = torch.linalg.qr(matrix.double())
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    return Q * signs, signs[:, None] * R


def random_permutations(n: int, size: int, generator: torch.Generator) -> Int[Tensor, "n size"]:
    """``n`` independent random permutations of ``size`` entries."""
    return torch.stack([torch.randperm(size, generator=generator, device="cpu") for _ in range(n)])


def others(n: int, chosen: tuple[int, ...], generator: Generator, size: int | None = None) -> tuple[int, ...]:
    """Indices below ``n`` that are not ``chosen``: all, or ``size`` of them drawn at random.

    Raises:
        InputError: when there are not as many.
    """
    left = torch.tensor([i for i in range(n) if i not in set(chosen)], device="cpu")
    if size is None:
        return tuple(left.tolist())
    if size > len(left):
        raise InputError(f"a control of {size} other units was asked for, but only {len(left)} of {n} are left")
    return tuple(sorted(left[torch.randperm(len(left), generator=generator, device="cpu")[:size]].tolist()))
