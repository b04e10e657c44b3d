"""Edits that stay with their tokens in their first block: the rest of the row comes in one block later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import readouts, sites
from sinklens.edits import Edit, EditSite
from sinklens.edits.base import ReadPlace
from sinklens.engine.packed import PackedJob, job
from sinklens.engine.packed.heads import ALONE
from sinklens.engine.run import run_patches
from sinklens.patches import Patch, Source
from sinklens.readouts.base import Readout
from sinklens.sites import HookSite
from tests.helpers.grids import LENGTH, RUNS, SHRINK, TRANSPLANT, N, kept_model, sites_of, tokens_for

LAYER = 1


class FromBefore(Edit):
    """Adds what MLP ``LAYER`` has written at the same token."""

    def reads_in(self, layer: int) -> tuple[ReadPlace, ...]:  # noqa: ARG002
        return (ReadPlace("before", sites.MLP_OUT, LAYER),)

    def __call__(self, x: Tensor, source: Tensor | None, at: EditSite) -> Tensor:  # noqa: ARG002
        return x + 3 * at.live["before"]


def _read(layers: tuple[int, ...], site: HookSite = sites.RESID_POST, position: int = LENGTH - 2) -> Readout:
    name = f"{site.template}/{layers}/{position}"
    return readouts.vector_readout(name, site, layers, (position,), N, lambda x, _: x.float().flatten(1).norm(dim=-1))


def _run(patches: list[Patch], wanted: list[Readout], monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple:
    """Results, and how many rows had a head; without heads where ``whole`` is asked for."""
    if options.pop("whole", False):
        monkeypatch.setattr(job, "head_ends", lambda _, n, length, __: lambda _: torch.full((n,), length).numpy())
    n_heads: list[int] = []
    forward = PackedJob.forward

    def spy(self: PackedJob, begin: int, end: int) -> None:
        n_heads.append(int((self.rows[begin:end].heads > 0).sum()))
        forward(self, begin, end)

    monkeypatch.setattr(PackedJob, "forward", spy)
    model = kept_model("llama")
    result = run_patches(model, tokens_for(model), patches, wanted, runs=RUNS, **options)
    monkeypatch.undo()
    assert result.stats.path == "packed"
    return result, sum(n_heads)


@pytest.mark.slow
@pytest.mark.parametrize("max_rows", [3, 64])
def test_rows_with_heads_give_what_whole_rows_give(max_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ((LAYER, 2), (LAYER, LENGTH // 2), (0, 3))
    patches = [
        Patch(site, (layer,), (position,), SHRINK, run=run)
        for run in RUNS
        for site in sites_of(kept_model("llama"))
        for layer, position in places
    ]
    # Several blocks, several positions, several parts, a source.
    patches += [
        Patch(sites.Z, (0, 1, 2), (3,), SHRINK),
        Patch(sites.MLP_OUT, (0,), (2, 4), SHRINK),
        replace(Patch(sites.MLP_OUT, (0,), (4,), SHRINK), also=(Patch(sites.RESID_PRE, (2,), (2,), SHRINK),)),
        Patch(sites.ATTN_OUT, (1,), (2,), TRANSPLANT, source=Source(list(RUNS)[-1])),
    ]
    wanted = [
        _read((2, 3)),
        _read((LAYER,), sites.MLP_OUT, 2),
        readouts.attention_received("received", (2, 3), (2,), N),
    ]
    found, with_heads = _run(patches, wanted, monkeypatch, max_rows=max_rows)
    expected, without = _run(patches, wanted, monkeypatch, max_rows=max_rows, whole=True)
    assert with_heads > 100 and without == 0
    for name, values in expected.values.items():
        assert torch.allclose(found.values[name], values, rtol=1e-5, atol=1e-6), name


def _n_heads(patch: Patch, wanted: list[Readout], monkeypatch: pytest.MonkeyPatch) -> int:
    return _run([patch], wanted, monkeypatch)[1]


@pytest.mark.slow
def test_only_what_reaches_no_other_token_has_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    late = [_read((3,))]
    for site in sites_of(kept_model("llama")):
        assert _n_heads(Patch(site, (LAYER,), (2,), SHRINK), late, monkeypatch) == (N if site.template in ALONE else 0)


def test_a_block_that_is_read_behind_the_head_is_computed_for_the_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = Patch(sites.MLP_OUT, (LAYER,), (2,), SHRINK)
    assert _n_heads(patch, [_read((LAYER, 3))], monkeypatch) == 0
    assert _n_heads(patch, [_read((LAYER,), position=2)], monkeypatch) == 0  # there is no next block
    assert _n_heads(patch, [_read((LAYER, 3), position=2)], monkeypatch) == 0  # and here no longer row
    assert _n_heads(patch, [_read((LAYER,), position=2), _read((3,))], monkeypatch) == N
    whole = Readout("whole", sites.RESID_POST, (LAYER,), lambda x, _: x.float().mean((1, 2)))
    assert _n_heads(patch, [whole, _read((3,))], monkeypatch) == 0


def test_an_edit_that_reads_an_earlier_block_sees_what_was_edited_there(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Patch(sites.MLP_OUT, (LAYER,), (2,), SHRINK), Patch(sites.MLP_OUT, (2,), (2,), FromBefore("before"))
    both = replace(first, also=(second,))
    found, with_heads = _run([both], [_read((3,))], monkeypatch)
    expected, _ = _run([both], [_read((3,))], monkeypatch, whole=True)
    assert with_heads == 0 and torch.allclose(found.values[_read((3,)).name], expected.values[_read((3,)).name])
