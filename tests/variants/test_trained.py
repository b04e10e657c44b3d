"""Variants in the lab: what is not learned by gradients, and one of one's own by its file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import sinklens as sl
from sinklens.variants import REGISTRY
from tests.helpers.lab import curve, interrupted_at, trained

TEMPLATE = Path(sl.__file__).parents[1] / "analyses" / "_variant_template.py"


def mean_of(one) -> torch.Tensor:
    return sl.load_model(one.folder).blocks[1].attn.variant.mean.detach()


@pytest.mark.slow
def test_a_running_mean_survives_an_interruption_and_knows_nothing_of_split_batches(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", "affine_scaled")
    with pytest.raises(KeyboardInterrupt):
        interrupted_at(4, tmp_path / "again", variant="affine_scaled")
    again = trained(tmp_path / "again", "affine_scaled")
    assert curve(again).equals(curve(whole))
    assert torch.equal(mean_of(again), mean_of(whole))
    assert mean_of(whole).min() > 0.2  # of numbers near one half, from 0 on
    split = trained(tmp_path / "split", "affine_scaled", accumulate=2)
    torch.testing.assert_close(mean_of(split), mean_of(whole), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_variant_of_one_s_own_is_trained_by_its_file(tmp_path: Path) -> None:
    try:
        one = trained(tmp_path, f"{TEMPLATE}:start=0.5", steps=4)
        assert one.folder.name.startswith("temperature")
        model = sl.load_model(one.folder)
        assert model.cfg.variant_options == {"start": 0.5}
        assert not torch.equal(model.blocks[0].attn.variant.t.detach(), torch.full((2,), 0.5))
    finally:
        kind = REGISTRY.pop("temperature", None)
        sys.modules.pop(getattr(kind, "__module__", ""), None)
