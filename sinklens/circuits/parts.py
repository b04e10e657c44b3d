"""How nodes read and write: the model's own norms and projections, block by block, on ``[token, d_model]``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.circuits.nodes import Branch, Node
from sinklens.engine.packed.known import packed_model, unsupported
from sinklens.engine.packed.weights import Norm, PackedBlock, PackedModel
from sinklens.errors import NotApplicableError
from sinklens.models.view import Model, model_id
from sinklens.sites import RESID_MID, RESID_PRE, HookSite, K, Q, V

PRE = HookSite("blocks.{layer}.mlp.hook_pre", ("batch", "pos", "d_mlp"))
PRE_LINEAR = HookSite("blocks.{layer}.mlp.hook_pre_linear", ("batch", "pos", "d_mlp"))
SITE: dict[str, HookSite] = {"q": Q, "k": K, "v": V, "gate": PRE, "linear": PRE_LINEAR, "in": PRE}
"""Where an input first shows, behind the norm and the projection; ``in`` of a gated MLP shows at both of its own."""


@dataclass(frozen=True, eq=False)
class Reader:
    """What one input makes of the residual stream: a norm, then a projection."""

    site: HookSite
    """Where the result stands."""
    units: tuple[int, ...] | None
    """Which units there; None for all."""
    reads: HookSite
    """The residual stream that it reads."""
    norm: Norm | None
    """The norm in front."""
    W: Float[Tensor, "d_model unit_d"]
    """The projection's columns, side by side; 0 for units that are another node's."""
    b: Float[Tensor, " unit_d"] | None = None
    """Its bias."""

    def __call__(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token unit_d"]:
        """The input as it reads ``x``, without the bias."""
        return (x if self.norm is None else self.norm(x)).to(self.W.dtype) @ self.W


class Parts:
    """A model's blocks for prompts of one length, as nodes.

    Raises:
        NotApplicableError: the model has a part that is not known, an MLP without neurons, or attention that is not a
            softmax over keys.
    """

    def __init__(self, model: Model, length: int, super_block: int, neurons: tuple[int, ...]) -> None:
        if (why := unsupported(model, length)) is not None:
            raise NotApplicableError(f"{model_id(model)}: no circuit can be taken apart ({why})")
        self.packed: PackedModel = packed_model(model, length)
        self.super_block, self.neurons = super_block, neurons
        self._name = model_id(model)
        self._readers: dict[tuple[Node, Branch], tuple[Reader, ...]] = {}

    def block(self, layer: int) -> PackedBlock:
        """The weights of a block.

        Raises:
            NotApplicableError: it has no dense MLP, or attention that is not known.
        """
        found = self.packed.block(layer)
        if found.mlp_parts is None:
            raise NotApplicableError(
                f"{self._name} has no MLP with neurons in block {layer}: no circuit of it is known"
            )
        if found.weigh is not None or found.v_scaled is not None or found.z_changed is not None:
            raise NotApplicableError(f"{self._name}: circuits are known for attention that is a softmax over keys")
        return found

    def readers(self, node: Node, branch: Branch) -> tuple[Reader, ...]:
        """How an input reads: one projection, or both of a gated MLP."""
        key = (node, branch)
        if key not in self._readers:
            self._readers[key] = self._attention(node, branch) if branch in ("q", "k", "v") else self._mlp(node, branch)
        return self._readers[key]

    def _attention(self, node: Node, branch: Branch) -> tuple[Reader, ...]:
        weights, size = self.block(node.block), self.packed.d_head
        W, b = self.qkv(node.block)["qkv".index(branch)]
        mine = slice(node.index * size, (node.index + 1) * size)
        b = None if b is None else b[mine]
        return (Reader(SITE[branch], (node.index,), RESID_PRE, weights.ln1, W[:, mine].contiguous(), b),)

    def qkv(self, layer: int) -> list[tuple[Tensor, Tensor | None]]:
        """Weights and biases of queries, keys and values."""
        linear, size = list(self.block(layer).qkv), self.packed.d_head
        if len(linear) > 1:
            return [(part.W, part.b) for part in linear]
        sizes = [self.packed.n_heads * size, *[self.packed.n_kv_heads * size] * 2]
        (whole,) = linear
        biases = [None] * 3 if whole.b is None else whole.b.split(sizes)
        return list(zip(whole.W.split(sizes, -1), biases, strict=True))

    def _mlp(self, node: Node, branch: Branch) -> tuple[Reader, ...]:
        weights = self.block(node.block)
        mlp, reads = weights.mlp_parts, RESID_PRE if self.packed.parallel else RESID_MID
        assert mlp is not None
        norm = weights.ln1 if weights.ln2 is None and self.packed.parallel else weights.ln2
        projections = [(PRE, mlp.up)] if mlp.gate is None else [(PRE, mlp.gate), (PRE_LINEAR, mlp.up)]
        if node.kind == "super":
            site, linear = projections[branch == "linear"]
            some = list(self.neurons)
            b = None if linear.b is None else linear.b[some]
            return (Reader(site, self.neurons, reads, norm, linear.W[:, some].contiguous(), b),)
        return tuple(
            Reader(site, None, reads, norm, self._others(linear.W, node.block), linear.b)
            for site, linear in projections
        )

    def writes(self, node: Node, act: Float[Tensor, "token unit *rest"]) -> Float[Tensor, "token d_model"]:
        """What a head writes, given its block's ``z``, or an MLP or the super neurons, given its neurons."""
        weights = self.block(node.block)
        if node.kind == "head":
            return attention_shares(weights, act)[0][:, node.index]
        neurons = self.neurons if node.block == self.super_block else ()
        some, others = mlp_shares(weights, act, neurons)
        return some if node.kind == "super" else others

    def _others(self, W: Tensor, layer: int) -> Tensor:
        """The columns of a projection without those of the super neurons."""
        if layer != self.super_block:
            return W
        W = W.clone()
        W[:, list(self.neurons)] = 0
        return W


