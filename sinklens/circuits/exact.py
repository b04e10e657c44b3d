"""Tables of exact edges, with the control of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sinklens.circuits.graph import Graph
from sinklens.circuits.measure import Effects, Measure
from sinklens.circuits.nodes import Edge
from sinklens.circuits.parts import Parts
from sinklens.circuits.paths import edge_patch, path_patch
from sinklens.circuits.written import Written, written
from sinklens.edits.general import resized
from sinklens.pairs.choice import Direction
from sinklens.patches import Positions, Source


def exact_edges(
    measure: Measure,
    graph: Graph,
    parts: Parts,
    edges: Sequence[Edge],
    change: Float[Tensor, "sender prompt d_model"],
    direction: Direction,
    what: str = "exact",
) -> Effects:
    """The effect of each edge alone, ``[edge, prompt]``.

    Args:
        measure: the metric.
        graph: the graph.
        parts: the model, taken apart.
        edges: the edges.
        change: what each sender writes more in the run with the sink than in the run without.
        direction: denoising adds it in the run without the sink, noising takes it away in the run with it.
        what: what the cost is noted under.
    """
    run, _ = measure.setting.pair.ends(direction)
    moved = change if direction == "denoise" else -change
    patches = [edge_patch(measure.setting, parts, edge, run, moved[graph.number[edge.sender]]) for edge in edges]
    return measure.effects(patches, direction, what)


def exact_paths(
    measure: Measure,
    graph: Graph,
    parts: Parts,
    paths: Sequence[Sequence[Edge]],
    with_sink: Written,
    without: Written,
    direction: Direction,
) -> Effects:
    """The effect of each path of several edges alone, ``[path, prompt]``.

    Args:
        measure: the metric.
        graph: the graph.
        parts: the model, taken apart.
        paths: edges one after another.
        with_sink: what nodes write in the run with the sink.
        without: what they write in the run without.
        direction: which of the runs is patched.

    Raises:
        InputError: edges that are no path.
    """
    run, _ = measure.setting.pair.ends(direction)
    own, other = (without, with_sink) if direction == "denoise" else (with_sink, without)
    change = other.nodes - own.nodes
    patches = [
        path_patch(measure.setting, graph, parts, path, run, change[graph.number[path[0].sender]], own.nodes)
        for path in paths
    ]
    return measure.effects(patches, direction, "paths")


def other_tokens(
    measure: Measure, graph: Graph, parts: Parts, change: Float[Tensor, "sender prompt d_model"], without: Written
) -> Float[Tensor, "sender prompt d_model"]:
    """A change of the same size in another direction: towards what each sender writes at an ordinary token.

    Of a sender that writes there what it writes at the sink's token in the run without, nothing.
    """
    setting = measure.setting
    drawn = setting.study.ordinary_position("circuit/other token", _positions(setting.pair.target))
    other = written(setting, graph, parts, Source(setting.pair.without.run, Positions.one_each(drawn.tolist())))
    return resized(other.nodes - without.nodes, change)


def _positions(where: Positions) -> tuple[int, ...]:
    return tuple(sorted({position for row in where.rows for position in row}))


def exact_rows(
    edges: Sequence[Edge], found: Sequence[dict[str, float]], direction: str, method: str, kept: set[Edge]
) -> list[dict[str, Any]]:
    """Rows of the table ``edges``."""
    return [
        {
            "sender": edge.sender.name,
            "receiver": edge.receiver.name,
            "branch": edge.branch,
            "direction": direction,
            "method": method,
            **mean,
            "kept": edge in kept,
        }
        for edge, mean in zip(edges, found, strict=True)
    ]
