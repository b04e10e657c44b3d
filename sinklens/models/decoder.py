"""A small decoder to be trained with variants of attention: Llama's blocks, with TransformerLens's names for all of it.

    resid_mid  = resid_pre + W_O(variant(norm(resid_pre)))        RMSNorm, rotary positions, grouped heads if asked for
    resid_post = resid_mid + W_out(silu(x W_gate) * (x W_in)),    x = norm(resid_mid)

Hook points, parameters and config have the names and axes that a HookedTransformer has, so that everything which works
on one works here; there is one more, ``attn.hook_aggregated``, in front of what a variant does to a head's output, of
which ``attn.hook_z`` is the end: what W_O reads. With :class:`~sinklens.variants.softmax.Softmax` it is Hugging Face's
Llama.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention, silu
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from sinklens.errors import InputError
from sinklens.variants import (
    REGISTRY,
    AttentionSizes,
    Slot,
    make_variant,
    overrides,
    variant_code,
    variant_kind,
    variant_place,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARCHITECTURE = "SinklensDecoder"
"""What the config of a saved decoder says that it is."""
WEIGHTS = "model.safetensors"
"""Name of the file with its weights."""


@dataclass
class DecoderConfig:
    """A decoder's sizes and plan, in TransformerLens's words."""

    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Query heads per block."""
    d_head: int = 32
    """Width of a head."""
    d_mlp: int = 344
    """Neurons per MLP."""
    d_vocab: int = 512
    """Number of tokens."""
    n_ctx: int = 256
    """Longest sequence that it is trained on; longer ones can be read."""
    n_key_value_heads: int | None = None
    """Key and value heads, where they are fewer than query heads."""
    tied: bool = True
    """Whether the unembedding is the embedding."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    eps: float = 1e-5
    """Added to the mean square in norms."""
    variant: str = "softmax"
    """How attention is computed."""
    variant_options: dict[str, Any] = field(default_factory=dict)
    """The variant's options."""
    model_name: str = "decoder"
    """What it is called in reports."""
    tokenizer_prepends_bos: bool = False
    """Whether its tokenizer puts a beginning-of-sequence token in front of a text."""

    # What TransformerLens's configs say besides.
    act_fn: str = "silu"
    gated_mlp: bool = True
    attention_dir: str = "causal"
    rotary_adjacent_pairs: bool = False
    use_qk_norm: bool = False  # a variant's matter
    attn_scores_soft_cap: float = 0.0
    output_logits_soft_cap: float = 0.0
    use_local_attn: bool = False
    window_size: int | None = None
    parallel_attn_mlp: bool = False
    attn_only: bool = False
    default_prepend_bos: bool = False
    ungroup_grouped_query_attention: bool = False
    n_devices: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        kind = variant_kind(self.variant)
        self.variant = kind.name  # of a file, too
        if self.n_key_value_heads == self.n_heads:
            self.n_key_value_heads = None
        for name in ("d_model", "n_layers", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        if self.rotary_base <= 0 or self.eps < 0:
            raise InputError(f"rotary_base must be over 0 and eps not under, not {self.rotary_base} and {self.eps}.")
        if self.d_head % 2 or self.n_heads % self.kv_heads:
            raise InputError(
                f"heads need an even width and a number that the key heads divide, not width {self.d_head} with "
                f"{self.n_heads} query and {self.kv_heads} key heads."
            )
        with torch.device("meta"):  # all options, those included that nobody has given
            self.variant_options = make_variant(self.variant, self.sizes(0), self.variant_options).options()
        self.variant_code = variant_code(self.variant)
        self.norms: Literal["pre", "sandwich", "post"] = kind.norms
        self.normalization_type = "RMS"
        self.positional_embedding_type = "rotary" if kind.rotary else "none"
        self.rotary_dim = self.d_head

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_key_value_heads or self.n_heads

    def is_layer_norm_activation(self) -> bool:
        """Whether the activation function has a norm of its own."""
        return False

    def sizes(self, layer: int) -> AttentionSizes:
        """What a variant is told of a block."""
        return AttentionSizes(self.d_model, self.n_heads, self.kv_heads, self.d_head, self.n_ctx, layer)

    def saved(self) -> dict[str, Any]:
        """The fields that a file keeps, and for a variant of the user's own where it comes from."""
        own = {} if self.variant_code is None else {"variant_from": variant_place(self.variant)}
        return {**{name: getattr(self, name) for name in SAVED}, **own}


SAVED = (
    "d_model",
    "n_layers",
    "n_heads",
    "d_head",
    "d_mlp",
    "d_vocab",
    "n_ctx",
    "n_key_value_heads",
    "tied",
    "rotary_base",
    "eps",
    "variant",
    "variant_options",
    "model_name",
)
"""Fields of a config that are written to a file; the others follow from them or are the same in all."""


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
        q = self.hook_q(torch.einsum("bpd,hde->bphe", x, self.W_Q))
        k = self.hook_k(torch.einsum("bpd,hde->bphe", x, self._kv("W_K")))
        v = self.hook_v(torch.einsum("bpd,hde->bphe", x, self._kv("W_V")))
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
        pre, linear = self.hook_pre(x @ self.W_gate), self.hook_pre_linear(x @ self.W_in)
        return self.hook_post(silu(pre) * linear) @ self.W_out


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


class Decoder(HookedRootModule):
    """The decoder.

    Args:
        cfg: its sizes and plan.
        tokenizer: its tokenizer, or None to work with token tensors.
        seed: of its weights (:func:`initialise`).

    Raises:
        InputError: the config's variant is unknown or does not fit.
    """

    def __init__(self, cfg: DecoderConfig, tokenizer: PreTrainedTokenizerBase | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.embed, self.hook_embed = Embed(cfg), HookPoint()
        self.token = nn.Parameter(torch.empty(cfg.d_model)) if variant_kind(cfg.variant).sink_token else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, cfg.eps)
        self.unembed = Unembed(cfg, self.embed)
        initialise(self, seed)
        self.setup()

    def forward(
        self,
        x: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        *,
        return_type: Literal["logits", "loss"] | None = "logits",
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
    ) -> Tensor | None:
        """A forward pass.

        Args:
            x: tokens; or the residual stream that enters block ``start_at_layer``.
            return_type: ``logits [batch pos d_vocab]``, the ``loss`` (mean cross-entropy of every next token, in
                nats), or None for nothing.
            start_at_layer: block to start with.
            stop_at_layer: block to stop in front of; then the residual stream there is returned.

        Raises:
            InputError: the loss is asked for without tokens.
        """
        if return_type not in ("logits", "loss", None):
            raise InputError(f'return_type must be "logits", "loss" or None, not {return_type!r}.')
        tokens, first = x, start_at_layer or 0
        if return_type == "loss" and start_at_layer is not None:
            raise InputError("the loss is that of tokens: give them, without start_at_layer.")
        resid = self.hook_embed(self.embed(x)) if start_at_layer is None else x
        for block, token in zip(self.blocks[first:stop_at_layer], self._tokens(first), strict=False):
            resid = block(resid, token)
        if stop_at_layer is not None:
            return resid
        if return_type is None:
            self.ln_final(resid)  # its hook points are part of a pass
            return None
        logits = self.unembed(self.ln_final(resid))
        return logits if return_type == "logits" else next_token_loss(logits, tokens)

    def _apply(self, fn: Any, recurse: bool = True) -> Decoder:
        """What ``to``, ``cuda``, ``double`` and the like do; the config says afterwards what they have done."""
        super()._apply(fn, recurse)
        weight = self.embed.W_E
        self.cfg.device, self.cfg.dtype = str(weight.device), weight.dtype
        return self

    def stepped(self) -> None:
        """To be called behind every step of training; see :meth:`Variant.stepped`."""
        for block in self.blocks:
            block.attn.variant.stepped()  # type: ignore[union-attr, operator]

    def sink_stream(self, layer: int) -> Float[Tensor, "d_model"] | None:
        """The learned token's normed input of block ``layer``; None where the variant has no such token."""
        token = next(self._tokens(layer))
        return None if token is None else self.blocks[layer]._before(1, token)  # type: ignore[operator]

    def _tokens(self, first: int) -> Iterator[Float[Tensor, "d_model"] | None]:
        """The learned token's stream in front of each block from ``first`` on."""
        token = self.token
        for layer, block in enumerate(self.blocks):
            if layer >= first:
                yield token
            token = None if token is None else block.of_token(token)  # type: ignore[operator]

    @torch.no_grad()
    def generate(
        self, tokens: Int[Tensor, "batch pos"], max_new_tokens: int = 20, *, temperature: float = 0.0, seed: int = 0
    ) -> Int[Tensor, "batch longer"]:
        """Tokens with more behind them, one after the other, without a cache: hooks see the whole sequence each time.

        Args:
            tokens: what to go on from.
            max_new_tokens: how many to add.
            temperature: of sampling; 0 takes the likeliest.
            seed: of sampling.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_new_tokens):
            logits = self(tokens)[:, -1]
            if temperature:
                chances = (logits / temperature).softmax(-1).cpu()
                new = torch.multinomial(chances, 1, generator=generator).to(tokens)
            else:
                new = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, new], 1)
        return tokens


def next_token_loss(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of every next token, in nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def initialise(model: Decoder, seed: int, sd: float = 0.02) -> None:
    """Weights to start training from: normal with ``sd``, W_O and W_out with ``sd / sqrt(2 n_layers)`` (GPT-2's).

    Each parameter has a draw of its own, that goes by its name: two variants of one seed start from the same weights
    wherever both have them. What a variant brings is drawn as it says (``drawn``), or has been set by it.
    """
    for name, weight in model.named_parameters():
        kind = name.rpartition(".")[2]
        own = variant_kind(model.cfg.variant).drawn if ".variant." in name else None
        if kind == "w" if own is None else kind not in own:
            continue
        key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(key)
        deep = own is None and kind in ("W_O", "W_out")
        size = sd / (2 * model.cfg.n_layers) ** 0.5 if deep else sd if own is None else own[kind]
        weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * size)


# --- Files -----------------------------------------------------------------------------------------------------------


def save_decoder(model: Decoder, folder: Path) -> None:
    """Write config, weights and tokenizer into ``folder``, which is there.

    What of it may be read by others: ``model.safetensors``, by the names of the parameters.
    """
    from safetensors.torch import save_file

    from sinklens.records.files import write_json

    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    write_json(folder / "config.json", {"architectures": [ARCHITECTURE], **model.cfg.saved()})
    save_file(weights, folder / WEIGHTS)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def is_decoder_config(config: object) -> bool:
    """Whether a ``config.json`` is that of a saved decoder."""
    return isinstance(config, dict) and config.get("architectures") == [ARCHITECTURE]


def load_decoder(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Decoder:
    """A decoder, without its tokenizer, from a folder that :func:`save_decoder` wrote.

    Raises:
        InputError: the files are damaged, do not belong together, or need a variant that is not known here.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (absent := [name for name in SAVED if name not in config]) != []:
        raise InputError(f"{folder / 'config.json'} does not say {absent[0]}; save the model again.")
    if config["variant"] not in REGISTRY:
        where = config.get("variant_from", "the file that registers it")
        raise InputError(
            f"{folder} was trained with the variant {config['variant']!r}, which is not known here: import {where}, "
            "which calls register_variant, before you load the model (models bring no code with them)."
        )
    try:
        model = Decoder(_config_of(config))
        weights = load_file(folder / WEIGHTS)
        own = dict(model.named_parameters())
        if set(own) != set(weights) or any(own[name].shape != weights[name].shape for name in own):
            name = min(set(own) ^ set(weights), default="one of another shape")
            raise InputError(f"{folder / WEIGHTS} does not fit its config.json ({name}); save the model again.")
        model.load_state_dict(weights, strict=False)
    except InputError:
        raise
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} holds no decoder that can be read ({error}); save the model again.") from error
    return model.to(dtype).eval()


def _config_of(config: dict[str, Any]) -> DecoderConfig:
    like = DecoderConfig()
    for name in SAVED:
        kinds = int if name == "n_key_value_heads" else type(getattr(like, name))
        value = config[name]
        wrong = isinstance(value, bool) is not (kinds is bool)
        if (wrong or not isinstance(value, (int, float) if kinds is float else kinds)) and (
            value is not None or name != "n_key_value_heads"
        ):
            raise TypeError(f"{name} is {value!r}")
    return DecoderConfig(**{name: config[name] for name in SAVED})
