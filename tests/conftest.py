"""Fixtures that are dear to build, once per session. Tests that use them must leave them without hooks."""

from __future__ import annotations

import os

# Before anything imports transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.tiny import tiny_model


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several threads on matrices of 32 columns spend their time waiting for one another."""
    import torch

    before = torch.get_num_threads()
    if request.node.get_closest_marker("smollm2") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The real model, on the default backend."""
    from sinklens.models.load import load_model

    return load_model("smollm2", device="cpu")


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """Gated MLP, RMSNorm, rotary, grouped-query attention; a HookedTransformer where there is one."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_bridge() -> Any:
    """The weights of `tiny_llama` in a TransformerBridge."""
    return tiny_model("llama", "bridge")


@pytest.fixture(scope="session")
def tiny_gpt2() -> Any:
    """Plain MLP, LayerNorm, learned positions."""
    return tiny_model("gpt2")


@pytest.fixture(scope="session")
def tiny_neox() -> Any:
    """Parallel attention and MLP."""
    return tiny_model("gpt_neox")
