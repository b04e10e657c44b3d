"""What the decoder (:mod:`sinklens.models.decoder`) is made of: its norms, embeddings, attention, MLP and blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu
from transformer_lens.hook_points import HookPoint

from sinklens.models.decoder_config import DecoderConfig
from sinklens.variants import Slot, make_variant, overrides


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * w``; the statistics are float32."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.w = nn.Parameter(torch.ones(d))
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The normed activation, in the dtype of the weight."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        scale = self.hook_scale((wide.square().mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(wide / scale).to(self.w.dtype) * self.w


class Embed(nn.Module):
    """Token embedding."""

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The embeddings."""
        return self.W_E[tokens]


class Unembed(nn.Module):
    """From the last residual to logits: a matrix of its own, or the embedding."""

    def __init__(self, cfg: DecoderConfig, embed: Embed) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab)) if not cfg.tied else None
        self._embed = (embed,)  # in a tuple, so that it is no part of this module
        self.register_buffer("b_U", torch.zeros(cfg.d_vocab), persistent=False)
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The matrix."""
        return self._embed[0].W_E.T if self.own is None else self.own

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits."""
        return self.hook_out(self.hook_in(x) @ self.W_U)


class Attention(nn.Module):
    """Attention of one block, as its variant computes it."""

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.cfg = cfg
        grouped = cfg.n_key_value_heads is not None
        self.W_Q = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_model, cfg.d_head))
        for name in ("W_K", "W_V"):  # as in TransformerLens, where W_K is _W_K repeated for the heads that share it
            weight = nn.Parameter(torch.empty(cfg.kv_heads, cfg.d_model, cfg.d_head))
            self.register_parameter(f"_{name}" if grouped else name, weight)
        self.W_O = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head, cfg.d_model))
        for name, heads in (("b_Q", cfg.n_heads), ("b_K", cfg.kv_heads), ("b_V", cfg.kv_heads)):
            own = f"_{name}" if grouped and name != "b_Q" else name
            self.register_buffer(own, torch.zeros(heads, cfg.d_head), persistent=False)
        self.register_buffer("b_O", torch.zeros(cfg.d_model), persistent=False)
        self.attn_scale = cfg.d_head**0.5
        self.variant = make_variant(cfg.variant, cfg.sizes(layer), cfg.variant_options)
        self.rotary_cos: Tensor
        self.rotary_sin: Tensor
        self.register_buffer("rotary_cos", torch.empty(0, cfg.d_head), persistent=False)
        self.register_buffer("rotary_sin", torch.empty(0, cfg.d_head), persistent=False)
        self._extend_rotary_embeddings(cfg.n_ctx)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        if self.variant.rotary:
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_aggregated, self.hook_z = HookPoint(), HookPoint()

    if not TYPE_CHECKING:  # grouped: what nn.Module does not find

        def __getattr__(self, name: str) -> Any:
            if name in ("W_K", "W_V", "b_K", "b_V") and self.cfg.n_key_value_heads is not None:
                own = super().__getattr__(f"_{name}")
                return own.repeat_interleave(self.cfg.n_heads // self.cfg.kv_heads, 0)
            return super().__getattr__(name)

    def _kv(self, name: str) -> Float[Tensor, "kv_head d_model d_head"]:
        return getattr(self, f"_{name}" if self.cfg.n_key_value_heads is not None else name)

    def _extend_rotary_embeddings(self, length: int) -> None:
        """Tables of cosines and sines for ``length`` positions, of two equal halves."""
        frequencies = self.cfg.rotary_base ** -(torch.arange(0, self.cfg.d_head, 2, device="cpu") / self.cfg.d_head)
        angles = torch.outer(torch.arange(length, device="cpu").float(), frequencies).repeat(1, 2)
        like = self.rotary_cos
        self.rotary_cos, self.rotary_sin = (t.to(like.device, like.dtype) for t in (angles.cos(), angles.sin()))

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], token: Float[Tensor, "d_model"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention writes.

        Args:
            x: the block's normed input.
            token: that of the learned token in front of all others, where the variant has one.
        """
        variant = self.variant
        q, k, v = self._projected(x)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        q, k, v = variant.queries(q), variant.keys(k), variant.values(v)
        if variant.rotary:
            q, k = self.hook_rot_q(self._turned(q)), self.hook_rot_k(self._turned(k))
        slot = variant.slot(q) if token is None else self._slot_of(token, q)
        shared = q.shape[2] // k.shape[2]
        if shared > 1:
            k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
        fused = self.training and not overrides(variant, "weights") and not self._looked_at()
        z = self._fused(q, k, v, slot) if fused else self._explicit(q, k, v, slot, x)
        z = self.hook_z(variant.output(self.hook_aggregated(z), x))
        return torch.einsum("bphe,hed->bpd", z, self.W_O)

    def _projected(self, x: Float[Tensor, "batch pos d_model"]) -> list[Tensor]:
        """Queries, keys and values; in training on a GPU by one product, which reads ``x`` once."""
        weights = [self.W_Q, self._kv("W_K"), self._kv("W_V")]
        if not (self.training and x.is_cuda):
            return [torch.einsum("bpd,hde->bphe", x, weight) for weight in weights]
        return list(torch.einsum("bpd,hde->bphe", x, torch.cat(weights)).split([len(one) for one in weights], 2))

    def _looked_at(self) -> bool:
        """Whether somebody has hooks on scores or pattern."""
        return bool(self.hook_attn_scores._forward_hooks or self.hook_pattern._forward_hooks)

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, slot: Slot | None, x: Tensor
    ) -> Float[Tensor, "batch pos head d_head"]:
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / self.attn_scale
        wide = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        seen = self.variant.seen(q.shape[1], q.device)
        scores = self.hook_attn_scores(wide.masked_fill(~seen, -torch.inf))
        rows = scores.transpose(1, 2)  # as variants see them: [batch query head key]
        pattern, share = self.variant.weights(rows, None if slot is None else slot.logit.to(rows.dtype), x)
        pattern = self.hook_pattern(pattern.transpose(1, 2)).to(v.dtype)
        z = torch.einsum("bhqk,bkhe->bqhe", pattern, v)
        if share is not None and slot is not None and slot.value is not None:
            z = z + (share[..., None] * slot.value).to(z.dtype)
        return z

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, slot: Slot | None) -> Float[Tensor, "batch pos head d_head"]:
        """The same without a pattern, for training: numbers that are read always come from the lines above."""
        width = q.shape[-1]
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        if slot is not None:
            q, k, v = self._with_slot(q, k, v, slot)
        if (
            q.is_cuda
        ):  # cuDNN's gradients of views are wrong in a compiled model (torch 2.11); a compiler copies for nothing
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        mask = self._mask(q.shape[2], slot, q.device) if overrides(self.variant, "seen") else None
        scale = 1 / self.attn_scale
        z = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(1, 2)
        return z if slot is None else z[:, 1:, :, :width]

    def _with_slot(self, q: Tensor, k: Tensor, v: Tensor, slot: Slot) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, ``[batch head pos width]``, with the slot as the first key of a causal pattern.

        It has a dimension of its own, in which queries have the slot's score; kernels want a multiple of eight.
        """
        own = (slot.logit.transpose(1, 2) * self.attn_scale).to(q.dtype)[..., None]
        q = pad(torch.cat([q, own], -1), (0, 7, 1, 0))
        k = pad(k, (0, 8, 1, 0))
        here = torch.zeros_like(k)
        here[..., 0, -8] = 1
        k, v = k + here, pad(v, (0, 8, 1, 0))
        if slot.value is not None:
            at = pad(slot.value.to(v.dtype)[:, None], (0, 8, 0, v.shape[2] - 1))
            v = v + at
        return q, k, v

    def _mask(self, length: int, slot: Slot | None, device: torch.device) -> Tensor:
        if slot is None:
            return self.variant.seen(length, device)
        seen = pad(self.variant.seen(length - 1, device), (1, 0, 1, 0))
        seen[:, 0] = True
        return seen

    def of_token(self, x: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
        """What attention writes at the learned token, which sees itself alone."""
        v = self.variant.values(torch.einsum("d,hde->he", x, self._kv("W_V")))
        z = v.repeat_interleave(self.cfg.n_heads // len(v), 0)
        return torch.einsum("he,hed->d", self.variant.output(z, x), self.W_O)

    def _slot_of(self, token: Float[Tensor, "d_model"], q: Float[Tensor, "*batch head d_head"]) -> Slot:
        """The learned token as it is attended to: a token at position -1."""
        shared = self.cfg.n_heads // self.cfg.kv_heads
        k = self.variant.keys(torch.einsum("d,hde->he", token, self._kv("W_K")))
        v = self.variant.values(torch.einsum("d,hde->he", token, self._kv("W_V")))
        if self.variant.rotary:
            k = k * self.rotary_cos[1] - _quarter(k) * self.rotary_sin[1]
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        return Slot((q * k).sum(-1) / self.attn_scale, v)

    def _turned(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """Rotary embeddings."""
        length = x.shape[1]
        if length > len(self.rotary_cos):
            self._extend_rotary_embeddings(length)
        cos, sin = self.rotary_cos[:length, None], self.rotary_sin[:length, None]
        return (x * cos + _quarter(x) * sin).to(x.dtype)


def _quarter(x: Float[Tensor, "*batch d_head"]) -> Float[Tensor, "*batch d_head"]:
    """Every pair ``(a, b)`` of the two halves as ``(-b, a)``."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.W_gate = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.register_buffer("b_in", torch.zeros(cfg.d_mlp), persistent=False)
        self.register_buffer("b_out", torch.zeros(cfg.d_model), persistent=False)
        self.act_fn = silu
        self.hook_pre, self.hook_pre_linear, self.hook_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP writes."""
        if self.training and x.is_cuda:  # one product, as in attention
            pre, linear = (x @ torch.cat([self.W_gate, self.W_in], 1)).chunk(2, -1)
        else:
            pre, linear = x @ self.W_gate, x @ self.W_in
        return self.hook_post(silu(self.hook_pre(pre)) * self.hook_pre_linear(linear)) @ self.W_out


class Block(nn.Module):
    """One block."""

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        super().__init__()
        if cfg.norms != "post":
            self.ln1, self.ln2 = RMSNorm(cfg.d_model, cfg.eps), RMSNorm(cfg.d_model, cfg.eps)
        if cfg.norms != "pre":
            self.ln1_post, self.ln2_post = RMSNorm(cfg.d_model, cfg.eps), RMSNorm(cfg.d_model, cfg.eps)
        self.norms = cfg.norms
        self.attn, self.mlp = Attention(cfg, layer), MLP(cfg)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint(), HookPoint()
        self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint()

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], token: Float[Tensor, "d_model"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream behind the block; ``token`` is that of the learned token in front of it."""
        x = self.hook_resid_pre(x)
        out = self.attn(self._before(1, x), None if token is None else self._before(1, token))
        x = self.hook_resid_mid(x + self.hook_attn_out(self._behind(1, out)))
        out = self.mlp(self._before(2, x))
        return self.hook_resid_post(x + self.hook_mlp_out(self._behind(2, out)))

    def of_token(self, x: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
        """The same for the learned token."""
        x = x + self._behind(1, self.attn.of_token(self._before(1, x)))
        h = self._before(2, x)
        return x + self._behind(2, (silu(h @ self.mlp.W_gate) * (h @ self.mlp.W_in)) @ self.mlp.W_out)

    def _before(self, which: int, x: Tensor) -> Tensor:
        return x if self.norms == "post" else self._normed(getattr(self, f"ln{which}"), x)

    def _behind(self, which: int, x: Tensor) -> Tensor:
        return x if self.norms == "pre" else self._normed(getattr(self, f"ln{which}_post"), x)

    @staticmethod
    def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
        """A norm; without its hook points for the learned token, which is in no prompt."""
        return norm(x) if x.ndim > 1 else x / (x.square().mean() + norm.eps).sqrt() * norm.w
