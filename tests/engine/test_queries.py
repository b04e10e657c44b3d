"""Attention of some queries at a time: the same numbers, and never a pattern of whole prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sinklens import edits, readouts, sites
from sinklens.engine.packed.layout import Layout
from sinklens.engine.packed.queries import pieces
from sinklens.engine.run import PatchRunner
from sinklens.models.view import is_bridge
from sinklens.patches import Patch, Source
from sinklens.readouts.base import Readout
from sinklens.sites import HookSite
from tests.helpers.grids import LENGTH, RUNS, N, grids, kept_model, patch_of
from tests.helpers.one_at_a_time import OneAtATime
from tests.helpers.tiny import slow_but, tiny_model, tiny_tokens

SCORES = HookSite("blocks.{layer}.attn.hook_attn_scores", sites.PATTERN.axes)
FAMILIES = ("llama", "gpt2", "mistral", "gemma2", "gptj", "gpt_oss")


def over_queries() -> list[Readout]:
    """Readouts of the pattern that are sums over queries: of many, of one, of none in some prompts; of scores, too."""
    some = torch.zeros(N, LENGTH)
    some[0, 4], some[1, -1], some[1, 2] = 1.0, 0.5, -2.0

    def strongest(act: Tensor, _tokens: object) -> Tensor:
        return act.float().amax((1, 2))

    def finite(act: Tensor, _tokens: object) -> Tensor:
        return act.float().clamp(min=-50).sum((1, 2)) / 100

    return [
        readouts.attention_received("received", (0, 1, 3), ((0,), (2,), (1,)), N),
        readouts.over_positions("strongest", sites.PATTERN, (2, 3), strongest, lambda _: some),
        readouts.over_positions("scores", SCORES, (1,), finite, lambda _: some),
        readouts.vector_readout("norm", sites.RESID_POST, (3,), ((4,), (8,), (5,)), N, lambda x, _: x.norm(dim=-1)),
    ]


def is_writable(patch: Patch) -> bool:
    """Whether a bridge goes on with what is written there; there may be no neurons to write to."""
    return patch.site != sites.RESID_MID and ".mlp." not in patch.site.template


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_but("llama", "gpt2", of=FAMILIES))
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)
@given(drawn=grids(), max_rows=st.sampled_from((1, 4, 64)), at_once=st.sampled_from((1, 3, 7, 40)))
def test_pieces_are_one_patch_at_a_time(family: str, drawn: list[tuple], max_rows: int, at_once: int) -> None:
    model = kept_model(family, "bridge" if family == "gpt_oss" else "auto")
    tokens, wanted = torch.randint(3, 99, (N, LENGTH), generator=torch.Generator().manual_seed(1)), over_queries()
    drawn_patches = (patch_of(model, item) for item in drawn)
    patches = [patch for patch in drawn_patches if not is_bridge(model) or is_writable(patch)]
    patches.append(Patch(sites.PATTERN, (1, 2), (3,), edits.AttendSelf(), source=None))
    runner = PatchRunner(model, tokens, wanted, runs=RUNS, max_rows=max_rows, once=True)
    runner.pattern_bytes = at_once * 4 * 4 * int(model.cfg.n_heads) * LENGTH
    result = runner.run(patches)
    assert result.stats.path == "packed", result.stats.reason
    slow = OneAtATime(model, tokens, wanted, RUNS)
    for index, patch in enumerate(patches):
        for prompt in range(N):
            for readout, expected in zip(wanted, slow(patch, prompt), strict=True):
                found = float(result.values[readout.name][index, prompt])
                assert found == pytest.approx(expected, abs=1e-5, rel=2e-5), (readout.name, patch.describe(), prompt)


@pytest.mark.slow
@settings(deadline=None)
@given(
    starts=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    kept=st.integers(0, 2**31),
    at_most=st.integers(1, 9),
)
def test_pieces_hold_every_query_once_in_its_row(starts: list[int], kept: int, at_most: int) -> None:
    zeros = np.zeros(len(starts), dtype=np.int64)
    begin = np.array(starts)
    layout = Layout(
        prompts=zeros,
        contexts=zeros,
        starts=begin,
        stops=zeros + 7,
        entries=zeros,
        length=7,
        device=torch.device("cpu"),
    )
    total = int(layout.offsets[-1])
    chosen = torch.rand(total, generator=torch.Generator().manual_seed(kept)) < 0.6
    tokens = chosen.nonzero().flatten()
    found = pieces(tokens, layout, at_most)
    assert torch.equal(torch.cat([piece.tokens for piece in found] or [tokens]), tokens)
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True] * bool(found)
    for piece in found:
        assert len(piece.tokens) <= at_most and piece.whole == (len(found) == 1)
        values = torch.rand(len(piece.tokens), 2)
        assert torch.equal(piece.packed(piece.padded(values)), values)
        rows = torch.arange(piece.rows.start, piece.rows.stop)[piece.slot // piece.width]
        assert torch.equal(rows, layout.row[piece.tokens])


class Largest(TorchDispatchMode):
    """The most entries that any tensor has which is made meanwhile."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.entries = max(self.entries, each.untyped_storage().nbytes() // each.element_size())
        return out


@pytest.mark.slow
def test_a_sweep_of_long_prompts_has_no_pattern_of_whole_prompts() -> None:
    length = 2048
    model: Any = tiny_model("llama", max_position_embeddings=length)
    tokens = tiny_tokens(1, length)
    source = Source("other")
    roots = (Patch(sites.PATTERN, (0, 1), (9,), edits.AttendSelf(), run="other"),)
    patches = [Patch(sites.RESID_PRE, (layer,), (9,), edits.Transplant(), source=source) for layer in (1, 2)]
    patches.append(Patch(sites.PATTERN, (1,), (9,), edits.AttendSelf()))
    wanted = [readouts.attention_received("received", (2, 3), (9,), 1)]
    budget = 1 << 25
    runner = PatchRunner(model, tokens, wanted, runs={"base": (), "other": roots}, memory_budget=budget)
    first = runner.run(patches)  # which captures the runs, with TransformerLens's own forward pass
    largest = Largest()
    with largest:
        found = runner.run(patches)
    assert found.stats.path == "packed" and torch.equal(found.values["received"], first.values["received"])
    heads = int(model.cfg.n_heads)
    # The most is an activation of one row, and a quarter of the budget for scores and pattern.
    assert largest.entries * 4 <= budget // 4 < heads * length * length * 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "bridge"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gptj"])
def test_without_a_look_at_a_pattern_none_is_computed(family: str, backend: str, monkeypatch) -> None:
    model = kept_model(family, backend)
    patches = [Patch(sites.RESID_PRE, (1,), (position,), edits.Constant()) for position in (2, 4)]
    wanted = [
        readouts.vector_readout("norm", sites.RESID_POST, (3,), ((4,), (8,), (5,)), N, lambda x, _: x.norm(dim=-1))
    ]
    runner = PatchRunner(model, torch.randint(3, 99, (N, LENGTH)), wanted)
    runner.run(patches)  # which proves the packed pass, and looks at everything

    def explicit(*_: object) -> None:
        raise AssertionError("a pattern that nobody looks at")

    monkeypatch.setattr("sinklens.engine.packed.blocks.PackedPass._explicit", explicit)
    assert runner.run(patches).stats.path == "packed"
