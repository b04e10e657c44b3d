r"""The QK fix of AtP* (Kramar et al. 2024): queries and keys are patched through an exact softmax.

A softmax that is saturated has no gradient, however far a patched query or key would move it. So for these the
attention pattern A is recomputed, and only what comes after it is linear: with G = dM/dA at the run, the estimate is

    sum_ij G[i, j] (A'[i, j] - A[i, j])  =  sum_ij A'[i, j] C[i, j],    C[i, j] = G[i, j] - sum_l A[i, l] G[i, l].

A query at i changes row i. A key at t changes one score in every row, by D[i], so that

    A'[i, t] = sigmoid(log A[i, t] - log(1 - A[i, t]) + D[i]),

and the rest of the row keeps its proportions: its mean of C is known beforehand. That is O(T) for each query or key.
Several keys of one patch share their rows, which are recomputed whole, so that they are as exact together as one is.

All of this is in float64, and 1 - A is summed over the other keys: where a sink takes nearly all attention it is what
matters. G is taken before the run's root edits of the pattern: a row that a root edit overwrites has G = 0, as patching
its query does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.attribution.trace import Node, Trace
from sinklens.errors import NotApplicableError
from sinklens.metrics.sums import running_sum
from sinklens.models.qk_product import Meeting, meeting, rotary_sites
from sinklens.models.view import Model, model_id
from sinklens.sites import PATTERN, K, Q

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far the recomputed pattern may be from the model's; a lower precision is given more."""


def nodes_for_fix(model: Model, layer: int) -> tuple[set[Node], set[Node]]:
    """What the fix needs of the patched run in a block: activations, and activations with gradients."""
    keep = {Node(site, layer) for site in (Q, K, *rotary_sites(model, layer))}
    return keep, {Node(PATTERN, layer, before=True)}


@dataclass(frozen=True, eq=False)
class Attention:
    """One block's attention in the patched run, recomputed from its queries and keys."""

    meeting: Meeting
    """How the model's queries and keys come to meet: norms and rotation."""
    q: Float[Tensor, "prompt pos head d_head"]
    """Queries as they meet the keys: normed and rotated where the model does that, and divided by the scale."""
    k: Float[Tensor, "prompt pos head d_head"]
    """Keys as they meet the queries, one for every query head."""
    log_pattern: Float[Tensor, "prompt head query key"]
    """Log A, float64."""
    centred: Float[Tensor, "readout prompt head query key"]
    """C: the gradient of every readout with respect to the pattern, minus its mean under the pattern, float64."""
    group: int
    """Query heads for each key/value head."""

    def queries(
        self, old: Tensor, new: Tensor, prompts: Tensor, positions: Tensor, heads: Int[Tensor, "pair unit"]
    ) -> Float[Tensor, "readout pair unit"]:
        """The estimate for queries ``old`` that become ``new`` (each ``[pair, unit, d_head]``), head by head."""
        moved = self.meeting.queries(new, positions) - self.meeting.queries(old, positions)
        keys = self.k[prompts[:, None], :, heads]  # [pair, unit, key, d_head]
        change = torch.einsum("pud,pukd->puk", moved, keys)
        at = (prompts[:, None], heads, positions[:, None])
        pattern = (self.log_pattern[at] + change).softmax(-1)
        return _sum_rows(change, pattern, torch.stack([c[at] for c in self.centred]))

    def keys(
        self, old: Tensor, new: Tensor, prompts: Tensor, positions: Tensor, units: Int[Tensor, "pair unit"]
    ) -> Float[Tensor, "readout pair unit"]:
        """The estimate for keys that become ``new``, each patched alone."""
        change, heads = self._score_changes(old, new, prompts, positions, units)  # [pair, head, query]
        at = (prompts[:, None], heads, slice(None), positions[:, None])
        odds = self.log_pattern[at] - self._log_rest[at] + change
        own, rest = odds.sigmoid(), (-odds).sigmoid()
        pattern = torch.stack([own, rest], -1)
        centred = [torch.stack([c[at], m[at]], -1) for c, m in zip(self.centred, self._rest_mean, strict=True)]
        return self._by_unit(_sum_rows(change[..., None], pattern, torch.stack(centred)))

    def keys_together(
        self,
        old: Tensor,
        new: Tensor,
        prompts: Tensor,
        positions: Tensor,
        units: Int[Tensor, "pair unit"],
        patches: Int[Tensor, " pair"],
        n_patches: int,
    ) -> Float[Tensor, "readout patch unit"]:
        """The estimate for keys that become ``new``; pairs with the same number in ``patches`` are patched together."""
        change, heads = self._score_changes(old, new, prompts, positions, units)
        whole = change.new_zeros(n_patches, *change.shape[1:], self.k.shape[1])  # [patch, head, query, key]
        every = torch.arange(change.shape[1], device=change.device)
        whole[patches[:, None], every, :, positions[:, None]] = change
        first = torch.zeros(n_patches, dtype=torch.long, device=patches.device).scatter_(
            0, patches, torch.arange(len(patches), device=patches.device)
        )  # any pair of the patch: its prompt and units are those of all
        at = (prompts[first][:, None], heads[first])
        pattern = (self.log_pattern[at] + whole).softmax(-1)
        return self._by_unit(_sum_rows(whole, pattern, torch.stack([c[at] for c in self.centred])))

    def _score_changes(
        self, old: Tensor, new: Tensor, prompts: Tensor, positions: Tensor, units: Tensor
    ) -> tuple[Float[Tensor, "pair head query"], Int[Tensor, "pair head"]]:
        """How patched keys change every query's score, and the query heads that read them."""
        moved = self.meeting.keys(new, positions) - self.meeting.keys(old, positions)
        heads = (units[:, :, None] * self.group + torch.arange(self.group, device=units.device)).flatten(1)
        queries = self.q[prompts[:, None], :, heads]  # [pair, head, query, d_head]
        change = torch.einsum("phd,phqd->phq", moved.repeat_interleave(self.group, 1), queries).double()
        sees = torch.arange(change.shape[-1], device=change.device) >= positions[:, None, None]
        return torch.where(sees, change, 0), heads

    def _by_unit(self, rows: Float[Tensor, "readout pair head query"]) -> Float[Tensor, "readout pair unit"]:
        return rows.sum(-1).unflatten(-1, (-1, self.group)).sum(-1)

    @cached_property
    def _log_rest(self) -> Float[Tensor, "prompt head query key"]:
        """Log of the attention to all other keys."""
        return _others(self.log_pattern.exp()).log()

    @cached_property
    def _rest_mean(self) -> Float[Tensor, "readout prompt head query key"]:
        """Mean of C under the attention to all other keys; 0 where there are none."""
        return torch.where(
            self._log_rest.isinf(), 0, _others(self.log_pattern.exp() * self.centred) / self._log_rest.exp()
        )


