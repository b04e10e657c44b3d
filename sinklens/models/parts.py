"""What a model is made of, taken apart: tensors, sizes and functions.

:mod:`sinklens.models.bridged` finds the parts of a TransformerBridge; the packed pass computes with those of any model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.models.hooked import Rotary

Function = Callable[[Tensor], Tensor]
"""Position-wise: from ``[token, ...]`` to ``[token, ...]``."""


class UnknownPartError(Exception):
    """The bridge has a part that is not known here; the message says which."""


@dataclass(frozen=True, eq=False)
class Linear:
    """A projection."""

    W: Float[Tensor, "d_in d_out"]
    """Its weight."""
    b: Float[Tensor, " d_out"] | None
    """Its bias, if it has one."""

    def __call__(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out"]:
        """``x @ W + b``."""
        return x @ self.W if self.b is None else torch.addmm(self.b, x, self.W)


@dataclass(frozen=True, eq=False)
class BridgeNorm:
    """A norm."""

    kind: str
    """rms or layer."""
    eps: float
    """Added before the square root."""
    w: Float[Tensor, " d_model"] | None
    """Multiplier that is applied; None for one."""
    b: Float[Tensor, " d_model"] | None
    """Offset."""


@dataclass(frozen=True, eq=False)
class BridgeAttention:
    """One block's attention, for prompts of one length."""

    q: Linear
    """Query projection."""
    k: Linear
    """Key projection."""
    v: Linear
    """Value projection."""
    o: Linear
    """Output projection."""
    q_norm: Function | None
    """Norms queries ``[token, head, d_head]``, before they are turned."""
    k_norm: Function | None
    """The same for keys."""
    scale: float
    """Scores are divided by this."""
    cap: float
    """Soft cap on scores; 0 without."""
    sinks: Float[Tensor, " head"] | None
    """Learned logits that take a part of every query's attention."""
    rotary: Rotary | None
    """Rotary embeddings; None where there are none in this block."""
    seen: Bool[Tensor, "pos pos"] | None
    """Keys that each query sees; None for all up to its own position."""
    masked: float
    """Score of a key that is not seen."""


@dataclass(frozen=True, eq=False)
class MLPParts:
    """One block's MLP."""

    gate: Linear | None
    """Gate projection; None in an MLP without a gate."""
    up: Linear
    """Up projection."""
    down: Linear
    """Down projection."""
    act: Function
    """The activation function."""
    offset: Float[Tensor, " d_mlp"] | None = None
    """Added to gated neurons."""


@dataclass(frozen=True, eq=False)
class BridgeBlock:
    """One block, for prompts of one length."""

    ln1: BridgeNorm | None
    """Norm in front of attention."""
    ln1_post: BridgeNorm | None
    """Norm behind it."""
    ln2: BridgeNorm | None
    """Norm in front of the MLP; None in a parallel block for that of attention."""
    ln2_post: BridgeNorm | None
    """Norm behind it."""
    attention: BridgeAttention
    """Attention."""
    mlp_parts: MLPParts | None
    """The MLP's parts; None where it has others (a mixture of experts)."""
    whole_mlp: Function
    """The MLP as the model runs it."""
    added: float
    """What attention and MLP write is multiplied by this before it is added."""


@dataclass(frozen=True, eq=False)
class Given:
    """What the model hands to the attention of a block, besides the residual stream."""

    mask: Tensor | None
    """Added to the scores, or the keys that are seen."""
    turns: tuple[Tensor, Tensor] | None
    """Cosines and sines ``[1, pos, rotary_dim]``."""
