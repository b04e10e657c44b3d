"""The packed forward pass against the plain one, one patch and one prompt at a time, with random grids."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinklens import readouts, sites
from sinklens.engine.packed import PackedJob, unpackable
from sinklens.engine.run import PatchRunner, run_patches
from sinklens.patches import Patch, Source
from sinklens.readouts.base import Readout
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
from tests.helpers.one_at_a_time import OneAtATime
from tests.helpers.tiny import slow_but, tiny_model

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox", "gptj")


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("llama", "gpt2", of=FAMILIES))
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=grids(), max_rows=st.sampled_from((1, 4, 64)))
def test_any_grid_equals_one_patch_at_a_time(family: str, drawn: list[tuple], max_rows: int) -> None:
    model = kept_model(family)
    tokens, wanted = tokens_for(model), measured(model)
    patches = [patch_of(model, item) for item in drawn]
    result = run_patches(model, tokens, patches, wanted, runs=RUNS, max_rows=max_rows)
    assert result.stats.path == "packed"
    slow = OneAtATime(model, tokens, wanted, RUNS)
    for index, patch in enumerate(patches):
        for prompt in range(N):
            for readout, expected in zip(wanted, slow(patch, prompt), strict=True):
                found = float(result.values[readout.name][index, prompt])
                # A readout may be the small difference of logits of 20, each with a rounding of its own.
                assert found == pytest.approx(expected, abs=2e-5, rel=2e-5), (readout.name, patch.describe(), prompt)


@pytest.mark.parametrize("family", slow_but("llama", "gpt2", of=FAMILIES))
def test_every_site_can_be_edited_and_moves_what_comes_later(family: str) -> None:
    """A sweep of one edit over all sites: none is passed over, and nothing before the position moves."""
    model = kept_model(family)
    tokens = tokens_for(model)
    late = [readouts.vector_readout("late", sites.RESID_POST, (3,), (9,), N, lambda x, _: x.float().sum(-1))]
    early = [readouts.vector_readout("early", sites.RESID_POST, (3,), (4,), N, lambda x, _: x.float().sum(-1))]
    patches = [Patch(site, (1,), (5,), SHRINK) for site in sites_of(model)]
    result = run_patches(model, tokens, patches, [*late, *early])
    moved = (result.values["late"] - result.runs["base"]["late"]).abs().amax(-1)
    unmoved = [p.site.template for p, change in zip(patches, moved, strict=True) if change < 1e-7]
    # The pattern of query 5 changes z there, and so everything later; only scores may by chance be moved too little.
    assert unmoved == []
    assert (result.values["early"] == result.runs["base"]["early"].float().double()).all()


def test_rows_hold_only_the_positions_that_can_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kept_model("llama")
    seen: list[tuple[int, int]] = []
    real = PackedJob.forward

    def spy(self: PackedJob, begin: int, end: int) -> None:
        rows = self.rows[begin:end]
        seen.extend(zip(rows.starts.tolist(), rows.stops.tolist(), strict=True))
        real(self, begin, end)

    monkeypatch.setattr(PackedJob, "forward", spy)
    norm = [readouts.vector_readout("norm", sites.RESID_POST, (2,), (6,), N, lambda x, _: x.norm(dim=-1))]
    places = [(0, 2), (0, 6), (0, 7), (3, 2)]  # the third lies behind the readout, the fourth above it
    patches = [Patch(sites.RESID_PRE, (layer,), (p,), SHRINK) for layer, p in places]
    result = run_patches(model, tokens_for(model), patches, norm)
    assert seen == [(2, 7)] * N + [(6, 7)] * N
    base = result.runs["base"]["norm"]
    assert ((result.values["norm"] - base).abs().amax(-1) > 1e-6).tolist() == [True, True, False, False]


def test_a_runner_captures_the_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forwards = kept_model("llama"), []
    real = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: (forwards.append(1), real(self, *a, **k))[1])
    runner = PatchRunner(model, tokens_for(model), [readouts.attention_received("r", (3,), (0,), N)], runs=RUNS)
    patches = [Patch(sites.RESID_PRE, (1,), (p,), TRANSPLANT, source=Source("other")) for p in range(1, 6)]
    first = runner.run(patches)
    count = len(forwards)
    again = runner.run(patches)
    assert len(forwards) == count
    assert again.stats.n_forwards == 1 < first.stats.n_forwards  # the batch alone
    assert torch.equal(first.values["r"], again.values["r"])
    assert runner.run_values["base"]["r"].shape == (N,)


def test_a_pass_that_is_not_the_model_s_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A part of a model that nobody thought of: the check finds it, and TransformerLens does the work."""
    model = tiny_model("llama")
    attention = type(model.blocks[0].attn).__mro__[1]
    real = attention.calculate_attention_scores
    monkeypatch.setattr(attention, "calculate_attention_scores", lambda self, q, k: real(self, q, k) * 1.5)
    wanted, tokens = measured(model), tokens_for(model)
    patches = [Patch(sites.RESID_PRE, (1,), (5,), TRANSPLANT, source=Source("other"))]
    with caplog.at_level(logging.WARNING):
        result = run_patches(model, tokens, patches, wanted, runs=RUNS)
    assert "the fast pass differs on this model" in caplog.text
    assert result.stats.path == "model" and "differs on this model" in result.stats.reason
    expected = OneAtATime(model, tokens, wanted, RUNS)(patches[0], 1)
    found = [float(result.values[readout.name][0, 1]) for readout in wanted]
    assert found == pytest.approx(expected, abs=1e-5, rel=2e-5)


