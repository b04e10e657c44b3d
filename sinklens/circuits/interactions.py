"""Several nodes at once: the effect of two together less the sum of their own.

    interaction(a, b)  =  effect(a and b)  -  effect(a)  -  effect(b)

Transplants of what the nodes write, at the sink's token. Denoising it is negative where one of them is enough (they
stand in for one another) and positive where it takes both; noising, positive where one stands in for the other that is
taken away (backup) and negative where the loss of either is nearly all. Effects that exceed the sink itself, because it
saturates, make negative ones too: read the effects beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pandas as pd

from sinklens.circuits.graph import Graph
from sinklens.circuits.measure import Measure
from sinklens.circuits.nodes import Edge, Node
from sinklens.circuits.paths import together
from sinklens.circuits.result import table
from sinklens.edits import Transplant
from sinklens.errors import InputError
from sinklens.models.identities import identities
from sinklens.pairs.choice import Direction
from sinklens.patches import Patch
from sinklens.sites import MLP_OUT, MLP_POST, RESID_PRE, Z

MOST = 8
"""Nodes that are paired, of a circuit with more."""


def node_patch(measure: Measure, graph: Graph, node: Node, direction: Direction) -> Patch:
    """The transplant of what a node writes.

    Raises:
        InputError: a node that writes nothing.
    """
    setting, units = measure.setting, None
    if node.kind == "embed":
        site, block = RESID_PRE, 0
    elif node.kind == "head":
        site, block, units = Z, node.block, (node.index,)
    elif node.kind == "neuron":
        site, block, units = MLP_POST, node.block, (node.index,)
    elif node.kind == "super":
        site, block, units = MLP_POST, node.block, graph.neurons
    elif node.kind == "mlp":
        site, block = MLP_OUT, node.block
        if block == graph.formation:  # the others
            site, units = MLP_POST, tuple(sorted(set(range(graph.shape.d_mlp)) - set(graph.neurons)))
    else:
        raise InputError(f"{node} writes nothing: give a head, an MLP, super neurons or one of them")
    patch = setting.patch(direction, site, (block,), Transplant(), units=units)
    return replace(patch, allow_unchanged=True, label=node.name)


def chosen_nodes(graph: Graph, kept: Sequence[Edge], sizes: Sequence[float], most: int = MOST) -> list[Node]:
    """The super neurons one by one, and the senders of the circuit whose edges are the largest together."""
    together: dict[Node, float] = {}
    for edge, size in zip(kept, sizes, strict=True):
        if edge.sender.kind not in ("super", "embed"):
            together[edge.sender] = together.get(edge.sender, 0.0) + abs(size)
    nodes = [Node("neuron", graph.formation, neuron) for neuron in graph.neurons[: most // 2]]
    by_size = sorted(together, key=lambda node: -together[node])
    return sorted([*nodes, *by_size[: most - len(nodes)]], key=lambda node: node.rank)


def interactions(measure: Measure, graph: Graph, nodes: Sequence[Node]) -> pd.DataFrame:
    """The table ``interactions`` of a circuit: all pairs of some nodes, in both directions.

    Raises:
        InputError: a node that writes nothing.
    """
    identities(measure.setting.model).require("mlp_adds", [node.block for node in nodes if node.kind == "mlp"])
    pairs, records = list(combinations(nodes, 2)), []
    for direction in measure.setting.pair.directions:
        alone = {node: node_patch(measure, graph, node, direction) for node in nodes}
        both = [together([alone[a], alone[b]]) for a, b in pairs]
        effects = measure.effects([*alone.values(), *both], direction, "interactions")
        of_node = dict(zip(nodes, effects[: len(nodes)], strict=True))
        for (a, b), of_both in zip(pairs, effects[len(nodes) :], strict=True):
            more = (of_both - of_node[a] - of_node[b])[None]
            mean = measure.means(more)[0]
            means = [measure.means(x[None])[0]["effect"] for x in (of_node[a], of_node[b], of_both)]
            record: dict[str, Any] = {"a": a.name, "b": b.name, "direction": direction}
            record |= dict(zip(("effect_a", "effect_b", "both"), means, strict=True))
            record |= {"interaction": mean["effect"], **{key: mean[key] for key in ("ci_low", "ci_high", "n")}}
            records.append(record)
    return table("interactions", records)
