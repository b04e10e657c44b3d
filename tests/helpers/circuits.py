"""A random model as a circuit: all that the room's functions stand on."""

from __future__ import annotations

from typing import Any

import torch

from sinklens.circuits.edges import Edges
from sinklens.circuits.rewired import Rewiring
from sinklens.circuits.verify import Verifier
from sinklens.stages.base import Setting
from tests.helpers.settings import TARGET, setting_for


class Made(Edges):
    @property
    def setting(self) -> Setting:
        return self.measure.setting

    def verifier(self, run: str) -> Verifier:
        return Verifier(self.measure, self.graph, Rewiring(self.setting, self.graph, self.parts, run))


def made_of(setting: Setting, min_gap: float = 0.0) -> Made:
    return Made.of(setting, "attention_received", min_gap)


def made_for(model: Any, kind: str = "block_aggregation") -> Made:
    return made_of(setting_for(model, kind))


def root_hooks(layers: Any) -> list[Any]:
    """What makes the sink at the target, as plain hooks."""

    def attend_self(pattern, hook):  # noqa: ARG001
        pattern = pattern.clone()
        pattern[:, :, TARGET] = 0
        pattern[:, :, TARGET, TARGET] = 1
        return pattern

    return [(f"blocks.{layer}.attn.hook_pattern", attend_self) for layer in layers]


def received(model, tokens, hooks, layers=(2, 3)):
    """The metric, written down: what later queries give the target, over heads and blocks."""
    kept = {}

    def keep(pattern, hook):
        kept[hook.name] = pattern

    names = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in layers]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, *names])
    return torch.stack([kept[name][:, :, TARGET + 1 :, TARGET].mean((1, 2)) for name, _ in names]).mean(0)


def writes(model, tokens, hooks, node, neurons):
    """What a node writes at the target, from a cache of TransformerLens."""
    kept = {}
    block = max(node.block, 0)
    names = ["hook_resid_pre", "attn.hook_z", "hook_mlp_out", "mlp.hook_post"]

    def keep_as(name):
        return lambda x, hook: kept.__setitem__(name, x[:, TARGET])  # noqa: ARG005

    keep = [(f"blocks.{block}.{name}", keep_as(name)) for name in names]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, *keep])
    some = kept["mlp.hook_post"][:, neurons] @ model.blocks[block].mlp.W_out[neurons]
    if node.kind == "embed":
        return kept["hook_resid_pre"]
    if node.kind == "head":
        return kept["attn.hook_z"][:, node.index] @ model.blocks[block].attn.W_O[node.index]
    if node.kind == "super":
        return some
    return kept["hook_mlp_out"] - (some if block == 1 else 0)


def hears(branch, receiver, more):
    """TransformerLens's own inputs of heads and MLPs, to which the difference is added."""
    name = "hook_mlp_in" if branch == "in" else f"hook_{branch}_input"

    def add(x, hook):  # noqa: ARG001
        x = x.clone()
        if branch == "in":
            x[:, TARGET] += more
        else:
            x[:, TARGET, receiver.index] += more
        return x

    return [(f"blocks.{receiver.block}.{name}", add)]