def test_hooks_that_the_caller_has_installed_stay_in_force() -> None:
    model = kept_model("llama")
    tokens, wanted = tokens_for(model), [readouts.attention_received("r", (3,), (0,), N)]
    patches = [Patch(sites.RESID_PRE, (1,), (5,), TRANSPLANT, source=Source("other"))]
    plain = run_patches(model, tokens, patches, wanted, runs=RUNS).values["r"]
    with model.hooks(fwd_hooks=[("blocks.2.hook_mlp_out", lambda act, hook: act * 3)]):  # noqa: ARG005
        hooked = run_patches(model, tokens, patches, wanted, runs=RUNS)
    assert hooked.stats.path == "model"
    assert not torch.allclose(plain, hooked.values["r"], atol=1e-4)


def test_what_is_not_known_is_said() -> None:
    model = kept_model("llama")
    odd = Readout(
        "scale", HookSite("blocks.{layer}.ln1.hook_scale", ("batch", "pos", "one")), (1,), lambda a, _: a[:, 0, 0]
    )
    assert unpackable(model, LENGTH, [odd], RUNS) == "the site blocks.{layer}.ln1.hook_scale"
    patches = [Patch(sites.RESID_PRE, (1,), (0,), TRANSPLANT, source=Source("other"))]
    result = run_patches(model, tokens_for(model), patches, [odd], runs=RUNS)
    assert result.stats.path == "model"
    assert unpackable(model, LENGTH, [], RUNS) is None


def test_a_transplanted_key_after_rotation() -> None:
    """The keys that rows take from the prefix are those after rotation, and can be edited there."""
    model = kept_model("llama")
    tokens, wanted = tokens_for(model), [readouts.attention_received("r", (2, 3), (4,), N)]
    patches = [Patch(sites.ROT_K, (2,), (4,), TRANSPLANT, source=Source("other"))]
    result = run_patches(model, tokens, patches, wanted, runs=RUNS)
    slow = OneAtATime(model, tokens, wanted, RUNS)
    expected = [slow(patches[0], prompt)[0] for prompt in range(N)]
    assert result.values["r"][0].tolist() == pytest.approx(expected, abs=1e-6)


def test_rows_see_their_prompt() -> None:
    model = kept_model("llama")
    which = [Readout("which", sites.RESID_POST, (3,), lambda act, rows: 10.0 * rows.prompts + 0 * act[:, 0, 0])]
    patches = [Patch(sites.RESID_PRE, (layer,), (p,), SHRINK) for layer in (0, 2) for p in (1, 7)]
    found = run_patches(model, tokens_for(model), patches, which, max_rows=5).values["which"]
    assert found.tolist() == [[0.0, 10.0, 20.0]] * 4


@pytest.mark.slow
def test_half_precision_is_within_rounding() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    tokens, wanted = tokens_for(model), [readouts.attention_received("r", (3,), (0,), N)]
    patches = [Patch(sites.RESID_PRE, (1,), (p,), TRANSPLANT, source=Source("other")) for p in (1, 5)]
    result = run_patches(model, tokens, patches, wanted, runs=RUNS)
    assert result.stats.path == "packed"
    slow = OneAtATime(model, tokens, wanted, RUNS)
    expected = [[slow(patch, prompt)[0] for prompt in range(N)] for patch in patches]
    assert torch.allclose(result.values["r"], torch.tensor(expected, dtype=torch.float64), rtol=0.03)


def test_what_a_runner_has_captured_stays_when_more_is_needed() -> None:
    """Windows of blocks overlap: a later call needs an activation where it was captured, and elsewhere too."""
    model = kept_model("llama")
    tokens, wanted = tokens_for(model), [readouts.attention_received("r", (3,), (0,), N)]

    def patch(layers: tuple[int, ...], position: int) -> Patch:
        return Patch(sites.Z, layers, (position,), TRANSPLANT, source=Source("other"))

    runner = PatchRunner(model, tokens, wanted, runs=RUNS)
    runner.run([patch((0, 1), 2)])
    patches = [patch((0, 1), 7), patch((1, 2), 2)]
    found = runner.run(patches).values["r"]
    assert torch.equal(found, run_patches(model, tokens, patches, wanted, runs=RUNS).values["r"])
