"""What rounding to few bits does to activations: quantised and dequantised again.

*Absmax*, for activations (LLM.int8, Dettmers et al. 2022): ``s = max |x| / (2^(b-1) - 1)``, ``round(x / s) s``. One s
for a whole tensor, or one for each token. *Min-max*, for key-value caches (KIVI, Liu et al. 2024):
``s = (max x - min x) / (2^b - 1)``, ``round((x - min x) / s) s + min x``, with one pair for each channel over the
tokens of a prompt, or one for each token over its channels. An outlier widens s for all that share it.

Errors are relative to each vector, ``||x' - x|| / ||x||``, and averaged over vectors: over the whole tensor, one
massive token would stand for all others, whose rounding it is that it spoils.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def quantised_absmax(x: Float[Tensor, "..."], bits: int, over: Sequence[int]) -> Float[Tensor, "..."]:
    """``x`` rounded to symmetric integers of ``bits``, with one scale for all entries along the axes ``over``."""
    wide = x.float()
    scale = wide.abs().amax(tuple(over), keepdim=True) / (2 ** (bits - 1) - 1)
    return (wide / scale.where(scale > 0, 1.0)).round() * scale  # all zero stays so


def quantised_minmax(x: Float[Tensor, "..."], bits: int, over: Sequence[int]) -> Float[Tensor, "..."]:
    """``x`` rounded to ``2^bits`` levels from the least to the largest entry along the axes ``over``."""
    wide = x.float()
    low = wide.amin(tuple(over), keepdim=True)
    scale = (wide.amax(tuple(over), keepdim=True) - low) / (2**bits - 1)
    return ((wide - low) / scale.where(scale > 0, 1.0)).round() * scale + low


def relative_error(rounded: Float[Tensor, "... d"], x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """``||x' - x|| / ||x||`` of every vector; NaN for a zero vector, of which there is no part to be off by."""
    wide = x.float()
    size = wide.norm(dim=-1)
    return ((rounded.float() - wide).norm(dim=-1) / size).masked_fill(size == 0, torch.nan)
