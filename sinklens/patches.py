"""The nouns of patching: where from (:class:`Source`), what (:class:`Patch`), on what (runs), and to what effect
(:class:`Readout`).

A *run* is the model on the prompts with a tuple of root patches in force: ``()`` is the clean model, and the anchored
run of a sink pair has the patch that makes the sink. A :class:`Patch` names the run that it is applied in and the run
that its source activation comes from; denoising and noising are the two ways to fill these in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.edits import Edit
from sinklens.sites import HookSite

Positions: TypeAlias = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""Token positions: the same for every prompt, or one tuple for each prompt."""


def positions_of(positions: Positions, prompt: int) -> tuple[int, ...]:
    """The positions that belong to ``prompt``."""
    first = positions[0] if positions else ()
    if isinstance(first, tuple):
        return positions[prompt]  # type: ignore[return-value]  # one tuple for each prompt
    return positions  # type: ignore[return-value]  # shared by all prompts


@dataclass(frozen=True)
class Source:
    """The run and the positions that a patch takes its source activation from."""

    run: str
    """Name of the run."""
    positions: Positions | None = None
    """Positions in that run, matched one to one with the patch's; ``None``: the same positions."""


@dataclass(frozen=True, eq=False)
class Patch:
    """One intervention: a site, blocks, positions, units and an edit, in one run."""

    site: HookSite
    """Where the activation is edited."""
    layers: tuple[int, ...]
    """Blocks in which it is edited."""
    positions: Positions
    """Token positions that are edited."""
    edit: Edit
    """The edit."""
    units: tuple[int, ...] | None = None
    """Heads, neurons or dimensions that are edited; ``None``: all of them."""
    run: str = "base"
    """The run that the patch is applied in."""
    source: Source | None = None
    """Where the source activation comes from, for edits that use one."""
    label: str = ""
    """Free text for error messages."""
    allow_unchanged: bool = False
    """Accept that the edit changes nothing, as when a run's own activation is put back."""

    @property
    def start(self) -> int:
        """The earliest block that the patch changes."""
        return min(self.layers)

    @property
    def id(self) -> str:
        """Content hash: equal for patches that do the same thing, whatever their label."""
        parts = (self.site, self.layers, self.positions, self.units, self.run, self.source, self.edit.fingerprint())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """A short name for messages."""
        return self.label or f"{self.edit.name} at {self.site.template} layers {self.layers} positions {self.positions}"


Runs: TypeAlias = Mapping[str, Sequence[Patch]]
"""Run name to the root patches that are in force throughout it."""

CLEAN: Runs = {"base": ()}
"""Just the model as it is."""


def per_prompt_index(positions: Positions, n_prompts: int) -> Int[Tensor, " prompt"]:
    """One position for each prompt as a tensor.

    Raises:
        ValueError: when a prompt has none or several.
    """
    chosen = [positions_of(positions, i) for i in range(n_prompts)]
    if any(len(item) != 1 for item in chosen):
        raise ValueError("exactly one position for each prompt is needed here")
    return torch.tensor([item[0] for item in chosen])
