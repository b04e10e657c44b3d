"""Hook sites: axes by their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sinklens import sites
from sinklens.sites import HookSite
from tests.helpers.tiny import D_HEAD, D_MLP, D_MODEL, N_HEADS, N_KV_HEADS, N_LAYERS

BATCH, POS = 2, 5
SIZES = {
    "batch": BATCH,
    "pos": POS,
    "query": POS,
    "key": POS,
    "head": N_HEADS,
    "kv_head": N_KV_HEADS,
    "d_head": D_HEAD,
    "d_model": D_MODEL,
    "d_mlp": D_MLP,
}
EVERY = {name: site for name, site in vars(sites).items() if isinstance(site, HookSite) and site != sites.LOGITS}


@pytest.mark.parametrize("name", EVERY)
def test_the_axes_are_those_of_the_activation(name: str, tiny_llama: Any) -> None:
    site = EVERY[name]
    tokens = torch.arange(3, 3 + BATCH * POS).view(BATCH, POS)
    cache = tiny_llama.run_with_cache(tokens)[1]
    for layer in range(N_LAYERS):
        assert cache[site.at(layer)].shape == tuple(SIZES[axis] for axis in site.axes)


@pytest.mark.parametrize("name", EVERY)
def test_canonical_is_batch_position_unit(name: str) -> None:
    site = EVERY[name]
    act = torch.arange(torch.Size(SIZES[axis] for axis in site.axes).numel()).view([SIZES[axis] for axis in site.axes])
    canonical = site.to_canonical(act)
    unit = [] if site.unit_name is None else [SIZES[site.unit_name]]
    assert list(canonical.shape[: 2 + len(unit)]) == [BATCH, POS, *unit]
    assert torch.equal(site.from_canonical(canonical), act)


def test_a_pattern_is_edited_at_its_queries_by_head() -> None:
    act = torch.rand(BATCH, N_HEADS, POS, POS)
    assert torch.equal(sites.PATTERN.to_canonical(act)[1, 3, 2], act[1, 2, 3])
    assert sites.PATTERN.unit_name == sites.Z.unit_name == "head" and sites.K.unit_name == "kv_head"


def test_an_axis_that_is_no_unit_leaves_a_site_without() -> None:
    scale = HookSite("blocks.{layer}.ln1.hook_scale", ("batch", "pos", "one"))
    assert scale.unit_axis is None and scale.unit_name is None and scale.at(3) == "blocks.3.ln1.hook_scale"
    act = torch.rand(BATCH, POS, 1)
    assert torch.equal(scale.from_canonical(scale.to_canonical(act)), act)
