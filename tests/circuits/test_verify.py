"""What verifying and pruning stand on: later tokens, ablations, metrics that a circuit can be found for."""

from __future__ import annotations

import pytest
import torch

from sinklens.circuits.direct import Listeners
from sinklens.circuits.graph import Graph
from sinklens.circuits.measure import Measure
from sinklens.circuits.nodes import Edge, Node
from sinklens.circuits.rewired import Rewiring
from sinklens.circuits.verify import Verifier, instead_of
from sinklens.errors import InputError, NoSinkError
from sinklens.readouts.named import named_readout
from tests.helpers.circuits import made_for
from tests.helpers.settings import setting_for
from tests.helpers.tiny import slow_but, tiny_model


@pytest.mark.parametrize("family", slow_but("llama", of=("llama", "gpt2", "gpt_neox", "gemma2", "qwen3")))
@pytest.mark.parametrize("kind", ["block_aggregation", "natural"])
def test_listeners_hear_the_run_as_it_is(family, kind) -> None:
    """With all edges kept, what later tokens give the token is what the model's own patterns have."""
    made = made_for(tiny_model(family), kind)
    run = made.setting.pair.with_sink.run
    rewiring = Rewiring(made.setting, made.graph, made.parts, run)
    verifier = Verifier(made.measure, made.graph, rewiring)
    (token,) = verifier.tokens(torch.ones(1, len(made.graph.edges), dtype=torch.bool), made.without.nodes)
    readout = made.measure.readouts[0]
    found = Listeners(made.setting, made.parts, run, readout).attention(token)  # type: ignore[arg-type]
    expected = torch.tensor(made.measure.runs[run]["sink"], dtype=found.dtype)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-4)


def test_what_is_heard_instead(tiny_llama) -> None:
    made = made_for(tiny_llama)
    nodes = made.without.nodes
    assert torch.equal(instead_of("other run", made.without, 0), nodes)
    assert not instead_of("zero", made.without, 0).any()
    mean = instead_of("mean", made.without, 0)
    torch.testing.assert_close(mean[:, 0], nodes.mean(1))
    assert torch.equal(mean[:, 0], mean[:, 1])
    for seed in range(5):
        resampled = instead_of("resample", made.without, seed)
        assert all(not torch.equal(resampled[1:, i], nodes[1:, i]) for i in range(nodes.shape[1]))


@pytest.mark.parametrize("metric", ["alpha", "residual_norm", "loss"])
def test_metrics_of_something_else_are_refused(tiny_llama, metric) -> None:
    with pytest.raises(InputError, match="a circuit is found for"):
        Measure(setting_for(tiny_llama), named_readout(metric))


def test_a_pair_without_a_sink_is_refused(tiny_llama) -> None:
    with pytest.raises(NoSinkError, match="no sink to explain"):
        Measure(setting_for(tiny_llama), named_readout("attention_received"), min_gap=0.99)


@pytest.mark.parametrize(
    "name", ["embed > head 0.1 q", "mlp 0 > super 1 gate", "head 3.5 > kv 4.1 v", "super 11 > mlp 12 in"]
)
def test_names_of_edges_are_read_back(name) -> None:
    assert Edge.of(name).name == name


@pytest.mark.parametrize("name", ["", "head", "head 1 2", "tail 3", "mlp x", "head 1.x"])
def test_what_is_no_name_of_a_node_is_refused(name) -> None:
    with pytest.raises(InputError, match="node"):
        Node.of(name)


def test_every_input_hears_what_was_written_before_it(tiny_llama, tiny_neox) -> None:
    for model in (tiny_llama, tiny_neox):
        setting = setting_for(model)
        graph = Graph(setting.shape, 1, setting.neurons, 3)
        for edge in graph.edges:
            same_block = edge.sender.block == edge.receiver.block
            assert edge.sender.block < edge.receiver.block or (same_block and edge.receiver.kind in ("mlp", "super"))
            assert not (same_block and (graph.shape.parallel or edge.sender.kind != "head"))
        # Counted by hand: 4 blocks of 4 heads, an MLP each in the first three, super neurons in block 1.
        into = len(graph.edges_into([(Node("mlp", 1), "in")]))
        assert into == 1 + 5 + (0 if graph.shape.parallel else 4)
        assert len(graph.edges_into([(Node("head", 2, 0), "q")])) == 1 + 5 + 6
