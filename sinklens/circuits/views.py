"""What there is to see of a circuit besides its numbers: the attention of its heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sinklens.circuits.graph import Graph
from sinklens.circuits.nodes import Edge
from sinklens.engine.capture import capture_runs
from sinklens.engine.store import Want
from sinklens.sites import PATTERN
from sinklens.stages.base import Setting


@torch.no_grad()
def attention_of(setting: Setting, graph: Graph, kept: Sequence[Edge]) -> dict[str, Tensor]:
    """Patterns ``{run/head 3.5: [query key]}`` of the first prompt, in every run: of a circuit's heads, and of those
    that look at keys that it makes where the sink is read.
    """
    shape = graph.shape
    group = shape.n_heads // shape.n_kv_heads
    heads = {(edge.sender.block, edge.sender.index) for edge in kept if edge.sender.kind == "head"}
    for edge in kept:
        if edge.branch == "k" and edge.receiver.block in setting.readout_layers:
            first = edge.receiver.index * group
            heads |= {(edge.receiver.block, head) for head in range(first, first + group)}
    found: dict[str, Tensor] = {}
    for run, roots in setting.pair.runs.items():
        wants = [Want(run, PATTERN, block) for block in sorted({block for block, _ in heads})]
        store = capture_runs(setting.model, setting.batch.tokens[:1], {run: roots}, wants, max_rows=1)
        for block, head in sorted(heads):
            pattern = PATTERN.from_canonical(store.tensor(run, PATTERN, block))[0, head]
            found[f"{run}/head {block}.{head}"] = pattern.float().cpu().clone()
    return found
