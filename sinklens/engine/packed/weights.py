"""The weights of a HookedTransformer as the packed pass uses them, and which models it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.models.hooked import (
    NormWeights,
    Options,
    attention_weights,
    can_take_apart,
    final_norm,
    has_option,
    mlp_weights,
    norms,
    options,
    unembedding,
)
from sinklens.models.identities import IDENTITIES, identities
from sinklens.models.state import foreign_hooks, foreign_part
from sinklens.models.view import Model, backend_name, model_shape

_NORMS = ("RMS", "RMSPre", "LN", "LNPre")
_STANDS_ON = (
    "norm_before_attention",
    "pattern_is_softmax",
    "heads_write",
    "attention_adds",
    "norm_before_mlp",
    "neurons_read",
    "neurons_write",
    "mlp_adds",
)
# Options of TransformerLens that change the computation in a way that the packed pass does not have.
_OPTIONS = (
    "attn_only",
    "use_attn_in",
    "use_split_qkv_input",
    "use_hook_mlp_in",
    "use_attn_result",
    "load_in_4bit",
    "ungroup_grouped_query_attention",
    "use_normalization_before_and_after",
    "use_attention_sinks",
    "use_logn_attn",
    "use_dynamic_ntk_rope",
    "num_experts",
    "clip_qkv",
)


def unsupported(model: Model, length: int) -> str | None:
    """What the packed pass does not know about ``model`` at this prompt length; None when it can run it."""
    if not can_take_apart(model):
        return f"a {backend_name(model)}"
    if (name := next((name for name in _OPTIONS if has_option(model, name)), None)) is not None:
        return name
    if foreign_hooks(model):
        return "hooks that are installed on the model"
    if (part := foreign_part(model)) is not None:
        return part
    measured = identities(model)
    if (failing := next((name for name in _STANDS_ON if not measured.holds(name)), None)) is not None:
        return f"a model without {IDENTITIES[failing].formula}"
    has = options(model)
    if has.attention_dir != "causal" or has.positions not in ("rotary", "standard"):
        return f"{has.attention_dir} attention with {has.positions} positions"
    if has.norm not in _NORMS or has.norm_in_activation:
        return f"normalization {has.norm} with activation {has.act_fn}"
    if has.qk_norm and has.positions != "rotary":
        return "norms of queries and keys without rotary positions"
    if has.scores_cap > 0:
        return "a soft cap on attention scores"
    if has.window is not None and has.window < length:
        return f"a sliding window of {has.window} tokens"
    return None


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm in front of attention, MLP or the unembedding."""

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

    def __call__(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """The whole norm in one kernel."""
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
        x = normalized.to(self.dtype)
        x = x if self.w is None else x * self.w
        return x if self.b is None else x + self.b


@dataclass(frozen=True, eq=False)
class PackedBlock:
    """One block's weights."""

    ln1: Norm
    ln2: Norm
    W_qkv: Float[Tensor, "d_model qkv"]
    """Query, key and value projections side by side: one product instead of three."""
    b_qkv: Float[Tensor, " qkv"] | None
    W_O: Float[Tensor, "z d_model"]
    b_O: Float[Tensor, " d_model"] | None
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"] | None
    act: Callable[[Tensor], Tensor]
    """The MLP's activation function."""
    q_norm: Any
    """Norm of each query, where the model has one (Qwen3)."""
    k_norm: Any
    scale: float
    """Scores are divided by this."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosine and sine ``[pos rotary_dim]``."""


class PackedModel:
    """A HookedTransformer's blocks, taken apart on first use: make a new one when the weights change."""

    def __init__(self, model: Model, length: int) -> None:
        self.model, self.length, self.options = model, length, options(model)
        shape = model_shape(model)
        self.n_heads, self.n_kv_heads, self.d_head = shape.n_heads, shape.n_kv_heads, shape.d_head
        self.parallel, self.rotary = shape.parallel, shape.rotary
        self.rotary_adjacent, self.dtype = self.options.rotary_adjacent, self.options.dtype
        self._blocks: dict[int, PackedBlock] = {}

    def block(self, layer: int) -> PackedBlock:
        """The weights of block ``layer``."""
        if layer not in self._blocks:
            with torch.no_grad():
                self._blocks[layer] = _block(self, layer)
        return self._blocks[layer]

    def logits(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_vocab"]:
        """The model's output for packed residuals after the last block."""
        (W_U, b_U), cap = unembedding(self.model), self.options.logits_cap
        x = _norm(self.options, final_norm(self.model))(x.to(W_U.device))
        out = x @ W_U if (b := _bias(b_U)) is None else torch.addmm(b, x, W_U)
        return cap * torch.tanh(out / cap) if cap > 0 else out


def _bias(b: Tensor | None) -> Tensor | None:
    """TransformerLens keeps biases of zeros where a model has none: they need not be added."""
    return None if b is None or not b.any() else b


def _norm(has: Options, norm: NormWeights) -> Norm:
    return Norm("rms" if has.norm.startswith("RMS") else "layer", has.norm_eps, norm.w, norm.b, has.dtype)


def _columns(W: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "d_model columns"]:
    return W.transpose(0, 1).flatten(1)


def _block(packed: PackedModel, layer: int) -> PackedBlock:
    attn, mlp = attention_weights(packed.model, layer, packed.length), mlp_weights(packed.model, layer)
    ln1, ln2 = norms(packed.model, layer)
    turn, length = attn.rotary, packed.length
    return PackedBlock(
        ln1=_norm(packed.options, ln1),
        ln2=_norm(packed.options, ln2),
        W_qkv=torch.cat([_columns(attn.W_Q), _columns(attn.W_K), _columns(attn.W_V)], -1),
        b_qkv=_bias(torch.cat([attn.b_Q.flatten(), attn.b_K.flatten(), attn.b_V.flatten()])),
        W_O=attn.W_O.flatten(0, 1),
        b_O=_bias(attn.b_O),
        W_gate=mlp.W_gate,
        W_in=mlp.W_in,
        b_in=_bias(mlp.b_in),
        W_out=mlp.W_out,
        b_out=_bias(mlp.b_out),
        act=mlp.act,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        scale=attn.scale,
        rotary=None if turn is None else (turn.cos[:length], turn.sin[:length]),
    )
