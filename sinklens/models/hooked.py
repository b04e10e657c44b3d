"""A HookedTransformer, or a decoder of ours, taken apart: all weights of a block, and the options that change what it
computes.

Two things compute a part of the model by themselves: the packed pass (whole blocks) and the QK fix (attention). They
need everything that the part has, keys before they are repeated for the query heads, biases, rotary tables, the
activation function. A bridge keeps these in Hugging Face's own modules, in a shape of each architecture's own, and so
cannot be taken apart (`can_take_apart`).

Nothing is copied: a weight here is the model's own tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.models.view import Model, is_bridge
from sinklens.variants import Slot, Variant, overrides


@dataclass(frozen=True)
class Options:
    """What a HookedTransformer's config says of the computation, in TransformerLens's words."""

    dtype: torch.dtype
    """What activations are cast to after a norm."""
    norm: str
    """Kind of norm: RMS, RMSPre, LN, LNPre, ..."""
    norm_eps: float
    """The small constant that the norms add before the square root."""
    act_fn: str
    """Name of the MLP's activation function."""
    norm_in_activation: bool
    """Whether that activation function has a norm of its own."""
    attention_dir: str
    """``causal`` or ``bidirectional``."""
    positions: str
    """How positions enter: rotary, standard, ..."""
    rotary_adjacent: bool
    """Whether rotary embeddings turn neighbouring dimensions together (GPT-J), or those half of them apart."""
    qk_norm: bool
    """Whether queries and keys are normed."""
    scores_cap: float
    """Soft cap on attention scores; 0 without."""
    logits_cap: float
    """Soft cap on logits; 0 without."""
    window: int | None
    """Tokens that a query of the blocks with local attention sees; None without such blocks."""


@dataclass(frozen=True, eq=False)
class NormWeights:
    """A norm's weights."""

    w: Float[Tensor, " d_model"] | None
    """Multiplier; None when it is folded away."""
    b: Float[Tensor, " d_model"] | None
    """Offset; None where there is none."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embeddings of one block."""

    cos: Float[Tensor, "pos rotary_dim"]
    """Cosines by position."""
    sin: Float[Tensor, "pos rotary_dim"]
    """Sines by position."""
    adjacent: bool
    """See :attr:`Options.rotary_adjacent`."""

    def turned(
        self, x: Float[Tensor, "pair unit d_head"], positions: Int[Tensor, " pair"]
    ) -> Float[Tensor, "pair unit d_head"]:
        """Queries or keys, each turned by its own position; dimensions beyond `rotary_dim` stay."""
        size = self.cos.shape[-1]
        own, passed = x[..., :size], x[..., size:]
        cos, sin = (table.to(x.device)[positions, None] for table in (self.cos, self.sin))
        return torch.cat([own * cos + self._quarter(own) * sin, passed], -1)

    def _quarter(self, x: Float[Tensor, "*batch rotary_dim"]) -> Float[Tensor, "*batch rotary_dim"]:
        """Every pair ``(a, b)`` as ``(-b, a)``."""
        if self.adjacent:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """One block's attention."""

    W_Q: Float[Tensor, "head d_model d_head"]
    """Query projection."""
    b_Q: Float[Tensor, "head d_head"]
    """Its bias, zeros where the model has none; so are all biases here."""
    W_K: Float[Tensor, "kv_head d_model d_head"]
    """Key projection."""
    b_K: Float[Tensor, "kv_head d_head"]
    """Its bias."""
    W_V: Float[Tensor, "kv_head d_model d_head"]
    """Value projection."""
    b_V: Float[Tensor, "kv_head d_head"]
    """Its bias."""
    W_O: Float[Tensor, "head d_head d_model"]
    """Output projection."""
    b_O: Float[Tensor, " d_model"]
    """Its bias."""
    q_norm: Callable[[Tensor], Tensor] | None
    """Norms each query (Qwen3), on the device of the weights; None in most models."""
    k_norm: Callable[[Tensor], Tensor] | None
    """The same for keys."""
    scale: float
    """Scores are divided by this."""
    rotary: Rotary | None
    """Rotary embeddings; None where positions enter in another way."""
    window: int | None
    """How many tokens a query sees, itself included, in a block with local attention; None for all before it."""


@dataclass(frozen=True, eq=False)
class MLPWeights:
    """One block's MLP."""

    W_gate: Float[Tensor, "d_model d_mlp"] | None
    """Gate projection; None in an MLP without a gate."""
    W_in: Float[Tensor, "d_model d_mlp"]
    """Up projection."""
    b_in: Float[Tensor, " d_mlp"]
    """Its bias."""
    W_out: Float[Tensor, "d_mlp d_model"]
    """Down projection."""
    b_out: Float[Tensor, " d_model"]
    """Its bias."""
    act: Callable[[Tensor], Tensor]
    """The activation function."""


def can_take_apart(model: Model) -> bool:
    """Whether the functions below know the model: it is a HookedTransformer, or a decoder of ours."""
    return not is_bridge(model)


