"""What later tokens would attend to a token with other keys, their own queries held as they are in the run.

It is not the sink that the circuit keeps (later tokens change as well), and is never reported as that: it ranks edges
within a circuit, thousands a minute, and the engine decides.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.circuits.parts import Parts
from sinklens.circuits.rewired import Token
from sinklens.engine.capture import capture_runs
from sinklens.engine.packed.blocks import turned
from sinklens.engine.packed.weights import PackedBlock
from sinklens.engine.store import Want
from sinklens.readouts.base import PositionReadout
from sinklens.sites import ROT_Q, Q
from sinklens.stages.base import Setting


class Listeners:
    """The later tokens of a run, who look at the target's keys.

    Args:
        setting: the setting; blocks are those in which its metric is read.
        parts: the model, taken apart.
        run: the run.
        readout: says how much each query counts.
    """

    def __init__(self, setting: Setting, parts: Parts, run: str, readout: PositionReadout) -> None:
        self.parts, self.layers = parts, tuple(readout.layers)
        packed, n = parts.packed, setting.batch.n
        q_site = ROT_Q if packed.rotary else Q
        wants = [Want(run, site, layer) for layer in self.layers for site in (q_site, packed.keys_site)]
        with torch.no_grad():
            tokens, runs = setting.batch.tokens, {run: setting.pair.runs[run]}
            store = capture_runs(setting.model, tokens, runs, wants, max_rows=setting.max_rows)
            self._q = {layer: store.tensor(run, q_site, layer) for layer in self.layers}
            device = self._q[self.layers[0]].device
            self.positions = setting.pair.target.single(n).to(device)
            self.weights = readout.weigh(setting.batch.length).to(device).expand(n, -1)
            keys = {layer: store.tensor(run, packed.keys_site, layer) for layer in self.layers}
            self._others = {layer: self._rest(layer, keys[layer]) for layer in self.layers}

    def _rest(self, layer: int, keys: Float[Tensor, "prompt pos kv_head d_head"]) -> Float[Tensor, "prompt query head"]:
        """The log of the sum of exponentials of all scores but the target's."""
        weights, q = self.parts.block(layer), self._q[layer]
        full = keys.repeat_interleave(q.shape[2] // keys.shape[2], 2)
        scores = _scored(weights, torch.einsum("pqhe,pkhe->pqhk", q.float(), full.float()))
        length = q.shape[1]
        position = torch.arange(length, device=q.device)
        seen = position <= position[:, None] if weights.seen is None else weights.seen
        there = seen[None] & (position != self.positions[:, None])[:, None]
        scores = scores.masked_fill(~there[:, :, None], -torch.inf)
        if weights.sinks is not None:
            lost = weights.sinks.to(scores).view(1, 1, -1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, lost], -1)
        return scores.logsumexp(-1)

    def attention(self, token: Token) -> Float[Tensor, "row"]:
        """Mean attention to the token of every row, over heads and blocks."""
        found = []
        for layer in self.layers:
            weights, q = self.parts.block(layer), self._q[layer]
            k, prompts = token.k[layer], token.prompts
            k = k if weights.k_norm is None else weights.k_norm(k)
            k = turned(weights.rotary, k, self.positions[prompts]) if self.parts.packed.rotary else k
            k = k.repeat_interleave(q.shape[2] // k.shape[1], 1)
            n = len(q)
            by_circuit = k.view(-1, n, *k.shape[1:]).float()
            scores = _scored(weights, torch.einsum("pqhe,cphe->cpqh", q.float(), by_circuit))
            seen = _sees(weights, self.positions, q.shape[1])
            pattern = torch.sigmoid(scores - self._others[layer]) * (self.weights * seen)[None, :, :, None]
            found.append(pattern.mean(-1).sum(-1).flatten())
        return torch.stack(found).mean(0)


def _scored(weights: PackedBlock, products: Tensor) -> Tensor:
    scores = products / weights.scale
    return weights.cap * torch.tanh(scores / weights.cap) if weights.cap > 0 else scores


def _sees(weights: PackedBlock, keys: Tensor, length: int) -> Tensor:
    """1 where a query sees the key of its prompt."""
    if weights.seen is not None:
        return weights.seen[:, keys].T.float()
    return (torch.arange(length, device=keys.device) >= keys[:, None]).float()
