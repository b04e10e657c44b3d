"""Where a sweep edits: stages of the chain and sites by name, with their layers and units."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from sinklens import sites
from sinklens.errors import InputError
from sinklens.models.view import ModelShape
from sinklens.records.ranges import Range, numbers, short
from sinklens.sites import HookSite, unit_count
from sinklens.stages import STAGES, Stage
from sinklens.stages.base import Setting
from sinklens.sweeps.grid import StageAxis

SITES: dict[str, HookSite] = {
    "resid_pre": sites.RESID_PRE,
    "resid_post": sites.RESID_POST,
    "attn_out": sites.ATTN_OUT,
    "mlp_out": sites.MLP_OUT,
    "ln1_normalized": sites.LN1_NORMALIZED,
    "q": sites.Q,
    "k": sites.K,
    "v": sites.V,
    "pattern": sites.PATTERN,
    "z": sites.Z,
    "mlp_post": sites.MLP_POST,
}
"""Sites by short name."""

KINDS = {"heads": ("head", "kv_head"), "neurons": ("d_mlp",), "dims": ("d_model",)}
"""What units are called, and the axes that they are along."""

Place = str | Stage | HookSite
"""A stage or a site, or the name of one."""


def place_name(place: Place) -> str:
    """The name that the table has for a place."""
    if isinstance(place, str):
        return place
    return place.name if isinstance(place, Stage) else site_name(place)


def site_name(site: HookSite) -> str:
    """Short name of a site; its template where it has none."""
    return next((name for name, known in SITES.items() if known == site), site.template)


def find_place(place: Place) -> Stage | HookSite:
    """The stage or site of that name.

    Raises:
        InputError: there is none.
    """
    if not isinstance(place, str):
        return place
    known = {**SITES, **STAGES}
    if place in known:
        return known[place]
    close = difflib.get_close_matches(place, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
    raise InputError(f"stage {place!r} is not known: {hint}")


def axis_of(place: Place, setting: Setting, layers: Range, window: int, units: Range | None) -> StageAxis:
    """A place with the layers and units that it is swept over.

    A stage that has units of its own (the super neurons) has them in its own blocks: only those of ``layers`` are
    swept, unless ``units`` gives numbers.

    Raises:
        InputError: a layer or unit that the model does not have, or a window that does not fit.
    """
    found, shape = find_place(place), setting.shape
    site = found.site if isinstance(found, Stage) else found
    chosen = window_starts(layers, window, shape.n_layers)
    own = found.units(setting) if isinstance(found, Stage) else None
    each = units_of(site, units, shape, own)
    given_numbers = each is not None and not _is_kind(units)
    if own is not None and not given_numbers:
        assert isinstance(found, Stage)
        blocks = found.layers(setting)
        inside = tuple(layer for layer in chosen if set(range(layer, layer + window)) <= set(blocks))
        if not inside:
            raise InputError(
                f"the units of {place_name(place)} are those of block {short(blocks)}: have it among the layers, "
                "with a window of no more, or give unit numbers"
            )
        chosen = inside
    return StageAxis(
        place_name(place),
        site,
        site_name(site),
        chosen,
        each,
        tuple(sorted(own)) if own is not None and each is None else None,
    )


def window_starts(layers: Range, window: int, n_layers: int) -> tuple[int, ...]:
    """First blocks of windows of ``window`` consecutive blocks; ``all``: wherever one fits.

    Raises:
        InputError: it does not fit somewhere.
    """
    if not 1 <= window <= n_layers:
        raise InputError(f"window {window}: it must be 1-{n_layers} blocks")
    if isinstance(layers, str) and layers.strip() == "all":
        return tuple(range(n_layers - window + 1))
    found = numbers("layers", layers, n_layers, "the model's blocks")
    beyond = [layer for layer in found if layer + window > n_layers]
    if beyond:
        raise InputError(
            f"layers {short(beyond)}: a window of {window} blocks from there goes beyond the model's last block, "
            f"{n_layers - 1}; the last that fits starts at {n_layers - window}"
        )
    return found


def units_of(
    site: HookSite, units: Range | None, shape: ModelShape, own: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Units of ``site`` that are swept one by one, ``None`` when they are edited at once.

    Raises:
        InputError: numbers that the site does not have.
    """
    if units is None:
        return None
    size = unit_count(site, shape)
    if _is_kind(units):
        kinds = _kinds(units)
        wanted = site.unit_name if "all" in kinds else None
        wanted = wanted or next((n for kind in kinds for n in KINDS.get(kind, ()) if n == site.unit_name), None)
        if wanted is None or size is None:
            return None
        return tuple(range(size)) if own is None else tuple(sorted(own))
    if size is None:
        raise InputError(f"units {units}: {site_name(site)} has none; leave units out, or choose another stage")
    return numbers("units", units, size, f"the units ({site.unit_name}) of {site_name(site)}")


def check_units(axes: Sequence[StageAxis], units: Range | None) -> None:
    """Make sure that a kind of unit that was asked for is found in some stage.

    Raises:
        InputError: it is in none.
    """
    if units is not None and all(axis.units is None for axis in axes):
        names = ", ".join(axis.name for axis in axes)
        raise InputError(
            f"units {units}: {names} has none of these; choose heads, neurons, dims or all, or leave it out"
        )


def _is_kind(units: Range | None) -> bool:
    return isinstance(units, str) and not any(c.isdigit() for c in units) and bool(units.strip())


def _kinds(units: Range | None) -> list[str]:
    kinds = [part.strip() for part in str(units).split(",")]
    unknown = [kind for kind in kinds if kind not in KINDS and kind != "all"]
    if unknown:
        raise InputError(f"units {unknown[0]!r}: choose heads, neurons, dims, all, or numbers such as 0-8")
    return kinds
