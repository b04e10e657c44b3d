"""Eviction against a loop that feeds one token at a time to Hugging Face's model, with a real cache that is trimmed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sinklens import edits, interventions, sites
from sinklens.edits import EditSite
from sinklens.engine import run_patches
from sinklens.errors import InputError, NotApplicableError
from sinklens.readouts import Readout
from tests.helpers.tiny import each_once, hooks_left, slow_but, tiny_hf, tiny_model, tiny_tokens

pytestmark = pytest.mark.backend

N, LENGTH, WINDOW = 2, 12, 4
MODELS = each_once(
    {
        "llama": ("llama", "auto"),
        "llama_bridge": ("llama", "bridge"),
        "gpt2": ("gpt2", "auto"),
        "gpt2_bridge": ("gpt2", "bridge"),
        "qwen3": ("qwen3", "auto"),
        "qwen3_bridge": ("qwen3", "bridge"),
        "gpt_neox_bridge": ("gpt_neox", "bridge"),
    }
)
ROTARY = [name for name in MODELS if "gpt2" not in name]


@pytest.fixture(scope="module", params=slow_but("llama", "gpt2_bridge", of=MODELS))
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_model(*MODELS[request.param])


@pytest.fixture
def model(named: tuple[str, Any]) -> Iterator[Any]:
    yield named[1]
    assert hooks_left(named[1]) == []


def logits_of(model: Any, tokens: Tensor, hooks: Any) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest logit, which is what float32 can tell."""
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def trimmed(cache: DynamicCache, window: int, first: int) -> None:
    """The cache without what lies between the first keys and the last ones."""
    layer: Any
    for layer in cache.layers:
        length = layer.keys.shape[2]
        keep = [i for i in range(length) if i < first or i >= length - window]
        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]


@torch.no_grad()
def step_by_step(hf: Any, tokens: Tensor, window: int, first: int) -> Tensor:
    cache, said = DynamicCache(), []
    for i in range(tokens.shape[1]):
        position = torch.full((len(tokens), 1), i)
        out = hf(tokens[:, i : i + 1], past_key_values=cache, position_ids=position, use_cache=True)
        said.append(out.logits[:, -1])
        trimmed(cache, window, first)
    return torch.stack(said, 1)


@torch.no_grad()
def step_by_step_reindexed(hf: Any, tokens: Tensor, window: int, first: int) -> Tensor:
    """Keys are kept as they are before their rotation, and rotated anew in every step."""
    n_layers, raw, seen, said = hf.config.num_hidden_layers, {}, {}, []
    for layer in range(n_layers):
        attention = hf.model.layers[layer].self_attn
        norm = getattr(attention, "k_norm", None)
        which = norm if norm is not None else attention.k_proj
        which.register_forward_hook(lambda *said, layer=layer: seen.__setitem__(layer, said[-1]))
    values: dict[int, Tensor] = {}
    for i in range(tokens.shape[1]):
        index = torch.arange(min(i, first + window))
        cache = DynamicCache()
        if i:
            cos, sin = hf.model.rotary_emb(raw[0], index[None])
            for layer in range(n_layers):
                turned = apply_rotary_pos_emb(raw[layer], raw[layer], cos, sin)[1]
                cache.update(turned, values[layer], layer)
        place = torch.full((len(tokens), 1), len(index))
        out = hf(tokens[:, i : i + 1], past_key_values=cache, position_ids=place, use_cache=True)
        said.append(out.logits[:, -1])
        for layer in range(n_layers):
            new = seen[layer].reshape(len(tokens), 1, -1, hf.model.layers[layer].self_attn.head_dim).transpose(1, 2)
            both = torch.cat([raw[layer], new], 2) if i else new
            keep = [j for j in range(both.shape[2]) if j < first or j >= both.shape[2] - window]
            raw[layer], values[layer] = both[:, :, keep], cache.layers[layer].values[:, :, keep]  # type: ignore[index]
    return torch.stack(said, 1)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_as_a_loop_with_a_trimmed_cache(named: tuple[str, Any], model: Any, first: int) -> None:
    tokens = tiny_tokens(N, LENGTH)
    hf = tiny_hf(MODELS[named[0]][0])
    hf.set_attn_implementation("eager")
    expected = step_by_step(hf, tokens, WINDOW, first)
    assert (expected - logits_of(model, tokens, [])).abs().max() > 1e-3, "nothing is evicted"
    found = logits_of(model, tokens, interventions.evict(model, WINDOW, first))
    close(found, expected)
    if first == 0 and named[0] in ROTARY:
        again = logits_of(model, tokens, interventions.evict(model, WINDOW, 0, positions="reindexed"))
        assert torch.equal(again, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but("llama", of=[name for name in ROTARY if "neox" not in name]))
