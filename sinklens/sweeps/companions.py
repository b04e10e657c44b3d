"""Companion edits: held fixed in every patched row of a sweep, at the target, beside the edit that is swept.

As text a companion is ``PLACE:EDIT[:LAYERS[:UNITS]]``: ``super_neurons:zero``, or ``z:transplant:12:3`` for head 3 of
block 12. A stage has blocks, and maybe units, of its own; for a site the blocks must be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from sinklens.errors import InputError
from sinklens.pairs.ablations import EditLike, read_edit
from sinklens.records.ranges import Numbers, Range, read, within
from sinklens.sites import site_name
from sinklens.stages import Stage
from sinklens.stages.base import Setting
from sinklens.sweeps.grid import StageAxis
from sinklens.sweeps.places import Place, find_place, own_layers, own_units, place_name, site_of, unit_numbers

Read: TypeAlias = Numbers | None
"""What a companion's range is after :func:`read_companions`."""
FORM = "PLACE:EDIT[:LAYERS[:UNITS]], such as super_neurons:zero or z:transplant:12:3"


@dataclass(frozen=True, eq=False)
class Companion:
    """An edit that is held fixed in every patched row, at the target."""

    place: Place
    """A stage or a site, or its name."""
    edit: EditLike
    """An edit, or its name."""
    layers: Range | None = None
    """Blocks; ``None``: those of the stage."""
    units: Range | None = None
    """Units that are edited; ``None``: those of the stage, or the whole activation."""


Companions: TypeAlias = str | Companion | Sequence[str | Companion]
"""One companion, or several: texts (which may hold several, with spaces between), or objects."""


def read_companions(given: Companions) -> tuple[Companion, ...]:
    """Companions with their ranges read.

    Raises:
        InputError: an unknown place or edit, a text of another form, or a site without blocks.
    """
    several: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
    split = [part for item in several for part in (item.split() if isinstance(item, str) else [item])]
    return tuple(_read(_of_text(part) if isinstance(part, str) else part) for part in split)


def _of_text(text: str) -> Companion:
    place, *rest = text.split(":")
    if not 1 <= len(rest) <= 3 or not all((place, *rest)):
        raise InputError(f"companion {text!r}: write {FORM}")
    return Companion(place, *rest)


def _read(companion: Companion) -> Companion:
    if not isinstance(companion, Companion):
        raise InputError(f"companion {companion!r}: write {FORM}, or give a Companion")
    edit = read_edit(companion.edit)
    layers = None if companion.layers is None else read("companion layers", companion.layers)
    if layers is None and not isinstance(find_place(companion.place), Stage):
        raise InputError(f"companion {place_name(companion.place)} is a site: say in which blocks, {FORM}")
    units = None if companion.units is None else read("companion units", companion.units)
    return replace(companion, place=_known(companion.place), edit=edit, layers=layers, units=units)


def _known(place: Place) -> Place:
    find_place(place)
    return place


def companion_axis(companion: Companion, setting: Setting) -> StageAxis:
    """Where a companion edits: its blocks, and the units that it edits at once.

    Raises:
        InputError: blocks or units that the model does not have.
    """
    place, site, shape = companion.place, site_of(companion.place), setting.shape
    layers, units = cast(Read, companion.layers), cast(Read, companion.units)
    if layers is None:
        layers = own_layers(place, setting)
    else:
        layers = within("companion layers", layers, shape.n_layers, "the model's blocks")
    units = own_units(place, setting) if units is None else unit_numbers(site, units, shape)
    assert isinstance(layers, tuple)  # a site without blocks was refused
    return StageAxis(place_name(place), site, site_name(site), layers=layers, together=units)
