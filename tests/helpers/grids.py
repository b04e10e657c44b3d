"""Random grids of patches at every site that the packed pass has, and readouts of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sinklens import edits, readouts, sites
from sinklens.engine.packed.points import SITES
from sinklens.patches import Patch, Source
from sinklens.readouts.base import Readout
from sinklens.sites import HookSite
from tests.helpers.tiny import tiny_model

N, LENGTH = 3, 10
AXES = {"attn.hook_q": "head", "attn.hook_z": "head", "attn.hook_rot_q": "head"}


_models: dict[str, Any] = {}


def kept_model(family: str, backend: Any = "auto", **options: Any) -> Any:
    """A tiny model that is made once: hypothesis asks for it again and again."""
    key = f"{family} {backend} {options}"
    if key not in _models:
        _models[key] = tiny_model(family, backend, **options)
    return _models[key]


def tokens_for(model: Any, n: int = N) -> Tensor:
    return torch.randint(3, model.cfg.d_vocab, (n, LENGTH), generator=torch.Generator().manual_seed(1))


def site_of(template: str) -> HookSite:
    name = template.removeprefix("blocks.{layer}.")
    if name in ("attn.hook_attn_scores", "attn.hook_pattern"):
        return HookSite(template, ("batch", "head", "query", "key"))
    if name.startswith("attn."):
        return HookSite(template, ("batch", "pos", AXES.get(name, "kv_head"), "d_head"))
    return HookSite(template, ("batch", "pos", "d_mlp" if name.startswith("mlp.") else "d_model"))


def sites_of(model: Any) -> list[HookSite]:
    return [site_of(template) for template in SITES if template.format(layer=0) in model.hook_dict]


class Shrink(edits.Edit):
    """An edit without a source that keeps attention scores finite or masked."""

    def __call__(self, x: Tensor, source: Tensor | None, at: edits.EditSite) -> Tensor:  # noqa: ARG002
        return torch.where(x.isfinite(), 0.5 * x + 0.01, x)


SHRINK, TRANSPLANT = Shrink("shrink"), edits.Transplant()
# The runs differ in every position, so that a transplant changes something everywhere.
RUNS = {"base": (), "other": (Patch(sites.RESID_PRE, (0,), tuple(range(LENGTH)), SHRINK, run="other"),)}


def measured(model: Any) -> list[Readout]:
    """Readouts over positions and over whole activations, in depth and in width, with the logits."""
    n_layers = model.cfg.n_layers
    at_end = torch.zeros(N, LENGTH)
    at_end[:, -1], at_end[:, 3] = 0.5, 2.0
    return [
        readouts.attention_received("received", (1, n_layers - 1), ((0,), (2,), (1,)), N),
        readouts.vector_readout("norm", sites.RESID_POST, (2,), ((4,), (8,), (5,)), N, lambda x, _: x.norm(dim=-1)),
        readouts.over_positions("value", sites.V, (1, 2), lambda x, _: x.flatten(1).sum(-1), lambda _: at_end),
        readouts.over_positions("logit", sites.LOGITS, (n_layers,), lambda x, _: x[:, 5].float(), lambda _: at_end),
        Readout("whole pattern", sites.PATTERN, (2,), lambda act, _: act.float().pow(2).sum((1, 2, 3))),
        Readout("whole logits", sites.LOGITS, (n_layers,), lambda act, rows: act.float().std((1, 2)) + rows.prompts),
    ]


@st.composite
def grids(draw: st.DrawFn) -> list[tuple]:
    layer = st.integers(0, 3)
    one = st.tuples(
        st.integers(0, 99),  # site
        st.lists(layer, min_size=1, max_size=2, unique=True).map(lambda x: tuple(sorted(x))),
        st.one_of(
            st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=2, unique=True).map(tuple),
            st.tuples(*[st.tuples(st.integers(0, LENGTH - 1))] * N),
        ),
        st.booleans(),  # a transplant, or not
        st.sampled_from(("base", "other")),
        st.one_of(st.none(), st.just((1,)), st.just((0, 2))),  # units
    )
    return draw(st.lists(one, min_size=1, max_size=5))


def patch_of(model: Any, drawn: tuple, choice: Sequence[HookSite] = ()) -> Patch:
    """A patch at one of the sites of ``choice``, by default at one of all."""
    index, layers, positions, transplant, run, units = drawn
    choice = choice or sites_of(model)
    site = choice[index % len(choice)]
    if site.unit_name == "kv_head" and units is not None:
        units = (0,)
    on_attention = "key" in site.axes
    source = Source("other" if run == "base" else "base") if transplant and not on_attention else None
    edit = TRANSPLANT if source else SHRINK
    return Patch(site, layers, positions, edit, units=units, run=run, source=source, allow_unchanged=True)
