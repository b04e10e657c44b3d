"""A HookedTransformer in the packed pass: which ones it knows, and their weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.engine.packed.weights import Norm, PackedBlock, PackedModel
from sinklens.models.hooked import (
    NormWeights,
    Options,
    Rotary,
    attention_weights,
    final_norm,
    has_option,
    mlp_weights,
    norms,
    norms_behind,
    options,
    unembedding,
)
from sinklens.models.identities import IDENTITIES, identities
from sinklens.models.parts import Function, Linear, MLPParts
from sinklens.models.view import Model
from sinklens.sites import ROT_K, HookSite, K

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
_WITHOUT_NORMS_BEHIND = ("heads_write", "neurons_write")
# Options of TransformerLens that change the computation in a way that the packed pass does not have.
_OPTIONS = (
    "attn_only",
    "use_attn_in",
    "use_split_qkv_input",
    "use_hook_mlp_in",
    "use_attn_result",
    "load_in_4bit",
    "ungroup_grouped_query_attention",
    "use_attention_sinks",
    "use_logn_attn",
    "use_dynamic_ntk_rope",
    "num_experts",
    "clip_qkv",
)


def unknown_part(model: Model) -> str | None:
    """What the packed pass does not know about a HookedTransformer; None when it can run it."""
    if (name := next((name for name in _OPTIONS if has_option(model, name)), None)) is not None:
        return name
    measured = identities(model)
    # With a norm behind attention and MLP what they write is not yet what is added.
    needed = [
        name for name in _STANDS_ON if name not in _WITHOUT_NORMS_BEHIND or norms_behind(model, 0) == (None, None)
    ]
    if (failing := next((name for name in needed if not measured.holds(name)), None)) is not None:
        return f"a model without {IDENTITIES[failing].formula}"
    has = options(model)
    if has.attention_dir != "causal" or has.positions not in ("rotary", "standard"):
        return f"{has.attention_dir} attention with {has.positions} positions"
    if has.norm not in _NORMS or has.norm_in_activation:
        return f"normalization {has.norm} with activation {has.act_fn}"
    if has.qk_norm and has.positions != "rotary":
        return "norms of queries and keys without rotary positions"
    return None


class HookedModel(PackedModel):
    """A HookedTransformer taken apart."""

    def __init__(self, model: Model, length: int) -> None:
        super().__init__(model, length)
        self.options = options(model)

    @property
    def keys_site(self) -> HookSite:
        """See :attr:`PackedModel.keys_site`."""
        return ROT_K if self.rotary else K

    def take_apart(self, layer: int) -> PackedBlock:
        """See :meth:`PackedModel.take_apart`."""
        attn, mlp = attention_weights(self.model, layer, self.length), mlp_weights(self.model, layer)
        ln1, ln2 = (norm_of(self.options, norm) for norm in norms(self.model, layer))
        ln1_post, ln2_post = (norm_of(self.options, norm) for norm in norms_behind(self.model, layer))
        gated = mlp.W_gate is not None
        b_in = _bias(mlp.b_in)
        return PackedBlock(
            ln1=ln1,
            ln2=ln2,
            ln1_post=ln1_post,
            ln2_post=ln2_post,
            qkv=(
                Linear(
                    torch.cat([_columns(attn.W_Q), _columns(attn.W_K), _columns(attn.W_V)], -1),
                    _bias(torch.cat([attn.b_Q.flatten(), attn.b_K.flatten(), attn.b_V.flatten()])),
                ),
            ),
            out=Linear(attn.W_O.flatten(0, 1), _bias(attn.b_O)),
            mlp_parts=MLPParts(
                gate=Linear(mlp.W_gate, None) if mlp.W_gate is not None else None,
                up=Linear(mlp.W_in, None if gated else b_in),
                down=Linear(mlp.W_out, _bias(mlp.b_out)),
                act=mlp.act,
                offset=b_in if gated else None,
            ),
            whole_mlp=None,
            q_norm=_head_norm(attn.q_norm),
            k_norm=_head_norm(attn.k_norm),
            scale=attn.scale,
            rotary=_at_positions(attn.rotary, self.length),
            cap=self.options.scores_cap,
            seen=None if attn.window is None else _seen(attn.window, self.length, attn.W_O.device),
        )

    def logits(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_vocab"]:
        """See :meth:`PackedModel.logits`."""
        (W_U, b_U), cap = unembedding(self.model), self.options.logits_cap
        norm = norm_of(self.options, final_norm(self.model))
        assert norm is not None
        x = norm(x.to(W_U.device))
        out = Linear(W_U, _bias(b_U))(x)
        return cap * torch.tanh(out / cap) if cap > 0 else out


def _bias(b: Tensor | None) -> Tensor | None:
    """TransformerLens keeps biases of zeros where a model has none: they need not be added."""
    return None if b is None or not b.any() else b


def norm_of(has: Options, norm: NormWeights | None) -> Norm | None:
    """A norm of a model with these options; None where there is none."""
    if norm is None:
        return None
    return Norm("rms" if has.norm.startswith("RMS") else "layer", has.norm_eps, norm.w, norm.b, has.dtype)


def _seen(window: int, length: int, device: torch.device) -> Bool[Tensor, "pos pos"] | None:
    """The keys that each query sees through a window; None where prompts are no longer than it."""
    position = torch.arange(length, device=device)
    before = position[:, None] - position
    return None if window >= length else (before >= 0) & (before < window)


def _columns(W: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "d_model columns"]:
    return W.transpose(0, 1).flatten(1)


def _head_norm(norm: Function | None) -> Function | None:
    return None if norm is None else lambda x: norm(x.reshape(-1, x.shape[-1])).view(x.shape)


def _at_positions(rotary: Rotary | None, length: int) -> Rotary | None:
    return None if rotary is None else Rotary(rotary.cos[:length], rotary.sin[:length], rotary.adjacent)