def attention(model: Model, layer: int, trace: Trace, readouts: list[str]) -> Attention:
    """The attention of block ``layer`` in a traced run.

    Raises:
        NotApplicableError: the model's pattern is not what its queries and keys give by the rules known here.
    """
    raw_q, raw_k = trace.acts[Node(Q, layer)], trace.acts[Node(K, layer)]
    length = raw_q.shape[1]
    passed = {site: Node(site, layer) for site in rotary_sites(model, layer)}
    seen = {site: trace.acts[node] for site, node in passed.items() if node in trace.acts}
    found = meeting(model, layer, length, seen)
    if found is None:
        raise NotApplicableError(_cannot(model))
    every = torch.arange(length, device=raw_q.device).repeat(len(raw_q))
    q = found.queries(raw_q.flatten(0, 1), every).view_as(raw_q)
    k = found.keys(raw_k.flatten(0, 1), every).view_as(raw_k)
    group = raw_q.shape[2] // raw_k.shape[2]
    k = k.repeat_interleave(group, 2)
    scores = torch.einsum("pqhd,pkhd->phqk", q, k).double()
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    log_pattern = scores.masked_fill(mask, -torch.inf).log_softmax(-1)
    pattern = log_pattern.exp()
    node = Node(PATTERN, layer, before=True)
    theirs = node.site.from_canonical(trace.acts[node])
    if not torch.allclose(pattern, theirs.double(), rtol=0, atol=TOLERANCE.get(theirs.dtype, 3e-2)):
        raise NotApplicableError(_cannot(model))
    grads = [trace.grads.get((name, node)) for name in readouts]
    full = [torch.zeros_like(pattern) if g is None else node.site.from_canonical(g).double() for g in grads]
    grad = torch.stack(full)
    return Attention(found, q, k, log_pattern, grad - (grad * pattern).sum(-1, keepdim=True), group)


def _cannot(model: Model) -> str:
    return (
        f"the attention of {model_id(model)} cannot be recomputed from its queries and keys, which estimates of "
        'patched queries and keys need: leave these sites out, or run them exactly (a sweep\'s method="exact"); '
        "sl.attribution's own functions can do without it (qk_fix=False), less exactly"
    )


def _sum_rows(change: Tensor, pattern: Tensor, centred: Float[Tensor, "readout *row key"]) -> Tensor:
    """``sum_j A'_j C_j`` of every row; a row whose scores stay as they are is exactly 0."""
    return torch.where((change != 0).any(-1), (pattern * centred).sum(-1), 0)


def _others(x: Float[Tensor, "... key"]) -> Float[Tensor, "... key"]:
    """For every key the sum over all others, of what comes before it and what comes after: nothing is subtracted."""
    before = torch.nn.functional.pad(running_sum(x[..., :-1], -1), (1, 0))
    after = torch.nn.functional.pad(running_sum(x[..., 1:].flip(-1), -1).flip(-1), (0, 1))
    return before + after
