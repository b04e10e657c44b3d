"""HookedTransformers with sliding windows, soft caps and norms behind attention and MLP, in the packed pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sinklens.engine.packed import of_hooked
from sinklens.engine.run import run_patches
from sinklens.models.backends import has_hooked_transformer
from sinklens.patches import Patch
from tests.helpers.grids import RUNS, SHRINK, N, measured, sites_of, tokens_for
from tests.helpers.one_at_a_time import OneAtATime
from tests.helpers.tiny import N_LAYERS

pytestmark = pytest.mark.skipif(not has_hooked_transformer(), reason="this TransformerLens has no HookedTransformer")
WINDOW = 4
"""Shorter than the prompts."""
LIKE_GEMMA = {"attn_scores_soft_cap": 0.5, "output_logits_soft_cap": 3.0, "use_normalization_before_and_after": True}


def _model(**options: Any) -> Any:
    """A random model with a window in every second block."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=16,
        n_ctx=32,
        d_head=4,
        n_heads=4,
        n_key_value_heads=2,
        d_mlp=24,
        d_vocab=50,
        act_fn="gelu_pytorch_tanh",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=4,
        use_local_attn=True,
        window_size=WINDOW,
        attn_types=["local", "global"] * (N_LAYERS // 2),
        initializer_range=0.3,
        device="cpu",
        **options,
    )
    return HookedTransformer(config).eval().requires_grad_(False)


def _results(model: Any, layers: tuple[int, ...] = (0,)) -> tuple[Any, list[Patch], list[Any]]:
    patches = [Patch(site, (layer,), (3,), SHRINK) for site in sites_of(model) for layer in layers]
    wanted = measured(model)
    return run_patches(model, tokens_for(model), patches, wanted, runs=RUNS), patches, wanted


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LIKE_GEMMA], ids=["windows", "like gemma"])
def test_every_site_gives_what_one_patch_at_a_time_gives(options: dict[str, Any]) -> None:
    model = _model(**options)
    result, patches, wanted = _results(model)
    assert (result.stats.path, result.stats.reason) == ("packed", "")
    slow = OneAtATime(model, tokens_for(model), wanted, RUNS)
    for index, patch in enumerate(patches):
        for readout, expected in zip(wanted, slow(patch, index % N), strict=True):
            found = float(result.values[readout.name][index, index % N])
            assert found == pytest.approx(expected, abs=1e-5, rel=2e-5), (readout.name, patch.describe())


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["window", "no window", "cap", "norm behind attention", "norm behind the MLP"])
def test_a_wrong_part_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, take_apart = _model(**LIKE_GEMMA), of_hooked.HookedModel.take_apart

    def planted(self: Any, layer: int) -> Any:
        block = take_apart(self, layer)
        if wrong == "cap":
            return replace(block, cap=0)
        if wrong == "norm behind attention":
            return replace(block, ln1_post=None)
        if wrong == "norm behind the MLP":
            return replace(block, ln2_post=None)
        if block.seen is None:
            return block
        return replace(block, seen=torch.ones_like(block.seen).tril() if wrong == "no window" else block.seen.triu(-2))

    expected, _, _ = _results(model)
    monkeypatch.setattr(of_hooked.HookedModel, "take_apart", planted)
    again = _model(**LIKE_GEMMA)
    found, _, _ = _results(again)
    assert expected.stats.path == "packed" and found.stats.path == "model" and "differs" in found.stats.reason
    for name, values in expected.values.items():
        assert torch.allclose(found.values[name], values, atol=1e-5, rtol=2e-5), name
