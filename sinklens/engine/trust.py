"""What callers' edits and readouts give, held to what the engine takes for granted of them.

An edit is given gathered activations, a readout a batch, and both may hold any rows of any patches: so each has to
treat every row by itself, give what it was asked for, and leave what it was given as it is. The package's own do; a
caller's function is called twice more, on a part of what it was given and beside other numbers, the first time that it
is met in a place. A result that depends on which rows happen to lie together is refused there, and not found in a table
later.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from sinklens.edits import Edit
from sinklens.errors import EditError
from sinklens.readouts.base import PositionReadout, Readout

_SEEN: weakref.WeakKeyDictionary[object, set[Hashable]] = weakref.WeakKeyDictionary()
"""Edits and readouts that were tried, and where."""
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodDescriptorType, type)
"""What is told by its own module alone."""


def is_new(thing: Edit | Readout, place: Hashable) -> bool:
    """Whether a caller's edit or readout has not been tried there; False for the package's own."""
    places = _places(thing)
    return None not in places and place not in places


def is_trusted(edit: Edit) -> bool:
    """Whether an edit is made of the package's own code alone (:func:`is_ours`, asked once)."""
    return None in _places(edit)


def _places(thing: Edit | Readout) -> set[Hashable]:
    places = _SEEN.get(thing)
    if places is None:
        places = _SEEN[thing] = {None} if is_ours(thing) else set()
    return places


def is_ours(thing: object) -> bool:
    """Whether an edit, a readout or a function is made of the package's own code alone."""
    if isinstance(thing, functools.partial):
        return all(map(is_ours, (thing.func, *thing.args, *thing.keywords.values())))
    if isinstance(thing, Edit | Readout):
        names = ("at", "weigh", "combine") if isinstance(thing, PositionReadout) else None
        parts = [getattr(thing, item.name) for item in fields(thing) if names is None or item.name in names]
        return _in_package(type(thing)) and all(map(is_ours, parts))
    if isinstance(thing, tuple | list):
        return all(map(is_ours, thing))
    if not callable(thing):
        return True
    if is_dataclass(thing) and not isinstance(thing, type):
        return _in_package(type(thing)) and all(is_ours(getattr(thing, item.name)) for item in fields(thing))
    if not isinstance(thing, _FUNCTIONS):
        return False  # a module, a compiled or scripted function: of torch's class, with anything inside
    if isinstance(thing, types.MethodType) and not is_ours(thing.__self__):
        return False
    cells = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or () if _filled(cell)]
    return _in_package(thing) and all(is_ours(cell) for cell in cells if callable(cell) and not isinstance(cell, type))


def _in_package(thing: object) -> bool:
    name = str(getattr(thing, "__module__", None))
    return name.partition(".")[0] in ("sinklens", "torch", "builtins", "None") or name == "_operator"


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def checked_tensor(what: str, value: object) -> Tensor:
    """``value`` if it is a tensor of real numbers.

    Raises:
        EditError: it is not.
    """
    if not isinstance(value, Tensor):
        kind = "nothing" if value is None else f"{type(value).__name__}, not a tensor"
        raise EditError(f"{what} returned {kind}")
    if value.is_complex():
        raise EditError(f"{what} returned complex numbers")
    if value.device.type == "meta":
        raise EditError(f"{what} returned a tensor on the device meta, which holds no numbers")
    return value


def checked_rows(readout: Readout, value: object, n_rows: int) -> Tensor:
    """A readout's value, with one entry for every row.

    Raises:
        EditError: it is no tensor, or does not have as many rows.
    """
    what = f"the readout {readout.name!r}"
    value = checked_tensor(what, value)
    if not value.ndim or len(value) != n_rows:
        raise EditError(
            f"{what} returned shape {tuple(value.shape)}: it must have one entry for every row, here {n_rows}"
        )
    return value if value.is_floating_point() else value.float()


def checked_combined(readout: Readout, stack: Tensor) -> Tensor:
    """``readout.combine(stack)``: one number for every row.

    Raises:
        EditError: it is anything else.
    """
    what = f"combine of the readout {readout.name!r}"
    value = checked_tensor(what, readout.combine(stack))
    if value.shape != stack.shape[1:2]:
        raise EditError(f"{what} returned shape {tuple(value.shape)}: one number for each of {stack.shape[1]} rows")
    if len(value) and is_new(readout, "combine"):
        by_row = stack.movedim(1, 0)
        compare(
            readout,
            "combine",
            what,
            value,
            lambda rows, other: readout.combine(beside(by_row[rows], other).movedim(0, 1)),
        )
    return value


def read(readout: Readout, place: Hashable, act: Tensor, function: Callable[[Tensor, Any], Any]) -> Tensor:
    """What a readout makes of an activation ``[row, ...]``.

    Args:
        readout: whose function it is.
        place: where it is met.
        act: what it is given, and must not write into.
        function: ``(activation, index of its rows) -> [row, ...]``.

    Raises:
        EditError: it writes into the activation, returns something else, or depends on which rows lie together.
    """
    version = act._version
    value = function(act, slice(None))
    if act._version != version:
        raise EditError(f"the readout {readout.name!r} writes into the activation that it is given")
    value = checked_rows(readout, value, len(act))
    if len(act) and is_new(readout, place):
        what = f"the readout {readout.name!r}"
        compare(readout, place, what, value, lambda rows, other: function(beside(act[rows], other), rows))
    return value


Again = Callable[[Tensor, bool], Any]
"""``(rows, other) -> value``: the function once more, on some rows; ``other``: only the second is as it was."""


def beside(rows: Tensor, other: bool) -> Tensor:
    """The rows as they are; or the second, between others with smaller and larger numbers."""
    if not other or not rows.is_floating_point():
        return rows
    return torch.cat([rows[:1] * -4 + 0.25, rows[1:2], rows[2:] * 2.5 + 0.25])


@torch.no_grad()
def compare(thing: Edit | Readout, place: Hashable, what: str, whole: Tensor, again: Again) -> None:
    """Make sure that the function of an edit or readout gives a row the same value whatever lies beside it; it is not
    asked again in that place.

    Raises:
        EditError: it does not.
    """
    n, tolerance = len(whole), 1e-4 if whole.element_size() >= 4 else 0.05
    for rows, other in ((range(n // 2, n), False), ((0, 0, 0, 0), True)):
        chosen = torch.tensor(tuple(rows), dtype=torch.long, device=whole.device)
        expected = whole[chosen]
        try:
            part = checked_tensor(what, again(chosen, other))
            same = slice(1, 2) if other else slice(None)
            alike = part.shape == expected.shape and _close(part[same], expected[same], tolerance)
        except (RuntimeError, ValueError, IndexError):
            alike = False
        if not alike:
            raise EditError(
                f"{what} gives a row another value when other rows lie beside it, so that its values would depend on "
                "the batch: it must treat every row by itself, and draw nothing at random"
            )
    _places(thing).add(place)


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = one.to(other).float(), other.float()
    size = other.nan_to_num(0, 0, 0).abs().amax() if other.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=float(tolerance * size), equal_nan=True)