def share(
    norm: Norm | None, part: Float[Tensor, "*place d_model"], whole: Float[Tensor, "*place d_model"]
) -> Float[Tensor, "*place d_model"]:
    """What a norm makes of a part of its input, with the scale of the whole (and without the norm's offset)."""
    if norm is None:
        return part
    if norm.kind == "layer":
        part, whole = part - part.mean(-1, keepdim=True), whole - whole.mean(-1, keepdim=True)
    part = part / (whole.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    return part if norm.w is None else part * norm.w.to(part)


def attention_shares(
    weights: PackedBlock, z: Float[Tensor, "row head d_head"]
) -> tuple[Float[Tensor, "row head d_model"], Float[Tensor, "row d_model"]]:
    """What each head adds to the residual stream, and what biases of the output do."""
    W = weights.out.W.view(z.shape[1], z.shape[2], -1).to(z.dtype)
    heads = torch.einsum("nhe,hed->nhd", z, W)
    bias = heads.new_zeros(heads.shape[-1]) if weights.out.b is None else weights.out.b.to(heads)
    whole = heads.sum(1) + bias
    rest = _with_offset(weights.ln1_post, share(weights.ln1_post, bias.expand_as(whole), whole))
    return weights.added * share(weights.ln1_post, heads, whole[:, None]), weights.added * rest


def mlp_shares(
    weights: PackedBlock, post: Float[Tensor, "row d_mlp"], neurons: tuple[int, ...]
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
    """What some neurons add to the residual stream, and what all the others do, with the bias."""
    assert weights.mlp_parts is not None
    down, some = weights.mlp_parts.down, list(neurons)
    whole = (down(post.to(down.W.dtype))).to(post.dtype)
    mine = post[:, some] @ down.W[some].to(post.dtype)
    of_some = weights.added * share(weights.ln2_post, mine, whole)
    others = share(weights.ln2_post, whole - mine, whole)
    return of_some, weights.added * _with_offset(weights.ln2_post, others)


def _with_offset(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None or norm.b is None else x + norm.b.to(x)
