"""Fixtures that are dear to build, once per session. Tests that use them must leave them without hooks."""

from __future__ import annotations

import os

# Before anything imports transformers, which reads it once. Processes that tests start, notebooks among them, inherit
# this: with one thread each they do not wait for one another's cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import save_tiny, tiny_model

LONG = ("test_ray.py", "test_capabilities.py", "test_smollm2.py", "test_readme.py")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread for tiny models: several on matrices of 32 columns spend their time waiting for one another.

    A hook and no fixture, so that it also holds while fixtures of a whole module are made. The real model gets all
    cores, or the share of one of the processes that run tests.
    """
    import torch

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    large = item.get_closest_marker("smollm2") is not None
    torch.set_num_threads(max(CORES // workers, 1) if large else 1)


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks run with both versions of TransformerLens: which of them, says who names them on the command line.

    They and other files that take minutes come first: begun last, they would keep one process busy and the others idle.
    """
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.backend)
    items.sort(key=lambda item: item.path.suffix != ".ipynb" and item.path.name not in LONG)


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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model without a sink, with a tokenizer of whole words; nothing may be changed in it."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")
