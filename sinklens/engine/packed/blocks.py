"""The packed forward pass: the model's blocks on packed tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

from sinklens.engine.packed.layout import Layout
from sinklens.engine.packed.points import PATTERN, SCORES, SITES, Points
from sinklens.engine.packed.weights import Norm, PackedBlock, PackedModel
from sinklens.sites import LOGITS, RESID_PRE, ROT_K, HookSite, K, V


def keys_site(model: PackedModel) -> HookSite:
    """Where the keys are as attention uses them: turned by their positions, where the model does that."""
    return ROT_K if model.rotary else K


class PackedPass:
    """One batch of rows through the blocks, with edits and readouts on the way."""

    def __init__(self, model: PackedModel, layout: Layout, points: Points) -> None:
        self.model, self.layout, self.points = model, layout, points
        self._n_rows = 0  # under way

    def run(self, first: int, last: int) -> Float[Tensor, "token d_model"]:
        """Blocks ``first`` to ``last``, no further than anything is read; gives the last residual that was computed."""
        n_layers, points = self.points.n_layers, self.points
        logits = points.asked(LOGITS.template, n_layers)
        x = torch.empty(0)
        with torch.no_grad():
            for layer in range(first, min(last, n_layers - 1) + 1):
                device = self.model.block(layer).W_O.device
                self.layout, x = self.layout.on(device), x.to(device)
                x = self._joined(x, layer)
                stop = len(SITES) if layer < last or logits else points.last(layer)
                x = self._block(x, layer, stop)
            if logits:
                points.logits(x, self.model.logits)
        return x

    def _joined(self, x: Tensor, layer: int) -> Tensor:
        """The rows that are patched in this block come in with the residual stream of their run."""
        old, new = len(x), self.layout.n_tokens(layer)
        self._n_rows = self.layout.n_rows(layer)
        if new == old:
            return x
        coming = self.points.captured(RESID_PRE, layer).flatten(0, 1)[self.layout.origin[old:new]]
        return torch.cat([x, coming]) if old else coming

    def _block(self, x: Tensor, layer: int, stop: int) -> Tensor:
        weights, visit = self.model.block(layer), self.points.visit
        x = visit("blocks.{layer}.hook_resid_pre", layer, x)
        if stop < 1:
            return x
        h = self._normalized(weights.ln1, "blocks.{layer}.ln1.hook_normalized", layer, x)
        if stop < 2:
            return x
        out = self._attention(weights, h, layer, stop)
        if out is None:
            return x
        if self.model.parallel:
            h = self._normalized(weights.ln2, "blocks.{layer}.ln2.hook_normalized", layer, x)
            x = x + out
        else:
            x = visit("blocks.{layer}.hook_resid_mid", layer, out.add_(x))
            if stop <= SITES.index("blocks.{layer}.hook_resid_mid"):
                return x
            h = self._normalized(weights.ln2, "blocks.{layer}.ln2.hook_normalized", layer, x)
        out = self._mlp(weights, h, layer)
        return visit("blocks.{layer}.hook_resid_post", layer, out.add_(x))

    def _normalized(self, norm: Norm, template: str, layer: int, x: Tensor) -> Tensor:
        if not self.points.asked(template, layer):
            return norm(x)
        return norm.scaled(self.points.visit(template, layer, norm.normalized(x)))

    def _attention(self, weights: PackedBlock, h: Tensor, layer: int, stop: int) -> Tensor | None:
        """Attention's output for every token; None when nothing behind the pattern is asked for."""
        model, visit = self.model, self.points.visit
        n, width, kv_width = len(h), model.n_heads * model.d_head, model.n_kv_heads * model.d_head
        qkv = h @ weights.W_qkv if weights.b_qkv is None else torch.addmm(weights.b_qkv, h, weights.W_qkv)
        q, k, v = (part.view(n, -1, model.d_head) for part in qkv.split([width, kv_width, kv_width], -1))
        q, k = visit("blocks.{layer}.attn.hook_q", layer, q), visit("blocks.{layer}.attn.hook_k", layer, k)
        v = visit("blocks.{layer}.attn.hook_v", layer, v)
        if weights.q_norm is not None:
            q, k = _head_norm(weights.q_norm, q), _head_norm(weights.k_norm, k)
        if weights.rotary is not None:
            q = visit("blocks.{layer}.attn.hook_rot_q", layer, self._turned(weights.rotary, q))
            k = visit("blocks.{layer}.attn.hook_rot_k", layer, self._turned(weights.rotary, k))
        if stop < SITES.index(SCORES):
            return None
        asked = self.points.asked(SCORES, layer) or self.points.asked(PATTERN, layer)
        z = (self._explicit if asked else self._fused)(weights, q, k, v, layer, stop)
        if z is None:
            return None
        z = visit("blocks.{layer}.attn.hook_z", layer, z).flatten(1)
        out = z @ weights.W_O if weights.b_O is None else torch.addmm(weights.b_O, z, weights.W_O)
        return visit("blocks.{layer}.hook_attn_out", layer, out)

    def _turned(self, rotary: tuple[Tensor, Tensor], x: Float[Tensor, "token head d_head"]) -> Tensor:
        """Rotary embeddings at the tokens' own positions."""
        position = self.layout.position[: len(x)]
        cos, sin = (table[position].unsqueeze(1) for table in rotary)
        size = cos.shape[-1]
        if self.model.rotary_adjacent:
            first, second = slice(0, size, 2), slice(1, size, 2)
        else:
            first, second = slice(size // 2), slice(size // 2, size)
        turned = x * cos if size == x.shape[-1] else torch.cat([x[..., :size] * cos, x[..., size:]], -1)
        turned[..., first].addcmul_(x[..., second], sin[..., first], value=-1)
        turned[..., second].addcmul_(x[..., first], sin[..., second])
        return turned

    def _fused(self, weights: PackedBlock, q, k, v, layer: int, stop: int) -> Tensor:  # noqa: ANN001, ARG002
        """``z`` by scaled-dot-product attention, where nobody looks at the pattern."""
        queries, keys, values = self._queries(q), self._prefixed(k, layer, "k"), self._prefixed(v, layer, "v")
        # Kernels for grouped heads exist in half precision on a GPU; elsewhere the shared heads are repeated.
        grouped = keys.shape[2] != queries.shape[2]
        native = grouped and q.is_cuda and q.dtype != torch.float32
        if grouped and not native:
            keys, values = self._repeated(keys), self._repeated(values)
        out = scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            is_causal=True,
            scale=1 / weights.scale,
            enable_gqa=native,
        )
        return self._packed(out.transpose(1, 2))

    def _explicit(self, weights: PackedBlock, q, k, v, layer: int, stop: int) -> Tensor | None:  # noqa: ANN001
        """Scores and pattern as TransformerLens computes them, packed as ``[token, head, key]``."""
        length = self.layout.length
        queries, keys = self._queries(q), self._repeated(self._prefixed(k, layer, "k"))
        scores = queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1) / weights.scale
        rows = self._packed(scores.transpose(1, 2))
        later = torch.arange(length, device=q.device) > self.layout.position[: len(q), None]
        rows = rows.masked_fill(later[:, None], -torch.inf)
        rows = self.points.visit(SCORES, layer, rows)
        pattern = self.points.visit(PATTERN, layer, softmax(rows, dim=-1))
        if stop <= SITES.index(PATTERN):
            return None
        values = self._repeated(self._prefixed(v, layer, "v"))
        return self._packed((self._queries(pattern).transpose(1, 2) @ values.transpose(1, 2)).transpose(1, 2))

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
        captured = self.points.captured(keys_site(self.model) if which == "k" else V, layer)
        # Joined first and gathered then: a scatter into the gathered prefix is several times slower on a GPU.
        pool = torch.cat([captured.flatten(0, 1), x])
        return pool[layout.prefixed(self._n_rows, len(captured))].view(self._n_rows, layout.length, *x.shape[1:])

    def _packed(self, full: Float[Tensor, "row pos *rest"]) -> Float[Tensor, "token *rest"]:
        flat = full.reshape(-1, *full.shape[2:])
        return flat[self.layout.slot[: self.layout.offsets[len(full)]]] if self.layout.padded else flat

    def _repeated(self, x: Float[Tensor, "row pos kv_head d_head"]) -> Tensor:
        n = self.model.n_heads // x.shape[2]
        return x if n == 1 else x.repeat_interleave(n, dim=2)

    def _mlp(self, weights: PackedBlock, h: Tensor, layer: int) -> Tensor:
        visit = self.points.visit
        if weights.W_gate is None:
            pre = h @ weights.W_in if weights.b_in is None else torch.addmm(weights.b_in, h, weights.W_in)
            post = weights.act(visit("blocks.{layer}.mlp.hook_pre", layer, pre))
        else:
            pre = visit("blocks.{layer}.mlp.hook_pre", layer, h @ weights.W_gate)
            linear = visit("blocks.{layer}.mlp.hook_pre_linear", layer, h @ weights.W_in)
            post = weights.act(pre) * linear
            post = post if weights.b_in is None else post + weights.b_in
        post = visit("blocks.{layer}.mlp.hook_post", layer, post)
        out = post @ weights.W_out if weights.b_out is None else torch.addmm(weights.b_out, post, weights.W_out)
        return visit("blocks.{layer}.hook_mlp_out", layer, out)


def _head_norm(norm, x: Float[Tensor, "token head d_head"]) -> Tensor:  # noqa: ANN001
    return norm(x.reshape(-1, x.shape[-1])).view(x.shape)
