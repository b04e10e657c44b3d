"""Window attention."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from sinklens.variants.base import AttentionSizes, Variant


class Window(Variant):
    """Softmax over the last ``window`` keys, the query's own included, in every block.

    Source: Gu et al., arXiv 2410.10781, figure 6: a sink forms from windows of 256 on, and at the first token of all.
    Later queries do not see that one, so that their row is missing from its mean.
    """

    name = "window"
    claim = "no sink forms where the window is narrow"

    def __init__(self, sizes: AttentionSizes, *, window: int = 128) -> None:
        super().__init__(sizes)
        if window < 1:
            raise ValueError(f"window must be 1 or more tokens, not {window}")
        self.window = window

    def options(self) -> dict[str, int]:
        """See :meth:`Variant.options`."""
        return {"window": self.window}

    def seen(self, length: int, device: torch.device | None = None) -> Bool[Tensor, "query key"]:
        """See :meth:`Variant.seen`."""
        return super().seen(length, device).triu(1 - self.window)
