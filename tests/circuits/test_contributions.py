"""Contributions add up to what the model computes, in every kind of model; tokens add up to attention's part."""

from __future__ import annotations

import pytest
import torch

from sinklens.circuits.contributions import Contributions
from sinklens.errors import EngineError
from tests.helpers.circuits import made_for, root_hooks
from tests.helpers.tiny import slow_but, tiny_model

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2", "qwen3")


def contributions_of(made) -> Contributions:
    return Contributions(made.setting, made.graph, made.parts, made.with_sink, made.without)


def own_inputs(made, run):
    """``hook_pre`` and ``hook_pre_linear`` of the super neurons at the target, from the model itself."""
    kept = {}
    names = ["hook_pre"] + (["hook_pre_linear"] if made.graph.shape.gated else [])
    hooks = [(f"blocks.1.mlp.{name}", lambda x, hook, name=name: kept.__setitem__(name, x)) for name in names]  # noqa: ARG005
    root = root_hooks(made.setting.pair.root_layers) if run == "anchored" else []
    with torch.no_grad():
        made.setting.model.run_with_hooks(made.setting.batch.tokens, fwd_hooks=[*root, *hooks])
    position = made.setting.pair.target.single(made.setting.batch.n)
    rows = torch.arange(made.setting.batch.n)
    return [kept[name][rows, position][:, list(made.graph.neurons)] for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("llama", "gpt2", of=FAMILIES))
def test_they_add_up(family) -> None:
    made = made_for(tiny_model(family))
    mine = contributions_of(made)
    with_sink, without = (own_inputs(made, run) for run in ("anchored", "base"))
    for i, key in enumerate(made.graph.super_inputs):
        tolerance = {"atol": 1e-4 * float(with_sink[i].abs().max()), "rtol": 0}
        torch.testing.assert_close(mine.of_run("with", key).sum(0), with_sink[i], **tolerance)
        torch.testing.assert_close(mine.of_run("without", key).sum(0), without[i], **tolerance)
        torch.testing.assert_close(mine.difference(key).sum(0), with_sink[i] - without[i], **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("llama", of=FAMILIES))
def test_tokens_add_up_to_the_heads(family) -> None:
    made = made_for(tiny_model(family))
    mine = contributions_of(made)
    rows, target = mine.by_token().to_dict("records"), int(made.setting.pair.target.rows[0][0])
    assert all(row["value"] == 0 for row in rows if row["position"] > target)
    heads = [i for i, node in enumerate(made.graph.senders) if node.kind == "head"]
    for node, branch in made.graph.super_inputs:
        heard = [i for i in heads if i < made.graph.heard(node)]
        expected = mine.of_run("with", (node, branch))[heard].sum(0).mean(-1)
        found = torch.zeros(len(expected))
        for row in rows:
            if (row["run"], row["branch"]) == ("with", branch):
                found[row["prompt"]] += row["value"]
        torch.testing.assert_close(found, expected.cpu(), atol=1e-4, rtol=1e-3)


def test_a_sum_that_is_off_is_refused(tiny_llama) -> None:
    made = made_for(tiny_llama)
    made.with_sink.nodes[3] += 0.1
    with pytest.raises(EngineError, match="do not add up"):
        contributions_of(made).of_run("with", made.graph.super_inputs[0])
