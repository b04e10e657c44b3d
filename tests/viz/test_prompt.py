"""Views of any prompt: their numbers are those of TransformerLens's own cache, with hooks and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sinklens import viz
from sinklens.errors import InputError
from sinklens.interventions import ablate_heads, ablate_neurons
from sinklens.prompts import from_tokens
from tests.helpers.one_at_a_time import cache_of
from tests.helpers.tiny import hooks_left, tiny_model, tiny_tokens

TOKENS = tiny_tokens(3, 8)
PATTERN, POST = "blocks.2.attn.hook_pattern", "blocks.2.mlp.hook_post"
FIRST = "blocks.0.hook_resid_post"
OFF = ablate_neurons(1, [3], [0, 1])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("backend", ["usual", "bridge"])
def test_numbers_are_the_cache_s(backend: str) -> None:
    model = tiny_model("llama") if backend == "usual" else tiny_model("llama", "bridge")
    own, other = (cache_of(model, TOKENS[1:2], list(hooks), {PATTERN, POST}) for hooks in ((), OFF))
    batch = from_tokens(model, TOKENS)
    for given in (batch, TOKENS):
        assert torch.allclose(viz.pattern_of(model, given, 2, prompt=1), own[PATTERN][0].cpu(), atol=1e-6)
    found = viz.neurons_of(model, batch, 2, [5, 0], prompt=1, hooks=OFF)
    assert torch.allclose(found, other[POST][0][:, [5, 0]].cpu(), atol=1e-6)
    difference = viz.pattern_of(model, batch, 2, prompt=1, hooks=OFF, against=())
    assert (
        torch.allclose(difference, (other[PATTERN] - own[PATTERN])[0].cpu(), atol=1e-5)
        and difference.abs().max() > 1e-4
    )
    with model.hooks(fwd_hooks=list(OFF)):  # in force on the model: the same
        assert torch.allclose(viz.pattern_of(model, batch, 2, prompt=1), other[PATTERN][0].cpu(), atol=1e-6)
    assert viz.pattern_of(model, batch, 2, hooks=OFF, against=OFF).abs().max() == 0
    assert not hooks_left(model)


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("backend", ["usual", "bridge"])
def test_the_lens_behind_the_last_block_is_the_model(backend: str) -> None:
    """And behind the first it is the residual there, through the last norm and the unembedding."""
    model = tiny_model("llama") if backend == "usual" else tiny_model("llama", "bridge")
    table = viz.logit_lens(model, TOKENS, prompt=2, top=3)
    n_layers = model.cfg.n_layers
    assert len(table) == n_layers * TOKENS.shape[1]
    whole = torch.as_tensor(model(TOKENS[2:3].to(model.cfg.device))).detach().softmax(-1)[0].cpu()
    resid = cache_of(model, TOKENS[2:3], [], {FIRST})[FIRST]
    first = model.unembed(model.ln_final(resid)).detach().softmax(-1)[0].cpu()
    for layer, expected in ((n_layers - 1, whole), (0, first)):
        rows = table[table.layer == layer]
        best = expected.topk(3, -1)
        assert torch.allclose(torch.tensor(rows.p_predicted.tolist()), best.values, atol=1e-6)
        assert [[int(name) for name in names] for names in rows.predicted] == best.indices.tolist()
        following = expected[range(7), TOKENS[2, 1:]]
        assert torch.allclose(torch.tensor(rows.p_following.tolist())[:-1], following.double().float(), atol=1e-6)
        ranks = (expected[:7] > following[:, None]).sum(-1).tolist()
        assert rows.rank_following.tolist()[:-1] == ranks
        assert rows.p_following.isna().tolist() == [False] * 7 + [True] and rows.following.iloc[-1] == ""
    assert not hooks_left(model)


def test_hooks_reach_the_lens(model: Any) -> None:
    plain, without = (viz.logit_lens(model, TOKENS, hooks=hooks) for hooks in ((), ablate_heads(0, [0, 1])))
    assert (plain.p_following - without.p_following).abs().max() > 1e-6


def test_a_lens_against_another_is_the_difference(model: Any) -> None:
    hooks = ablate_heads(0, [0, 1])
    one, other = (viz.logit_lens(model, TOKENS, hooks=each, top=100) for each in (hooks, ()))
    less = viz.logit_lens(model, TOKENS, hooks=hooks, against=(), top=2)
    difference = (one.p_following - other.p_following).dropna().tolist()
    assert less.p_following.dropna().tolist() == pytest.approx(difference, abs=1e-6) and any(difference)
    assert less.rank_following.iloc[0] == one.rank_following.iloc[0] - other.rank_following.iloc[0]
    same = viz.logit_lens(model, TOKENS, hooks=hooks, against=hooks)
    assert same.p_following.dropna().eq(0).all() and all(x == 0 for row in same.p_predicted for x in row)
    # What is named differs most, with its sign: by hand from all that each run predicts.
    runs = [dict(zip(table.predicted[0], table.p_predicted[0], strict=True)) for table in (one, other)]
    change = {name: runs[0][name] - runs[1][name] for name in runs[0].keys() & runs[1].keys()}
    first = max(change, key=lambda name: abs(change[name]))
    assert less.predicted[0][0] == first and less.p_predicted[0][0] == pytest.approx(change[first], abs=1e-6)
    assert not hooks_left(model)


def test_views_hold_the_numbers(model: Any) -> None:
    pytest.importorskip("circuitsvis")
    pytest.importorskip("plotly")
    from sinklens.viz.circuitsvis import component

    pattern = viz.pattern_of(model, TOKENS, 2, hooks=OFF, against=())
    name, props = component(viz.pattern_view(model, TOKENS, 2, heads=[1], hooks=OFF, against=(), max_tokens=6))
    assert name == "AttentionHeads" and props["attentionHeadNames"] == ["2.1"] and len(props["tokens"]) == 6
    assert torch.allclose(torch.tensor(props["attention"][0]), pattern[1, :6, :6], atol=6e-4)
    assert props["maxValue"] == -props["minValue"] == pytest.approx(float(pattern[1, :6, :6].abs().max()))
    _, props = component(viz.pattern_view(model, TOKENS, 2))
    assert (props["minValue"], props["maxValue"], len(props["attention"])) == (0.0, 1.0, model.cfg.n_heads)
    name, props = component(viz.neuron_view(model, TOKENS, 2, [5, 0]))
    expected = viz.neurons_of(model, TOKENS, 2, [5, 0])
    assert props["labels"] == ["neuron 5", "neuron 0"]
    assert torch.allclose(torch.tensor(props["values"]), expected, rtol=1e-3)
    figure: Any = viz.lens_figure(model, TOKENS, first=2, last=5)
    assert len(figure.data[0].z) == model.cfg.n_layers and len(figure.data[0].z[0]) == 3
    changed: Any = viz.lens_figure(model, TOKENS, hooks=OFF, against=(), first=2, last=5)
    less = viz.logit_lens(model, TOKENS, hooks=OFF, against=())
    assert changed.data[0].z[1][0] == less[(less.layer == 1) & (less.position == 2)].p_predicted.iloc[0][0]
    assert (changed.data[0].zmin, changed.data[0].zmax) == (-1, 1) and "changes most" in changed.layout.title.text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: viz.pattern_of(m, TOKENS, 9), "block 9 is not in 0.."),
        (lambda m: viz.pattern_of(m, TOKENS, 0, prompt=3), "numbered 0..2"),
        (lambda m: viz.neurons_of(m, TOKENS, 0, [10**6]), "must be at least one of 0.."),
        (lambda m: viz.neurons_of(m, TOKENS, 0, []), "must be at least one of 0.."),
        (lambda m: viz.pattern_view(m, TOKENS, 0, heads=[99]), "are not in 0.."),
        (lambda m: viz.lens_figure(m, TOKENS, first=50, last=60), "there is no position"),
        (lambda m: viz.logit_lens(m, TOKENS, top=0), "top"),
    ],
)
def test_what_is_not_there_is_told(model: Any, call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(model)
