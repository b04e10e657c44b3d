"""What every node writes into the residual stream at the sink's token, in a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.circuits.graph import Graph
from sinklens.circuits.parts import Parts, attention_shares, mlp_shares
from sinklens.engine.capture import capture_runs
from sinklens.engine.store import ActivationStore, Want
from sinklens.errors import EngineError
from sinklens.models.view import dtype_of
from sinklens.patches import Source
from sinklens.sites import MLP_POST, RESID_PRE, Z
from sinklens.stages.base import Setting

SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""How far the sum of what all nodes write may be from the model's residual stream, relative to its size."""


@dataclass(frozen=True, eq=False)
class Written:
    """What nodes write at one position of every prompt."""

    nodes: Float[Tensor, "sender prompt d_model"]
    """What each sender adds."""
    biases: Float[Tensor, "block prompt d_model"]
    """What the biases of attention's output add, block by block."""
    heard: Float[Tensor, "block prompt d_model"]
    """The residual stream that enters each block, the model's own; one more than :attr:`biases`."""

    def bias_before(self, block: int) -> Float[Tensor, "prompt d_model"]:
        """What the biases of all attention before a block's add."""
        return self.biases[:block].sum(0)


@torch.no_grad()
def written(setting: Setting, graph: Graph, parts: Parts, source: Source) -> Written:
    """What every node writes in a run, at the source's positions (the target where it names none).

    Raises:
        EngineError: the sum is not the model's residual stream.
    """
    index = source.where(setting.pair.target).single(setting.batch.n)
    store = _captured(setting, graph, source.run, index)
    nodes, biases = [store.at(source.run, RESID_PRE, 0, index).float()], []
    for layer in range(graph.last):
        weights = parts.block(layer)
        heads, bias = attention_shares(weights, store.at(source.run, Z, layer, index).float())
        own = graph.neurons if layer == graph.formation else ()
        some, others = mlp_shares(weights, store.at(source.run, MLP_POST, layer, index).float(), own)
        nodes += [*heads.unbind(1), others, *([some] if own else [])]
        biases.append(bias)
    heard = torch.stack([store.at(source.run, RESID_PRE, layer, index).float() for layer in range(graph.last + 1)])
    found = Written(torch.stack(nodes), torch.stack(biases), heard)
    _check(found, source.run, dtype_of(setting.model))
    return found


def _captured(setting: Setting, graph: Graph, run: str, index: Int[Tensor, " prompt"]) -> ActivationStore:
    positions = tuple(sorted(set(index.tolist())))
    wants = [Want(run, RESID_PRE, layer, positions) for layer in range(graph.last + 1)]
    wants += [Want(run, site, layer, positions) for site in (Z, MLP_POST) for layer in range(graph.last)]
    runs = {run: setting.pair.runs[run]}
    return capture_runs(setting.model, setting.batch.tokens, runs, wants, max_rows=setting.max_rows)


def _check(found: Written, run: str, dtype: torch.dtype) -> None:
    total, expected = found.nodes.sum(0) + found.biases.sum(0), found.heard[-1]
    error = float(((total - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error <= SUM_TOLERANCE[dtype]:
        raise EngineError(
            f"what nodes write does not add up to the residual stream in the run {run!r}: {error:.2g} off"
        )
