"""What callers hand to the engine: one sentence where it is no patch, readout or run, or where values do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from sinklens.edits import Constant, Edit, PerPosition, PerPrompt, Rescale
from sinklens.errors import InputError
from sinklens.models.view import ModelShape
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
    if not isinstance(edit, PerPrompt | PerPosition):
        return
    for layer, values in edit.values.items():
        if isinstance(values, Tensor) and values.ndim and len(values) != n_prompts:
            raise InputError(
                f"the edit {edit.name!r} has values of {len(values)} prompts in block {layer}, and {n_prompts} are run"
            )


def check_values(patch: Patch, shape: ModelShape, n_prompts: int, length: int) -> None:
    """Make sure that an edit's values are there for its blocks and have the size of its place.

    Raises:
        InputError: they do not.
    """
    edit = patch.edit
    table = edit.mean if isinstance(edit, Rescale) else getattr(edit, "values", None)
    if not isinstance(edit, Constant | PerPrompt | PerPosition | Rescale) or table is None:
        return
    sizes = {"head": shape.n_heads, "kv_head": shape.n_kv_heads, "d_mlp": shape.d_mlp, "d_model": shape.d_model}
    sizes |= {"query": length, "key": length}
    axes = [axis for axis in patch.site.axes[1:] if patch.site.axes.index(axis) != patch.site.pos_axis]
    wanted = [sizes.get(axis) for axis in axes]
    for layer in patch.layers:
        where = f"the edit {edit.name!r} at {patch.site.at(layer)}"
        if layer not in table:
            raise InputError(f"{where} has no values for block {layer}, only for {sorted(table)}")
        values: object = table[layer]
        if not isinstance(values, torch.Tensor):
            raise InputError(f"{where} needs values that are tensors, not of type {type(values).__name__}")
        own = isinstance(edit, PerPrompt | PerPosition) or (isinstance(edit, Rescale) and values.ndim > len(wanted))
        found = list(values.shape[1:] if own else values.shape)
        if own and (not values.ndim or len(values) < n_prompts):
            raise InputError(f"{where} needs a value for each of {n_prompts} prompts, but got {tuple(values.shape)}")
        if isinstance(edit, PerPosition):
            if not found or found[0] != length:
                raise InputError(f"{where} needs a value for each of {length} positions, but got {tuple(values.shape)}")
            found = found[1:]
        fits = len(found) <= len(wanted) and all(
            mine in (1, size) or size is None for mine, size in zip(found[::-1], wanted[::-1], strict=False)
        )
        if not fits:
            names = " ".join(
                f"{axis}={size}" if size is not None else axis for axis, size in zip(axes, wanted, strict=True)
            )
            raise InputError(f"{where} needs values [{names}], but got {tuple(values.shape)}")
