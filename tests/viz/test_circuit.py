"""Figures and views of a circuit: they hold its numbers, in the order of the forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sinklens import viz
from sinklens.errors import InputError
from sinklens.viz.circuit import WIDEST
from sinklens.viz.circuitsvis import component
from tests.helpers.made_circuit import KEPT, LEFT, made_circuit
from tests.helpers.made_results import made_result

pytest.importorskip("plotly")
pytest.importorskip("circuitsvis")


def _lines(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.mode == "lines"]


def test_nodes_lie_from_left_to_right_and_none_on_another() -> None:
    nodes = viz.circuit_nodes(made_circuit(more=5))
    assert len(nodes.drop_duplicates(["column", "row"])) == len(nodes)
    for edge in made_circuit(more=5).kept:
        column = nodes.set_index("node").column
        assert column[str(edge.sender)] < column[str(edge.receiver)], edge
    heads = nodes[nodes.kind.isin(["head", "kv", "embed"])]
    assert nodes[~nodes.index.isin(heads.index)].row.min() > heads.row.max()
    assert nodes.block.tolist() == sorted(nodes.block)


def test_edges_are_those_that_are_kept_by_their_exact_effects() -> None:
    edges: Any = viz.circuit_edges(made_circuit())
    assert len(edges) == 2 * len(KEPT) and set(edges.method) == {"exact"}
    rows = edges[edges.direction == "denoise"].to_dict("records")
    found = {f"{row['sender']} > {row['receiver']} {row['branch']}": row for row in rows}
    assert {name: row["effect"] for name, row in found.items()} == KEPT and LEFT not in found
    assert edges.effect.abs().tolist() == sorted(edges.effect.abs(), reverse=True)
    assert found["mlp 2 > head 3.1 q"]["loss"] == pytest.approx(0.01)


def test_widths_follow_effects_and_say_them() -> None:
    circuit = made_circuit()
    for vertical in (False, True):
        figure: Any = viz.circuit_figure(circuit, vertical=vertical)
        lines = {trace.text.split("<br>")[0]: trace for trace in _lines(figure)}
        assert len(lines) == len(KEPT)
        wide = lines["mlp 0 → super 2 (linear)"]
        assert (wide.line.width, wide.line.dash) == (WIDEST, "solid")  # 1.3: no wider than at 1
        assert lines["head 0.1 → mlp 2 (in)"].line.dash == "dot"
        widths = [
            lines[name].line.width for name in ("mlp 2 → head 3.1 (q)", "embed → head 0.1 (v)", "embed → mlp 0 (in)")
        ]
        assert widths == pytest.approx([1 + 11 * x for x in (0.02, 0.31, 0.9)], abs=0.01)
        assert "denoise 1.30 [1.25, 1.35], n = 2, exact" in wide.text and "noise −0.650" in wide.text
        assert "without it the circuit loses 0.650 of the sink" in wide.text
        legend = [trace.legendgroup for trace in figure.data if trace.showlegend]
        assert sorted(legend) == sorted({name.rpartition(" ")[2] for name in KEPT})  # each once
        x, y = (wide.x, wide.y) if not vertical else (tuple(-v for v in wide.y), wide.x)
        place = viz.circuit_nodes(circuit).set_index("node")
        ends = [place.loc[name, ["column", "row"]].tolist() for name in ("mlp 0", "super 2")]
        assert np.allclose([[x[0], y[0]], [x[-1], y[-1]]], ends, atol=1e-3)


def test_buttons_give_the_other_direction_its_widths() -> None:
    figure: Any = viz.circuit_figure(made_circuit())
    first, second = (button.args[0] for button in figure.layout.updatemenus[0].buttons)
    assert list(first["line.width"]) == [trace.line.width for trace in _lines(figure)]
    by_name = dict(zip([trace.text.split("<br>")[0] for trace in _lines(figure)], second["line.width"], strict=True))
    assert by_name["mlp 0 → super 2 (linear)"] == pytest.approx(1 + 11 * 0.65, abs=0.01)
    assert set(second["line.dash"]) == {"dot", "solid"}
    alone: Any = viz.circuit_figure(made_circuit(natural=True))
    assert not alone.layout.updatemenus  # there is one direction


def test_many_edges_are_cut_to_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinklens.viz.circuit.MOST_EDGES", 3)
    figure = viz.circuit_figure(made_circuit())
    names = [trace.text.split("<br>")[0] for trace in _lines(figure)]
    assert names == ["embed → mlp 0 (in)", "super 2 → kv 3.0 (k)", "mlp 0 → super 2 (linear)"]  # the strongest on top


@pytest.mark.slow
def test_charts_hold_the_numbers() -> None:
    circuit = made_circuit()
    figure: Any = viz.contributions_figure(circuit, most=2)
    assert {name for trace in figure.data for name in trace.x} == {"MLP 0", "MLP 1"}
    figure = viz.interactions_figure(circuit, direction="noise")
    cells = pd.DataFrame(figure.data[0].z, index=figure.data[0].y, columns=figure.data[0].x)
    assert cells.loc["MLP 0", "MLP 2"] == cells.loc["MLP 2", "MLP 0"] == -0.3 and np.isnan(cells.loc["MLP 0", "MLP 0"])
    figure = viz.tests_figure(circuit)
    assert [trace.name for trace in figure.data] == ["other run", "mean", "zero", "resample"]
    figure = viz.pruning_figure(circuit)
    assert list(figure.data[0].y) == circuit.pruning.share.tolist()[1:]  # 0 edges are on no log axis


def test_views_hold_what_was_kept_of_the_first_prompt() -> None:
    circuit = made_circuit()
    assert viz.circuit_heads(circuit, "base") == ["head 0.1", "head 1.0"]
    name, props = component(viz.circuit_attention_view(circuit, "anchored", ["head 1.0"], max_tokens=4))
    assert name == "AttentionHeads" and props["attentionHeadNames"] == ["1.0"] and len(props["tokens"]) == 4
    expected = circuit.attention["anchored/head 1.0"][:4, :4].float().numpy()
    assert np.allclose(props["attention"][0], expected, atol=6e-4)
    values = viz.contributed(circuit, "base", "gate")
    assert np.isnan(values[-1]) and values[:3].tolist() == [0.0, -0.1, 0.2]
    name, props = component(viz.circuit_token_view(circuit, "base", "gate"))
    assert name == "ColoredTokens" and props["values"] == values[:-1].tolist()
    assert props["maxValue"] == -props["minValue"] == pytest.approx(0.7)
    assert not any("<" in token and "\u2060" not in token for token in props["tokens"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda _: viz.circuit_figure(made_result()), "this draws what sl.circuit found"),  # type: ignore[arg-type]
        (lambda c: viz.circuit_figure(replace(c, kept=())), "the circuit has no edge"),
        (lambda c: viz.contributions_figure(c, run="no"), "run 'no': this circuit has base, anchored, difference"),
        (lambda c: viz.interactions_figure(c, direction="up"), "direction 'up': this circuit has denoise, noise"),
        (lambda c: viz.pruning_figure(replace(c, pruning=c.pruning[:0])), "no record of its pruning"),
        (lambda c: viz.tests_figure(replace(c, tests=c.tests[:0])), "was not tested"),
        (lambda c: viz.circuit_attention_view(c, "no"), "run 'no': this circuit has base, anchored"),
        (lambda c: viz.circuit_attention_view(c, "base", ["head 9.9"]), "head 9.9 are not among head 0.1, head 1.0"),
        (lambda c: viz.circuit_token_view(c, "base", "q"), "base q: this circuit has base gate, base linear"),
    ],
)
def test_what_is_not_there_is_told(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(made_circuit())
