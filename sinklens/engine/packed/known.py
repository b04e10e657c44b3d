"""Which models the packed pass knows."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.engine.packed import noise, of_decoder, of_hooked
from sinklens.engine.packed.of_bridge import BridgedModel
from sinklens.engine.packed.of_decoder import DecoderModel
from sinklens.engine.packed.of_hooked import HookedModel
from sinklens.engine.packed.proof import proof
from sinklens.engine.packed.weights import PackedModel
from sinklens.models.hooked import can_take_apart
from sinklens.models.parts import UnknownPartError
from sinklens.models.state import Snapshot, current_structure, foreign_hooks, foreign_part
from sinklens.models.view import Model, is_decoder
from sinklens.readouts.base import Readout

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""How far, relative to its size, a reading of the packed pass may be from the model's own in the check of the two."""


class DifferentModelError(Exception):
    """The packed pass does not give this model's numbers."""


_DIFFERENT: weakref.WeakKeyDictionary[Model, tuple[Snapshot, str]] = weakref.WeakKeyDictionary()
"""Models of which the packed pass was found to have other numbers, and where."""


def unsupported(model: Model, length: int) -> str | None:
    """What the packed pass does not know about ``model`` at this prompt length; None when it can run it."""
    if foreign_hooks(model):
        return "hooks that are installed on the model"
    if (part := foreign_part(model)) is not None:
        return part
    if is_decoder(model):
        return of_decoder.unknown_part(model)
    if can_take_apart(model):
        return of_hooked.unknown_part(model)
    if model in _DIFFERENT and _DIFFERENT[model][0] == current_structure(model):
        return _DIFFERENT[model][1]
    if (part := proof(model).why_not) is not None:
        return part
    try:
        packed_model(model, length)
    except UnknownPartError as error:
        return str(error)
    return None


def packed_model(model: Model, length: int) -> PackedModel:
    """The model taken apart for prompts of ``length`` tokens, where :func:`unsupported` has nothing to say."""
    if is_decoder(model):
        return DecoderModel(model, length)
    if can_take_apart(model):
        return HookedModel(model, length)
    found = proof(model)
    return BridgedModel(model, length, found.whole, found.proven)


def found_different(model: Model, why: str) -> None:
    """Remember that the packed pass has not this model's numbers."""
    _DIFFERENT[model] = (current_structure(model), why)


def check_reading(readout: Readout, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Make sure that a reading of the packed pass, ``[row, ...]``, is the model's own.

    Raises:
        DifferentModelError: it is not.
    """
    found, expected = (x.float().reshape(len(x), -1) for x in (found, expected))
    # What is not finite in both is another's to judge.
    same = (found == expected) | (found.isnan() & expected.isnan())
    apart, size = (found - expected).masked_fill(same, 0).norm(dim=1), expected.masked_fill(same, 0).norm(dim=1)
    off = ~(apart <= TOLERANCE[dtype] * size.clamp(min=0.01))
    if off.any():
        raise DifferentModelError(f"{readout.name}: {_first(found[off])} instead of {_first(expected[off])}")


@contextmanager
def rounding_allowed(packed: PackedModel, tokens: Int[Tensor, "row pos"]) -> Iterator[None]:
    """A comparison inside may fail by what rounding makes: in 16 bits these prompts are then tried block by block.

    Raises:
        DifferentModelError: it has failed, and not by rounding.
    """
    try:
        yield
    except DifferentModelError as error:
        if packed.dtype.itemsize > 2:
            raise
        if (why := noise.differs(packed.model, packed, tokens)) is not None:
            raise DifferentModelError(f"{error}; {why}") from error


def _first(values: Tensor) -> str:
    return f"{values[0, 0]:.6g}" if values.shape[1] == 1 else f"{values[0].norm():.6g} in size"
