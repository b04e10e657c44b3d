"""What a variant of attention is: softmax attention, and the places at which others differ from it.

A decoder (:mod:`sinklens.models.decoder`) computes, in every block and for every head, with queries and keys that are
turned by their positions (RoPE) before they meet:

    scores  = q k^T / sqrt(d_head), unseen keys at minus infinity
    pattern = softmax(scores), over the keys and over a slot where the variant has one
    z       = pattern v + share of the slot x its value

A variant may change what comes in (``queries``, ``keys``, ``values``), which keys are seen (``seen``), what else there
is to attend to (``slot``), how scores become weights (``weights``) and what comes out (``output``); and, by attributes
of its class, where the norms stand, whether positions are told, and whether a learned token comes first.

Axes are ``[*batch head key]`` for scores and ``[*batch head d_head]`` for queries and outputs, whatever stands in
front, so that the same lines serve a whole prompt, one query, and the packed rows of a sweep: every method works on
each query by itself, and knows nothing of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionSizes:
    """What a variant may need to know of the block that it is in."""

    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Query heads."""
    n_kv_heads: int
    """Key and value heads."""
    d_head: int
    """Width of a head."""
    n_ctx: int
    """Longest sequence."""
    layer: int
    """The block, from 0."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Something besides the keys that a query may attend to: no token, and so no position."""

    logit: Float[Tensor, "*batch head"]
    """Its score, to be compared with those of the keys."""
    value: Float[Tensor, "head d_head"] | None = None
    """What it adds to the output; None for nothing."""


class Variant(nn.Module):
    """Softmax attention (Vaswani et al. 2017), and what a variant may override.

    A subclass is one way of computing attention. Its docstring has the equation, the source and the pitfalls; keyword
    arguments of its constructor after ``sizes`` are its options, and are recorded with every model.
    """

    name: ClassVar[str]
    """What it is called in commands and tables."""
    claim: ClassVar[str]
    """What its authors say that it does to the sink."""
    edit: ClassVar[str | None] = None
    """Analysis that does the same to a model that was trained without it; None where there is none."""
    norms: ClassVar[Literal["pre", "sandwich", "post"]] = "pre"
    """Where the block's norms stand: in front of its sublayers, on both sides, or between them and the sum."""
    rotary: ClassVar[bool] = True
    """Whether queries and keys are turned by their positions."""
    sink_token: ClassVar[bool] = False
    """Whether a learned token stands in front of every prompt."""
    decays: ClassVar[bool] = False
    """Whether weight decay acts on its parameters."""
    drawn: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """Parameters that start from normal draws, which go by the model's seed, and their standard deviations. Others
    start as the constructor sets them."""

    def __init__(self, sizes: AttentionSizes) -> None:
        super().__init__()
        self.sizes = sizes

    def options(self) -> dict[str, Any]:
        """The options that it was made with, as JSON can hold them."""
        return {}

    def queries(self, q: Float[Tensor, "*batch head d_head"]) -> Float[Tensor, "*batch head d_head"]:
        """Queries before they are turned."""
        return q

    def keys(self, k: Float[Tensor, "*batch kv_head d_head"]) -> Float[Tensor, "*batch kv_head d_head"]:
        """Keys before they are turned."""
        return k

    def values(self, v: Float[Tensor, "*batch kv_head d_head"]) -> Float[Tensor, "*batch kv_head d_head"]:
        """Values before they are averaged."""
        return v

    def seen(self, length: int, device: torch.device | None = None) -> Bool[Tensor, "query key"]:
        """Which keys a query sees: those up to its own."""
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def slot(self, q: Float[Tensor, "*batch head d_head"]) -> Slot | None:
        """What besides the keys may be attended to, for queries as they meet the keys."""
        return None

    def weights(
        self,
        scores: Float[Tensor, "*batch head key"],
        slot: Float[Tensor, "*batch head"] | None,
        x: Float[Tensor, "*batch d_model"],
    ) -> tuple[Float[Tensor, "*batch head key"], Float[Tensor, "*batch head"] | None]:
        """What is given to each key (nothing to one whose score is minus infinity), and to the slot.

        Args:
            scores: of the keys, float32 at least.
            slot: that of the slot; None where there is none.
            x: the block's normed input at the query.
        """
        if slot is None:
            return scores.softmax(-1), None
        both = torch.cat([scores, slot[..., None]], -1).softmax(-1)
        return both[..., :-1], both[..., -1]

    def output(
        self, z: Float[Tensor, "*batch head d_head"], x: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch head d_head"]:
        """What W_O reads; ``x`` is the normed input of the block, which queries, keys and values are made of."""
        return z

    def stepped(self) -> None:
        """Called behind every step of training: for what is not learned by gradients, such as a running mean."""


def rms_normed(
    x: Float[Tensor, "*batch width"], gain: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*batch width"]:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last axis, with statistics in float32, in the dtype of ``x``."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * gain).to(x.dtype)


def overrides(variant: Variant | type[Variant], *names: str) -> bool:
    """Whether a variant has its own version of one of some methods."""
    kind = variant if isinstance(variant, type) else type(variant)
    return any(getattr(kind, name) is not getattr(Variant, name) for name in names)
