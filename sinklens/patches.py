"""The nouns of patching: where from (:class:`Source`), what (:class:`Patch`), on what (runs), and to what effect
(a readout, in :mod:`sinklens.readouts`).

A *run* is the model on the prompts with a tuple of root patches in force: ``()`` is the clean model, and the anchored
run of a sink pair has the patch that makes the sink. Root patches may take from other runs, as long as no run takes
from itself by way of others. A :class:`Patch` names the run that it is applied in and the run
that its source activation comes from; denoising and noising are the two ways to fill these in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.edits import Edit
from sinklens.errors import InputError
from sinklens.records.integers import as_plain, is_several, whole_number, whole_numbers
from sinklens.sites import HookSite


@dataclass(frozen=True, repr=False)
class Positions:
    """Token positions: the same in every prompt, or each prompt's own."""

    rows: tuple[tuple[int, ...], ...]
    """Each prompt's positions; a single entry where all prompts share them."""
    shared: bool
    """Whether all prompts share them."""

    def __post_init__(self) -> None:
        """Keep plain whole numbers, so that equal places look the same.

        Raises:
            InputError: something else, or several rows for all prompts.
        """
        if type(self.rows) is not tuple or any(
            type(row) is not tuple or any(type(position) is not int for position in row) for row in self.rows
        ):
            object.__setattr__(self, "rows", tuple(whole_numbers(row, "position") for row in self.rows))
        if self.shared and len(self.rows) != 1:
            raise InputError(f"positions that all prompts share are one tuple, not {len(self.rows)}")

    @staticmethod
    def of(where: Where) -> Positions:
        """From ``(3, 5)``, which all prompts share, or ``((3,), (5,))``, one tuple for each prompt.

        A number, lists, ranges, arrays and tensors will do, and masks of booleans, ``[pos]`` or ``[prompt, pos]``.

        Raises:
            InputError: what is no whole number, or numbers and tuples side by side.
        """
        if isinstance(where, Positions):
            return where
        if type(where) is tuple and all(type(entry) is int for entry in where):
            return Positions((where,), shared=True)  # pyright: ignore[reportArgumentType]
        entries = as_plain(where)
        if not is_several(entries):
            return Positions((whole_numbers(entries, "position"),), shared=True)
        entries = [as_plain(entry) for entry in entries]
        several = [is_several(entry) for entry in entries]
        if not any(several):
            return Positions((whole_numbers(entries, "position"),), shared=True)
        if not all(several):
            raise InputError(f"positions {where}: give numbers for all prompts, or a tuple for each")
        return Positions(tuple(whole_numbers(entry, "position") for entry in entries), shared=False)

    @staticmethod
    def one_each(positions: Iterable[int]) -> Positions:
        """One position for each prompt."""
        return Positions(tuple((whole_number(position, "position"),) for position in positions), shared=False)

    def at(self, prompt: int) -> tuple[int, ...]:
        """The positions of ``prompt``."""
        return self.rows[0] if self.shared else self.rows[prompt]

    def prompts(self, first: int, last: int) -> Positions:
        """Those of prompts ``first .. last - 1`` alone."""
        return self if self.shared else Positions(self.rows[first:last], shared=False)

    def single(self, n_prompts: int) -> Int[Tensor, " prompt"]:
        """One position for each prompt, as a tensor.

        Raises:
            InputError: when a prompt has none or several, or a negative one; or there are not as many prompts.
        """
        if not self.shared and len(self.rows) != n_prompts:
            raise InputError(f"positions are given for {len(self.rows)} prompts, but there are {n_prompts}")
        chosen = [self.at(prompt) for prompt in range(n_prompts)]
        if any(len(positions) != 1 for positions in chosen):
            raise InputError("exactly one position for each prompt is needed here")
        if any(positions[0] < 0 for positions in chosen):
            raise InputError(f"positions {self} must not be negative: they count from the first token")
        return torch.tensor([positions[0] for positions in chosen], dtype=torch.long, device="cpu")

    def __repr__(self) -> str:
        return repr(self.rows[0] if self.shared else self.rows)


Where: TypeAlias = (
    Positions | int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor | tuple[tuple[int, ...], ...]
)
"""Positions as they may be written: ``(3, 5)`` for all prompts, ``((3,), (5,))`` for each its own; see
:meth:`Positions.of`."""


