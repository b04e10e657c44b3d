"""Sizes and plan of the decoder (:mod:`sinklens.models.decoder`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sinklens.errors import InputError
from sinklens.variants import AttentionSizes, make_variant, variant_code, variant_kind, variant_place


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
