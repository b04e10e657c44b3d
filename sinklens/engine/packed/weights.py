"""The weights of a HookedTransformer as the packed pass uses them, and which models it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.models.view import Model, is_bridge

_NORMS = ("RMS", "RMSPre", "LN", "LNPre")
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
_POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM")


def unsupported(model: Model, length: int) -> str | None:
    """What the packed pass does not know about ``model`` at this prompt length; None when it can run it."""
    if is_bridge(model):
        return "a TransformerBridge"
    cfg = model.cfg
    if (name := next((name for name in _OPTIONS if getattr(cfg, name, None)), None)) is not None:
        return name
    if cfg.original_architecture in _POST_NORM:
        return "norms behind attention and MLP"
    if cfg.attention_dir != "causal" or cfg.positional_embedding_type not in ("rotary", "standard"):
        return f"{cfg.attention_dir} attention with {cfg.positional_embedding_type} positions"
    if cfg.normalization_type not in _NORMS or cfg.is_layer_norm_activation():
        return f"normalization {cfg.normalization_type} with activation {cfg.act_fn}"
    if cfg.use_qk_norm and cfg.positional_embedding_type != "rotary":
        return "norms of queries and keys without rotary positions"
    if (cfg.attn_scores_soft_cap or 0) > 0:
        return "a soft cap on attention scores"
    if cfg.use_local_attn and (cfg.window_size or 0) < length:
        return f"a sliding window of {cfg.window_size} tokens"
    if any(point.fwd_hooks for point in model.hook_dict.values()):
        return "hooks that are installed on the model"
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
        self.model, self.cfg = model, model.cfg
        self.n_heads: int = model.cfg.n_heads
        self.n_kv_heads: int = model.cfg.n_key_value_heads or model.cfg.n_heads
        self.d_head: int = model.cfg.d_head
        self.parallel: bool = bool(model.cfg.parallel_attn_mlp)
        self.rotary: bool = model.cfg.positional_embedding_type == "rotary"
        self.length = length
        self._blocks: dict[int, PackedBlock] = {}

    def block(self, layer: int) -> PackedBlock:
        """The weights of block ``layer``."""
        if layer not in self._blocks:
            with torch.no_grad():
                self._blocks[layer] = _block(self, self.model.blocks[layer])
        return self._blocks[layer]

    def logits(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_vocab"]:
        """The model's output for packed residuals after the last block."""
        unembed, cap = self.model.unembed, self.cfg.output_logits_soft_cap or 0
        x = _norm(self.cfg, self.model.ln_final)(x.to(unembed.W_U.device))
        out = x @ unembed.W_U if (b := _bias(unembed.b_U)) is None else torch.addmm(b, x, unembed.W_U)
        return cap * torch.tanh(out / cap) if cap > 0 else out


def _bias(b: Tensor | None) -> Tensor | None:
    """TransformerLens keeps biases of zeros where a model has none: they need not be added."""
    return None if b is None or not b.any() else b


def _norm(cfg: Any, norm: Any) -> Norm:
    kind = "rms" if cfg.normalization_type.startswith("RMS") else "layer"
    return Norm(kind, float(cfg.eps), getattr(norm, "w", None), getattr(norm, "b", None), cfg.dtype)


def _columns(W: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "d_model columns"]:
    return W.transpose(0, 1).flatten(1)


def _block(packed: PackedModel, block: Any) -> PackedBlock:
    cfg, attn, mlp = packed.cfg, block.attn, block.mlp
    grouped = cfg.n_key_value_heads is not None
    W_K, W_V = (attn._W_K, attn._W_V) if grouped else (attn.W_K, attn.W_V)
    b_K, b_V = (attn._b_K, attn._b_V) if grouped else (attn.b_K, attn.b_V)
    rotary = None
    if packed.rotary:
        if packed.length > attn.rotary_cos.shape[0]:
            attn._extend_rotary_embeddings(packed.length)
        rotary = (attn.rotary_cos[: packed.length], attn.rotary_sin[: packed.length])
    return PackedBlock(
        ln1=_norm(cfg, block.ln1),
        ln2=_norm(cfg, block.ln2),
        W_qkv=torch.cat([_columns(attn.W_Q), _columns(W_K), _columns(W_V)], -1),
        b_qkv=_bias(torch.cat([attn.b_Q.flatten(), b_K.flatten(), b_V.flatten()])),
        W_O=attn.W_O.flatten(0, 1),
        b_O=_bias(attn.b_O),
        W_gate=getattr(mlp, "W_gate", None),
        W_in=mlp.W_in,
        b_in=_bias(mlp.b_in),
        W_out=mlp.W_out,
        b_out=_bias(mlp.b_out),
        act=mlp.act_fn,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        scale=float(attn.attn_scale),
        rotary=rotary,
    )
