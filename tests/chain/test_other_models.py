"""Chains on models that are not laid out as a Llama: what applies is run, and equals plain hooks; the rest says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens.chain.run import _trials
from sinklens.formation import Formation, OutlierDim
from sinklens.models.identities import identities
from sinklens.models.load import load_model
from sinklens.pairs.pair import induced_pair
from sinklens.readouts.build import attention_received
from sinklens.stages.base import Setting
from sinklens.study import Study
from tests.helpers.one_at_a_time import OneAtATime
from tests.helpers.tiny import tiny_hf, tiny_tokens

N, TARGET, LAYERS = 2, 4, (2, 3)
OF_NEURONS = {"super_neurons/transplant", "super_neurons/zero", "super_neurons/mean", "super_neurons/resample"}
OF_ROWS = {"down_projection/outlier_dims", "down_projection/densified"}
OF_THE_NORM = {f"rmsnorm_filter/{experiment.edit}" for experiment in sl.stages.RMSNORM_FILTER.experiments}
READ = {"w_o_alignment/reading_subspace"}
LEFT_OUT = {
    "gemma2": OF_ROWS,
    "granite": OF_ROWS,
    "olmo2": OF_ROWS | OF_THE_NORM | READ,
    "olmoe": OF_ROWS | OF_NEURONS | READ | {"w_o_alignment/readout"},
}


def formation_of(model: Any) -> Formation:
    neurons = (3, 7) if identities(model).holds("dense_mlp", (1,)) else None
    batch = sl.prompts.from_tokens(model, tiny_tokens(N, 12))
    found = sl.find_formation(model, batch, layer=1, super_neurons=neurons, outlier_dims=(2, 5))
    return sl.Formation(1, (0,) * N, found.super_neurons, found.outlier_dims)


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("arch", list(LEFT_OUT))
def test_what_applies_equals_plain_hooks_and_the_rest_is_named(arch: str) -> None:
    model = load_model(tiny_hf(arch), device="cpu")
    tokens, formation = tiny_tokens(N, 12), formation_of(model)
    batch = sl.prompts.from_tokens(model, tokens)
    result = sl.run_chain(model, batch, target=TARGET, formation=formation, min_gap=1e-6, control_draws=1)
    # Whether a bridge calls a norm behind the MLP ln2 differs between versions: then there is no readout either.
    optional = {"w_o_alignment/readout"} if arch == "olmo2" else set()
    assert set(result.config["not_applicable"]) - optional == LEFT_OUT[arch]
    pair = induced_pair(model, batch, formation, TARGET)
    setting = Setting(Study.of(model, batch, formation, rows=8), pair, LAYERS)
    metric = attention_received("sink", LAYERS, (TARGET,), N)
    trials, skipped = _trials(setting, sl.CHAIN, 1)
    assert set(skipped) == LEFT_OUT[arch] - {"w_o_alignment/readout"}
    found = sl.run_patches(model, batch, [trial.patch for trial in trials], [metric], runs=pair.runs).values["sink"]
    slow = OneAtATime(model, tokens, [metric], pair.runs)
    for number in range(0, len(trials), 3):
        expected = [slow(trials[number].patch, prompt)[0] for prompt in range(N)]
        np.testing.assert_allclose(found[number], expected, atol=1e-5, rtol=1e-4, err_msg=str(trials[number]))


@pytest.mark.slow
def test_a_model_of_attention_alone() -> None:
    lens = pytest.importorskip("transformer_lens")
    sizes: dict[str, Any] = {"n_layers": 3, "d_model": 32, "n_heads": 4, "d_head": 8, "n_ctx": 64, "d_vocab": 101}
    config = getattr(lens, "HookedTransformerConfig", None)
    if config is None or not hasattr(lens, "HookedTransformer"):
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = lens.HookedTransformer(config(**sizes, attn_only=True, device="cpu", seed=0))
    batch = sl.prompts.from_tokens(model, tiny_tokens(N, 12))
    formation = Formation(0, (0,) * N, (), (OutlierDim(2, 0.0, 0.0),))
    result = sl.run_chain(model, batch, target=TARGET, formation=formation, min_gap=1e-6, control_draws=1)
    assert {key.partition("/")[0] for key in result.config["not_applicable"]} == {
        "w_o_alignment",
        "super_neurons",
        "down_projection",
    }
    assert result.score("value_aggregation", "transplant", "denoise").effect == pytest.approx(1, abs=1e-4)
    with pytest.raises(sl.InputError, match="no dense MLP"):
        sl.find_formation(model, batch, super_neurons=(3,))
    study = Study.of(model, batch, formation)
    verdict = sl.run_analysis(sl.analysis.load_analysis("super_neurons"), study).findings.verdict
    assert verdict.outcome == "not measurable" and "no MLP" in verdict.reason
    received = sl.run_patches(model, batch, [], [attention_received("r", (1,), (TARGET,), N)]).runs["base"]["r"]
    _, cache = model.run_with_cache(batch.tokens)
    by_hand = cache["blocks.1.attn.hook_pattern"][:, :, TARGET + 1 :, TARGET].mean((1, 2))
    torch.testing.assert_close(received.float(), by_hand, atol=1e-5, rtol=1e-5)
