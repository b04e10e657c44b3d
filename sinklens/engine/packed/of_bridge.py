"""A TransformerBridge in the packed pass: the parts of the Hugging Face modules that it wraps."""

from __future__ import annotations

import weakref
from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.engine.packed.points import KEYS
from sinklens.engine.packed.weights import Norm, PackedBlock, PackedModel
from sinklens.models.bridged import block_parts, embedded, final_norm, given_to_attention, unembedding
from sinklens.models.parts import BridgeNorm, Given
from sinklens.models.state import Snapshot, current_structure
from sinklens.models.view import Model
from sinklens.sites import HookSite

_GIVEN: weakref.WeakKeyDictionary[Model, tuple[Snapshot, dict[int, list[Given]]]] = weakref.WeakKeyDictionary()
"""What attention is given at each length, and of which model."""


class BridgedModel(PackedModel):
    """A TransformerBridge taken apart.

    Args:
        model: the bridge.
        length: tokens of its prompts.
        whole: blocks whose MLP is run by the model's own module.
        proven: hook points at which it is known to have the bridge's own activations.

    Raises:
        UnknownPartError: attention is given something that is not known.
    """

    def __init__(self, model: Model, length: int, whole: Collection[int] = (), proven: Collection[str] = ()) -> None:
        super().__init__(model, length)
        self.whole, self.proven, self._given = whole, proven, _given(model, length)

    @property
    def keys_site(self) -> HookSite:
        """See :attr:`PackedModel.keys_site`."""
        return KEYS

    def take_apart(self, layer: int) -> PackedBlock:
        """See :meth:`PackedModel.take_apart`."""
        parts = block_parts(self.model, layer, self.length, self._given[layer])
        attn = parts.attention
        norms = (parts.ln1, parts.ln1_post, parts.ln2, parts.ln2_post)
        ln1, ln1_post, ln2, ln2_post = (None if norm is None else self._norm(norm) for norm in norms)
        return PackedBlock(
            ln1=ln1,
            ln2=ln2,
            ln1_post=ln1_post,
            ln2_post=ln2_post,
            qkv=(attn.q, attn.k, attn.v),
            out=attn.o,
            mlp_parts=None if layer in self.whole else parts.mlp_parts,
            whole_mlp=parts.whole_mlp,
            q_norm=attn.q_norm,
            k_norm=attn.k_norm,
            scale=attn.scale,
            rotary=attn.rotary,
            cap=attn.cap,
            sinks=attn.sinks,
            seen=attn.seen,
            masked=attn.masked,
            added=parts.added,
        )

    def embedded(self, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_model"]:
        """See :meth:`PackedModel.embedded`."""
        return embedded(self.model, tokens)

    def logits(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_vocab"]:
        """See :meth:`PackedModel.logits`."""
        unembed, finished = unembedding(self.model)
        x = self._norm(final_norm(self.model))(x.to(unembed.W.device))
        return finished(unembed(x))

    def lacks(self, site: HookSite, layer: int) -> str | None:
        """See :meth:`PackedModel.lacks`."""
        name = site.at(layer)
        return None if site == KEYS or name in self.proven else f"{name}, which is another thing there or nothing"

    def _norm(self, norm: BridgeNorm) -> Norm:
        return Norm(norm.kind, norm.eps, norm.w, norm.b, self.dtype, cast_last=True)


def _given(model: Model, length: int) -> list[Given]:
    structure = current_structure(model)
    if model not in _GIVEN or _GIVEN[model][0] != structure:
        _GIVEN[model] = (structure, {})
    found = _GIVEN[model][1]
    if length not in found:
        with torch.no_grad():
            found[length] = given_to_attention(model, length)
    return found[length]
