"""Sums that are the same from run to run."""

from __future__ import annotations

import torch
from torch import Tensor


def running_sum(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)``, also where deterministic algorithms are asked for: a GPU has none for it, the CPU has."""
    if x.is_cuda and x.is_floating_point() and torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(dim).to(x.device)
    return x.cumsum(dim)
