"""A patch as plain TransformerLens hooks: they apply it to every row of whatever batch is run.

Positions count from the first token of a prompt, in generation with a key-value cache too, which runs one new token at
a time (:mod:`sinklens.interventions.cached`). Pitfall: where TransformerLens pads prompts of different lengths on the
left, they count from the first token of the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sinklens.engine.apply import Op, apply_edit, gather
from sinklens.engine.given import check_values
from sinklens.engine.places import group_of, pairs_of
from sinklens.errors import InputError
from sinklens.interventions.cached import Span
from sinklens.patches import Patch
from sinklens.sites import PATTERN, HookSite

Hook = Callable[[Tensor, Any], Tensor | None]
Hooks = list[tuple[str, Hook]]


def hooks_of(patch: Patch, source: Mapping[str, Tensor] | None = None) -> Hooks:
    """The hooks that apply ``patch`` to every row of whatever batch is run.

    Args:
        patch: the patch; its ``run`` is ignored. Empty ``positions`` mean all of them.
        source: for edits that use one, hook-point name to the source activation ``[batch, pos, ...]``, as in a
            TransformerLens cache.

    Raises:
        InputError: no units where some are to be chosen, or a negative block, position or unit. From the hooks: a
            position, unit or prompt that the run, or the source, does not have; a key-value cache that was made
            without them.
    """
    for part in patch.parts:
        if part.units == ():
            raise InputError("choose at least one neuron, dimension or head")
        positions = tuple(position for row in part.where.rows for position in row)
        for name, numbers in (("blocks", part.layers), ("positions", positions), ("units", part.units or ())):
            if any(number < 0 for number in numbers):
                raise InputError(f"{name} count from 0, but {tuple(numbers)} has a negative one")
    writers: Hooks = []
    readers: Hooks = []
    for part in patch.parts:
        for layer in part.layers:
            live: dict[str, Tensor] = {}
            span = Span(f"the edit {part.edit.name!r} at {part.site.at(layer)}")
            writers.append((part.site.at(layer), _writer(part, layer, live, source, span)))
            readers += seers(part.site, layer, span)
            for place in part.edit.reads_in(layer):
                readers.append((place.site.at(place.layer), _reader(place.key, live)))
    # What is read at a hook point is read as edited: there a reader stands behind the writers.
    written = {name for name, _ in writers}
    early = [(name, hook) for name, hook in readers if name not in written]
    late = [(name, hook) for name, hook in readers if name in written]
    return [*early, *writers, *late]


def seers(site: HookSite, layer: int, span: Span) -> Hooks:
    """The hook that tells ``span`` where a pass begins; a site with keys tells it itself."""
    if "key" in site.axes:
        return []

    def see(act: Tensor, hook: Any) -> None:  # noqa: ARG001
        span.see(*act.shape[-2:])

    return [(PATTERN.at(layer), see)]


def first_of(span: Span, site: HookSite, act: Tensor) -> int:
    """The position of the first token of the pass that ``act``, at ``site``, is from."""
    if "key" in site.axes:
        span.see(act.shape[site.pos_axis], act.shape[site.axes.index("key")])
    return span.begins(act.shape[site.pos_axis])


def _op(patch: Patch, layer: int, act: Tensor, first: int) -> Op:
    """The edit at those of the patch's positions that ``act`` has, in every row; no positions mean all of them.

    ``first`` is the position of its first token: those before were run, and edited, in an earlier pass.
    """
    end = first + act.shape[patch.site.pos_axis]
    _check_places(patch, layer, act, end)
    placed = patch if any(patch.where.rows) else replace(patch, positions=tuple(range(first, end)))
    group = group_of(placed, act.device)
    rows = torch.arange(len(act), device=act.device)
    pairs = pairs_of(group, torch.zeros_like(rows), rows)
    here = pairs.positions >= first
    of, positions = pairs.of[here], pairs.positions[here]
    return Op(
        patch.site,
        layer,
        patch.edit,
        (of, positions - first),
        of,
        positions,
        None if pairs.units is None else pairs.units[here],
        source_positions=pairs.source_positions[here],
    )


def _check_places(patch: Patch, layer: int, act: Tensor, end: int) -> None:
    """Refuse places that ``act`` does not have, in which an index would raise, or bring a GPU down."""
    what = f"the edit {patch.edit.name!r} at {patch.site.at(layer)}"
    if not patch.where.shared and len(patch.where.rows) != len(act):
        raise InputError(f"{what} has positions for {len(patch.where.rows)} prompts, but the batch has {len(act)}")
    beyond = [position for row in patch.where.rows for position in row if position >= end]
    if beyond:
        raise InputError(f"{what} is for position {beyond[0]}, but the run has positions 0..{end - 1}")
    if patch.units is None:
        return
    if patch.site.unit_name is None:
        raise InputError(f"{patch.site.template} has no units to choose: leave them out")
    size = patch.site.to_canonical(act).shape[2]
    if not all(unit < size for unit in patch.units):
        raise InputError(f"{what} is for unit {max(patch.units)}, but there are {size} ({patch.site.unit_name})")


def _check_values(patch: Patch, layer: int, act: Tensor, first: int) -> None:
    """Refuse values of another size than the activation's, which would be broadcast or picked from wrongly."""
    end = first + act.shape[patch.site.pos_axis]
    sizes = dict(zip(patch.site.axes[1:], act.shape[1:], strict=True)) | {"prompt": len(act)}
    check_values(patch, layer, sizes | dict.fromkeys(("pos", "query", "key"), end))


def _check_source(op: Op, name: str, source: Mapping[str, Tensor], pos_axis: int) -> None:
    """Refuse a source run without the hook point, the prompts or the positions that are asked of it."""
    if name not in source:
        raise InputError(f"the source run has no {name!r}, which the edit {op.edit.name!r} takes: cache it there")
    assert op.source_positions is not None
    n_prompts, length = len(source[name]), source[name].shape[pos_axis]
    prompts, positions = int(op.prompts.max()) + 1, int(op.source_positions.max()) + 1
    if prompts > n_prompts or positions > length:
        raise InputError(
            f"the edit {op.edit.name!r} needs {prompts} prompts and {positions} positions of {name!r}, but the source "
            f"run has {n_prompts} and {length}: run both on the same prompts"
        )


def _reader(key: str, live: dict[str, Tensor]) -> Hook:
    def read(act: Tensor, hook: Any) -> None:  # noqa: ARG001
        live[key] = act

    return read


def _writer(patch: Patch, layer: int, live: dict[str, Tensor], source: Mapping[str, Tensor] | None, span: Span) -> Hook:
    def write(act: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        return with_patch(patch, layer, act, first_of(span, patch.site, act), live, source)

    return write


def with_patch(
    patch: Patch,
    layer: int,
    act: Tensor,
    first: int,
    live: Mapping[str, Tensor],
    source: Mapping[str, Tensor] | None,
) -> Tensor | None:
    """A copy of ``act``, whose first token has position ``first``, with the edit; None where it has no place in it."""

    def source_of(op: Op, site: HookSite, block: int) -> Tensor:
        if source is None:
            raise InputError(f"the edit {op.edit.name!r} needs the source run's activations")
        assert op.source_positions is not None
        name, units = site.at(block), op.units if site == op.site else None
        _check_source(op, name, source, site.pos_axis)
        return gather(site.to_canonical(source[name]), (op.prompts, op.source_positions), units)

    op = _op(patch, layer, act, first)
    if not len(op.positions):
        return None
    _check_values(patch, layer, act, first)
    new, places = act.clone(), patch.edit.reads_in(layer)
    reads = {place.key: gather(place.site.to_canonical(live[place.key]), op.address, None) for place in places}
    apply_edit(patch.site.to_canonical(new), op, reads, source_of, None)
    return new
