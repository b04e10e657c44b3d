"""Where a sweep edits: stages of the chain and sites by name, and which units of them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from sinklens import sites
from sinklens.errors import InputError
from sinklens.models.view import ModelShape
from sinklens.records.fingerprint import fingerprint_of
from sinklens.records.ranges import Numbers, Range, names_in, parse, read, short, shown, within
from sinklens.records.registry import is_the_package_s
from sinklens.sites import SITES, UNIT_KINDS, HookSite, site_name, unit_count
from sinklens.stages import STAGES, Stage
from sinklens.stages.base import KIND, Setting

Place = str | Stage | HookSite
"""A stage or a site, or the name of one."""


def place_name(place: Place) -> str:
    """The name that the table has for a place."""
    if isinstance(place, str):
        return place
    return place.name if isinstance(place, Stage) else site_name(place)


def find_place(place: Place) -> Stage | HookSite:
    """The stage or site of that name.

    Raises:
        InputError: there is none.
    """
    if isinstance(place, Stage | HookSite):
        return place
    if not isinstance(place, str):
        raise InputError(f"stage {shown(place)} must be the name of a stage or a site, or one itself")
    known = {**SITES, **STAGES}
    if place in known:
        return known[place]
    close = difflib.get_close_matches(place, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
    raise InputError(f"stage {place!r} is not known: {hint}")


def place_fingerprint(place: Place) -> object:
    """What tells a place from another, in plain data: of the package's own the name, of the user's its contents too."""
    found = find_place(place)
    if isinstance(found, Stage):
        own = is_the_package_s(STAGES, KIND, found.name, found)
        return found.name if own else [found.name, fingerprint_of((found.site, found.layers, found.units))]
    if isinstance(place, str) and is_the_package_s(SITES, sites.KIND, place, found):
        return place
    return [*([place] if isinstance(place, str) else []), found.template, list(found.axes)]


def site_of(place: Place) -> HookSite:
    """Where a place's activation is edited."""
    found = find_place(place)
    return found.site if isinstance(found, Stage) else found


def own_layers(place: Place, setting: Setting) -> tuple[int, ...] | None:
    """The blocks that a stage is in; ``None``: a site, which is in all."""
    found = find_place(place)
    return tuple(found.layers(setting)) if isinstance(found, Stage) else None


def own_units(place: Place, setting: Setting) -> tuple[int, ...] | None:
    """The units that a stage is about; ``None``: a site, or a stage that is about the whole activation."""
    found = find_place(place)
    units = found.units(setting) if isinstance(found, Stage) else None
    return None if units is None else tuple(sorted(units))


@dataclass(frozen=True)
class Units:
    """Which units are swept one by one."""

    given: str | tuple[int, ...]
    """As it was asked for: a text, or numbers."""
    kinds: tuple[str, ...] | None
    """Of which kinds all are, or ``all``; ``None`` where there are numbers."""
    numbers: tuple[int, ...]
    """Units of every site."""

    def __str__(self) -> str:
        return self.given if isinstance(self.given, str) else short(self.given)


def read_units(given: Range) -> Units:
    """Units by kind or by number.

    Raises:
        InputError: neither.
    """
    text = given.strip() if isinstance(given, str) else None
    if text and not any(c.isdigit() for c in text):
        kinds = names_in(text)
        unknown = [kind for kind in kinds if kind not in UNIT_KINDS and kind != "all"]
        if unknown or not kinds:
            told = unknown[0] if unknown else text
            raise InputError(f"units {told!r}: choose heads, neurons, dims, all, or numbers such as 0-8")
        return Units(text, kinds, ())
    found = read("units", given, ()) if text is None else parse("units", text)
    assert not isinstance(found, str)
    return Units(found if text is None else text, None, found)


def unit_numbers(site: HookSite, units: Numbers, shape: ModelShape) -> tuple[int, ...]:
    """Numbers of units, as ``site`` has them.

    Raises:
        InputError: numbers that the site does not have.
    """
    size = unit_count(site, shape)
    if size is None:
        told = units if isinstance(units, str) else short(units)
        raise InputError(f"units {told}: {site_name(site)} has none; leave units out, or choose another stage")
    return within("units", units, size, f"the units ({site.unit_name}) of {site_name(site)}")
