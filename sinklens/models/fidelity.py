"""How near a loaded model is to Hugging Face's, and what holds in it: measured on small random models of a family.

`load_model` refuses what is not near enough (:mod:`sinklens.models.compare`); here the numbers are, for the table of
what runs on what.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from sinklens.errors import InputError, NotApplicableError
from sinklens.models.backends import has_hooked_transformer
from sinklens.models.compare import look, look_loaded, prompt
from sinklens.models.families import random_model
from sinklens.models.given import private_copy
from sinklens.models.identities import HOOKS, IDENTITIES, identities
from sinklens.models.load import Backend, load_model
from sinklens.models.view import model_shape
from sinklens.models.writes import check_writable

LENGTH = 40
"""Tokens of the prompt: more than every window of the small models."""
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Fidelity:
    """One family on one backend in one dtype."""

    family: str
    """Key of :data:`sinklens.models.families.FAMILIES`."""
    backend: str
    """``hooked`` or ``bridge``."""
    dtype: str
    """Of weights and activations."""
    transformer_lens: str
    """The version of transformer-lens."""
    logits: float | None = None
    """Largest difference from Hugging Face's logits in that dtype, in standard deviations of these; None if refused."""
    patterns: float | None = None
    """Largest difference from its attention weights; None where one of the two shows none."""
    rounding: float | None = None
    """Largest difference of Hugging Face's own logits in that dtype from those in float32."""
    refused: str = ""
    """Why it is not loaded."""
    fails: tuple[str, ...] = ()
    """Identities that do not hold in some block."""
    ignored: tuple[str, ...] = ()
    """Hook points at which edits are refused."""


def fidelity(family: str) -> list[Fidelity]:
    """A small random model of ``family`` on every backend that is installed, in every dtype."""
    backends: list[Backend] = ["hooked", "bridge"] if has_hooked_transformer() else ["bridge"]
    return [_measured(family, backend, dtype) for backend in backends for dtype in DTYPES]


def _measured(family: str, backend: Backend, dtype: str) -> Fidelity:
    given = random_model(family)
    key: dict[str, Any] = {
        "family": family,
        "backend": backend,
        "dtype": dtype,
        "transformer_lens": version("transformer-lens"),
    }
    try:
        model = load_model(given, backend=backend, dtype=dtype, device="cpu")
    except InputError as error:
        return Fidelity(**key, refused=str(error))
    tokens = prompt(given, min(LENGTH, model_shape(model).n_ctx))
    exact = look(private_copy(given), tokens)
    theirs = look(private_copy(given, dtype=getattr(torch, dtype)), tokens)
    ours = look_loaded(model, tokens, sorted(theirs.patterns))
    off = [_largest(ours.patterns[layer], theirs.patterns[layer]) for layer in ours.patterns]
    scale = float(exact.logits.std())
    return Fidelity(
        **key,
        logits=_largest(ours.logits, theirs.logits) / scale,
        patterns=max(off, default=None),
        rounding=_largest(theirs.logits, exact.logits) / scale,
        fails=tuple(name for name in IDENTITIES if not identities(model).holds(name)),
        ignored=tuple(name for name in HOOKS if _is_refused(model, name)),
    )


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def _is_refused(model: Any, name: str) -> bool:
    """Whether an edit at a hook point that the model computes is refused."""
    layers = range(model_shape(model).n_layers)
    if not any(f"blocks.{layer}.{name}" in identities(model).fired for layer in layers):
        return False
    try:
        check_writable(model, "blocks.{layer}." + name, layers)
    except NotApplicableError:
        return True
    return False
