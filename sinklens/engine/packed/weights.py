"""A model's weights as the packed pass uses them, whatever kind of model it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.models.hooked import Rotary
from sinklens.models.parts import Function, Linear, MLPParts
from sinklens.models.view import Model, dtype_of, model_shape
from sinklens.sites import HookSite


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm in front of attention, MLP or the unembedding, or behind attention or MLP."""

    kind: str
    """rms or layer."""
    eps: float
    """Added before the square root."""
    w: Float[Tensor, " d_model"] | None
    """Multiplier; None when it is folded away."""
    b: Float[Tensor, " d_model"] | None
    """Offset of a LayerNorm."""
    dtype: torch.dtype
    """The model's."""
    cast_last: bool = False
    """Whether what is normed is multiplied before it is cast to the model's dtype, or behind."""

    def __call__(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """The whole norm, in one kernel."""
        if self.w is not None and self.w.dtype != x.dtype:  # multipliers that are kept in float32
            return self.scaled(self.normalized(x))
        size = x.shape[-1:]
        if self.kind == "rms":
            return torch.nn.functional.rms_norm(x, size, self.w, self.eps)
        return torch.nn.functional.layer_norm(x, size, self.w, self.b, self.eps)

    def normalized(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """What ``hook_normalized`` sees, in float32 as there."""
        x = x if x.dtype == torch.float64 else x.float()
        x = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def scaled(self, normalized: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """What follows ``hook_normalized``."""
        x = normalized if self.cast_last else normalized.to(self.dtype)
        x = x if self.w is None else x * self.w
        x = x if self.b is None else x + self.b
        return x.to(self.dtype)


Weigh = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""``(scores [token head key], queries as they meet the keys [token head d_head], normed inputs [token d_model])`` to
weights, and to what is added to ``z`` besides (None for nothing)."""


@dataclass(frozen=True, eq=False)
class PackedBlock:
    """One block's weights."""

    ln1: Norm | None
    """Norm in front of attention."""
    ln2: Norm | None
    """Norm in front of the MLP; None in a parallel block for what attention reads."""
    qkv: tuple[Linear, ...]
    """Query, key and value projections, one by one or side by side (one product instead of three)."""
    out: Linear
    """Attention's output projection."""
    mlp_parts: MLPParts | None
    """The MLP; None where it is run as a whole."""
    whole_mlp: Function | None
    """The MLP as a whole."""
    q_norm: Function | None
    """Norm of queries ``[token, head, d_head]``, where the model has one."""
    k_norm: Function | None
    """The same of keys."""
    scale: float
    """Scores are divided by this."""
    rotary: Rotary | None
    """Rotary embeddings at the positions of the prompts; None where this block has none."""
    ln1_post: Norm | None = None
    """Norm behind attention."""
    ln2_post: Norm | None = None
    """Norm behind the MLP."""
    cap: float = 0
    """Soft cap on scores; 0 without."""
    sinks: Float[Tensor, " head"] | None = None
    """Learned logits that take a part of every query's attention."""
    seen: Bool[Tensor, "pos pos"] | None = None
    """Keys that each query sees; None for all up to its own position."""
    masked: float = -torch.inf
    """Score of a key that is not seen."""
    added: float = 1
    """What attention and MLP write is multiplied by this before it is added."""
    v_scaled: Function | None = None
    """What is done to values behind ``hook_v``."""
    weigh: Weigh | None = None
    """Scores to weights, where that is not the softmax over them and over `sinks`."""
    z_changed: Callable[[Tensor, Tensor], Tensor] | None = None
    """``(z, x)`` to what W_O reads."""

    @property
    def device(self) -> torch.device:
        """Where the block is."""
        return self.out.W.device


class PackedModel:
    """A model's blocks for prompts of one length, taken apart on first use: make a new one when the weights change."""

    def __init__(self, model: Model, length: int) -> None:
        self.model, self.length, self.dtype = model, length, dtype_of(model)
        shape = model_shape(model)
        self.n_layers, self.n_heads, self.n_kv_heads = shape.n_layers, shape.n_heads, shape.n_kv_heads
        self.d_head, self.parallel, self.rotary = shape.d_head, shape.parallel, shape.rotary
        self._blocks: dict[int, PackedBlock] = {}

    def block(self, layer: int) -> PackedBlock:
        """The weights of block ``layer``."""
        if layer not in self._blocks:
            with torch.no_grad():
                self._blocks[layer] = self.take_apart(layer)
        return self._blocks[layer]

    @property
    def keys_site(self) -> HookSite:
        """Where keys are captured as attention uses them."""
        raise NotImplementedError

    def take_apart(self, layer: int) -> PackedBlock:
        """:meth:`block`, looked up."""
        raise NotImplementedError

    def embedded(self, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_model"]:
        """The residual stream that enters the first block."""
        raise NotImplementedError

    def logits(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_vocab"]:
        """The model's output for packed residuals after the last block."""
        raise NotImplementedError

    def lacks(self, site: HookSite, layer: int) -> str | None:  # noqa: ARG002
        """Why this model has no such hook point in a block; None when it has."""
        return None
