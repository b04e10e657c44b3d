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
    return edit if first == 0 or type(edit) in _SAME_FOR_ALL else Shifted(edit.name, edit, first)


def roots_for_prompts(roots: Sequence[Patch], first: int, last: int) -> tuple[Patch, ...]:
    """A run's root patches as they are for prompts ``first .. last - 1`` alone."""
    return tuple(
        replace(
            root,
            edit=edit_for_prompts(root.edit, first),
            positions=root.where.prompts(first, last),
            source=None if root.source is None else source_for_prompts(root.source, first, last),
            also=roots_for_prompts(root.also, first, last),
        )
        for root in roots
    )


def source_for_prompts(source: Source, first: int, last: int) -> Source:
    """A source as it is for prompts ``first .. last - 1`` alone."""
    if source.positions is None:
        return source
    return Source(source.run, Positions.of(source.positions).prompts(first, last))


def pair_for_prompts(pair: SinkPair, first: int, last: int) -> SinkPair:
    """A pair on prompts ``first .. last - 1`` alone."""
    return replace(
        pair,
        target=pair.target.prompts(first, last),
        runs={run: roots_for_prompts(roots, first, last) for run, roots in pair.runs.items()},
        without=source_for_prompts(pair.without, first, last),
        with_sink=source_for_prompts(pair.with_sink, first, last),
        ordinary=pair.ordinary[first:last],
        reference=pair.reference.prompts(first, last),
    )
