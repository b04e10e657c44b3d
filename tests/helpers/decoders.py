"""Small decoders with random weights that are large enough for attention to be far from uniform."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from sinklens.models.decoder import Decoder, DecoderConfig
from sinklens.variants import REGISTRY

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in REGISTRY if name != "window"},
    "window": ("window", {"window": 4}),
    "sigmoid normalised": ("sigmoid", {"normalised": True, "offset": True}),
    "gate headwise": ("gate", {"kind": "headwise"}),
    "k_bias shared": ("k_bias", {"shared": True}),
}
"""Every variant, some with other options than usual, by what a test is called."""
SIZES: dict[str, Any] = {
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 4,
    "d_head": 8,
    "d_mlp": 40,
    "d_vocab": 50,
    "n_ctx": 16,
}


def grouped(case: str) -> int | None:
    """Key heads: fewer than query heads where the variant allows it."""
    return None if CASES[case][0] == "differential" else 2


def made_decoder(case: str = "softmax", *, seed: int = 0, **sizes: Any) -> Any:
    """A decoder in evaluation mode whose own parameters, and those of its variant, are far from where they start."""
    variant, options = CASES[case]
    fields = {**SIZES, "n_key_value_heads": grouped(case), "variant": variant, "variant_options": options, **sizes}
    model = Decoder(DecoderConfig(**fields), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            weight.add_(draw * (0.3 if ".variant." in name or name.endswith(".w") else 0.1))
    return model.eval()


@cache
def kept_decoder(case: str) -> Any:
    """One that is made once; tests leave it as it is."""
    return made_decoder(case)
