"""Massive activations: found where they were planted, and replaced as hooks written by hand replace them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from sinklens import edits, interventions
from sinklens.edits import EditSite
from sinklens.errors import InputError, NotApplicableError
from sinklens.interventions import find_massive, massive_activations
from sinklens.models.load import load_model
from sinklens.prompts import PromptBatch, from_tokens
from tests.helpers.tiny import each_once, hooks_left, slow_but, tiny_hf, tiny_tokens

pytestmark = pytest.mark.backend

N, LENGTH, LAYER, SPIKE, OTHER = 3, 10, 1, 5, 11
FIRST = 7
"""The token that has massive activations."""
MODELS = each_once({"llama": ("llama", "auto"), "llama_bridge": ("llama", "bridge")})


def planted(backend: str) -> Any:
    """Block 1 writes two large entries for one token alone, whose embedding is a direction of its own."""
    hf: Any = tiny_hf("llama")
    with torch.no_grad():
        table = hf.model.embed_tokens.weight
        table[:, 0] = 0
        table[FIRST] = 0
        table[FIRST, 0] = 30.0
        for block in hf.model.layers[: LAYER + 1]:  # nobody else writes that direction
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0
        mlp = hf.model.layers[LAYER].mlp
        mlp.gate_proj.weight[0] = 0
        mlp.up_proj.weight[0] = 0
        mlp.gate_proj.weight[0, 0] = 4.0
        mlp.up_proj.weight[0, 0] = 4.0
        mlp.down_proj.weight[:, 0] = 0
        mlp.down_proj.weight[SPIKE, 0] = 40.0
        mlp.down_proj.weight[OTHER, 0] = -30.0
    return load_model(hf, backend=backend, device="cpu")  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=slow_but("llama", "llama_bridge", of=MODELS))
def shared(request: pytest.FixtureRequest) -> Any:
    return planted(MODELS[request.param][1])


@pytest.fixture
def model(shared: Any) -> Iterator[Any]:
    yield shared
    assert hooks_left(shared) == []


@pytest.fixture
def batch(model: Any) -> PromptBatch:
    tokens = tiny_tokens(N, LENGTH)
    tokens[tokens == FIRST] = FIRST + 1
    tokens[:, 0] = FIRST
    tokens[2, 6] = FIRST  # a second one in the last prompt
    return from_tokens(model, tokens)


BOUNDS: Any = {"absolute": 50.0, "relative": 30.0}


def behind(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1][f"blocks.{LAYER}.hook_resid_post"]


def test_what_was_planted_is_found(model: Any, batch: PromptBatch) -> None:
    found, x = find_massive(model, batch, **BOUNDS), behind(model, batch.tokens)
    assert (found.layer, set(found.dims)) == (LAYER, {SPIKE, OTHER})
    assert found.tokens == ((0, 0), (1, 0), (2, 0), (2, 6))
    assert found.share == 1
    at = [x[0, 0], x[1, 0], x[2, 0], x[2, 6]]
    for dim, mean in zip(found.dims, found.mean.tolist(), strict=True):
        assert mean == pytest.approx(sum(float(one[dim]) for one in at) / 4, rel=1e-5)
    rest = x.clone()
    for prompt, position in found.tokens:
        rest[prompt, position, list(found.dims)] = 0
    assert found.ordinary == pytest.approx(float(rest.abs().max()))
    medians = [float(one.abs().flatten().median()) for one in x]
    assert found.limit == pytest.approx(max(50.0, 30.0 * sum(medians) / N), rel=1e-5)
    assert not set(found.median_dims) & set(found.dims)
    size = x[[0, 1, 2, 2], [0, 0, 0, 6]].abs().mean(0)
    far = (size - sum(medians) / N).abs()
    far[list(found.dims)] = torch.inf
    assert set(found.median_dims) == set(far.argsort()[:2].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("mode", ["zero", "mean", "clamp"])
def test_replaced_as_by_hand(model: Any, batch: PromptBatch, mode: Any, control: bool) -> None:
    found = find_massive(model, batch, **BOUNDS)
    old = behind(model, batch.tokens)

    def by_hand(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        x = x.clone()
        for prompt, position in found.tokens:
            for number, dim in enumerate(found.median_dims if control else found.dims):
                value = float(x[prompt, position, dim])
                new = {
                    "zero": 0.0,
                    "mean": float((found.median_mean if control else found.mean)[number]),
                    "clamp": max(-found.ordinary, min(found.ordinary, value)),
                }[mode]
                x[prompt, position, dim] = new
        return x

    name = f"blocks.{LAYER}.hook_resid_post"
    with torch.no_grad():
        expected = model.run_with_hooks(batch.tokens, fwd_hooks=[(name, by_hand)])
        hooks = massive_activations(found, mode, control=control)
        with model.hooks(fwd_hooks=hooks):
            assert torch.equal(model(batch.tokens), expected)
        moved = (expected - model(batch.tokens)).abs().max()
    if mode == "clamp" and control:
        assert moved == 0  # what is of median size lies within
    elif mode != "mean" and not control:
        assert moved > 1e-3
    assert torch.equal(behind(model, batch.tokens), old)


def test_a_generated_token_counts_too(model: Any, batch: PromptBatch) -> None:
    """With a cache, each token comes alone."""
    found = find_massive(model, batch, **BOUNDS)
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    told = []
    for cached in (True, False):
        with model.hooks(fwd_hooks=massive_activations(found, "zero")):
            told.append(model.generate(batch.tokens, max_new_tokens=5, use_past_kv_cache=cached, **options))
    assert torch.equal(*told)


def test_a_model_without_any_says_so(tiny_llama: Any) -> None:
    with pytest.raises(NotApplicableError, match="has no massive activations .* set lower bounds"):
        find_massive(tiny_llama, from_tokens(tiny_llama, tiny_tokens()))
    with pytest.raises(NotApplicableError, match="behind block 0"):
        find_massive(tiny_llama, from_tokens(tiny_llama, tiny_tokens()), layer=0)
    with pytest.raises(InputError, match=r"not in 0\.\."):
        find_massive(tiny_llama, from_tokens(tiny_llama, tiny_tokens()), layer=99)


def test_another_mode_is_refused(model: Any, batch: PromptBatch) -> None:
    with pytest.raises(InputError, match="choose zero, mean, clamp"):
        massive_activations(find_massive(model, batch, **BOUNDS), "median")  # type: ignore[arg-type]


def test_replacing_by_hand_on_numbers() -> None:
    x = tensor([[1.0, 200, -150, 3], [1.0, 20, -150, 3]])
    at = EditSite(0, torch.zeros(2, dtype=torch.long), tensor([0, 1]))
    edit = edits.ReplaceMassive(dims=(1, 2), limit=100.0)
    assert edit(x, None, at).tolist() == [[1, 0, 0, 3], [1, 20, 0, 3]]
    edit = edits.ReplaceMassive(dims=(1, 2), limit=100.0, values=tensor([7.0, 8]))
    assert edit(x, None, at).tolist() == [[1, 7, 8, 3], [1, 20, 8, 3]]
    edit = edits.ReplaceMassive(dims=(1, 2), limit=100.0, cut=50.0)
    assert edit(x, None, at).tolist() == [[1, 50, -50, 3], [1, 20, -50, 3]]
    edit = edits.ReplaceMassive(dims=(1, 2), limit=100.0, instead=(0, 3))
    assert edit(x, None, at).tolist() == [[0, 200, -150, 0], [1, 20, -150, 0]]


@pytest.mark.smollm2
def test_the_real_model_has_them_at_its_first_token(smollm2: Any) -> None:
    from sinklens.prompts import natural

    found = interventions.find_massive(smollm2, natural(smollm2, 4, 48))
    assert (found.layer, found.dims[0]) == (11, 507)
    assert {position for _, position in found.tokens} == {0}
