"""A write into the residual stream before the MLP, on models in which its hook point passes it on to one reader only.

In a bridge ``hook_resid_mid`` is where the norm before the MLP reads; what goes on past the MLP is another copy.
But ``resid_mid = resid_pre + attn_out``, so that whatever is to become of the sum can be written as attention's output,
which all that follows sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import override

from sinklens.edits import Edit, EditSite
from sinklens.edits.base import Gathered, ReadPlace, WrappingEdit, read_key
from sinklens.errors import NotApplicableError
from sinklens.models.identities import identities
from sinklens.models.view import Model, model_shape
from sinklens.models.writes import check_writable
from sinklens.patches import Patch, Runs
from sinklens.readouts.base import Readout
from sinklens.sites import ATTN_OUT, RESID_MID, RESID_PRE


@dataclass(frozen=True, eq=False)
class AsAttention(WrappingEdit):
    """What an edit makes of ``resid_mid``, as attention's output: ``attn_out + edit(resid_mid) - resid_mid``."""

    edit: Edit
    """The edit of ``resid_mid``, which has the axes of attention's output."""

    @property
    @override
    def inner(self) -> Edit:
        return self.edit

    @override
    def reads_in(self, layer: int) -> tuple[ReadPlace, ...]:
        own = ReadPlace(read_key(RESID_PRE), RESID_PRE, layer)
        return (own, *(place for place in self.edit.reads_in(layer) if not _is_attention(place, layer)))

    @property
    @override
    def needs(self) -> tuple[str, ...]:
        return ("attention_adds", *self.edit.needs)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:
        before = read_key(RESID_PRE)
        live, source_live = {**at.live}, {**at.source_live}
        for place in self.edit.reads_in(at.layer):
            if _is_attention(place, at.layer):  # what the model computes there is what this edit is given
                live[place.key] = x
                if source is not None:
                    source_live[place.key] = source
        sum_source = None if source is None else source + _own(source_live[before], at)
        total = x + _own(live[before], at)
        new = self.edit(total, sum_source, replace(at, live=live, source_live=source_live))
        return x + (new - total)


def _is_attention(place: ReadPlace, layer: int) -> bool:
    return (place.site, place.layer) == (ATTN_OUT, layer)


def _own(act: Tensor, at: EditSite) -> Tensor:
    """The dimensions that are edited."""
    return act if at.units is None else act.gather(-1, at.units)


def as_written(model: Model, patches: Sequence[Patch], readouts: Sequence[Readout], runs: Runs) -> Sequence[Patch]:
    """The patches, those of ``resid_mid`` written as attention's output where only that is seen by all that follows.

    A patch stays as it is where something else happens at attention's output of the same block: there it would no
    longer be the same. (The engine then says that its edit reaches only a part.)
    """
    if all(part.site != RESID_MID for patch in patches for part in (patch, *patch.also)):
        return patches
    taken = {layer for readout in readouts if readout.site == ATTN_OUT for layer in readout.layers}
    taken |= {layer for roots in runs.values() for root in roots for part in root.parts for layer in _attention(part)}
    written = {part.layers for patch in patches for part in patch.parts if part.site == RESID_MID}
    needed = {layers for layers in written if taken.isdisjoint(layers) and _is_needed(model, layers)}
    return [_rewritten(patch, needed) for patch in patches] if needed else patches


def _attention(part: Patch) -> set[int]:
    """Blocks in which a patch writes or reads attention's output."""
    written = set(part.layers) if part.site == ATTN_OUT else set()
    places = (place for layer in part.layers for place in part.edit.reads_in(layer))
    return written | {place.layer for place in places if place.site == ATTN_OUT}


def _rewritten(patch: Patch, needed: set[tuple[int, ...]]) -> Patch:
    parts = list(patch.parts)
    for i, part in enumerate(parts):
        others = set().union(*(_attention(other) for other in parts if other is not part))
        # With units the edit is given some of its own place only, and cannot read the rest there.
        others |= _attention(part) if part.units is not None else set()
        if part.site == RESID_MID and part.layers in needed and others.isdisjoint(part.layers):
            edit = AsAttention(part.edit.name, part.edit)
            parts[i] = replace(part, site=ATTN_OUT, edit=edit, label=part.describe())
    first, *rest = parts
    return replace(first, also=tuple(rest))


def _is_needed(model: Model, layers: Sequence[int]) -> bool:
    """Whether a write into ``resid_mid`` reaches only a part of what follows, and one into attention's output all."""
    if not all(0 <= layer < model_shape(model).n_layers for layer in layers):
        return False  # which the engine says
    if not identities(model).holds("attention_adds", layers):
        return False
    try:
        check_writable(model, RESID_MID.template, layers)
    except NotApplicableError:
        return True
    return False
