"""Modules of a caller's own, to be put in the place of a model's."""

from __future__ import annotations

from torch import Tensor, nn


class Halved(nn.Module):
    """Half of what another module gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.inner(x)


class Doubled(nn.Module):
    """A parametrisation: twice the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x
