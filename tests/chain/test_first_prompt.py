"""What a chain keeps of its first prompt, against plain runs of the model with a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens.chain.run import run_chain
from sinklens.formation import find_formation
from sinklens.prompts import from_tokens
from tests.helpers.planted import OUTLIER, SUPER, planted_model, prompts
from tests.helpers.tiny import tiny_model

pytest.importorskip("transformer_lens.HookedTransformer")


@pytest.mark.slow
def test_the_planted_sink_is_seen_token_by_token():
    model, target = planted_model(), 5
    batch = from_tokens(model, prompts(16))
    formation = find_formation(model, batch, layer=0, super_neurons=[SUPER], outlier_dims=[OUTLIER])
    stage = sl.stages.STAGES["super_neurons"]
    result = run_chain(model, batch, target=target, stages=(stage,), formation=formation, readout_blocks=1)
    assert result.received["base"].shape == (1, 16) and result.neurons["base"].shape == (1, 16, 1)
    for run in ("base", "anchored"):
        assert result.received[run][0, target].item() == pytest.approx(result.runs[run]["sink"][0], abs=1e-5)
        assert result.received[run].isnan().nonzero().tolist() == [[0, 15]]
    base, anchored = (result.neurons[run][0, :, 0] for run in ("base", "anchored"))
    moved = (base - anchored).abs() > 1e-6
    assert moved.nonzero().flatten().tolist() == [target]
    assert anchored[target] > base[target]


@pytest.mark.slow
def test_a_natural_run_is_the_model_as_it_is():
    model = tiny_model("llama")
    tokens = torch.tensor(np.random.default_rng(0).integers(3, model.cfg.d_vocab, (3, 12)))
    batch = from_tokens(model, tokens)
    formation = find_formation(model, batch, layer=0, super_neurons=[3, 7], outlier_dims=[2])
    result = run_chain(model, batch, target="natural", formation=formation, readout_blocks=2, min_gap=1e-9)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:1])
    later = torch.ones(12, 12).tril(-1)
    blocks = [result.config["readout_layers"][0], result.config["readout_layers"][-1]]
    patterns = torch.stack([cache[f"blocks.{b}.attn.hook_pattern"] for b in blocks]).mean((0, 2))[0]
    expected = (patterns * later).sum(0) / later.sum(0)
    torch.testing.assert_close(result.received["natural"][0], expected, equal_nan=True, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result.neurons["natural"], cache["blocks.0.mlp.hook_post"][..., [*formation.neurons]])