def test_reindexed_as_a_loop_that_rotates_by_the_place_in_the_cache(name: str) -> None:
    tokens, model = tiny_tokens(N, LENGTH), tiny_model(*MODELS[name])
    hf = tiny_hf(MODELS[name][0])
    hf.set_attn_implementation("eager")
    expected = step_by_step_reindexed(hf, tokens, WINDOW, 2)
    kept = logits_of(model, tokens, interventions.evict(model, WINDOW, 2))
    assert (expected - kept).abs().max() > 1e-4, "the indices make no difference"
    found = logits_of(model, tokens, interventions.evict(model, WINDOW, 2, positions="reindexed"))
    close(found, expected)
    assert hooks_left(model) == []


def test_positions_that_are_not_rotary_are_not_reindexed(model: Any, named: tuple[str, Any]) -> None:
    if named[0] in ROTARY:
        logits = logits_of(model, tiny_tokens(N, LENGTH), interventions.evict(model, WINDOW, 2, positions="reindexed"))
        assert logits.isfinite().all()
        return
    with pytest.raises(NotApplicableError, match="keep the positions"):
        interventions.evict(model, WINDOW, 2, positions="reindexed")


@pytest.mark.parametrize("positions", ["kept", "reindexed"])
def test_generation_with_a_cache_is_as_without_one(model: Any, named: tuple[str, Any], positions: Any) -> None:
    if positions == "reindexed" and named[0] not in ROTARY:
        pytest.skip("no rotary positions")
    if named[0] == "gpt2":
        pytest.skip("TransformerLens's own generation with a cache is wrong for learned positions")
    tokens, said = tiny_tokens(N, 3), []
    last = sites.RESID_POST.at(model.cfg.n_layers - 1)
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    for cached in (False, True):
        hooks, ends = interventions.evict(model, 3, 2, positions=positions), []
        with model.hooks(fwd_hooks=[*hooks, (last, lambda x, hook, ends=ends: ends.append(x[:, -1].clone()))]):  # noqa: ARG005
            model.generate(tokens, max_new_tokens=8, use_past_kv_cache=cached, **options)
        said.append(torch.stack(ends))
    torch.testing.assert_close(said[1], said[0], atol=2e-4, rtol=1e-3)


def test_the_weights_that_are_left_are_a_softmax_of_their_own() -> None:
    """Two queries, five keys: the first of them and the two before the query are kept."""
    scores = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0)).double()
    causal = scores.masked_fill(torch.arange(5) > tensor([3, 4])[:, None, None], -torch.inf).softmax(-1)
    at = EditSite(0, torch.zeros(2, dtype=torch.long), tensor([3, 4]))
    found = edits.KeepKeys(window=1, first=1)(causal, None, at)
    for row, kept in ((0, [0, 2, 3]), (1, [0, 3, 4])):
        expected = torch.zeros(5).double()
        expected[kept] = scores[row, 0, kept].softmax(-1)
        torch.testing.assert_close(found[row, 0], expected, atol=1e-6, rtol=1e-6)


def test_a_part_that_goes_to_no_key_stays_in_the_sum() -> None:
    """exp(0) = 1 in the denominator beside the keys 2, 3 and 5: without the first, 3 / 9 and 5 / 9."""
    pattern = tensor([[[2.0, 3, 5]]]) / 11
    at = EditSite(0, torch.zeros(1, dtype=torch.long), tensor([2]))
    found = edits.KeepKeys(window=1, slot=True)(pattern, None, at)
    torch.testing.assert_close(found, tensor([[[0.0, 3, 5]]]) / 9)


def test_as_a_patch_of_the_engine(model: Any) -> None:
    """The packed pass and plain hooks give the same."""
    tokens, layers = tiny_tokens(N, LENGTH), tuple(range(model.cfg.n_layers))
    patch = interventions.eviction_patch(model, WINDOW, 1, layers, length=LENGTH)
    readout = Readout("last", sites.LOGITS, (len(layers),), lambda logits, _: logits[:, -1, 5])
    found = run_patches(model, tokens, [patch], [readout]).values["last"][0]
    expected = logits_of(model, tokens, interventions.evict(model, WINDOW, 1))[:, -1, 5]
    close(found.float(), expected)


def test_what_is_no_cache_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(InputError, match="cannot be -1"):
        interventions.evict(tiny_llama, -1)
    with pytest.raises(InputError, match="whole number"):
        interventions.evict(tiny_llama, 2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="choose kept or reindexed"):
        interventions.evict(tiny_llama, 4, positions="shifted")  # type: ignore[arg-type]
