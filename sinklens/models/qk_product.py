r"""How queries and keys come to meet in a block: their norms, their rotation, the scale of their products.

With q and k as they leave their projections, N the norm of queries or of keys and R_i the rotation at position i,

    score[i, j] = (R_i N_q(q_i)) . (R_j N_k(k_j)) / scale.

A HookedTransformer has all of this among its weights. A bridge leaves it to Hugging Face's modules, in a shape of each
architecture's own; but the tables of the rotation pass a hook point in every block that rotates (``ROTARY``), so that
they are taken from the run itself, whatever way the architecture makes them in.

Pitfall: this is what most models do, and not all (score caps, position biases, windows, norms over all heads at once).
What is known to be different is refused; who uses it compares the pattern that comes out with the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.models.hooked import Rotary, attention_weights, can_take_apart, sink_slot, variant_of
from sinklens.models.view import Model, has_hook
from sinklens.sites import HookSite
from sinklens.variants import overrides

ROTARY = tuple(HookSite(f"blocks.{{layer}}.attn.hook_{name}", ("batch", "pos", "d_rotary")) for name in ("cos", "sin"))
"""Where a bridge's cosines and sines pass; it has no such hook points in models without rotary embeddings."""

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Meeting:
    """What stands between the projections of a block and its attention scores."""

    q_norm: Norm | None
    """Norms each query (Qwen3), on :attr:`device`; None in most models."""
    k_norm: Norm | None
    """The same for keys."""
    scale: float
    """Scores are divided by this."""
    rotary: Rotary | None
    """Rotary embeddings; None where positions enter in another way."""
    device: torch.device
    """Where the norms are."""

    def queries(
        self, q: Float[Tensor, "pair unit d_head"], positions: Int[Tensor, " pair"]
    ) -> Float[Tensor, "pair unit d_head"]:
        """Queries as they meet keys: normed, turned by each one's own position, and divided by the scale."""
        return self._placed(q, positions, self.q_norm) / self.scale

    def keys(
        self, k: Float[Tensor, "pair unit d_head"], positions: Int[Tensor, " pair"]
    ) -> Float[Tensor, "pair unit d_head"]:
        """Keys as they meet queries: normed, and turned."""
        return self._placed(k, positions, self.k_norm)

    def _placed(self, x: Tensor, positions: Tensor, norm: Norm | None) -> Tensor:
        if norm is not None:
            x = norm(x.to(self.device)).to(x.device)
        x = x if x.dtype == torch.float64 else x.float()
        return x if self.rotary is None else self.rotary.turned(x, positions)


def rotary_sites(model: Model, layer: int) -> tuple[HookSite, ...]:
    """The places whose activations in a run :func:`meeting` has to be given: none for a HookedTransformer."""
    return tuple(site for site in ROTARY if not can_take_apart(model) and has_hook(model, site.at(layer)))


def meeting(model: Model, layer: int, length: int, seen: dict[HookSite, Tensor]) -> Meeting | None:
    """How queries and keys meet in block ``layer``; None where it is known that they do so in another way.

    Args:
        model: the model.
        layer: the block.
        length: positions that the rotation is needed for.
        seen: what passed the sites of :func:`rotary_sites`, ``[prompt or 1, pos, d_rotary]``; a site that nothing
            passed (a block that does not rotate) is left out.
    """
    if can_take_apart(model):
        variant = variant_of(model, layer)
        if variant is not None and (overrides(variant, "weights") or sink_slot(model, layer) is not None):
            return None  # a softmax over more than the keys, or none
        weights = attention_weights(model, layer, length)
        d_head = weights.W_Q.shape[-1]
        if any(_width(norm) not in (None, d_head) for norm in (weights.q_norm, weights.k_norm)):
            return None  # one norm over all heads together (OLMoE): a head alone has none
        return Meeting(weights.q_norm, weights.k_norm, weights.scale, weights.rotary, weights.W_Q.device)
    return _of_bridge(model, layer, [seen[site][0] for site in ROTARY if site in seen])


def _of_bridge(model: Any, layer: int, tables: list[Tensor]) -> Meeting | None:
    attn = model.blocks[layer].attn
    theirs = attn.original_component
    config = getattr(theirs, "config", None)
    if getattr(theirs, "attn_logit_softcapping", None) or getattr(config, "clip_qkv", None) is not None:
        return None  # both may do nothing in the run, and something to what is patched
    norms = [getattr(attn, name, None) for name in ("q_norm", "k_norm")]
    if norms != [None, None] and not _norms_each_head_alike(attn):
        return None
    scaling = getattr(theirs, "scaling", None) or model.cfg.d_head**-0.5
    parameter = next(theirs.parameters(), tables[0] if tables else torch.zeros(()))
    q_norm, k_norm = (None if norm is None else norm.original_component for norm in norms)
    return Meeting(q_norm, k_norm, 1 / float(scaling), _rotary(model.cfg, tables), parameter.device)


def _width(norm: object) -> int | None:
    """Over how many entries a norm of TransformerLens goes; None where it does not say so."""
    weight = getattr(norm, "w", None)
    return len(weight) if isinstance(weight, Tensor) else None


def _norms_each_head_alike(attn: Any) -> bool:
    """Whether the norms take one head at a time, with the same weights for every head."""
    return getattr(attn, "_qk_norm_phase", None) == "post_reshape" and not getattr(attn, "_qk_norm_per_head", False)


def _rotary(cfg: Any, tables: list[Tensor]) -> Rotary | None:
    """The tables as they passed; those of neighbours that are turned together may come as two halves."""
    if len(tables) != len(ROTARY):
        return None
    repeated, halves = (
        bool(getattr(cfg, f"rotary_{name}", False)) for name in ("interleaved_cos_sin", "adjacent_pairs")
    )
    if halves and not repeated:
        tables = [table[..., : table.shape[-1] // 2].repeat_interleave(2, -1) for table in tables]
    return Rotary(*tables, adjacent=repeated or halves)
