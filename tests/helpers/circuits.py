"""A random model as a circuit: all that the room's functions stand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sinklens.circuits.graph import Graph
from sinklens.circuits.measure import Measure
from sinklens.circuits.parts import Parts
from sinklens.circuits.rewired import Rewiring
from sinklens.circuits.verify import Verifier
from sinklens.circuits.written import Written, written
from sinklens.readouts.named import named_readout
from sinklens.stages.base import Setting
from tests.helpers.settings import TARGET, setting_for


@dataclass
class Made:
    setting: Setting
    graph: Graph
    parts: Parts
    measure: Measure
    with_sink: Written
    without: Written

    @property
    def change(self) -> Any:
        return self.with_sink.nodes - self.without.nodes

    def verifier(self, run: str) -> Verifier:
        return Verifier(self.measure, self.graph, Rewiring(self.setting, self.graph, self.parts, run))


def made_of(setting: Setting, min_gap: float = 0.0) -> Made:
    graph = Graph(setting.shape, setting.formation.layer, setting.neurons, max(setting.readout_layers))
    parts = Parts(setting.model, setting.batch.length, setting.formation.layer, setting.neurons)
    ends = [written(setting, graph, parts, source) for source in (setting.pair.with_sink, setting.pair.without)]
    return Made(setting, graph, parts, Measure(setting, named_readout("attention_received"), min_gap), *ends)


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
