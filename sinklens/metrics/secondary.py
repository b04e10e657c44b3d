"""Secondary sinks (arXiv 2512.22213): tokens that come to point where the first sink points, later and for a while.

A sink lives from the block in which its norm grows most to the one in which it falls most. Another token is a sink in
those blocks of that range behind which its hidden state has ``|cos| > 0.9`` with the first sink's. How many blocks it
holds out tells what it is: up to 4 is noise, up to ``L - 16`` (of ``L`` blocks) a secondary sink, more is one like the
first. Its *level* is the pair of the block that makes it and that number.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def alive(norm: Float[Tensor, "layer *sinks"]) -> Bool[Tensor, "layer *sinks"]:
    """Marks the blocks behind which a sink lives, by its norm behind every block.

    As in the released code: from the block in which the norm grows most to before the one in which it falls most after
    that; to the last block, where it does not fall.
    """
    rise = norm.float().diff(dim=0)
    block = torch.arange(len(norm), device=norm.device).view(-1, *[1] * (norm.ndim - 1))
    start = rise.argmax(0) + 1
    later = rise.masked_fill(block[:-1] < start, torch.inf)
    end = torch.where(later.amin(0) < 0, later.argmin(0) + 1, len(norm))
    return (block >= start) & (block < end)


def alike(hidden: Float[Tensor, "*leading pos d"], sink: Float[Tensor, "*leading d"]) -> Float[Tensor, "*leading pos"]:
    """``|cos|`` of every position's hidden state with the sink's."""
    return torch.nn.functional.cosine_similarity(hidden.float(), sink.float()[..., None, :], dim=-1).abs()
