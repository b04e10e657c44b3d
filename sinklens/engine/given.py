"""What callers hand to the engine: one sentence where it is no patch, readout or run, or where values do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from sinklens.edits import Edit
from sinklens.edits.base import Table
from sinklens.errors import InputError
from sinklens.patches import Patch, Runs
from sinklens.readouts.base import Readout

T = TypeVar("T")


def listed(given: object, kind: type[T], what: str) -> Sequence[T]:
    """A sequence of things: one alone or an iterator will do; one that makes them when they are asked for stays it.

    Raises:
        InputError: it is none, or of other things.
    """
    if isinstance(given, kind):
        return [given]
    if isinstance(given, str | Mapping) or not (isinstance(given, Iterable) or hasattr(given, "__getitem__")):
        raise InputError(f"{what} must be a list of things such as {kind.__name__}, not of type {type(given).__name__}")
    things: Any = given if hasattr(given, "__len__") else list(given)  # type: ignore[call-overload]
    if isinstance(things, list | tuple):
        wrong = next((thing for thing in things if not isinstance(thing, kind)), None)
        if wrong is not None:
            raise InputError(f"{what} must each be a {kind.__name__}, but one is of type {type(wrong).__name__}")
    return things


def check_runs(runs: object) -> None:
    """Make sure of runs and their root patches.

    Raises:
        InputError: they are something else.
    """
    if not isinstance(runs, Mapping):
        raise InputError(f"runs must be a mapping of names to root patches, not of type {type(runs).__name__}")
    for name, roots in runs.items():
        if isinstance(roots, Patch) or not isinstance(roots, Sequence):
            raise InputError(f"the root patches of the run {name!r} must be a list, not of type {type(roots).__name__}")
        listed(roots, Patch, f"the root patches of the run {name!r}")


def check_readouts(readouts: object) -> list[Readout]:
    """The readouts, at least one of them.

    Raises:
        InputError: there is none, or something else.
    """
    found = listed(readouts, Readout, "readouts")
    if not len(found):
        raise InputError("give at least one readout: there is nothing to be measured")
    return list(found)


def check_own_values(patches: Sequence[Patch], runs: Runs, n_prompts: int) -> None:
    """Make sure that an edit with a value for each prompt has them for these prompts, and not for more.

    Raises:
        InputError: it has another number of them.
    """
    roots = [root for of_run in runs.values() for root in of_run]
    seen: set[int] = set()
    for part in (part for patch in (*patches, *roots) for part in patch.parts):
        if id(part.edit) not in seen:
            seen.add(id(part.edit))
            check_count(part.edit, n_prompts)


def check_count(edit: Edit, n_prompts: int) -> None:
    """:func:`check_own_values` of one edit."""
    for table in edit.tables:
        if table.front[:1] != ("prompt",) or table.optional:
            continue
        for layer, values in table.values.items() if isinstance(table.values, Mapping) else [(None, table.values)]:
            if isinstance(values, Tensor) and values.ndim and len(values) != n_prompts:
                where = "" if layer is None else f" in block {layer}"
                raise InputError(
                    f"the edit {edit.name!r} has values of {len(values)} prompts{where}, and {n_prompts} are run"
                )


def check_values(patch: Patch, layer: int, sizes: Mapping[str, int], *, more_prompts: bool = False) -> None:
    """Make sure that an edit's values are there for a block and have the size of its place.

    Args:
        patch: the patch, of whose edit :attr:`~sinklens.edits.Edit.tables` are looked at.
        layer: the block.
        sizes: how long the axes are, ``prompt`` and those of the patch's site; one that is not named may be anything.
        more_prompts: whether there may be values of more prompts, of which the first are run.

    Raises:
        InputError: they do not.
    """
    for table in patch.edit.tables:
        _check_table(table, patch, layer, sizes, more_prompts)


def _check_table(table: Table, patch: Patch, layer: int, sizes: Mapping[str, int], more_prompts: bool) -> None:
    where = f"the edit {patch.edit.name!r} at {patch.site.at(layer)}"
    if isinstance(table.values, Mapping) and layer not in table.values:
        raise InputError(f"{where} has no values for block {layer}, only for {sorted(table.values)}")
    values: object = table.values[layer] if isinstance(table.values, Mapping) else table.values
    if not isinstance(values, Tensor):
        raise InputError(f"{where} needs values that are tensors, not of type {type(values).__name__}")
    axes = [axis for i, axis in enumerate(patch.site.axes) if i not in (0, patch.site.pos_axis)]
    behind = axes if table.behind is None else axes[: table.behind]
    front = list(table.front)
    if table.optional and values.ndim < len(front) + len(behind):
        del front[0]
    wanted = [sizes.get(axis) for axis in (*front, *behind)]
    found = list(values.shape)
    if more_prompts and front[:1] == ["prompt"] and found:
        found[0] = min(found[0], sizes["prompt"])
    # Chosen units are picked from the values: an axis that is broadcast has not got them.
    broadcast = patch.units is None
    if broadcast:
        found[len(front) : len(front)] = [1] * (len(wanted) - len(found))
    fits = len(found) == len(wanted) and all(
        want is None or size == want or (broadcast and size == 1 and i >= len(front))
        for i, (size, want) in enumerate(zip(found, wanted, strict=True))
    )
    if not fits:
        names = [
            axis if size is None else f"{axis}={size}" for axis, size in zip((*front, *behind), wanted, strict=True)
        ]
        raise InputError(f"{where} needs values [{' '.join(names)}], but got {tuple(values.shape)}")
