"""Exact edges against TransformerLens's own path patching, and against plain hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinklens.circuits.exact import exact_edges, exact_paths
from sinklens.circuits.nodes import Edge
from sinklens.errors import InputError
from tests.helpers.circuits import hears, made_for, received, root_hooks, writes
from tests.helpers.settings import TARGET
from tests.helpers.tiny import slow_but, tiny_model

HOOKED = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma2")


def some_edges(made, per_branch=4):
    """A few edges into every kind of input, from every kind of node; MLPs other than the formation block's."""
    generator = torch.Generator().manual_seed(0)
    chosen: list[Edge] = []
    for branch in ("q", "k", "v", "in"):
        mine = [
            e
            for e in made.graph.edges
            if e.branch == branch and e.receiver.kind != "super" and (branch != "in" or e.receiver.block != 1)
        ]
        chosen += [mine[i] for i in torch.randperm(len(mine), generator=generator)[:per_branch].tolist()]
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_edges_are_transformer_lens_s_path_patching(family, direction) -> None:
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = tiny_model(family, "hooked")
    made = made_for(model)
    edges = some_edges(made)
    found = exact_edges(made.measure, made.graph, made.parts, edges, made.change, direction)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    tokens, neurons = made.setting.batch.tokens, list(made.graph.neurons)
    root = root_hooks(made.setting.pair.root_layers)
    own, other = ([], root) if direction == "denoise" else (root, [])
    start, end = received(model, tokens, own), received(model, tokens, other)
    for edge, effects in zip(edges, found, strict=True):
        change = writes(model, tokens, other, edge.sender, neurons) - writes(model, tokens, own, edge.sender, neurons)
        patched_value = received(model, tokens, [*own, *hears(edge.branch, edge.receiver, change)])
        expected = ((patched_value - start) / (end - start)).numpy()
        np.testing.assert_allclose(effects, expected, atol=2e-3, rtol=2e-3, err_msg=edge.name)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_edges_into_super_neurons_are_plain_hooks(tiny_llama, direction) -> None:
    made = made_for(tiny_llama)
    model, tokens, neurons = tiny_llama, made.setting.batch.tokens, list(made.graph.neurons)
    pytest.importorskip("transformer_lens.HookedTransformer")
    edges = made.graph.edges_into(made.graph.super_inputs)[::3]
    found = exact_edges(made.measure, made.graph, made.parts, edges, made.change, direction)
    root = root_hooks(made.setting.pair.root_layers)
    own, other = ([], root) if direction == "denoise" else (root, [])
    start, end = received(model, tokens, own), received(model, tokens, other)
    for edge, effects in zip(edges, found, strict=True):
        change = writes(model, tokens, other, edge.sender, neurons) - writes(model, tokens, own, edge.sender, neurons)
        mlp, ln2, kept = model.blocks[1].mlp, model.blocks[1].ln2, {}
        W, name = (mlp.W_gate, "hook_pre") if edge.branch == "gate" else (mlp.W_in, "hook_pre_linear")

        def keep(x, hook, kept=kept):  # noqa: ARG001
            kept["resid"] = x

        def replace(x, hook, kept=kept, W=W, change=change, ln2=ln2):  # noqa: ARG001
            resid = kept["resid"].clone()
            resid[:, TARGET] += change
            x = x.clone()
            x[:, TARGET, neurons] = (ln2(resid)[:, TARGET] @ W)[:, neurons]
            return x

        hooks = [*own, ("blocks.1.hook_resid_mid", keep), (f"blocks.1.mlp.{name}", replace)]
        expected = ((received(model, tokens, hooks) - start) / (end - start)).numpy()
        np.testing.assert_allclose(effects, expected, atol=2e-3, rtol=2e-3, err_msg=edge.name)


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("llama", "gpt_neox", of=HOOKED))
@pytest.mark.parametrize("kind", ["block_aggregation", "natural"])
def test_a_rewired_edge_is_the_exact_edge(family, kind) -> None:
    """Two ways to the same number: a patch of one input, and the token computed anew with one edge cut."""
    made = made_for(tiny_model(family), kind)
    drawn = torch.randperm(len(made.graph.edges), generator=torch.Generator().manual_seed(2))[:24].tolist()
    edges = [made.graph.edges[i] for i in drawn]
    exact = exact_edges(made.measure, made.graph, made.parts, edges, made.change, "noise")
    kept = torch.ones(len(edges) + 2, len(made.graph.edges), dtype=torch.bool)
    kept[range(len(edges)), drawn] = False
    kept[-1] = False
    verifier = made.verifier(made.setting.pair.with_sink.run)
    shares = verifier.shares(kept, made.without.nodes, "test")
    assert shares[-2] == pytest.approx(1, abs=1e-4)  # all edges: the run itself
    if kind != "natural":
        assert shares[-1] == pytest.approx(0, abs=1e-3)  # none: the run without
    np.testing.assert_allclose(1 - shares[: len(edges)], exact, atol=5e-3, rtol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("llama", of=("llama", "gpt2", "gpt_neox", "qwen3", "gemma2")))
def test_a_bridge_has_the_same_edges(family) -> None:
    edges = None
    found = []
    for backend in ("auto", "bridge"):
        made = made_for(tiny_model(family, backend))  # type: ignore[arg-type]
        edges = edges or [made.graph.edges[i] for i in range(0, len(made.graph.edges), 29)]
        found.append(exact_edges(made.measure, made.graph, made.parts, edges, made.change, "denoise"))
    np.testing.assert_allclose(found[0], found[1], atol=2e-3, rtol=2e-3)
    assert np.abs(found[0]).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_paths_hand_on_what_changes_and_nobody_else_hears(direction) -> None:
    """Hop by hop with plain hooks: what a node makes of what it hears, and then the next alone hears that."""
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = tiny_model("llama", "hooked")
    made = made_for(model)
    paths = [
        [Edge.of(name) for name in path]
        for path in (
            ("head 0.1 > mlp 0 in", "mlp 0 > kv 3.1 k"),
            ("head 0.2 > kv 2.1 v", "head 2.3 > kv 3.0 k"),
            ("mlp 0 > head 2.1 q", "head 2.1 > mlp 2 in", "mlp 2 > kv 3.0 k"),
            ("head 1.0 > kv 2.0 k", "head 2.0 > kv 3.1 k"),
        )
    ]
    found = exact_paths(made.measure, made.graph, made.parts, paths, made.with_sink, made.without, direction)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    tokens, neurons = made.setting.batch.tokens, list(made.graph.neurons)
    root = root_hooks(made.setting.pair.root_layers)
    own, other = ([], root) if direction == "denoise" else (root, [])
    start, end = received(model, tokens, own), received(model, tokens, other)
    for path, effects in zip(paths, found, strict=True):
        hooks = other
        for edge in path:
            now = writes(model, tokens, hooks, edge.sender, neurons)
            change = now - writes(model, tokens, own, edge.sender, neurons)
            hooks = [*own, *hears(edge.branch, edge.receiver, change)]
        expected = ((received(model, tokens, hooks) - start) / (end - start)).numpy()
        np.testing.assert_allclose(effects, expected, atol=2e-3, rtol=5e-3, err_msg=str(path))


def test_what_is_no_path_is_refused(tiny_llama) -> None:
    made = made_for(tiny_llama)
    path = [Edge.of("head 0.1 > mlp 0 in"), Edge.of("head 1.0 > kv 3.1 k")]
    with pytest.raises(InputError, match="does not lead to"):
        exact_paths(made.measure, made.graph, made.parts, [path], made.with_sink, made.without, "noise")
