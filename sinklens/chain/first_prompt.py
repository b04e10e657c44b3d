"""What a chain keeps of its first prompt, token by token, for views: patterns, attention received, super neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from sinklens import metrics
from sinklens.engine.capture import capture_runs
from sinklens.engine.store import Want
from sinklens.models.identities import identities
from sinklens.sites import MLP_POST, PATTERN
from sinklens.stages.base import Setting

ByRun = dict[str, Tensor]
"""A tensor for every run of the pair."""


def first_prompt(setting: Setting) -> dict[str, ByRun]:
    """What views show of the first prompt: by name and run, on the CPU, with an axis of one prompt in front.

    * ``attention`` [prompt head query key]: of the block after the formation block;
    * ``received`` [prompt pos]: attention from later queries, mean over heads and the blocks in which attention is
      measured; NaN at the last position, which no later query sees;
    * ``neurons`` [prompt pos neuron]: activations of the super neurons.
    """
    block, runs = setting.formation.layer, setting.pair.runs
    dense = identities(setting.model).holds("dense_mlp", (block,))
    neurons = list(setting.formation.neurons) if dense else []
    wants = [
        Want(run, site, layer)
        for run in runs
        for site, layers in ((PATTERN, {block + 1, *setting.readout_layers}), (MLP_POST, {block} if neurons else ()))
        for layer in layers
    ]
    store = capture_runs(setting.model, setting.batch.tokens[:1], runs, wants, max_rows=setting.max_rows)

    def pattern(run: str, layer: int) -> Tensor:
        return PATTERN.from_canonical(store.tensor(run, PATTERN, layer))

    def received(run: str) -> Tensor:
        by_block = [metrics.attention_received(pattern(run, layer)).mean(1).cpu() for layer in setting.readout_layers]
        return torch.stack(by_block).mean(0)

    def activations(run: str) -> Tensor:
        if not neurons:  # a model without a dense MLP
            return torch.zeros(1, setting.batch.length, 0)
        return store.tensor(run, MLP_POST, block)[..., neurons].float().cpu()

    return {
        "attention": {run: pattern(run, block + 1).half().cpu() for run in runs},
        "received": {run: received(run).float().cpu() for run in runs},
        "neurons": {run: activations(run) for run in runs},
    }