def options(model: Model) -> Options:
    """The options that decide what the blocks compute."""
    cfg = _inside(model).cfg
    return Options(
        dtype=cfg.dtype,
        norm=str(cfg.normalization_type),
        norm_eps=float(cfg.eps),
        act_fn=str(cfg.act_fn),
        norm_in_activation=cfg.is_layer_norm_activation(),
        attention_dir=cfg.attention_dir,
        positions=cfg.positional_embedding_type,
        rotary_adjacent=bool(cfg.rotary_adjacent_pairs),
        qk_norm=bool(cfg.use_qk_norm),
        scores_cap=max(cfg.attn_scores_soft_cap or 0, 0),  # TransformerLens: -1 for none
        logits_cap=max(cfg.output_logits_soft_cap or 0, 0),
        window=(cfg.window_size or 0) if cfg.use_local_attn else None,
    )


def has_option(model: Model, name: str) -> bool:
    """Whether an option that TransformerLens calls ``name`` is set; one that this version does not have is not."""
    return bool(getattr(_inside(model).cfg, name, None))


def attention_weights(model: Model, layer: int, length: int) -> AttentionWeights:
    """The attention of block ``layer``, with rotary tables for at least ``length`` positions."""
    cfg, attn = _inside(model).cfg, _inside(model).blocks[layer].attn
    # Under grouped-query attention W_K is repeated for the query heads, and _W_K is the parameter.
    own = "_" if cfg.n_key_value_heads is not None else ""
    rotary = None
    if cfg.positional_embedding_type == "rotary":
        if length > attn.rotary_cos.shape[0]:
            attn._extend_rotary_embeddings(length)
        rotary = Rotary(attn.rotary_cos, attn.rotary_sin, bool(cfg.rotary_adjacent_pairs))
    return AttentionWeights(
        W_Q=attn.W_Q,
        b_Q=attn.b_Q,
        W_K=getattr(attn, f"{own}W_K"),
        b_K=getattr(attn, f"{own}b_K"),
        W_V=getattr(attn, f"{own}W_V"),
        b_V=getattr(attn, f"{own}b_V"),
        W_O=attn.W_O,
        b_O=attn.b_O,
        q_norm=changed_by(model, layer, "queries") or getattr(attn, "q_norm", None),
        k_norm=changed_by(model, layer, "keys") or getattr(attn, "k_norm", None),
        scale=float(attn.attn_scale),
        rotary=rotary,
        window=int(cfg.window_size) if getattr(attn, "attn_type", "global") == "local" else None,
    )


def variant_of(model: Model, layer: int) -> Variant | None:
    """What a decoder of ours computes attention with in a block; None for any other model."""
    return getattr(_inside(model).blocks[layer].attn, "variant", None)


def changed_by(model: Model, layer: int, name: str) -> Callable[[Tensor], Tensor] | None:
    """The variant's method of that name (``queries``, ``keys``, ``values``); None where it does nothing there."""
    variant = variant_of(model, layer)
    return getattr(variant, name) if variant is not None and overrides(variant, name) else None


def sink_slot(model: Model, layer: int) -> Callable[[Float[Tensor, "*batch head d_head"]], Slot | None] | None:
    """What queries of a block attend to besides the keys of their prompt, from the queries as they meet the keys."""
    variant, attn = variant_of(model, layer), _inside(model).blocks[layer].attn
    if variant is None:
        return None
    if (token := _inside(model).sink_stream(layer)) is not None:
        return lambda q: attn._slot_of(token, q)
    return variant.slot if overrides(variant, "slot") else None


def norms_behind(model: Model, layer: int) -> tuple[NormWeights | None, NormWeights | None]:
    """The norms behind attention and behind the MLP, where the block has them."""
    block = _inside(model).blocks[layer]
    found = (getattr(block, "ln1_post", None), getattr(block, "ln2_post", None))
    return tuple(None if norm is None else _norm(norm) for norm in found)  # type: ignore[return-value]


def mlp_weights(model: Model, layer: int) -> MLPWeights:
    """The MLP of block ``layer``."""
    mlp = _inside(model).blocks[layer].mlp
    return MLPWeights(getattr(mlp, "W_gate", None), mlp.W_in, mlp.b_in, mlp.W_out, mlp.b_out, mlp.act_fn)


def norms(model: Model, layer: int) -> tuple[NormWeights | None, NormWeights | None]:
    """The norms of block ``layer``: in front of attention, and in front of the MLP; None where there is none."""
    block = _inside(model).blocks[layer]
    found = (getattr(block, "ln1", None), getattr(block, "ln2", None))
    return tuple(None if norm is None else _norm(norm) for norm in found)  # type: ignore[return-value]


def final_norm(model: Model) -> NormWeights:
    """The norm in front of the unembedding."""
    return _norm(_inside(model).ln_final)


def unembedding(model: Model) -> tuple[Float[Tensor, "d_model d_vocab"], Float[Tensor, " d_vocab"]]:
    """The unembedding, and its bias."""
    unembed = _inside(model).unembed
    return unembed.W_U, unembed.b_U


def _norm(module: Any) -> NormWeights:
    return NormWeights(getattr(module, "w", None), getattr(module, "b", None))


def _inside(model: Model) -> Any:
    """The model without its protocol."""
    return model
