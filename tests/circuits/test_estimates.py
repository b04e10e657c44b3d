"""Estimates against the exact edges that they are the first order of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sinklens.circuits.estimates import Estimator
from sinklens.circuits.exact import exact_edges
from sinklens.circuits.nodes import Node
from tests.helpers.circuits import made_for, root_hooks, writes
from tests.helpers.settings import TARGET
from tests.helpers.tiny import slow_but, tiny_model


def estimator_of(made):
    verifier = made.verifier(made.setting.pair.with_sink.run)
    return Estimator(made.measure, made.graph, verifier.rewiring, made.with_sink, made.without)


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("llama", of=("llama", "gpt2", "gpt_neox", "gemma2", "qwen3")))
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_eap_is_the_slope_of_the_exact_edges(family, direction) -> None:
    """A hundredth of the change does a hundredth of the estimate: gradients through two forward passes and their norms
    against differences of a third.
    """
    made = made_for(tiny_model(family))
    numbers = list(range(0, len(made.graph.edges), 7))
    edges = [made.graph.edges[i] for i in numbers]
    small = 0.03
    up = exact_edges(made.measure, made.graph, made.parts, edges, made.change * small, direction)
    down = exact_edges(made.measure, made.graph, made.parts, edges, made.change * -small, direction)
    slope, estimate = (up - down) / (2 * small), estimator_of(made).eap(direction)[numbers]
    assert np.corrcoef(slope.ravel(), estimate.ravel())[0, 1] > 0.99
    np.testing.assert_allclose(estimate, slope, atol=0.03 * np.abs(slope).max())


def slopes(model, tokens, hooks):
    """The metric of every prompt, and its gradient at all inputs that TransformerLens has, by plain autograd."""
    kept, patterns = {}, []

    def keep(x, hook):
        kept[hook.name] = x.requires_grad_() if x.is_leaf else x
        kept[hook.name].retain_grad()
        return kept[hook.name]

    inputs = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")
    every = [(f"blocks.{block}.{name}", keep) for block in range(model.cfg.n_layers) for name in inputs]
    read = [(f"blocks.{block}.attn.hook_pattern", lambda x, hook: patterns.append(x)) for block in (2, 3)]  # noqa: ARG005
    with torch.enable_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, *every, *read])
        value = torch.stack([x[:, :, TARGET + 1 :, TARGET].mean((1, 2)) for x in patterns]).mean(0)
        value.sum().backward()
    return value.detach(), {name: x.grad[:, TARGET] for name, x in kept.items() if x.grad is not None}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_eap_is_plain_autograd(direction) -> None:
    """Gradient times difference at TransformerLens's own inputs, of every edge of a GPT-2."""
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = tiny_model("gpt2", "hooked")
    made = made_for(model)
    found = dict(zip(made.graph.edges, estimator_of(made).eap(direction), strict=True))
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    tokens, neurons = made.setting.batch.tokens, list(made.graph.neurons)
    root = root_hooks(made.setting.pair.root_layers)
    own, other = ([], root) if direction == "denoise" else (root, [])
    (start, gradients), (end, _) = slopes(model, tokens, own), slopes(model, tokens, other)
    changes = {
        node: writes(model, tokens, other, node, neurons) - writes(model, tokens, own, node, neurons)
        for node in made.graph.senders
    }
    for edge, score in found.items():
        mlp, to = edge.branch == "in", edge.receiver
        gradient = gradients[f"blocks.{to.block}." + ("hook_mlp_in" if mlp else f"hook_{edge.branch}_input")]
        expected = ((gradient if mlp else gradient[:, to.index]) * changes[edge.sender]).sum(-1).detach() / (
            end - start
        )
        if mlp and to.block == made.graph.formation:  # TransformerLens has one input for the super neurons and the rest
            score = sum(found[replace(edge, receiver=Node(kind, to.block))] for kind in ("mlp", "super"))
        np.testing.assert_allclose(score, expected, atol=1e-4, rtol=1e-4, err_msg=edge.name)
    assert max(np.abs(score).max() for score in found.values()) > 0.01


@pytest.mark.slow
def test_on_the_way_between_the_runs_the_ends_are_theirs(tiny_llama) -> None:
    """Many points average the gradients that single ones have; at the ends they are those of the runs."""
    made = made_for(tiny_llama)
    estimator = estimator_of(made)
    before, after = estimator.eap("denoise"), estimator.eap("noise")
    gap = np.abs(before).max()
    near = [estimator._effects([point], "denoise") for point in (1e-4, 1 - 1e-4)]
    assert np.abs(near[0] - before).max() < 0.02 * gap
    np.testing.assert_allclose(near[1], after, atol=0.02 * gap)
    halves = (estimator._effects([0.25], "denoise") + estimator._effects([0.75], "denoise")) / 2
    np.testing.assert_allclose(estimator.eap_ig("denoise", 2), halves, atol=1e-5)


@pytest.mark.slow
def test_integrated_gradients_of_the_natural_sink_are_finite() -> None:
    made = made_for(tiny_model("llama"), "natural")
    found = estimator_of(made).eap_ig("noise", 3)
    assert found.shape == (len(made.graph.edges), made.setting.batch.n)
    assert np.isfinite(found).any(0).any() and np.nanmax(np.abs(found)) > 1e-3
