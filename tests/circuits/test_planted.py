"""The planted circuit: exactly its edges are found, with the effects that they must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinklens.circuits import Circuit, circuit
from sinklens.circuits.exact import exact_edges
from tests.helpers.circuits import made_of
from tests.helpers.planted_circuit import EDGES, TARGET, planted_circuit, planted_formation, planted_setting

pytest.importorskip("transformer_lens.HookedTransformer")


@pytest.fixture(scope="module")
def model():
    return planted_circuit()


@pytest.fixture(scope="module")
def made(model):
    return made_of(planted_setting(model))


@pytest.fixture(scope="module")
def found(model):
    batch, formation = planted_formation(model)
    return circuit(
        model, batch, target=TARGET, formation=formation, readout_blocks=1, share=0.99, sample=20, control_draws=2
    )


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_edge_has_the_effect_that_it_has_on_paper(made, direction) -> None:
    edges = made.graph.edges
    effects = exact_edges(made.measure, made.graph, made.parts, edges, made.change, direction)
    paper = np.array([EDGES.get(edge.name, 0.0) for edge in edges])
    assert set(EDGES) <= {edge.name for edge in edges}
    np.testing.assert_allclose(effects, np.tile(paper[:, None], made.setting.batch.n), atol=1e-4)


def test_exactly_these_edges_are_found(found) -> None:
    assert {edge.name for edge in found.kept} == set(EDGES)
    names = [f"{row.sender} > {row.receiver} {row.branch}" for row in found.minimality.itertuples()]
    np.testing.assert_allclose(found.minimality.loss, [EDGES[name] for name in names], atol=1e-4)


def test_the_circuit_is_all_of_it_whatever_the_others_hear(found) -> None:
    tests = found.tests.set_index(["what", "ablation"]).effect
    for ablation in ("other run", "mean", "resample"):
        assert tests["circuit", ablation] == pytest.approx(1, abs=1e-4)
        assert tests["complement", ablation] == pytest.approx(0, abs=1e-4)
        assert (tests["all", ablation], tests["none", ablation]) == pytest.approx((1, 0), abs=1e-4)
    # Without the constant nothing has a threshold, a query or a scale: an ablation that no run has.
    assert tests["circuit", "zero"] != pytest.approx(1, abs=1e-2)
    assert tests["carried", "none"] == pytest.approx(1, abs=1e-4)
    assert tests["random", "other run"] < 0.1


@pytest.mark.slow
def test_half_of_the_sink_takes_one_branch(model) -> None:
    batch, formation = planted_formation(model)
    half = circuit(
        model, batch, target=TARGET, formation=formation, readout_blocks=1, share=0.45, sample=0, control_draws=1
    )
    one = {"head 0.0 > mlp 0 in", "mlp 0 > super 1 gate", "super 1 > head 2.0 k"}
    other = {"head 0.0 > mlp 0 in", "mlp 0 > mlp 1 in", "mlp 1 > head 2.1 k"}
    assert {edge.name for edge in half.kept} in (one, other)


def test_contributions_to_the_gate_are_those_on_paper(found) -> None:
    """The sink's token has squared length 5 in front of the super neuron, and without the sink 2."""
    rows = found.contributions
    gate = rows[rows.branch == "gate"].set_index(["run", "sender"]).value
    with_sink, without = (12 / 5) ** 0.5, 6**0.5
    assert gate["with", "mlp 0"] == pytest.approx(10 * with_sink, rel=1e-4)
    assert gate["with", "embed"] == pytest.approx(-5 * with_sink, rel=1e-4)
    assert gate["without", "embed"] == pytest.approx(-5 * without, rel=1e-4)
    assert gate["difference", "mlp 0"] == pytest.approx(10 * (with_sink + without) / 2, rel=1e-4)
    assert gate["difference", "norm"] == pytest.approx((10 - 5 - 5) / 2 * (with_sink - without), abs=1e-4)
    assert gate["difference", "embed"] == pytest.approx(0, abs=1e-5)
    others = set(gate["with"].index) - {"mlp 0", "embed"}
    assert all(abs(gate["with", name]) < 1e-5 for name in others)


def test_the_branches_do_not_stand_in_for_one_another(found) -> None:
    """Either alone gives its half, both all: no interaction. The MLP in front and a branch are in a row: there is."""
    pairs = found.interactions.set_index(["a", "b", "direction"]).interaction
    assert pairs["mlp 1", "neuron 1.0", "denoise"] == pytest.approx(0, abs=1e-4)
    assert pairs["mlp 0", "neuron 1.0", "denoise"] == pytest.approx(-0.5, abs=1e-4)
    assert pairs["mlp 0", "neuron 1.0", "noise"] == pytest.approx(-0.5, abs=1e-4)


def test_a_saved_circuit_is_the_same(found, tmp_path) -> None:
    loaded = Circuit.load(found.save(tmp_path / "circuit"))
    assert loaded.kept == found.kept and loaded.formation.neurons == found.formation.neurons
    for name in ("edges", "tests", "minimality", "contributions", "interactions", "pruning", "agreement", "by_token"):
        assert getattr(loaded, name).equals(getattr(found, name)), name
    assert all(torch.equal(x, loaded.attention[name]) for name, x in found.attention.items())
    assert "5 of" in repr(found) and "head 0.0" in found._repr_html_()
