"""The sink's token alone, with its edges rewired: what it becomes when some inputs hear some senders differently.

The tokens before it are as they are in the run (a patch at the sink's token cannot move them), so a circuit of the
token costs one token's forward pass, with an input of its own for every receiver:

    x_r  =  sum over senders s of  (live s  if the edge s -> r is kept, else its alternative)  +  biases

where *live* is what the sender writes under the same rewiring. Kept edges all: the run itself. The run's root edits
stay in force. What is found are the keys and values that the token has in every block; the engine puts these where the
later tokens look (:mod:`sinklens.circuits.verify`).

All is differentiable, for :mod:`sinklens.circuits.estimates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.circuits.graph import Graph, Input
from sinklens.circuits.parts import Parts, attention_shares, mlp_shares
from sinklens.engine.apply import Op, edited
from sinklens.engine.capture import capture_runs
from sinklens.engine.packed.blocks import turned
from sinklens.engine.packed.weights import Norm, PackedBlock
from sinklens.engine.store import Want
from sinklens.errors import NotApplicableError
from sinklens.patches import Patch
from sinklens.sites import PATTERN, RESID_PRE, V, Z
from sinklens.stages.base import Setting


@dataclass(frozen=True, eq=False)
class Wiring:
    """Which edges each row keeps, and what the others hear; rows are all prompts of a circuit, then of the next."""

    keep: Float[Tensor, "row edge"]
    """1 for edges that are kept, 0 for the others, in the order of :attr:`Graph.edges`."""
    instead: Float[Tensor, "sender prompt d_model"]
    """What is heard of each sender where the edge is not kept."""
    prompts: Int[Tensor, " row"]
    """The prompt of each row."""


@dataclass(eq=False)
class Token:
    """The token of every row, block by block."""

    prompts: Int[Tensor, " row"]
    """The prompt of each row."""
    heard: dict[tuple[int, str], Float[Tensor, "row input d_model"]] = field(default_factory=dict)
    """What the inputs of a block hear: of attention (``attn``) and of the MLP (``mlp``), in the order of the graph."""
    k: dict[int, Float[Tensor, "row kv_head d_head"]] = field(default_factory=dict)
    """Keys as ``hook_k`` has them."""
    v: dict[int, Float[Tensor, "row kv_head d_head"]] = field(default_factory=dict)
    """Values as ``hook_v`` has them."""
    neurons: Float[Tensor, "row neuron"] | None = None
    """The super neurons' activations."""


class Rewiring:
    """A setting's token, as often and in as many wirings as one likes, in one of its runs."""

    def __init__(self, setting: Setting, graph: Graph, parts: Parts, run: str) -> None:
        self.graph, self.parts, self.run = graph, parts, run
        tokens, model = setting.batch.tokens, setting.model
        runs = {run: setting.pair.runs[run]}
        self._roots = [part for root in runs[run] for part in root.parts]
        if any(root.site not in (PATTERN, Z) or root.units is not None for root in self._roots):
            raise NotApplicableError("a circuit is known of sinks that are made at hook_pattern or hook_z of all heads")
        sites = [parts.packed.keys_site, V]
        wants = [Want(run, RESID_PRE, 0), *(Want(run, site, b) for site in sites for b in range(graph.last))]
        with torch.no_grad():
            store = capture_runs(model, tokens, runs, wants, max_rows=setting.max_rows)
            self._embedded = store.tensor(run, RESID_PRE, 0).float()
            self._k = [store.tensor(run, sites[0], b) for b in range(graph.last)]
            self._v = [store.tensor(run, V, b) for b in range(graph.last)]
        self.device = self._embedded.device
        self.positions = setting.pair.target.single(setting.batch.n).to(self.device)
        first, self._slices = 0, {}
        for to, branch in graph.inputs:
            self._slices[to, branch] = slice(first, first + graph.heard(to))
            first += graph.heard(to)

    def __call__(
        self,
        wiring: Wiring,
        *,
        root: float = 1.0,
        probe: dict[tuple[int, str], Tensor] | None = None,
    ) -> Token:
        """The token of every row.

        Args:
            wiring: which edges are kept.
            root: how far the run's root edits are in force, from 0 to 1.
            probe: added to what the inputs of a block hear, by the keys of :attr:`Token.heard`.
        """
        state = _State(self, wiring, root, probe or {})
        own = self._embedded[wiring.prompts, self.positions[wiring.prompts]]
        state.write(own[:, None])
        for layer in range(self.graph.last):
            state.block(layer)
        state.attention_inputs(self.graph.last)
        return state.token

    def keep(self, edges: Bool[Tensor, "circuit edge"]) -> tuple[Float[Tensor, "row edge"], Int[Tensor, " row"]]:
        """Rows for every prompt of some circuits, and the prompts of the rows."""
        n = len(self.positions)
        kept = edges.to(self.device).float().repeat_interleave(n, 0)
        return kept, torch.arange(n, device=self.device).repeat(len(edges))

    def mask(self, wiring: Wiring, inputs: Sequence[Input]) -> Float[Tensor, "row input sender"]:
        """The kept edges into some inputs of a block, which hear the same senders."""
        return torch.stack([wiring.keep[:, self._slices[key]] for key in inputs], 1)

    def keys_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """The run's own keys, as attention uses them, and values, ``[prompt pos head d_head]``."""
        n = self.parts.packed.n_heads // self.parts.packed.n_kv_heads
        return self._k[layer].repeat_interleave(n, 2), self._v[layer].repeat_interleave(n, 2)

    def rooted(self, site: object, layer: int, x: Tensor, prompts: Tensor, amount: float) -> Tensor:
        """``x`` under the run's root edits at a site."""
        for root in self._roots:
            if root.site == site and layer in root.layers and amount:
                x = torch.lerp(x, _edited(root, layer, x, prompts, self.positions[prompts]), amount)
        return x


