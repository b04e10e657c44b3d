"""Interventions while a model generates: with a key-value cache, one token at a time, as without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import edits, interventions, sites
from sinklens.errors import InputError
from sinklens.interventions import Hooks, hooks_of
from sinklens.models.families import D_HEAD, D_MLP, D_MODEL, N_HEADS
from sinklens.patches import Patch, Source
from tests.helpers.tiny import each_once, hooks_left, slow_but, tiny_model, tiny_tokens

pytestmark = pytest.mark.backend

LENGTH, NEW, POSITION = 6, 4, 3
MODELS = each_once(
    {
        "llama": ("llama", "auto"),
        "llama_bridge": ("llama", "bridge"),
        "gpt2_bridge": ("gpt2", "bridge"),
        "gpt_neox_bridge": ("gpt_neox", "bridge"),
        "gemma2_bridge": ("gemma2", "bridge"),
    }
)
EARLY = ["RESID_PRE", "LN1_NORMALIZED", "Q", "K", "ROT_K", "V"]
LATE = ["PATTERN", "Z", "ATTN_OUT", "LN2_NORMALIZED", "MLP_POST", "MLP_OUT", "RESID_POST"]
PLACES = {name: getattr(sites, name) for name in (*EARLY, *LATE)}
POSITIONS: tuple[Any, ...] = ((0, POSITION), ((1, 2), (3,), (0, 3)), ())
"""The same of all prompts, of each its own, and every one."""
QUICK = ("RESID_PRE", "PATTERN", "MLP_POST")
WHERE = [
    pytest.param(name, positions, marks=() if name in QUICK else pytest.mark.slow, id=f"{name}-{positions}")
    for number, name in enumerate(PLACES)
    for positions in (POSITIONS if name in QUICK else POSITIONS[number % 3 :][:1])
]
"""Some places with all positions, the others with one of them, in turn."""


@pytest.fixture(scope="module", params=slow_but("llama", of=MODELS))
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_model(*MODELS[request.param])


@pytest.fixture
def model(named: tuple[str, Any]) -> Iterator[Any]:
    yield named[1]
    assert hooks_left(named[1]) == []


def generated(model: Any, tokens: Tensor, hooks: Hooks, cached: bool) -> Tensor:
    """What the model says at the end of every pass, ``[pass, prompt, d_model]``, before the logits."""
    said: list[Tensor] = []

    def record(act: Tensor, hook: Any) -> None:  # noqa: ARG001
        said.append(act[:, -1].clone())

    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    last = sites.RESID_POST.at(model.cfg.n_layers - 1)
    with model.hooks(fwd_hooks=[*hooks, (last, record)]):
        model.generate(tokens, max_new_tokens=NEW, use_past_kv_cache=cached, **options)
    return torch.stack(said)


def as_without_a_cache(model: Any, tokens: Tensor, hooks: Callable[[], Hooks]) -> None:
    expected = generated(model, tokens, hooks(), cached=False)
    assert (expected - generated(model, tokens, [], cached=False)).abs().max() > 2e-3, "the hooks do nothing here"
    shared = hooks()
    for _ in range(2):  # the second prompt begins at position 0 again
        torch.testing.assert_close(generated(model, tokens, shared, cached=True), expected, atol=2e-4, rtol=1e-3)
    for short in (tokens, tokens[:, : POSITION + 1]):
        with torch.no_grad(), model.hooks(fwd_hooks=shared):
            found = model(short)
        with torch.no_grad(), model.hooks(fwd_hooks=hooks()):
            torch.testing.assert_close(found, model(short))


@pytest.mark.parametrize(("place", "positions"), WHERE)
def test_positions_count_from_the_first_token(named: tuple[str, Any], model: Any, place: str, positions: Any) -> None:
    name, site = named[0], PLACES[place]
    if place == "ROT_K" and name in ("gpt2_bridge", "gpt_neox_bridge"):
        pytest.skip("no rotary keys that can be written to")
    patch = Patch(site, (0, 2), positions, edits.Constant())
    as_without_a_cache(model, tiny_tokens(3, LENGTH), lambda: hooks_of(patch))


def ready_made(model: Any, cache: Any) -> dict[str, Callable[[], Hooks]]:
    values = torch.randn(3, D_MLP, generator=torch.Generator().manual_seed(0))
    mean = {0: torch.ones(N_HEADS, D_HEAD), 2: torch.zeros(N_HEADS, D_HEAD)}
    moved = Patch(sites.V, (0, 1), (2, 3), edits.Transplant(), source=Source("other", (0, 5)))
    both = Patch(
        sites.RESID_POST, (0,), (1,), edits.Constant(), also=(Patch(sites.Z, (1,), (2,), edits.Constant(), (0, 1)),)
    )
    act = interventions
    return {
        "block_aggregation": lambda: act.block_aggregation(POSITION, range(3)),
        "amplify_variance": lambda: act.amplify_variance(POSITION, [0, 2], 5.0),
        "amplify_around": lambda: act.amplify_variance(POSITION, [0, 2], 5.0, mean),
        "same_norm": lambda: act.amplify_variance(POSITION, [0, 2], 5.0, norm_only=True),
        "ablate_neurons": lambda: act.ablate_neurons(1, list(range(20)), [0]),
        "ablate_dims": lambda: act.ablate_dims(0, range(D_MODEL // 2), [0, 2], site=sites.RESID_PRE),
        "ablate_heads": lambda: act.ablate_heads(1, [0, 3]),
        "resample": lambda: act.ablate_neurons(1, list(range(20)), [1], mode="resample", values=values),
        "permute_z": lambda: act.permute_z(model, POSITION, [0, 1]),
        "densify": lambda: act.densify_down_projection(model, 1, list(range(20)), [0]),
        "transplant": lambda: act.transplant(sites.RESID_MID, cache, POSITION, [1]),
        "keys": lambda: act.transplant_keys(cache, POSITION, [0, 1]),
        "values": lambda: act.transplant_values(cache, POSITION, [0, 1]),
        "attention_output": lambda: act.transplant_attention_output(cache, POSITION, [0]),
        "of another position": lambda: hooks_of(moved, cache),
        "two at once": lambda: hooks_of(both),
        "added": lambda: act.block_aggregation(2, range(2)) + act.ablate_neurons(1, list(range(20)), [2]),
    }


@pytest.fixture(scope="module")
def cache(named: tuple[str, Any]) -> Any:
    with torch.no_grad():
        return named[1].run_with_cache(tiny_tokens(3, LENGTH, seed=1))[1]


@pytest.mark.parametrize("name", ready_made(None, None))
def test_every_intervention(named: tuple[str, Any], model: Any, cache: Any, name: str) -> None:
    if name == "transplant" and ("neox" in named[0] or "bridge" in named[0]):
        pytest.skip("a bridge's resid_mid is not written to")
    if name in ("densify", "same_norm") and "gemma2" in named[0]:
        pytest.skip("a norm stands behind what is written")
    as_without_a_cache(model, tiny_tokens(3, LENGTH), ready_made(model, cache)[name])


def test_what_changes_with_the_length_is_refused(model: Any) -> None:
    for axis in ("positions", "global"):
        hooks = interventions.amplify_variance(POSITION, [0], 2.0, axis=axis)
        with pytest.raises(InputError, match="changes with every token that is generated"):
            generated(model, tiny_tokens(3, LENGTH), hooks, cached=True)
        generated(model, tiny_tokens(3, LENGTH), hooks, cached=False)


@pytest.mark.parametrize("cached", [True, False])
def test_a_position_that_the_prompt_does_not_have(model: Any, cached: bool) -> None:
    for hooks in (interventions.block_aggregation(10, [0]), interventions.ablate_neurons(1, [0], [10])):
        with pytest.raises(InputError, match=r"position 10, but the run has positions 0..5"):
            generated(model, tiny_tokens(2, LENGTH), hooks, cached=cached)


@pytest.mark.slow
def test_a_cache_that_keeps_a_window_alone_is_refused() -> None:
    """Its keys say no more what was before them."""
    model = tiny_model("mistral", "bridge", sliding_window=LENGTH + 2)
    for site in (sites.RESID_PRE, sites.PATTERN, sites.MLP_POST):
        hooks = hooks_of(Patch(site, (0,), (POSITION,), edits.Constant()))
        with pytest.raises(InputError, match="keeps a sliding window alone"):
            generated(model, tiny_tokens(2, LENGTH), hooks, cached=True)
        generated(model, tiny_tokens(2, LENGTH), hooks, cached=False)


# --- A cache of the caller's own -------------------------------------------------------------------------------------


def empty_cache(model: Any, n: int) -> Any:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", n)


def after(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    return model(tokens, past_kv_cache=cache, attention_mask=torch.ones_like(tokens))


@pytest.fixture(scope="module")
def hooked() -> Any:
    model = tiny_model("llama", "auto")
    if type(model).__name__ != "HookedTransformer":
        pytest.skip("no HookedTransformer in this version")
    return model


@pytest.mark.parametrize("site", [sites.RESID_PRE, sites.MLP_POST, sites.PATTERN], ids=lambda site: site.template)
def test_a_cache_of_a_run_without_the_hooks_is_refused(hooked: Any, site: sites.HookSite) -> None:
    tokens, cache = tiny_tokens(2, LENGTH), empty_cache(hooked, 2)
    hooks = hooks_of(Patch(site, (1,), (0,), edits.Constant()))
    with torch.no_grad():
        after(hooked, cache, tokens[:, :-1])
        with hooked.hooks(fwd_hooks=hooks), pytest.raises(InputError, match="use_past_kv_cache=False"):
            after(hooked, cache, tokens[:, -1:])
        with hooked.hooks(fwd_hooks=hooks):
            found = hooked(tokens)
        torch.testing.assert_close(found, hooked.run_with_hooks(tokens, fwd_hooks=hooks))


@pytest.mark.parametrize("site", [sites.RESID_PRE, sites.MLP_POST, sites.PATTERN], ids=lambda site: site.template)
def test_a_prompt_in_several_pieces(hooked: Any, site: sites.HookSite) -> None:
    """Right, or refused where the hook comes by before the attention, which says what lies before a piece."""
    tokens, cache = tiny_tokens(2, LENGTH), empty_cache(hooked, 2)
    hooks = hooks_of(Patch(site, (1,), (), edits.Constant()))
    with torch.no_grad():
        whole = hooked.run_with_hooks(tokens, fwd_hooks=hooks)
        with hooked.hooks(fwd_hooks=hooks):
            after(hooked, cache, tokens[:, :2])
            if site is sites.RESID_PRE:
                with pytest.raises(InputError, match="took this pass to begin at position 0, but it begins at 2"):
                    after(hooked, cache, tokens[:, 2:])
                return
            torch.testing.assert_close(after(hooked, cache, tokens[:, 2:]), whole[:, 2:], atol=2e-4, rtol=1e-3)
