"""Several edges at once: against plain hooks, one at a time, and by identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinklens.circuits import Edge, Edges
from sinklens.circuits.exact import exact_edges
from sinklens.circuits.paths import together
from sinklens.edits import Transplant, resized
from sinklens.sites import K, V
from tests.helpers.circuits import hears, received, root_hooks, writes
from tests.helpers.settings import setting_for
from tests.helpers.tiny import tiny_model

DIRECTIONS = ("denoise", "noise")


@pytest.fixture(scope="module")
def edges() -> Edges:
    return Edges.of(setting_for(tiny_model("llama")), min_gap=0.0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_edge_alone_is_the_exact_edge(edges: Edges, direction) -> None:
    some = edges.graph.edges[::31]
    exact = exact_edges(edges.measure, edges.graph, edges.parts, some, edges.change, direction)
    np.testing.assert_allclose(edges.effects(some, direction), exact, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_several_edges_at_once_are_plain_hooks(direction) -> None:
    """Two senders into one key, one of them into another key of the block, into a value and into an MLP."""
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = tiny_model("llama", "hooked")
    made = Edges.of(setting_for(model), min_gap=0.0)
    names = ("head 0.1 > kv 2.0 k", "mlp 0 > kv 2.0 k", "mlp 0 > kv 2.1 k", "super 1 > kv 2.0 v", "head 1.2 > mlp 2 in")
    chosen = [Edge.of(name) for name in (*names, "mlp 1 > kv 3.1 k")]
    (found,) = made.at_once([chosen], direction)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    setting = made.measure.setting
    tokens, neurons = setting.batch.tokens, list(made.graph.neurons)
    root = root_hooks(setting.pair.root_layers)
    own, other = ([], root) if direction == "denoise" else (root, [])
    start, end = received(model, tokens, own), received(model, tokens, other)
    hooks = list(own)
    for edge in chosen:
        change = writes(model, tokens, other, edge.sender, neurons) - writes(model, tokens, own, edge.sender, neurons)
        hooks += hears(edge.branch, edge.receiver, change)
    expected = ((received(model, tokens, hooks) - start) / (end - start)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)
    assert np.abs(found - made.effects(chosen, direction).sum(0)).max() > 1e-4, "as good as a sum: nothing is tested"


def test_all_that_an_input_hears_is_its_residual_stream(edges: Edges) -> None:
    """All edges into all keys and values of a block at once: its residual stream of the other run."""
    setting = edges.measure.setting
    chosen = edges.into([key for key in edges.graph.inputs_of(2) if key[1] in "kv"])
    patches = [setting.patch("denoise", site, (2,), Transplant()) for site in (K, V)]
    whole = edges.measure.effects([together(patches)], "denoise", "test")
    np.testing.assert_allclose(edges.at_once([chosen], "denoise"), whole, atol=2e-3, rtol=2e-3)


def test_what_is_said_in_place_is_as_long(edges: Edges) -> None:
    some = [edges.into(edges.graph.super_inputs), edges.graph.edges[:3], ()]
    real = edges.at_once(some, "denoise")
    np.testing.assert_allclose(edges.at_once(some, "denoise", 7 * edges.change), real, atol=1e-4)
    assert np.abs(edges.at_once(some, "denoise", edges.other_token) - real)[0].max() > 1e-3
    assert (real[2] == 0).all()
    x, like = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 10.0], [1.0, 1.0]])
    assert resized(x, like).tolist() == [[6.0, 8.0], [0.0, 0.0]]


def test_a_table_of_edges_has_a_row_for_every_set_and_prompt(edges: Edges) -> None:
    some = [edges.graph.edges[:3], edges.graph.edges[3:4]]
    labels = [{"set": "three", "n": 3}, {"set": "one", "n": 1}]
    table, effects = edges.table(some, labels, "noise"), edges.at_once(some, "noise")
    n = effects.shape[1]
    assert list(table) == ["prompt", "set", "n", "effect"] and table.prompt.tolist() == [*range(n), *range(n)]
    assert table.set.tolist() == ["three"] * n + ["one"] * n
    np.testing.assert_array_equal(table.effect, effects.flatten())
    said = edges.table(some, labels, "noise", edges.other_token).effect
    np.testing.assert_array_equal(said, edges.at_once(some, "noise", edges.other_token).flatten())
    with pytest.raises(ValueError, match="longer"):
        edges.table(some, labels[:1], "noise")


def test_edges_into_an_input_from_some_senders(edges: Edges) -> None:
    key = edges.graph.super_inputs[0]
    some = edges.graph.senders[1:3]
    assert [edge.name for edge in edges.into([key], some)] == ["head 0.0 > super 1 gate", "head 0.1 > super 1 gate"]
    assert len(edges.into([key])) == edges.graph.heard(key[0])
