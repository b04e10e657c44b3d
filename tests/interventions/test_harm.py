"""Harm against Hugging Face's model, by hand, and on hooks whose harm is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import sinklens as sl
from sinklens import interventions, metrics
from sinklens.errors import InputError
from sinklens.interventions.harm import BRIEF, QUANTITIES, harm, measure_harm
from sinklens.prompts import PromptBatch, from_tokens
from tests.helpers.tiny import N_LAYERS, each_once, hooks_left, slow_but, tiny_hf, tiny_model, tiny_tokens

pytestmark = pytest.mark.backend

N, LENGTH = 4, 12
MODELS = each_once({"llama": ("llama", "auto"), "llama_bridge": ("llama", "bridge"), "gpt2_bridge": ("gpt2", "bridge")})


@pytest.fixture(scope="module", params=slow_but("llama", "llama_bridge", of=MODELS))
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_model(*MODELS[request.param])


def batch_of(model: Any) -> PromptBatch:
    return from_tokens(model, tiny_tokens(N, LENGTH))


def halved(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
    return act / 2


@torch.no_grad()
def test_loss_kl_and_agreement_are_hugging_face_s(named: tuple[str, Any]) -> None:
    """The MLP of block 1 writes half, there through a hook of torch's."""
    name, model = named
    hf: Any = tiny_hf(MODELS[name][0]).double()
    batch = batch_of(model)
    found = harm(model, batch, [("blocks.1.hook_mlp_out", halved)])
    mlp = (hf.model.layers if hasattr(hf, "model") else hf.transformer.h)[1].mlp
    before = hf(batch.tokens).logits[:, :-1].log_softmax(-1)
    mlp.register_forward_hook(lambda *said: said[-1] / 2)
    after = hf(batch.tokens).logits[:, :-1].log_softmax(-1)
    nexts = batch.tokens[:, 1:, None]
    expected = {
        "loss": -after.gather(-1, nexts)[..., 0].mean(1),
        "kl": (before.exp() * (before - after)).sum(-1).mean(1),
        "top1": (before.argmax(-1) == after.argmax(-1)).double().mean(1),
    }
    for quantity, value in expected.items():
        torch.testing.assert_close(found.after[quantity], value, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.before["loss"], -before.gather(-1, nexts)[..., 0].mean(1), atol=1e-4, rtol=1e-4)
    assert found.change("loss").value == pytest.approx(float((found.after["loss"] - found.before["loss"]).mean()))
    assert hooks_left(model) == []


def test_no_hooks_do_no_harm(named: tuple[str, Any]) -> None:
    model = named[1]
    found = harm(model, batch_of(model), [])
    assert found.estimate("kl").value == pytest.approx(0, abs=1e-6)
    assert found.estimate("top1").value == 1
    for quantity in QUANTITIES:
        torch.testing.assert_close(found.after[quantity], found.before[quantity] * (quantity not in ("kl",)))
    table = found.table.set_index("quantity")
    assert (table.change[[name for name in QUANTITIES if name != "kl"]].abs() < 1e-9).all()


@torch.no_grad()
def test_everything_else_by_hand(named: tuple[str, Any]) -> None:
    model = named[1]
    batch = batch_of(model)
    found, cache = harm(model, batch, []).before, model.run_with_cache(batch.tokens)[1]
    layers = range(N_LAYERS)

    def each(site: str) -> list[Tensor]:
        return [cache[f"blocks.{layer}.{site}"].float() for layer in layers]

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).double().mean(0)

    patterns, residuals = each("attn.hook_pattern"), each("hook_resid_post")
    later = [torch.stack([p[:, :, k + 1 :, k].mean(-1) for k in range(LENGTH - 1)], -1) for p in patterns]
    close = {
        "first_share": mean([x[..., 0].mean(1) for x in later]),
        "largest_share": mean([x[..., : 3 * LENGTH // 4].amax(-1).mean(1) for x in later]),
        "sink_rate": mean([(p[..., 0].mean(2) > 0.3).float().mean(1) for p in patterns]),
        "massive": torch.stack([metrics.massive_activations(x).sum((1, 2)) for x in residuals]).amax(0).double(),
        "dominance": mean([(x.abs().amax(-1) / x.abs().mean(-1)).amax(1) for x in residuals]),
        "effective_rank": mean([metrics.effective_rank(residuals[layer]) for layer in range(N_LAYERS)]),
    }

    def int8(x: Tensor, per_token: bool) -> Tensor:
        errors = []
        for prompt in x:
            scale = prompt.abs().amax(-1, keepdim=True) if per_token else prompt.abs().max()
            rounded = (prompt / (scale / 127)).round() * (scale / 127)
            errors.append(((rounded - prompt).norm(dim=-1) / prompt.norm(dim=-1)).mean())
        return torch.stack(errors)

    for what in ("tensor", "token"):
        close[f"int8_residual_{what}"] = mean([int8(x, what == "token") for x in residuals])
    for bits in (8, 4, 2):
        for what, axis in (("channel", 1), ("token", -1)):
            errors = []
            for x in each("attn.hook_k") + each("attn.hook_v"):
                low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
                step = (high - low) / (2**bits - 1)
                rounded = ((x - low) / step).round() * step + low
                errors.append(((rounded - x).norm(dim=-1) / x.norm(dim=-1)).mean((1, 2)))
            close[f"kv_int{bits}_{what}"] = mean(errors)
    for quantity, value in close.items():
        torch.testing.assert_close(found[quantity].double(), value, atol=2e-5, rtol=2e-4, msg=quantity)
    assert all(found[quantity].isfinite().all() for quantity in QUANTITIES)


def test_several_share_a_pass_and_may_be_brief(named: tuple[str, Any]) -> None:
    model = named[1]
    batch, hooks = batch_of(model), [("blocks.1.hook_mlp_out", halved)]
    steps: list[tuple[int, int]] = []
    found = measure_harm(model, batch, {"none": [], "half": hooks}, brief=["half"], step=lambda *at: steps.append(at))
    assert tuple(found["half"].after) == BRIEF and set(found["none"].after) == set(QUANTITIES)
    for quantity, value in harm(model, batch, hooks, brief=True).after.items():
        torch.testing.assert_close(found["half"].after[quantity], value)
    assert steps[-1][0] == steps[-1][1]
    with pytest.raises(InputError, match="'kurtosis' was not measured"):
        found["half"].estimate("kurtosis")


def test_nothing_is_left_behind_after_an_exception(named: tuple[str, Any]) -> None:
    def breaks(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        harm(named[1], batch_of(named[1]), [("blocks.1.hook_mlp_out", breaks)])
    assert hooks_left(named[1]) == []


def test_one_token_has_no_next(tiny_llama: Any) -> None:
    with pytest.raises(InputError, match="length must be at least 2"):
        harm(tiny_llama, from_tokens(tiny_llama, tiny_tokens(2, 1)), [])


def test_interventions_are_seen_by_what_is_measured(named: tuple[str, Any]) -> None:
    """A window without the first token leaves it nothing from queries beyond."""
    model = named[1]
    found = sl.harm(model, batch_of(model), interventions.evict(model, 0, 0))
    assert found.estimate("first_share").value == 0
    assert found.estimate("kl").value > 0
    assert not math.isnan(found.estimate("int8_tensor").value)
