"""Tiny random models for tests: seeded, no tokenizer (see :mod:`sinklens.models.families`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sinklens.models.backends import has_hooked_transformer
from sinklens.models.families import (
    D_HEAD,
    D_MLP,
    D_MODEL,
    D_VOCAB,
    FAMILIES,
    N_CTX,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    random_model,
)
from sinklens.models.load import load_model

__all__ = ["D_HEAD", "D_MLP", "D_MODEL", "D_VOCAB", "N_CTX", "N_HEADS", "N_KV_HEADS", "N_LAYERS"]

ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "gptj", "phi", "phi3", "olmo", "olmo2"),
)
"""Families that are taken apart: every size and weight of them is known to the tests."""
HOOKED = tuple(key for key in ARCHITECTURES if FAMILIES[key].hooked)
BRIDGE_ONLY = tuple(key for key in ARCHITECTURES if not FAMILIES[key].hooked)
BACKENDS: tuple[Literal["auto", "bridge"], ...] = ("auto", "bridge") if has_hooked_transformer() else ("bridge",)
"""A HookedTransformer, where there is one, and a bridge."""
WORDS = [f"w{i}" for i in range(4, D_VOCAB)]
"""What the tokenizer of :func:`save_tiny` knows."""


def slow_but(*quick: str, of: Iterable[str]) -> list[Any]:
    """The names as parameters of a test, of which only some belong to the quick tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in of]


def on_both(*quick: str, of: Iterable[str]) -> list[Any]:
    """The names as parameters: the quick ones with both versions of TransformerLens, the rest are slow."""
    return [pytest.param(name, marks=pytest.mark.backend if name in quick else pytest.mark.slow) for name in of]


def each_once(models: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Families and backends by name, no model twice: without HookedTransformer the default is a bridge too."""

    def backend_of(family: str, backend: str) -> str:
        hooked = has_hooked_transformer() and FAMILIES[family].hooked
        return backend if backend != "auto" else "hooked" if hooked else "bridge"

    first: dict[tuple[str, str], str] = {}
    for name, (family, backend) in models.items():
        first.setdefault((family, backend_of(family, backend)), name)
    return {name: models[name] for name in first.values()}


def tiny_hf(arch: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random Hugging Face model in eval mode; the same seed gives the same weights."""
    return random_model(arch, seed=seed, **overrides)


def tiny_model(
    arch: str = "llama", backend: Literal["auto", "hooked", "bridge"] = "auto", *, seed: int = 0, **overrides: Any
) -> Any:
    """The same tiny model behind either backend."""
    return load_model(tiny_hf(arch, seed=seed, **overrides), backend=backend, device="cpu")


def tiny_tokens(batch: int = 3, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random tokens [batch pos], special ones excluded."""
    return torch.randint(3, D_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def hooks_left(model: Any) -> list[str]:
    """Names of the hook points that still carry a hook, of TransformerLens' kind or of torch's."""
    return [
        name
        for name, point in model.hook_dict.items()
        if point.fwd_hooks or point.bwd_hooks or point._forward_hooks or point._forward_pre_hooks
    ]


def save_tiny(folder: Path) -> Path:
    """A random model without a sink, with a tokenizer of whole words, as a folder that can be loaded."""
    model = tiny_hf("llama")
    for name, weight in model.named_parameters():
        if "q_proj" in name:
            weight.data *= 0.1  # nearly uniform attention
    model.save_pretrained(folder)
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: i for i, word in enumerate(WORDS, 4)}
    core = Tokenizer(token_models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]: read-only stub
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder
