"""Where an edit is applied: gather what is there, call the edit, check what it gives, write it, note what moved.

An :class:`Op` is one edit in one block at some places of a batch. Its *address* says where these lie in an activation
laid out as ``[*address, unit, ...]``: ``(rows, positions)`` in a batch of whole prompts, ``(tokens,)`` where rows are
packed. Everything that patches goes through here: the packed pass, TransformerLens's pass, gradients, plain hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinklens.edits import Edit, EditSite
from sinklens.edits.base import Gathered
from sinklens.engine import trust
from sinklens.errors import EditError, EngineError
from sinklens.sites import HookSite


@dataclass(frozen=True, eq=False)
class Op:
    """One edit in one block, at some places of a batch."""

    site: HookSite
    """Where the edit is written."""
    layer: int
    """Block."""
    edit: Edit
    """The edit."""
    address: tuple[Int[Tensor, " pair"], ...]
    """Where every place lies in the activation."""
    prompts: Int[Tensor, " pair"]
    """Its prompt."""
    positions: Int[Tensor, " pair"]
    """Its position in that prompt."""
    units: Int[Tensor, "pair unit"] | None = None
    """Units that are edited; ``None``: all."""
    owners: Int[Tensor, " pair"] | None = None
    """Number of the intervention that each place belongs to, for the check that it changed something; ``None`` for root
    edits."""
    source_run: str | None = None
    """Run that the source activation comes from."""
    source_positions: Int[Tensor, " pair"] | None = None
    """Positions in that run."""

    def on(self, device: torch.device) -> Op:
        """The same with its indices on ``device``: blocks of one model may lie on several.

        Owners stay where they are counted.
        """
        if self.prompts.device == device:
            return self
        names = ("prompts", "positions", "units", "source_positions")
        moved = {name: value.to(device) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, address=tuple(index.to(device) for index in self.address), **moved)

    def only(self, mine: Bool[Tensor, " pair"], *address: Int[Tensor, " pair"]) -> Op:
        """The same at some of its places, which lie at another address."""
        names = ("prompts", "positions", "units", "source_positions")
        some = {name: value[mine] for name in names if (value := getattr(self, name)) is not None}
        if self.owners is not None:
            some["owners"] = self.owners[mine.to(self.owners.device)]
        return replace(self, address=address, **some)


SourceOf = Callable[[Op, HookSite, int], Tensor]
"""``(op, site, block) -> [pair, unit, ...]``: a source run's activation at the op's source places."""


def gather(laid_out: Tensor, address: tuple[Tensor, ...], units: Tensor | None) -> Gathered:
    """``[pair, unit, ...]`` from an activation laid out as ``[*address, unit, ...]``."""
    return laid_out[_index(address, units)]


def _index(address: tuple[Tensor, ...], units: Tensor | None) -> tuple[Tensor, ...]:
    return address if units is None else (*(index[:, None] for index in address), units)


def source_at(gather_from: Callable[..., Tensor], op: Op, site: HookSite, layer: int) -> Tensor:
    """The source run's activation at an op's source places, from a store's ``gather``.

    Raises:
        EngineError: the patch names no source.
    """
    if op.source_run is None or op.source_positions is None:
        raise EngineError(f"the edit {op.edit.name!r} needs a source run: give the patch source=Source(...)")
    units = op.units if site == op.site else None
    return gather_from(op.source_run, site, layer, op.prompts, op.source_positions, units)


def not_computed(op: Op, name: str) -> EngineError:
    """The refusal of a read, at the hook point ``name``, of what comes later in the forward pass than the edit."""
    return EngineError(
        f"the edit {op.edit.name!r} at {op.site.at(op.layer)} reads {name}, which the model has not computed by then: "
        "edits can only read what comes earlier in the forward pass"
    )


def edited(op: Op, old: Gathered, live: Mapping[str, Tensor], source_of: SourceOf | None) -> Gathered:
    """What the edit makes of ``old``, in its shape and dtype.

    Args:
        op: the edit and its places, on the device of ``old``.
        old: the activation there, ``[pair, unit, ...]``.
        live: what the edit reads in this pass, by the keys of :attr:`EditSite.live`.
        source_of: looks up the source run's activations; ``None`` where there are none.

    Raises:
        EditError: a caller's edit returns another shape than it was given, or no tensor, or depends on what else lies
            in the batch.
    """
    source, source_live = None, {}
    if op.edit.uses_source and source_of is not None:
        source = source_of(op, op.site, op.layer)
        source_live = {place.key: source_of(op, place.site, place.layer) for place in op.edit.reads_in(op.layer)}
    at = EditSite(op.layer, op.prompts, op.positions, op.units, live, source_live)
    if trust.is_trusted(op.edit):
        return _checked(op, op.edit(old, source, at), old)
    x, mine, here = _copies(old, source, at)
    new = _checked(op, op.edit(x, mine, here), x)
    place = (op.site.template, op.layer)
    if len(new) and trust.is_new(op.edit, place):

        def again(rows: Tensor, other: bool) -> Tensor:
            x, mine, here = _copies(old, source, at, rows, other)
            return _checked(op, op.edit(x, mine, here), x)

        trust.compare(op.edit, place, f"the edit {op.edit.name!r}", new, again)
    return new


def _checked(op: Op, new: object, x: Tensor) -> Tensor:
    """What an edit returned, in the dtype of ``x``; what it has written into ``x`` where it returned nothing.

    Raises:
        EditError: it is no tensor of the shape of ``x``.
    """
    what = f"the edit {op.edit.name!r}"
    written = new is None and not x.is_inference() and x._version > 0
    new = trust.checked_tensor(what, x if written else new)
    if new.shape != x.shape:
        raise EditError(f"{what} returned shape {tuple(new.shape)} for {tuple(x.shape)}")
    return new.to(x)


def _copies(
    old: Tensor, source: Tensor | None, at: EditSite, rows: Tensor | slice = slice(None), other: bool = False
) -> tuple[Tensor, Tensor | None, EditSite]:
    """What a caller's edit is given, at some of its places: it may work in place."""

    def copied(act: Tensor) -> Tensor:
        return trust.beside(act[rows].clone(), other)

    here = replace(
        at,
        prompts=copied(at.prompts),
        positions=copied(at.positions),
        units=None if at.units is None else copied(at.units),
        live={key: copied(act) for key, act in at.live.items()},
        source_live={key: copied(act) for key, act in at.source_live.items()},
    )
    return copied(old), None if source is None else copied(source), here


def apply_edit(
    laid_out: Tensor,
    op: Op,
    live: Mapping[str, Tensor],
    source_of: SourceOf | None,
    changed: Int[Tensor, " intervention"] | None,
    broken: Int[Tensor, " intervention"] | None = None,
) -> None:
    """Write one edit into ``laid_out`` (``[*address, unit, ...]``), which must be the caller's own copy.

    Places that moved are counted in ``changed``, and those with NaN in ``broken``, at the number of their intervention.
    """
    op = op.on(laid_out.device)
    index = _index(op.address, op.units)
    old = laid_out[index]
    new = edited(op, old, {key: act.to(old.device) for key, act in live.items()}, source_of)
    if changed is not None and op.owners is not None:
        # An index_add_ of integers is exact in any order.
        changed.index_add_(0, op.owners, has_moved(old, new).to(changed))
    if broken is not None and (op.owners is not None or changed is None):
        lost = new.isnan().flatten(1).any(-1).to(broken)
        # Root edits have no number of their own: in a pass over runs alone all are counted together.
        broken.index_add_(0, torch.zeros_like(op.prompts) if op.owners is None else op.owners, lost)
    laid_out[index] = new


def has_moved(old: Tensor, new: Tensor) -> Bool[Tensor, " pair"]:
    """Whether an edit changed what it was given by more than the rounding of a forward pass.

    In float32 and up, relative to the root mean square of each activation. Half precision rounds so coarsely that a
    real change could pass for rounding: there any difference counts.
    """
    old, new = old.flatten(1), new.flatten(1)
    if old.element_size() < 4:
        return (new != old).any(-1)
    return ((new - old).abs() > 1e-5 * old.pow(2).mean(-1, keepdim=True).sqrt()).any(-1) | ~torch.isfinite(new).all(-1)