def _edited(root: Patch, layer: int, x: Tensor, prompts: Tensor, positions: Tensor) -> Tensor:
    op = Op(root.site, layer, root.edit, (torch.arange(len(x), device=x.device),), prompts, positions)
    return edited(op, x, {}, None)


class _State:
    """One pass under way: what has been written so far."""

    def __init__(self, made: Rewiring, wiring: Wiring, root: float, probe: dict[tuple[int, str], Tensor]) -> None:
        self.made, self.wiring, self.root, self.probe = made, wiring, root, probe
        self.graph, self.prompts = made.graph, wiring.prompts
        self.token = Token(self.prompts)
        self._changes: list[Tensor] = []  # live less alternative, [row sender d_model]
        self._rest: Tensor | float = 0.0  # alternatives of all senders so far, and biases
        self._n = 0

    def write(self, live: Float[Tensor, "row node d_model"]) -> None:
        """What the next senders write."""
        instead = self.wiring.instead[self._n : self._n + live.shape[1], self.prompts].transpose(0, 1).to(live)
        self._changes.append(live - instead)
        self._rest = self._rest + instead.sum(1)
        self._n += live.shape[1]

    def _hear(self, layer: int, part: str, inputs: Sequence[Input]) -> Float[Tensor, "row input d_model"]:
        mask = self.made.mask(self.wiring, inputs)
        changes = torch.cat(self._changes, 1)[:, : mask.shape[2]]
        assert isinstance(self._rest, Tensor)
        heard = self._rest[:, None] + mask @ changes
        heard = heard + self.probe[layer, part] if (layer, part) in self.probe else heard
        self.token.heard[layer, part] = heard
        return heard

    def attention_inputs(self, layer: int) -> Tensor | None:
        """Queries of a block, if any hear; its keys and values are noted."""
        inputs = [key for key in self.graph.inputs_of(layer) if key[1] in ("q", "k", "v")]
        heard, packed = self._hear(layer, "attn", inputs), self.made.parts.packed
        normed = _normed(self.made.parts.block(layer).ln1, heard)
        found = {}
        for (W, b), branch in zip(self.made.parts.qkv(layer), "qkv", strict=True):
            mine = [i for i, key in enumerate(inputs) if key[1] == branch]
            if mine:
                columns = W.view(len(W), len(mine), packed.d_head)
                x = torch.einsum("nhd,dhe->nhe", normed[:, mine].to(W.dtype), columns)
                found[branch] = x if b is None else x + b.view(len(mine), packed.d_head)
        self.token.k[layer] = found["k"]
        if "v" in found:
            self.token.v[layer] = found["v"]
        return found.get("q")

    def block(self, layer: int) -> None:
        """One block: attention, then the MLP."""
        weights = self.made.parts.block(layer)
        before = self._rest
        q = self.attention_inputs(layer)
        assert q is not None
        z = self._z(weights, layer, q)
        heads, bias = attention_shares(weights, z.float())
        parallel = self.made.parts.packed.parallel
        if not parallel:
            self.write(heads)
            self._rest = self._rest + bias
        own = self.graph.neurons if layer == self.graph.formation else ()
        post = self._post(weights, layer)
        if own:
            self.token.neurons = post[:, list(own)]
        some, others = mlp_shares(weights, post.float(), own)
        if parallel:
            assert self._rest is before
            self.write(heads)
            self._rest = self._rest + bias
        self.write(torch.stack([others, some] if own else [others], 1))

    def _z(self, weights: PackedBlock, layer: int, q: Tensor) -> Float[Tensor, "row head d_head"]:
        made, prompts = self.made, self.prompts
        position, packed = made.positions[prompts], made.parts.packed
        k, v = self.token.k[layer], self.token.v[layer]
        q = q if weights.q_norm is None else weights.q_norm(q)
        k = k if weights.k_norm is None else weights.k_norm(k)
        if packed.rotary:
            q, k = turned(weights.rotary, q, position), turned(weights.rotary, k, position)
        n = packed.n_heads // packed.n_kv_heads
        keys, values = made.keys_of(layer)
        # Circuits of a prompt share its other tokens; the token itself has a key and a value in each.
        here = (torch.arange(keys.shape[1], device=q.device) == position[:, None])[:, None]
        scores = torch.einsum("cphe,pthe->cpht", self._by_prompt(q), keys).flatten(0, 1)
        own = (q * k.repeat_interleave(n, 1)).sum(-1, keepdim=True)
        scores = torch.where(here, own, scores) / weights.scale
        scores = weights.cap * torch.tanh(scores / weights.cap) if weights.cap > 0 else scores
        seen = _seen(weights, keys.shape[1], position)
        scores = scores.masked_fill(~seen[:, None], weights.masked)
        if weights.sinks is not None:
            lost = weights.sinks.to(scores).view(1, -1, 1).expand(len(scores), -1, 1)
            pattern = torch.cat([scores, lost], -1).softmax(-1)[..., :-1]
        else:
            pattern = scores.softmax(-1)
        pattern = made.rooted(PATTERN, layer, pattern, prompts, self.root)
        others = self._by_prompt(pattern.masked_fill(here, 0))
        z = torch.einsum("cpht,pthe->cphe", others, values).flatten(0, 1)
        z = z + (pattern * here).sum(-1, keepdim=True) * v.repeat_interleave(n, 1)
        return made.rooted(Z, layer, z, prompts, self.root)

    def _by_prompt(self, x: Tensor) -> Float[Tensor, "circuit prompt *rest"]:
        return x.unflatten(0, (-1, len(self.made.positions)))

    def _post(self, weights: PackedBlock, layer: int) -> Float[Tensor, "row d_mlp"]:
        mlp = weights.mlp_parts
        assert mlp is not None
        inputs = [key for key in self.graph.inputs_of(layer) if key[1] not in ("q", "k", "v")]
        heard = self._hear(layer, "mlp", inputs)
        parallel = weights.ln2 is None and self.made.parts.packed.parallel
        normed = _normed(weights.ln1 if parallel else weights.ln2, heard)
        some = list(self.graph.neurons)

        def projected(linear, own: int) -> Tensor:  # noqa: ANN001
            x = linear(normed[:, 0].to(linear.W.dtype))
            if len(inputs) == 1:
                return x
            of_some = normed[:, own].to(linear.W.dtype) @ linear.W[:, some]
            x = x.clone()
            x[:, some] = of_some if linear.b is None else of_some + linear.b[some]
            return x

        if mlp.gate is None:
            return mlp.act(projected(mlp.up, 1))
        post = mlp.act(projected(mlp.gate, 1)) * projected(mlp.up, 2)
        return post if mlp.offset is None else post + mlp.offset


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _seen(weights: PackedBlock, length: int, position: Int[Tensor, " row"]) -> Bool[Tensor, "row pos"]:
    """The keys that the queries at some positions see."""
    if weights.seen is not None:
        return weights.seen[position]
    return torch.arange(length, device=position.device) <= position[:, None]