@dataclass(frozen=True)
class Source:
    """The run and the positions that a patch takes its source activation from."""

    run: str
    """Name of the run."""
    positions: Where | None = None
    """Positions in that run, matched one to one with the patch's, or one for all of them; ``None``: the same
    positions. However they are given, they are kept as :class:`Positions`."""

    def __post_init__(self) -> None:
        if self.positions is not None:
            object.__setattr__(self, "positions", Positions.of(self.positions))

    def where(self, otherwise: Positions) -> Positions:
        """Its positions; those of whoever takes from it, where it names none."""
        return otherwise if self.positions is None else Positions.of(self.positions)


@dataclass(frozen=True, eq=False)
class Patch:
    """One intervention: a site, blocks, positions, units and an edit, in one run."""

    site: HookSite
    """Where the activation is edited."""
    layers: tuple[int, ...]
    """Blocks in which it is edited."""
    positions: Where
    """Token positions that are edited; however they are given, they are kept as :class:`Positions`."""
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
    also: tuple[Patch, ...] = ()
    """Further interventions in the same run at the same time: all together are one patch, one row of a table."""

    def __post_init__(self) -> None:
        """Keep places in one way, whichever the caller has chosen.

        Raises:
            InputError: what is no place, site or edit, or a source of another number of positions.
        """
        self._check_kinds()
        object.__setattr__(self, "layers", whole_numbers(self.layers, "block"))
        object.__setattr__(self, "positions", Positions.of(self.positions))
        if self.units is not None:
            object.__setattr__(self, "units", whole_numbers(self.units, "unit"))
        if self.also is None:
            object.__setattr__(self, "also", ())
        if self.also and type(self.also) is not tuple:
            object.__setattr__(self, "also", (self.also,) if isinstance(self.also, Patch) else tuple(self.also))
        if any(not isinstance(patch, Patch) for patch in self.also):
            raise InputError(f"what goes with a patch (also) must be Patches, not {self.also!r}")
        if self.source is not None and self.source.positions is not None:
            self._check_source()

    def _check_kinds(self) -> None:
        for what, value, kind, such in (
            ("site", self.site, HookSite, "sinklens.sites.RESID_PRE"),
            ("edit", self.edit, Edit, "sinklens.edits.Constant(), or Function(name, function)"),
        ):
            if not isinstance(value, kind):
                raise InputError(f"the {what} of a patch must be such as {such}, not of type {type(value).__name__}")
        if self.source is not None and not isinstance(self.source, Source):
            raise InputError(f"the source of a patch must be a Source(run), not of type {type(self.source).__name__}")

    def _check_source(self) -> None:
        where, source = self.where, self.source_where
        if not where.shared and not source.shared and len(where.rows) != len(source.rows):
            raise InputError(
                f"positions are given for {len(where.rows)} prompts, and those of the source for {len(source.rows)}"
            )
        prompts = range(max(len(where.rows), len(source.rows)))
        matched = [(len(where.at(prompt)), len(source.at(prompt))) for prompt in prompts]
        if any(n_sources != n for n, n_sources in matched) and any(n_sources != 1 for _, n_sources in matched):
            raise InputError(
                f"give one source position for each of the positions {where}, or one for all, not {source}: "
                f"{self.describe()}"
            )

    @property
    def where(self) -> Positions:
        """The positions that are edited."""
        return Positions.of(self.positions)

    @property
    def source_where(self) -> Positions:
        """The positions that the source activation comes from."""
        return self.where if self.source is None else self.source.where(self.where)

    @property
    def parts(self) -> tuple[Patch, ...]:
        """The interventions one by one, this one first. At one place they act in this order."""
        if not self.also:
            return (self,)
        return (replace(self, also=()), *(part for patch in self.also for part in patch.parts))

    @property
    def start(self) -> int:
        """The earliest block that the patch changes."""
        return min(min(part.layers) for part in self.parts)

    @property
    def id(self) -> str:
        """Content hash: equal for patches that do the same thing, whatever their label."""
        contents = [
            (part.site, part.layers, part.positions, part.units, part.run, part.source, part.edit.fingerprint())
            for part in self.parts
        ]
        text = repr(contents[0] if len(contents) == 1 else tuple(contents))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """A short name for messages."""
        if self.label:
            return self.label
        alone = f"{self.edit.name} at {self.site.template} layers {self.layers} positions {self.positions}"
        return " and ".join([alone, *(patch.describe() for patch in self.also)])


Runs: TypeAlias = Mapping[str, Sequence[Patch]]
"""Run name to the root patches that are in force throughout it."""

CLEAN: Runs = {"base": ()}
"""Just the model as it is."""
