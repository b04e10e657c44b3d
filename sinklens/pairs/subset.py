"""A pair on some of its prompts: its runs, sources and positions as they are for these alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from typing_extensions import override

from sinklens.edits import AttendSelf, Constant, Edit, EditSite, Function, Transplant
from sinklens.edits.base import Gathered, WrappingEdit
from sinklens.pairs.pair import SinkPair
from sinklens.patches import Patch, Positions, Source

_SAME_FOR_ALL = (Transplant, Constant, AttendSelf, Function)
"""Edits that do not look prompts up."""


@dataclass(frozen=True, eq=False)
class Shifted(WrappingEdit):
    """Another edit, told the number of each prompt among all prompts where only some are run."""

    name: str = "shifted"
    edit: Edit = Transplant()
    """The edit."""
    offset: int = 0
    """Number of the first prompt that is run."""

    @property
    @override
    def inner(self) -> Edit:
        return self.edit

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        return self.edit(x, source, replace(at, prompts=at.prompts + self.offset))


def edit_for_prompts(edit: Edit, first: int) -> Edit:
    """``edit`` as it is for prompts that are numbered from ``first`` on."""
    return edit if first == 0 or isinstance(edit, _SAME_FOR_ALL) else Shifted(edit.name, edit, first)


def roots_for_prompts(roots: Sequence[Patch], first: int) -> tuple[Patch, ...]:
    """A run's root patches as they are for prompts that are numbered from ``first`` on."""
    return tuple(replace(root, edit=edit_for_prompts(root.edit, first)) for root in roots)


def pair_for_prompts(pair: SinkPair, first: int, last: int) -> SinkPair:
    """A pair on prompts ``first .. last - 1`` alone."""

    def source(of_all: Source) -> Source:
        where = of_all.positions
        return of_all if where is None else Source(of_all.run, Positions.of(where).prompts(first, last))

    return replace(
        pair,
        target=pair.target.prompts(first, last),
        runs={run: roots_for_prompts(roots, first) for run, roots in pair.runs.items()},
        without=source(pair.without),
        with_sink=source(pair.with_sink),
        ordinary=pair.ordinary[first:last],
        reference=pair.reference.prompts(first, last),
    )
