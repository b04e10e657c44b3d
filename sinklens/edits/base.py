"""What an edit is: a name, the sites that it must see, and a call on gathered activations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import FunctionType
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.sites import HookSite

Gathered: TypeAlias = Float[Tensor, "pair unit *rest"]


@dataclass(frozen=True, eq=False)
class EditSite:
    """What an edit may know about the places that it is applied to."""

    layer: int
    """Block index."""
    prompts: Int[Tensor, " pair"]
    """Index of the prompt that each pair comes from."""
    positions: Int[Tensor, " pair"]
    """Token position of each pair."""
    units: Int[Tensor, "pair unit"] | None = None
    """Selected unit indices, or ``None`` for the whole axis."""
    live: Mapping[str, Gathered] = field(default_factory=dict)
    """Activations of this forward pass at the sites in ``Edit.reads`` (keys are site templates)."""
    source_live: Mapping[str, Gathered] = field(default_factory=dict)
    """The source run's activations at the sites in ``Edit.reads``."""


@dataclass(frozen=True, eq=False)
class Edit:
    """Base class: a name, the other sites it must see, and a call."""

    name: str
    """Short name, used in tables."""

    @property
    def reads(self) -> tuple[HookSite, ...]:
        """Sites of the same block, earlier in the forward pass, whose activations the edit needs."""
        return ()

    @property
    def uses_source(self) -> bool:
        """Whether the edit needs the activation of a source run."""
        return False

    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        """The edited activation, of the shape of ``x``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 over the class and all parameters, tensors by value: equal edits have equal fingerprints."""
        digest = hashlib.sha256(type(self).__qualname__.encode())
        for item in fields(self):
            _update(digest, getattr(self, item.name))
        return digest.hexdigest()


def _update(digest: hashlib._Hash, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(str((tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Edit):
        digest.update(value.fingerprint().encode())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(repr(key).encode())
            _update(digest, value[key])
    elif isinstance(value, FunctionType):
        _update_function(digest, value)
    else:
        digest.update(repr(value).encode())


def _update_function(digest: hashlib._Hash, function: FunctionType) -> None:
    # A function is known by what it does: its repr would hold an address that differs in every process.
    code = function.__code__
    constants = [item for item in code.co_consts if isinstance(item, (int, float, str, tuple, type(None)))]
    digest.update(code.co_code)
    digest.update(repr((function.__qualname__, code.co_names, constants)).encode())
    for cell in function.__closure__ or ():
        _update(digest, cell.cell_contents)


def select(full: Float[Tensor, "unit ..."], like: Gathered, units: Int[Tensor, "pair unit"] | None) -> Tensor:
    """Per-unit parameters broadcast to the pairs of ``like``, on its device and in its dtype."""
    full = full.to(like)
    return full.unsqueeze(0) if units is None else full[units]


def need(source: Gathered | None, edit: Edit) -> Gathered:
    """``source``, or a ``ValueError`` that names the edit which cannot do without."""
    if source is None:
        raise ValueError(f"the edit {edit.name!r} needs a source run: give the patch source=Source(...)")
    return source
