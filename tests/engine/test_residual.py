"""Edits of the residual stream before the MLP where the model's own hook point there reaches only the MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sinklens import edits
from sinklens.engine.residual import AsAttention, as_written
from sinklens.engine.run import run_patches
from sinklens.errors import InputError, NotApplicableError
from sinklens.patches import CLEAN, Patch, Source
from sinklens.readouts.base import Readout
from sinklens.sites import ATTN_OUT, LOGITS, MLP_OUT, RESID_MID, RESID_POST, RESID_PRE, HookSite
from tests.helpers.one_at_a_time import cache_of
from tests.helpers.tiny import tiny_model, tiny_tokens

N, LENGTH, AT, BLOCK = 3, 12, 5, 1


def patch(edit: edits.Edit, **changes: Any) -> Patch:
    return replace(Patch(RESID_MID, (BLOCK,), (AT,), edit, source=Source("base", (2,))), **changes)


def total(site: HookSite, layer: int = BLOCK) -> Readout:
    return Readout(site.template + str(layer), site, (layer,), lambda act, rows: act.float().pow(2).flatten(1).sum(-1))  # noqa: ARG005


def width(model: Any) -> int:
    return int(model.cfg.d_model)


def made(model: Any) -> list[Patch]:
    basis = torch.linalg.qr(torch.randn(width(model), 4, generator=torch.Generator().manual_seed(0))).Q
    writers = ((ATTN_OUT, 0), (MLP_OUT, 0), (ATTN_OUT, BLOCK))
    own = edits.WrittenBy("own", basis, writers)
    return [
        patch(edits.Transplant()),
        patch(edits.Subspace("subspace", basis)),
        patch(own),
        patch(edits.Transplant(), units=(1, 5, 7)),
        patch(edits.Constant(), source=None),
        patch(edits.OfSource(edit=edits.Constant(), background=(0, 1))),
        patch(edits.Transplant(), layers=(0, BLOCK)),
        patch(edits.Transplant(), also=(patch(edits.Transplant(), site=MLP_OUT, layers=(0,)),)),
    ]


@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_patches_of_a_bridge_are_those_by_hand(family: str) -> None:
    """By hand, with hooks of attention's output and what enters the block alone."""
    model: Any = tiny_model(family, "bridge")
    tokens = tiny_tokens(N, LENGTH)
    enters, writes = (site.at(BLOCK) for site in (RESID_PRE, ATTN_OUT))
    clean = cache_of(model, tokens, [], {enters, writes})
    middle = clean[enters] + clean[writes]

    def write(act: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
        new = act.clone()
        new[:, AT] = middle[:, 2] - clean[enters][:, AT]
        return new

    with torch.no_grad(), model.hooks(fwd_hooks=[(writes, write)]):
        expected = model(tokens).float().pow(2).flatten(1).sum(-1)
    found = run_patches(model, tokens, made(model)[:1], [total(LOGITS, int(model.cfg.n_layers))])
    torch.testing.assert_close(next(iter(found.values.values()))[0].float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bridge_gives_what_a_hooked_transformer_gives(family: str) -> None:
    pytest.importorskip("transformer_lens.HookedTransformer")
    tokens = tiny_tokens(N, LENGTH)
    values = []
    for backend in ("hooked", "bridge"):
        model: Any = tiny_model(family, backend)
        # LayerNorms are centred in a HookedTransformer only: what enters a norm is the same, the sums are not.
        readouts = [total(RESID_POST), total(RESID_MID)] if family == "llama" else [total(LOGITS, model.cfg.n_layers)]
        values.append(run_patches(model, tokens, made(model)[: 8 if family == "llama" else 1], readouts).values)
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.backend
def test_what_else_happens_at_attentions_output_is_not_mixed_up() -> None:
    """There the patch would be another one: it stays refused."""
    model: Any = tiny_model("llama", "bridge")
    tokens, one = tiny_tokens(N, LENGTH), patch(edits.Transplant())
    other = replace(one, site=ATTN_OUT)
    refused = pytest.raises(NotApplicableError, match="hook_resid_mid reaches only a part")
    with refused:
        run_patches(model, tokens, [one], [total(ATTN_OUT)])
    with refused:
        run_patches(model, tokens, [replace(one, also=(other,))], [total(RESID_POST)])
    with refused:
        run_patches(
            model,
            tokens,
            [one],
            [total(RESID_POST)],
            runs={"base": (replace(other, source=None, edit=edits.Constant()),)},
        )
    assert run_patches(model, tokens, [one, other], [total(RESID_POST)]).values, "two patches are two rows"


@pytest.mark.slow
@pytest.mark.backend
def test_only_what_must_be_is_written_otherwise() -> None:
    hooked, bridge = (tiny_model("llama", backend) for backend in ("auto", "bridge"))
    (moved,) = as_written(bridge, [patch(edits.Transplant())], (), CLEAN)
    assert moved.site == ATTN_OUT and isinstance(moved.edit, AsAttention) and moved.edit.name == "transplant"
    assert "hook_resid_mid" in moved.describe()
    if not hasattr(hooked, "original_model"):
        (kept,) = as_written(hooked, [patch(edits.Transplant())], (), CLEAN)
        assert kept.site == RESID_MID
    with pytest.raises(InputError, match=r"needs values \[d_model=32\], but got \(7,\)"):
        wrong = patch(edits.Constant("mine", {BLOCK: torch.zeros(7)}), source=None)
        run_patches(bridge, tiny_tokens(N, LENGTH), [wrong], [total(RESID_POST)])
    far = patch(edits.Transplant(), layers=(99,))
    assert as_written(bridge, [far], (), CLEAN)[0].site == RESID_MID
    with pytest.raises(InputError, match=r"blocks \(99,\) are not all"):
        run_patches(bridge, tiny_tokens(N, LENGTH), [far], [total(RESID_POST)])
