r"""Eviction as in StreamingLLM: a query sees a window of recent keys, with or without the first few.

With a window of r keys and s first keys, what query i sees is ``{j < s} U {i - r <= j <= i}``: the cache holds the s
first and the r last keys of what was before, and is trimmed after every token, as in the authors' code (Xiao et al.,
ICLR 2024). Keys and values of later blocks are computed from what earlier blocks saw, so that one masked pass gives
what a loop over tokens with a trimmed cache gives.

Positions are *kept*, or *re-indexed*: the authors cache keys before their rotation and rotate them by their index in
the cache, so that a query never lies farther than r + s from the first key. Recent keys keep their distance to the
query in either way; only the scores of the s first ones differ,

    score[i, p] = (R_{r+s} q_i) . (R_p k_p) / scale    for p < s, where i > r + s.

Defaults: 4 first keys, as the paper recommends; the window is the caller's. The authors' script keeps 1 and 255.
Pitfall: to take the first token away by *dropping it from the prompt* shifts all positions; here nothing shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens import edits
from sinklens.errors import InputError, NotApplicableError
from sinklens.interventions.cached import Span
from sinklens.interventions.patched import Hooks, hooks_of
from sinklens.models.identities import identities, is_unnormalised, probe_tokens, probing
from sinklens.models.qk_product import Meeting, meeting, rotary_sites
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, has_hook, model_id, model_shape
from sinklens.models.writes import check_writable
from sinklens.patches import Patch
from sinklens.records.integers import whole_number, whole_numbers
from sinklens.sites import PATTERN, HookSite, K, Q

SCORES = HookSite("blocks.{layer}.attn.hook_attn_scores", PATTERN.axes)
"""Attention scores in front of the softmax."""
Indexing = Literal["kept", "reindexed"]


@in_usual_state
def evict(
    model: Model, window: int, first: int = 4, *, layers: Sequence[int] | None = None, positions: Indexing = "kept"
) -> Hooks:
    """Let every query see the ``first`` keys of its prompt, the last ``window`` before it, and its own.

    Args:
        model: the model that the hooks are for.
        window: recent keys in the cache.
        first: first keys in the cache; 0 for a window alone.
        layers: blocks; all by default.
        positions: ``kept``, or ``reindexed`` by their place in the cache (rotary embeddings only).

    Raises:
        InputError: a negative number of keys, or other positions.
        NotApplicableError: attention is no softmax; positions that cannot be re-indexed.
    """
    check_cache(window, first)
    if positions not in ("kept", "reindexed"):
        raise InputError(f"positions {positions!r}: choose kept or reindexed")
    blocks = tuple(range(model_shape(model).n_layers)) if layers is None else whole_numbers(layers, "layers")
    patch = eviction_patch(model, window, first, blocks)
    hooks = [hook for layer in blocks for hook in _masked(model, layer, window, first)] or hooks_of(patch)
    # Without first keys the two are the same: only distances between recent keys are left.
    return hooks if positions == "kept" or not first else [*reindexed(model, window, first, blocks), *hooks]


def _masked(model: Model, layer: int, window: int, first: int) -> Hooks:
    """The mask in front of the softmax; none where scores cannot be written.

    Better than the pattern's rows divided by their sums, where a sink has left nothing for the others in float32.
    """
    try:
        check_writable(model, SCORES.template, (layer,))
    except NotApplicableError:
        return []
    if SCORES.at(layer) not in identities(model).fired:
        return []
    span = Span(f"the eviction of keys in block {layer}")

    def mask(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        n_queries, n_keys = act.shape[-2:]
        span.see(n_queries, n_keys)
        queries = torch.arange(n_keys - n_queries, n_keys, device=act.device)[:, None]
        keys = torch.arange(n_keys, device=act.device)
        return act.masked_fill((keys >= first) & (keys < queries - window), -torch.inf)

    return [(SCORES.at(layer), mask)]


def check_cache(window: int, first: int) -> None:
    """Make sure that these are sizes of a cache.

    Raises:
        InputError: one is no whole number, or negative.
    """
    for what, size in (("window", window), ("first", first)):
        if whole_number(size, what) < 0:
            raise InputError(f"{what} counts keys that are kept, and cannot be {size}")


def eviction_patch(
    model: Model, window: int, first: int, layers: Sequence[int], *, length: int = 0, run: str = "base"
) -> Patch:
    """The same with kept positions as a patch, for the engine: a root of a run, say.

    Args:
        model: the model.
        window: recent keys in the cache.
        first: first keys in the cache.
        layers: blocks.
        length: tokens in a prompt, which the engine has to be told; for plain hooks there is no need to.
        run: the run that is patched.

    Raises:
        NotApplicableError: the model's attention is no softmax.
    """
    check_cache(window, first)
    if is_unnormalised(model):
        raise NotApplicableError(
            f"{model_id(model)}: what is left when keys are evicted is known of a softmax alone, and its attention is "
            "none"
        )
    slot = not all(identities(model).holds("pattern_sums_to_one", (layer,)) for layer in layers)
    edit = edits.KeepKeys("evicted", window, first, slot)
    return Patch(PATTERN, tuple(layers), tuple(range(length)), edit, run=run)


# --- Positions by the place in the cache -----------------------------------------------------------------------------


def reindexed(model: Model, window: int, first: int, layers: Sequence[int]) -> Hooks:
    """Hooks that give the first keys the scores they have when positions count in the cache; they evict nothing."""
    last = window + first
    hooks: Hooks = []
    for layer, met in meetings(model, layers, last + 1).items():
        block = _Block(met, layer, last, first, Span(f"re-indexed positions in block {layer}"))
        hooks += [(Q.at(layer), block.queries), (K.at(layer), block.keys), (SCORES.at(layer), block.scores)]
    return hooks


def meetings(model: Model, layers: Sequence[int], length: int) -> dict[int, Meeting]:
    """How queries and keys meet in these blocks, with rotations for ``length`` positions.

    Raises:
        NotApplicableError: not through rotary embeddings, or in a way that is not known.
    """
    for site in (Q, K, SCORES):
        identities(model).check_layout(site.template, layers)
    seen: dict[int, dict[HookSite, Tensor]] = {layer: {} for layer in layers}
    places = [(layer, site) for layer in layers for site in rotary_sites(model, layer)]
    if places:

        def keeper(layer: int, site: HookSite) -> Any:
            def keep(act: Tensor, hook: Any) -> None:  # noqa: ARG001
                seen[layer][site] = act.detach()

            return keep

        tokens = probe_tokens(model)[:1]
        tokens = tokens.repeat(1, -(-length // tokens.shape[1]))[:, :length]
        with probing(model, [(site.at(layer), keeper(layer, site)) for layer, site in places]):
            model(tokens, return_type=None)
    found: dict[int, Meeting] = {}
    for layer in layers:
        met = meeting(model, layer, length, seen[layer]) if has_hook(model, SCORES.at(layer)) else None
        if met is None or met.rotary is None:
            raise NotApplicableError(
                f"{model_id(model)}: positions cannot be re-indexed in block {layer}, where queries and keys do not "
                "meet by rotary embeddings alone: keep the positions"
            )
        found[layer] = met
    return found


@dataclass(eq=False)
class _Block:
    """What one block's hooks know of the pass under way."""

    met: Meeting
    """How its queries and keys meet."""
    layer: int
    """The block."""
    last: int
    """Place of the query in a full cache."""
    n_first: int
    """First keys that are kept."""
    span: Span
    """Where the pass begins."""
    q: Float[Tensor, "batch pos head d_head"] = field(default_factory=lambda: torch.zeros(0))
    """Queries of this pass, before their rotation."""
    k: Float[Tensor, "batch pos kv_head d_head"] = field(default_factory=lambda: torch.zeros(0))
    """The first keys of the prompt, before theirs."""

    def queries(self, act: Tensor, hook: Any) -> None:  # noqa: ARG002
        self.q = act

    def keys(self, act: Tensor, hook: Any) -> None:  # noqa: ARG002
        begins = self.span.begins(act.shape[1])
        if begins < self.n_first:  # later passes of a generation go on with those of its first
            before = act[:, :0] if begins == 0 else self.k
            self.k = torch.cat([before, act], 1)[:, : self.n_first].clone()

    def scores(self, act: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG002
        queries, n_keys = act.shape[-2:]
        self.span.see(queries, n_keys)
        late = torch.arange(n_keys - queries, n_keys, device=act.device) > self.last
        if not late.any():
            return None
        new = act.clone()
        new[:, :, late, : self.n_first] = self._first_scores(late).to(act)
        return new

    def _first_scores(self, late: Tensor) -> Float[Tensor, "batch head query first"]:
        q, k = self.q[:, late.to(self.q.device)], self.k
        place = torch.full((q.shape[0] * q.shape[1],), self.last, device=q.device)
        turned_q = self.met.queries(q.flatten(0, 1), place).view_as(q)
        index = torch.arange(k.shape[1], device=k.device).repeat(len(k))
        turned_k = self.met.keys(k.flatten(0, 1), index).view_as(k)
        turned_k = turned_k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        return torch.einsum("bqhd,bkhd->bhqk", turned_q, turned_k.to(turned_q))
