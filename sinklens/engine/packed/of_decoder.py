"""A decoder in the packed pass, with the variant of attention that it was trained with.

A variant's methods take queries one by one, whatever axes stand in front, so that packed rows fit: the pass calls them
itself. What cannot be told by a look at them, such as a variant whose rows depend on one another, is found by the check
of the pass's first readings against the model's own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sinklens.engine.packed.of_hooked import HookedModel, norm_of
from sinklens.engine.packed.weights import PackedBlock, Weigh
from sinklens.models.hooked import changed_by, norms_behind, sink_slot, variant_of
from sinklens.models.view import Model, model_shape
from sinklens.variants import Variant, overrides


def unknown_part(model: Model) -> str | None:
    """What the packed pass does not know about a decoder; None when it can run it."""
    if not model_shape(model).rotary and changed_by(model, 0, "keys") is not None:
        return "keys that are changed and not turned"  # captured at hook_k, where they are as projected
    return None


class DecoderModel(HookedModel):
    """A decoder taken apart: a HookedTransformer, and what its variant does."""

    def take_apart(self, layer: int) -> PackedBlock:
        """See :meth:`HookedModel.take_apart`."""
        variant = variant_of(self.model, layer)
        assert variant is not None
        block = super().take_apart(layer)
        ln1_post, ln2_post = (norm_of(self.options, norm) for norm in norms_behind(self.model, layer))
        return replace(
            block,
            q_norm=changed_by(self.model, layer, "queries"),
            k_norm=changed_by(self.model, layer, "keys"),
            ln1_post=ln1_post,
            ln2_post=ln2_post,
            seen=variant.seen(self.length, block.device) if overrides(variant, "seen") else None,
            v_scaled=changed_by(self.model, layer, "values"),
            weigh=_weigh(self.model, layer, variant),
            z_changed=variant.output if overrides(variant, "output") else None,
        )


def _weigh(model: Model, layer: int, variant: Variant) -> Weigh | None:
    slot_of = sink_slot(model, layer)
    if slot_of is None and not overrides(variant, "weights"):
        return None

    def weigh(scores: Tensor, q: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        slot = None if slot_of is None else slot_of(q)
        wide = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        pattern, share = variant.weights(wide, None if slot is None else slot.logit.to(wide.dtype), x)
        besides = None
        if share is not None and slot is not None and slot.value is not None:
            besides = (share[..., None] * slot.value).to(q.dtype)
        return pattern.to(scores.dtype).contiguous(), besides

    return weigh
