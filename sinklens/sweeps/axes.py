"""The axes of a sweep: every place with the blocks and the units that it is swept over in this model."""

from __future__ import annotations

from collections.abc import Sequence

from sinklens.errors import InputError
from sinklens.models.view import ModelShape
from sinklens.records.ranges import short
from sinklens.sites import UNIT_KINDS, HookSite, site_name, unit_count
from sinklens.stages.base import Setting
from sinklens.sweeps.choices import Choices
from sinklens.sweeps.grid import Grid, StageAxis
from sinklens.sweeps.places import Place, Units, own_layers, own_units, place_name, site_of, unit_numbers
from sinklens.sweeps.request import edit_name


def make_grid(choices: Choices, setting: Setting) -> Grid:
    """All axes of the sweep.

    Raises:
        InputError: units that a site does not have, or a stage whose own block is not among the layers.
    """
    axes = [axis_of(place, choices, setting) for place in choices.stages]
    check_units(axes, choices.units)
    return Grid(
        stages=tuple(axes),
        directions=choices.directions,
        edits=tuple(edit_name(edit) for edit in choices.edits),
        positions=None if isinstance(choices.positions, str) else choices.positions,
        window=choices.window,
    )


def axis_of(place: Place, choices: Choices, setting: Setting) -> StageAxis:
    """A place with the layers and units that it is swept over.

    A stage that has units of its own (the super neurons) has them in its own blocks: only those of ``layers`` are
    swept, unless ``units`` gives numbers.

    Raises:
        InputError: a unit that the model does not have, or a window that does not fit.
    """
    site, units, own = site_of(place), choices.units, own_units(place, setting)
    each = units_of(site, units, setting.shape, own)
    given_numbers = each is not None and units is not None and units.kinds is None
    inside = None if own is None or given_numbers else own_layers(place, setting)
    return StageAxis(
        name=place_name(place),
        site=site,
        site_name=site_name(site),
        layers=choices.layers if inside is None else _inside(place, choices, inside),
        units=each,
        together=own if each is None else None,
    )


def _inside(place: Place, choices: Choices, blocks: Sequence[int]) -> tuple[int, ...]:
    """The windows that are within a stage's own blocks."""
    window = choices.window
    inside = tuple(layer for layer in choices.layers if set(range(layer, layer + window)) <= set(blocks))
    if not inside:
        raise InputError(
            f"the units of {place_name(place)} are those of block {short(blocks)}: have it among the layers, "
            "with a window of no more, or give unit numbers"
        )
    return inside


def units_of(
    site: HookSite, units: Units | None, shape: ModelShape, own: tuple[int, ...] | None = None
) -> tuple[int, ...] | None:
    """Units of ``site`` that are swept one by one, ``None`` when they are edited at once.

    Raises:
        InputError: numbers that the site does not have.
    """
    if units is None:
        return None
    if units.kinds is None:
        return unit_numbers(site, units.numbers, shape)
    size = unit_count(site, shape)
    wanted = "all" in units.kinds or any(site.unit_name in UNIT_KINDS[kind] for kind in units.kinds)
    if not wanted or size is None:
        return None
    return tuple(range(size)) if own is None else own


def check_units(axes: Sequence[StageAxis], units: Units | None) -> None:
    """Make sure that a kind of unit that was asked for is found in some stage.

    Raises:
        InputError: it is in none.
    """
    if units is not None and all(axis.units is None for axis in axes):
        names = ", ".join(axis.name for axis in axes)
        raise InputError(
            f"units {units}: {names} has none of these; choose heads, neurons, dims or all, or leave it out"
        )
