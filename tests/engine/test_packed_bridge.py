"""The packed pass on a TransformerBridge: the numbers of one patch at a time, and nothing believed without proof."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sinklens import readouts, sites
from sinklens.engine.capture import capture_runs
from sinklens.engine.packed import of_bridge, packed_model, unpackable
from sinklens.engine.packed.proof import proof
from sinklens.engine.packed.weights import PackedBlock
from sinklens.engine.run import PatchResult, PatchRunner, run_patches
from sinklens.engine.store import Want
from sinklens.errors import NotApplicableError
from sinklens.models import bridged
from sinklens.models.families import FAMILIES
from sinklens.models.state import foreign_part
from sinklens.models.writes import check_writable
from sinklens.patches import Patch, Source
from sinklens.sites import HookSite
from tests.helpers.grids import (
    LENGTH,
    RUNS,
    SHRINK,
    TRANSPLANT,
    N,
    grids,
    kept_model,
    measured,
    patch_of,
    sites_of,
    tokens_for,
)
from tests.helpers.modules import Doubled, Halved
from tests.helpers.one_at_a_time import OneAtATime
from tests.helpers.tiny import hooks_left, slow_but, tiny_model, tiny_tokens

pytestmark = pytest.mark.backend

UNKNOWN = {
    "opt_post": "blocks.0.attn.hook_q, which would be off",  # a norm behind the sum
    "mpt": "attention that is not causal",
    "bloom": "called in another way",
    "deepseek_v2": "attention of the kind MLAAttentionBridge",
    "deepseek_v3": "attention of the kind MLAAttentionBridge",
}
"""Families with a part that is not known, and what is said of it."""
KNOWN = tuple(family for family in FAMILIES if family not in UNKNOWN)
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3": {"sliding_window": 4},
    "olmo3": {"sliding_window": 4},
    "gpt_oss": {"sliding_window": 4},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
}
"""Windows shorter than the prompts, in all blocks or in some."""
model_of = partial(kept_model, backend="bridge")


def writable(model: Any) -> list[HookSite]:
    """Sites that the packed pass has of this model, and at which an edit takes effect."""
    found = []
    for site in sites_of(model):
        try:
            check_writable(model, site.template, range(4))
        except NotApplicableError:
            continue
        if unpackable(model, LENGTH, [], RUNS, [Patch(site, (0, 1, 2, 3), (1,), SHRINK)]) is None:
            found.append(site)
    return found


def check(model: Any, patches: list[Patch], *, path: str = "packed", **options: Any) -> PatchResult:
    """The values of a run against one patch at a time."""
    before = hooks_left(model)  # some bridges have hooks of their own
    tokens, wanted = tokens_for(model), measured(model)
    result = run_patches(model, tokens, patches, wanted, runs=RUNS, **options)
    assert result.stats.path == path and bool(result.stats.reason) == (path == "model"), result.stats.reason
    slow = OneAtATime(model, tokens, wanted, RUNS)
    with torch.no_grad():  # logits of such models go up to 40, and a readout may be the difference of two
        size = {readout: 1.0 for readout in wanted} | {wanted[3]: max(1.0, float(model(tokens).abs().max()))}
    for index, patch in enumerate(patches):
        for prompt in range(N):
            for readout, expected in zip(wanted, slow(patch, prompt), strict=True):
                found, near = float(result.values[readout.name][index, prompt]), 1e-5 * size[readout]
                assert found == pytest.approx(expected, abs=near, rel=2e-5), (readout.name, patch.describe(), prompt)
    assert hooks_left(model) == before
    return result


RANDOM = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("llama", "gpt2", of=KNOWN))
@RANDOM
@given(drawn=grids(), max_rows=st.sampled_from((1, 4, 64)))
def test_any_grid_equals_one_patch_at_a_time(family: str, drawn: list[tuple], max_rows: int) -> None:
    model = model_of(family)
    choice = writable(model)
    assert len(choice) > 10
    check(model, [patch_of(model, item, choice) for item in drawn], max_rows=max_rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("gemma3", of=WINDOWS))
@RANDOM
@given(drawn=grids(), max_rows=st.sampled_from((1, 4, 64)))
def test_windows_shorter_than_the_prompt(family: str, drawn: list[tuple], max_rows: int) -> None:
    model = model_of(family, **WINDOWS[family])
    windows = [model_seen is not None for model_seen in seen_by(model, LENGTH)]
    assert any(windows)
    choice = writable(model)
    check(model, [patch_of(model, item, choice) for item in drawn], max_rows=max_rows)


def seen_by(model: Any, length: int) -> list[Tensor | None]:
    with torch.no_grad():
        given = bridged.given_to_attention(model, length)
    return [bridged.block_parts(model, i, length, one).attention.seen for i, one in enumerate(given)]


@pytest.mark.slow
def test_a_window_that_only_long_prompts_reach() -> None:
    """The proof is made with 13 tokens, which a window of 16 does not touch."""
    model = model_of("mistral", sliding_window=16)
    assert seen_by(model, 13) == [None] * 4 and all(seen is not None for seen in seen_by(model, 24))
    tokens = tiny_tokens(N, 24)
    wanted = [readouts.attention_received("received", (1, 3), (2,), N)]
    patches = [Patch(sites.RESID_PRE, (1,), (p,), SHRINK) for p in (0, 7, 20)]
    result = run_patches(model, tokens, patches, wanted)
    assert result.stats.path == "packed"
    slow = OneAtATime(model, tokens, wanted, {"base": ()})
    expected = [[slow(patch, prompt)[0] for prompt in range(N)] for patch in patches]
    torch.testing.assert_close(result.values["received"].float(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow) for name in UNKNOWN])
def test_what_is_not_known_runs_through_transformer_lens_and_is_named(family: str) -> None:
    model = model_of(family)
    why = unpackable(model, LENGTH, measured(model)[1:2], RUNS)
    assert why is not None and UNKNOWN[family] in why
    patches = [Patch(sites.RESID_PRE, (1,), (5,), TRANSPLANT, source=Source("other"))]
    result = run_patches(model, tokens_for(model), patches, measured(model)[1:2], runs=RUNS)
    assert (result.stats.path, result.stats.reason) == ("model", why)


@pytest.mark.slow
def test_nothing_inside_an_mlp_that_is_run_whole_is_packed() -> None:
    model = model_of("mixtral")
    inside = HookSite("blocks.{layer}.mlp.hook_pre", ("batch", "pos", "d_mlp"))
    why = unpackable(model, LENGTH, [], RUNS, [Patch(inside, (1,), (3,), SHRINK)])
    assert why is not None and why.startswith("blocks.1.mlp.hook_pre")
    assert unpackable(model, LENGTH, [], RUNS) is None and packed_model(model, LENGTH).block(1).mlp_parts is None


def test_captures_are_those_of_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    tokens, places = tokens_for(model), sites_of(model)
    wants = [
        Want(run, site, layer, kept) for run in RUNS for site in places for layer, kept in ((1, None), (3, (2, 5)))
    ]
    mine = capture_runs(model, tokens, RUNS, wants, measured(model), max_rows=4)
    monkeypatch.setattr("sinklens.engine.capture.unknown_place", lambda *_: "for this test")
    theirs = capture_runs(model, tokens, RUNS, wants, measured(model), max_rows=64)
    for want in wants:
        found, expected = (store.tensor(*want.key) for store in (mine, theirs))
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert torch.linalg.vector_norm(found - expected) < 1e-5 * torch.linalg.vector_norm(expected)
    for key, expected in theirs.readings.items():
        torch.testing.assert_close(mine.readings[key], expected, rtol=1e-4, atol=1e-5)
    for key, expected in theirs.before.items():
        torch.testing.assert_close(mine.before[key], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_runner_uses_the_models_forward_pass_for_the_check_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama", "bridge"), []
    unpackable(model, LENGTH, [], RUNS)  # the proof is made, and the length known
    real = type(model).forward

    def spy(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        if options.get("stop_at_layer") != 0:
            rows.append(len(x))
        return real(self, x, *args, **options)

    runner = PatchRunner(model, tokens_for(model), measured(model), runs=RUNS)
    patches = [Patch(sites.RESID_PRE, (1,), (p,), TRANSPLANT, source=Source("other")) for p in range(1, 6)]
    check_writable(model, sites.RESID_PRE.template, (0, 1))
    monkeypatch.setattr(type(model), "forward", spy)
    first = runner.run(patches)
    assert rows == [len(RUNS)]  # one prompt of every run
    again = runner.run(patches)
    assert rows == [len(RUNS)] and again.stats.n_forwards == 1 < first.stats.n_forwards


# --- Wrong passes ----------------------------------------------------------------------------------------------------


def _other_norm(block: PackedBlock) -> PackedBlock:
    assert block.ln2 is not None
    return replace(block, ln2=replace(block.ln2, eps=block.ln2.eps + 1))


def _other_turns(block: PackedBlock) -> PackedBlock:
    assert block.rotary is not None
    return replace(block, rotary=replace(block.rotary, sin=-block.rotary.sin))


def _swapped(block: PackedBlock) -> PackedBlock:
    q, k, v = block.qkv
    return replace(block, qkv=(q, v, k))


PLANTED: dict[str, Callable[[PackedBlock], PackedBlock]] = {
    "another scale": lambda block: replace(block, scale=block.scale * 1.02),
    "a soft cap": lambda block: replace(block, cap=30.0),
    "another norm": _other_norm,
    "turned the other way": _other_turns,
    "neighbours turned": lambda b: replace(b, rotary=replace(b.rotary, adjacent=True)),  # type: ignore[type-var]
    "no turns": lambda block: replace(block, rotary=None),
    "keys for values": _swapped,
    "a window": lambda block: replace(block, seen=torch.ones(LENGTH, LENGTH).tril().triu(-3).bool()),
    "a sink": lambda block: replace(block, sinks=torch.zeros(4)),
    "another sum": lambda block: replace(block, added=0.98),
    "a norm behind": lambda block: replace(block, ln1_post=block.ln1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but("another scale", "a window", of=PLANTED))
@pytest.mark.parametrize("proved", [False, True], ids=["before", "after the proof"])
def test_a_wrong_pass_is_found(name: str, proved: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """By the proof, if it sees the fault; else by the first prompts of the runs."""
    model, real = tiny_model("llama", "bridge"), of_bridge.BridgedModel.take_apart

    def wrong(self: Any, layer: int) -> PackedBlock:
        block = real(self, layer)
        return PLANTED[name](block) if layer == 2 and (self.length == LENGTH or name != "a window") else block

    if proved:
        assert proof(model).why_not is None
    monkeypatch.setattr(of_bridge.BridgedModel, "take_apart", wrong)
    patches = [
        Patch(sites.RESID_PRE, (1,), (5,), TRANSPLANT, source=Source("other")),
        Patch(sites.Z, (2,), (4,), SHRINK, run="other"),
    ]
    with caplog.at_level(logging.WARNING):
        result = check(model, patches, path="model")
    by_check = proved or name == "a window"
    assert ("differs on this model" if by_check else "off by") in result.stats.reason
    assert ("differs on this model" in caplog.text) == by_check
    again = run_patches(model, tokens_for(model), patches, measured(model), runs=RUNS)
    assert again.stats.reason == result.stats.reason


@pytest.mark.slow
def test_a_class_that_somebody_has_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """No module, weight or setting of the model says so."""
    model = tiny_model("llama", "bridge")
    attention = type(model.blocks[0].attn)
    real = attention.forward
    assert proof(model).why_not is None
    check_writable(model, sites.RESID_PRE.template, (0, 1))

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        out, *others = real(self, *args, **options)
        return (1.5 * out, *others)

    monkeypatch.setattr(attention, "forward", forward)
    patches = [Patch(sites.RESID_PRE, (1,), (5,), TRANSPLANT, source=Source("other"))]
    result = run_patches(model, tokens_for(model), patches, measured(model)[:1], runs=RUNS)
    assert result.stats.path == "model" and "differs on this model" in result.stats.reason
    slow = OneAtATime(model, tokens_for(model), measured(model)[:1], RUNS)
    assert result.values["received"][0].tolist() == pytest.approx([slow(patches[0], i)[0] for i in range(N)], abs=1e-5)


def _layer(model: Any) -> Any:
    return model.original_model.model.layers[2]


def replace_mlp(model: Any) -> None:
    _layer(model).mlp = Halved(_layer(model).mlp)


def parametrise(model: Any) -> None:
    down = model.blocks[2].mlp.out.original_component
    nn.utils.parametrize.register_parametrization(down, "weight", Doubled())


def other_forward(model: Any) -> None:
    inner = model.blocks[2].mlp.original_component
    real = inner.forward
    inner.forward = lambda x: 0.5 * real(x)


@pytest.mark.slow
@pytest.mark.parametrize("change", [replace_mlp, parametrise, other_forward])
def test_replaced_and_parametrised_modules_count(change: Callable[[Any], None]) -> None:
    model = tiny_model("llama", "bridge")
    patches = [Patch(sites.RESID_PRE, (1,), (5,), TRANSPLANT, source=Source("other"))]
    check(model, patches)
    assert foreign_part(model) is None
    change(model)
    assert foreign_part(model) is not None
    check(model, patches, path="model")


def other_act(model: Any) -> None:
    model.blocks[2].mlp.original_component.act_fn = nn.ReLU()


def other_eps(model: Any) -> None:
    model.blocks[2].ln2.original_component.variance_epsilon = 0.1


def other_scale(model: Any) -> None:
    model.blocks[2].attn.original_component.scaling *= 2


def other_weight(model: Any) -> None:
    model.blocks[2].attn.q.original_component.weight.data.mul_(2)


@pytest.mark.slow
@pytest.mark.parametrize("change", [other_act, other_eps, other_scale, other_weight])
def test_what_is_changed_between_two_calls_is_seen(change: Callable[[Any], None]) -> None:
    model = tiny_model("llama", "bridge")
    tokens, wanted = tokens_for(model), measured(model)
    patches = [Patch(sites.RESID_PRE, (1,), (5,), TRANSPLANT, source=Source("other"))]
    runner = PatchRunner(model, tokens, wanted, runs=RUNS)
    before = runner.run(patches)
    change(model)
    after, fresh = runner.run(patches), check(model, patches)
    assert after.stats.path == "packed"
    for name, values in fresh.values.items():
        assert torch.equal(after.values[name], values)
    assert not torch.allclose(before.values["norm"], fresh.values["norm"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2", "gpt_neox"])
def test_other_precisions_are_within_rounding(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, "bridge").to(dtype)
    tokens, wanted = tokens_for(model), [readouts.attention_received("r", (3,), (0,), N)]
    patches = [Patch(sites.RESID_PRE, (1,), (p,), TRANSPLANT, source=Source("other")) for p in (1, 5)]
    result = run_patches(model, tokens, patches, wanted, runs=RUNS)
    assert result.stats.path == "packed", result.stats.reason
    slow = OneAtATime(model, tokens, wanted, RUNS)
    expected = torch.tensor([[slow(patch, prompt)[0] for prompt in range(N)] for patch in patches])
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(result.values["r"].float(), expected, rtol=tolerance, atol=1e-6)
