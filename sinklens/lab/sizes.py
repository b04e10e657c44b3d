"""Sizes of models that have a name."""

from __future__ import annotations

from dataclasses import dataclass

from sinklens.errors import InputError


@dataclass(frozen=True)
class Size:
    """A model's sizes, and what goes with them in training."""

    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Heads per block; their width is ``d_model / n_heads``."""
    d_mlp: int
    """Neurons per MLP."""
    n_ctx: int
    """Tokens of a row."""
    vocab: int
    """Tokens of a tokenizer that is made of the text."""
    tied: bool
    """Whether the unembedding is the embedding."""
    batch: int
    """Rows of a step."""
    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Of matrices."""


SIZES: dict[str, Size] = {
    "toy": Size(64, 2, 1, 256, 64, 256, True, 16, 1e-2, 0.0),
    "tiny": Size(128, 5, 4, 304, 256, 2048, True, 16, 3e-3, 0.1),
    "34m": Size(512, 8, 8, 1376, 512, 8192, False, 128, 1.5e-3, 0.1),
    "60m": Size(768, 10, 8, 1536, 2048, 50432, False, 512, 4e-4, 0.1),
    "150m": Size(768, 12, 12, 3072, 1024, 50257, True, 512, 6e-4, 0.1),
}
"""``toy`` is for bigram-backcopy on a CPU; ``tiny`` has 1.2M parameters (2.4 MB as bfloat16);
``34m`` 33.7M; ``60m`` is that of Gu et al. (59M without embeddings); ``150m`` has 152M, as arXiv 2605.06611 says of its
model, the shape of which it does not say."""


def size_of(name: str) -> Size:
    """The sizes of a name.

    Raises:
        InputError: there are none of that name.
    """
    if name not in SIZES:
        raise InputError(f"unknown size {name!r}; the known ones are {', '.join(SIZES)}.")
    return SIZES[name]
