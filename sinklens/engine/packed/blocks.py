"""The packed forward pass: the model's blocks on packed tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

from sinklens.engine.packed.layout import Layout
from sinklens.engine.packed.points import KEYS, PATTERN, SCORES, SITES, Points
from sinklens.engine.packed.queries import Piece, pieces
from sinklens.engine.packed.weights import Norm, PackedBlock, PackedModel
from sinklens.models.hooked import Rotary
from sinklens.sites import LOGITS, RESID_PRE, V

PATTERN_BYTES = 1 << 27
"""What scores and pattern may take at a time where nobody says."""
COPIES = 4
"""Of scores and pattern, with their masked and packed forms, how many are there at once."""


class PackedPass:
    """One batch of rows through the blocks, with edits and readouts on the way."""

    def __init__(
        self,
        model: PackedModel,
        layout: Layout,
        points: Points,
        pattern_bytes: int = PATTERN_BYTES,
        begun: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.model, self.layout, self.points, self.pattern_bytes = model, layout, points, pattern_bytes
        self._begun = begun or {}  # packed tokens that enter a block with another residual stream than their run's
        self._n_rows = 0  # under way
        self._pieces: dict[tuple[int, torch.device], list[Piece]] = {}

    def run(
        self, first: int, last: int, x: Float[Tensor, "token d_model"] | None = None, *, to_end: bool = False
    ) -> Float[Tensor, "token d_model"]:
        """Blocks ``first`` to ``last``, no further than anything is read; gives the last residual that was computed.

        ``x`` is what enters the first block, where it was not captured; ``to_end`` goes on to the end of the last.
        """
        n_layers, points = self.points.n_layers, self.points
        logits = points.asked(LOGITS.template, n_layers)
        x = torch.empty(0) if x is None else x
        with torch.no_grad():
            for layer in range(first, min(last, n_layers - 1) + 1):
                device = self.model.block(layer).device
                self.layout, x = self.layout.on(device), x.to(device)
                x = self._joined(x, layer)
                stop = len(SITES) if layer < last or logits or to_end else points.last(layer)
                x, h = self._attention(x, layer, stop)
                if h is None:  # nothing is read behind
                    return x
                x = self._mlp(x, h, layer)
            if logits:
                points.logits(x, self.model.logits)
        return x

    def _joined(self, x: Tensor, layer: int) -> Tensor:
        """The rows that are patched in this block come in with the residual stream of their run."""
        old, new = len(x), self.layout.n_tokens(layer)
        if new == old:
            return x
        coming = self.points.captured(RESID_PRE, layer).flatten(0, 1)[self.layout.origin[old:new]]
        if layer in self._begun:
            tokens, begun = self._begun[layer]
            coming[tokens.to(coming.device) - old] = begun.to(coming)
        return torch.cat([x, coming]) if old else coming

    def one_block(self, x: Float[Tensor, "token d_model"], layer: int) -> Float[Tensor, "token d_model"]:
        """One block alone, to its end."""
        x, h = self._attention(x, layer, len(SITES))
        assert h is not None
        return self._mlp(x, h, layer)

    def _attention(self, x: Tensor, layer: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The first half of a block: the residual stream with attention's output, and what the MLP is given.

        That is None where nothing is asked for behind ``stop``, an index of the block's sites.
        """
        self._n_rows = self.layout.n_rows(layer)
        weights, visit = self.model.block(layer), self.points.visit
        x = visit("blocks.{layer}.hook_resid_pre", layer, x)
        if stop < 1:
            return x, None
        h = self._normalized(weights.ln1, "blocks.{layer}.ln1.hook_normalized", layer, x)
        if stop < 2:
            return x, None
        q, k, v = self._projected(weights, h, layer)
        if stop < SITES.index(SCORES):
            return x, None
        looked_at = self._looked_at(weights, layer, q)
        if looked_at is None:
            z = self._explicit(weights, q, k, v, h, layer, stop)
        else:
            z = self._in_pieces(weights, q, k, v, h, layer, stop, looked_at)
        if z is None:
            return x, None
        z = z if weights.z_changed is None else weights.z_changed(z, h)
        out = weights.out(visit("blocks.{layer}.attn.hook_z", layer, z).flatten(1))
        out = self._added(weights, out if weights.ln1_post is None else weights.ln1_post(out))
        out = visit("blocks.{layer}.hook_attn_out", layer, out)
        if self.model.parallel:
            if weights.ln2 is not None:
                h = self._normalized(weights.ln2, "blocks.{layer}.ln2.hook_normalized", layer, x)
            return x + out, h
        x = visit("blocks.{layer}.hook_resid_mid", layer, out.add_(x))
        if stop <= SITES.index("blocks.{layer}.hook_resid_mid"):
            return x, None
        return x, self._normalized(weights.ln2, "blocks.{layer}.ln2.hook_normalized", layer, x)

    def _normalized(self, norm: Norm | None, template: str, layer: int, x: Tensor) -> Tensor:
        if norm is None:
            return x
        if not self.points.asked(template, layer):
            return norm(x)
        return norm.scaled(self.points.visit(template, layer, norm.normalized(x)))

    def _projected(
        self, weights: PackedBlock, h: Tensor, layer: int
    ) -> tuple[
        Float[Tensor, "token head d_head"], Float[Tensor, "token kv_head d_head"], Float[Tensor, "token kv_head d_head"]
    ]:
        """Queries, keys and values as attention has them."""
        visit, model = self.points.visit, self.model
        width, kv_width = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
        parts = [product(h) for product in weights.qkv]
        parts = parts[0].split([width, kv_width, kv_width], -1) if len(parts) == 1 else parts
        q, k, v = (part.view(len(h), -1, model.d_head) for part in parts)
        q, k = visit("blocks.{layer}.attn.hook_q", layer, q), visit("blocks.{layer}.attn.hook_k", layer, k)
        v = visit("blocks.{layer}.attn.hook_v", layer, v)
        q = q if weights.q_norm is None else weights.q_norm(q)
        k = k if weights.k_norm is None else weights.k_norm(k)
        if self.model.rotary:
            q = visit("blocks.{layer}.attn.hook_rot_q", layer, self._turned(weights.rotary, q))
            k = visit("blocks.{layer}.attn.hook_rot_k", layer, self._turned(weights.rotary, k))
        return q, visit(KEYS.template, layer, k), v

    def _added(self, weights: PackedBlock, out: Tensor) -> Tensor:
        return out if weights.added == 1 else out * weights.added

    def _turned(self, rotary: Rotary | None, x: Float[Tensor, "token head d_head"]) -> Tensor:
        """Rotary embeddings at the tokens' own positions."""
        return turned(rotary, x, self.layout.position[: len(x)])

    def _looked_at(self, weights: PackedBlock, layer: int, q: Tensor) -> list[Piece] | None:
        """The queries whose pattern is needed, in pieces; None where all of it is, or it is small."""
        layout, needed, key = self.layout, self.points.queries(layer, q), len(q)
        if needed is None:
            return None
        if fused(weights):
            key = id(needed)  # which the points keep
        else:
            needed = torch.arange(len(q), device=q.device)
        bytes_each = COPIES * self.model.n_heads * layout.length * q.element_size()
        at_most = max(1, self.pattern_bytes // bytes_each)
        if 2 * len(needed) > len(q) and self._n_rows * layout.length <= at_most:
            return None
        if (key, q.device) not in self._pieces:
            self._pieces[key, q.device] = pieces(needed, layout, at_most)
        return self._pieces[key, q.device]

    def _in_pieces(
        self,
        weights: PackedBlock,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        layer: int,
        stop: int,
        looked_at: list[Piece],
    ) -> Tensor | None:
        """``z``, with scores and pattern of some queries alone."""
        goes_on = stop > SITES.index(PATTERN)
        keys = self._repeated(self._prefixed(k, layer, "k")) if looked_at else k
        values = self._repeated(self._values(weights, v, layer)) if looked_at and goes_on else v
        z = None
        if goes_on:
            z = self._fused(weights, q, k, v, layer) if fused(weights) else torch.empty_like(q)
        for piece in looked_at:
            queries = piece.padded(q[piece.tokens])
            scores = queries.transpose(1, 2) @ keys[piece.rows].permute(0, 2, 3, 1)
            rows = self._scores(weights, piece.packed(scores.transpose(1, 2)), self.layout.position[piece.tokens])
            rows = self.points.visit_queries(SCORES, layer, rows, piece)
            pattern, besides = _weights_of(weights, rows, q[piece.tokens], x[piece.tokens])
            pattern = self.points.visit_queries(PATTERN, layer, pattern, piece)
            if z is not None and (self.points.edits_attention(layer) or not fused(weights)):
                mixed = piece.padded(pattern).transpose(1, 2) @ values[piece.rows].transpose(1, 2)
                mixed = piece.packed(mixed.transpose(1, 2))
                z[piece.tokens] = mixed if besides is None else mixed + besides
        return z

    def _fused(self, weights: PackedBlock, q, k, v, layer: int) -> Tensor:  # noqa: ANN001
        """``z`` by scaled-dot-product attention, where nobody looks at the pattern."""
        queries, keys, values = self._queries(q), self._prefixed(k, layer, "k"), self._values(weights, v, layer)
        # Kernels for grouped heads exist in half precision on a GPU; elsewhere the shared heads are repeated.
        grouped = keys.shape[2] != queries.shape[2]
        native = grouped and q.is_cuda and q.dtype != torch.float32
        if grouped and not native:
            keys, values = self._repeated(keys), self._repeated(values)
        out = scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=weights.seen,
            is_causal=weights.seen is None,
            scale=1 / weights.scale,
            enable_gqa=native,
        )
        return self._packed(out.transpose(1, 2))

    def _explicit(self, weights: PackedBlock, q, k, v, x: Tensor, layer: int, stop: int) -> Tensor | None:  # noqa: ANN001
        """Scores and pattern as TransformerLens computes them, packed as ``[token, head, key]``."""
        queries, keys = self._queries(q), self._repeated(self._prefixed(k, layer, "k"))
        scores = queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1)
        rows = self._scores(weights, self._packed(scores.transpose(1, 2)), self.layout.position[: len(q)])
        rows = self.points.visit(SCORES, layer, rows)
        pattern, besides = _weights_of(weights, rows, q, x)
        pattern = self.points.visit(PATTERN, layer, pattern)
        if stop <= SITES.index(PATTERN):
            return None
        values = self._repeated(self._values(weights, v, layer))
        z = self._packed((self._queries(pattern).transpose(1, 2) @ values.transpose(1, 2)).transpose(1, 2))
        return z if besides is None else z + besides

    def _scores(
        self, weights: PackedBlock, products: Float[Tensor, "token head key"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token head key"]:
        """Scores of queries at some positions, from their products with all keys."""
        scores = products.div_(weights.scale)  # they are nobody else's: a copy would cost as much as the arithmetic
        scores = weights.cap * torch.tanh(scores / weights.cap) if weights.cap > 0 else scores
        if weights.seen is None:
            unseen = torch.arange(self.layout.length, device=position.device) > position[:, None]
        else:
            unseen = ~weights.seen[position]
        return scores.masked_fill_(unseen[:, None], weights.masked)

    def _queries(self, x: Float[Tensor, "token head rest"]) -> Float[Tensor, "row pos head rest"]:
        """Packed queries in their places; what stands before them does not matter."""
        layout = self.layout
        if not layout.padded:
            return x.view(-1, layout.length, *x.shape[1:])
        return x[layout.queries(self._n_rows)].view(self._n_rows, layout.length, *x.shape[1:])

    def _prefixed(self, x: Float[Tensor, "token kv_head d_head"], layer: int, which: str) -> Tensor:
        """Keys or values of all positions: the unpatched run's before a row's first token, its own from there on."""
        layout = self.layout
        if not layout.padded:
            return x.view(-1, layout.length, *x.shape[1:])
        captured = self.points.captured(self.model.keys_site if which == "k" else V, layer)
        # Joined first and gathered then: a scatter into the gathered prefix is several times slower on a GPU.
        pool = torch.cat([captured.flatten(0, 1), x])
        return pool[layout.prefixed(self._n_rows, len(captured))].view(self._n_rows, layout.length, *x.shape[1:])

    def _values(self, weights: PackedBlock, v: Float[Tensor, "token kv_head d_head"], layer: int) -> Tensor:
        """Values of all positions as they are averaged."""
        full = self._prefixed(v, layer, "v")
        return full if weights.v_scaled is None else weights.v_scaled(full)

    def _packed(self, full: Float[Tensor, "row pos *rest"]) -> Float[Tensor, "token *rest"]:
        flat = full.reshape(-1, *full.shape[2:])
        return flat[self.layout.slot[: self.layout.offsets[len(full)]]] if self.layout.padded else flat

    def _repeated(self, x: Float[Tensor, "row pos kv_head d_head"]) -> Tensor:
        n = self.model.n_heads // x.shape[2]
        # A copy of an expanded view is several times faster on a CPU than repeat_interleave.
        return x if n == 1 else x.unsqueeze(3).expand(-1, -1, -1, n, -1).flatten(2, 3)

    def _mlp(self, x: Tensor, h: Tensor, layer: int) -> Tensor:
        """The second half: the residual stream with what the MLP makes of ``h``."""
        weights, visit = self.model.block(layer), self.points.visit
        mlp = weights.mlp_parts
        if mlp is None:
            assert weights.whole_mlp is not None
            out = weights.whole_mlp(h)
        else:
            if mlp.gate is None:
                post = mlp.act(visit("blocks.{layer}.mlp.hook_pre", layer, mlp.up(h)))
            else:
                pre = visit("blocks.{layer}.mlp.hook_pre", layer, mlp.gate(h))
                linear = visit("blocks.{layer}.mlp.hook_pre_linear", layer, mlp.up(h))
                post = _times(mlp.act(pre), linear)
                post = post if mlp.offset is None else post + mlp.offset
            out = mlp.down(visit("blocks.{layer}.mlp.hook_post", layer, post))
        out = self._added(weights, out if weights.ln2_post is None else weights.ln2_post(out))
        out = visit("blocks.{layer}.hook_mlp_out", layer, out)
        return visit("blocks.{layer}.hook_resid_post", layer, out.add_(x))


def turned(
    rotary: Rotary | None, x: Float[Tensor, "token head d_head"], position: Int[Tensor, " token"]
) -> Float[Tensor, "token head d_head"]:
    """Queries or keys with rotary embeddings at their positions."""
    if rotary is None:
        return x
    cos, sin = (table[position].unsqueeze(1) for table in (rotary.cos, rotary.sin))
    size = cos.shape[-1]
    if rotary.adjacent:
        first, second = slice(0, size, 2), slice(1, size, 2)
    else:
        first, second = slice(size // 2), slice(size // 2, size)
    turned = x * cos if size == x.shape[-1] else torch.cat([x[..., :size] * cos, x[..., size:]], -1)
    turned[..., first].addcmul_(x[..., second], sin[..., first], value=-1)
    turned[..., second].addcmul_(x[..., first], sin[..., second])
    return turned.to(x.dtype)  # tables may be of a higher precision


def _times(x: Tensor, other: Tensor) -> Tensor:
    """Their product, in the memory of the first where it fits there."""
    return x.mul_(other) if x.dtype == other.dtype else x * other


def fused(weights: PackedBlock) -> bool:
    """Whether a kernel of torch computes this block's attention, without a pattern."""
    return not weights.cap and weights.sinks is None and weights.weigh is None


def _weights_of(
    weights: PackedBlock,
    scores: Float[Tensor, "token head key"],
    q: Float[Tensor, "token head d_head"],
    x: Float[Tensor, "token d_model"],
) -> tuple[Float[Tensor, "token head key"], Float[Tensor, "token head d_head"] | None]:
    """The softmax over keys, and over a learned logit to which a part of the attention is lost, or what else the block
    makes of its scores; and what that adds to ``z`` besides.
    """
    if weights.weigh is not None:
        return weights.weigh(scores, q, x)
    if weights.sinks is None:
        return softmax(scores, dim=-1), None
    lost = weights.sinks.to(scores).view(1, -1, 1).expand(len(scores), -1, 1)
    return softmax(torch.cat([scores, lost], -1), dim=-1)[..., :-1].contiguous(), None
