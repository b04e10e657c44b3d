"""Sink pairs: what is refused, what the defaults are, and that the runs are the interventions that they are called."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from sinklens import edits, interventions
from sinklens.engine.capture import capture_runs
from sinklens.engine.store import Want
from sinklens.errors import InputError
from sinklens.formation import Formation, FormationEvent
from sinklens.models.families import D_HEAD, N_HEADS
from sinklens.pairs.pair import SinkPair, induced_pair, natural_pair
from sinklens.patches import Positions, Source
from sinklens.prompts import PromptBatch, from_tokens
from sinklens.sites import ATTN_OUT, PATTERN, Z
from tests.helpers.one_at_a_time import cache_of
from tests.helpers.tiny import tiny_tokens

N, LENGTH, TARGET = 3, 12, 4


def event(layer: int) -> FormationEvent:
    return FormationEvent(layer, *[1.0] * 6)


FORMATION = Formation(2, (0, 2, 1), (), (), (event(1), event(2)))


@pytest.fixture(scope="module")
def batch(tiny_llama: Any) -> PromptBatch:
    return from_tokens(tiny_llama, tiny_tokens(N, LENGTH))


def pair_at(
    model: Any, batch: PromptBatch, target: int = TARGET, formation: Formation = FORMATION, **given: Any
) -> SinkPair:
    return induced_pair(model, batch, formation, target, **given)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (0, "target 0 has no earlier tokens"),
        (-1, "must be in 1..10"),
        (LENGTH - 1, "must be in 1..10"),
        (LENGTH, "must be in 1..10"),
        (100, "must be in 1..10"),
        (2, "target 2 is already the sink of a prompt"),
    ],
)
@pytest.mark.parametrize("kind", ["block_aggregation", "amplify_variance"])
def test_targets_that_cannot_be_a_sink_are_refused(tiny_llama, batch, kind, target, message):
    with pytest.raises(InputError, match=message):
        pair_at(tiny_llama, batch, target, kind=kind)


def test_targets_at_the_ends_are_allowed(tiny_llama, batch):
    clear = replace(FORMATION, sink_positions=(0, 0, 0))
    for target in (1, LENGTH - 2):
        assert pair_at(tiny_llama, batch, target, clear).target == Positions.of((target,))


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (3,), (-1, 0), ()])
def test_blocks_outside_of_those_up_to_formation_are_refused(tiny_llama, batch, layers):
    with pytest.raises(InputError, match=r"must be within 0\.\.2"):
        pair_at(tiny_llama, batch, layers=layers)


def test_amplification_needs_two_prompts(tiny_llama, batch):
    with pytest.raises(InputError, match="at least 2, there is 1"):
        pair_at(
            tiny_llama, batch.subset([0]), kind="amplify_variance", formation=replace(FORMATION, sink_positions=(0,))
        )


def test_an_unknown_kind_is_refused(tiny_llama, batch):
    with pytest.raises(InputError, match="unknown pair 'nothing'"):
        pair_at(tiny_llama, batch, kind="nothing")


@pytest.mark.parametrize(
    ("kind", "layer", "events", "expected"),
    [
        ("block_aggregation", 2, (1, 2), (0, 1, 2)),
        ("block_aggregation", 2, (), (0, 1, 2)),
        ("block_aggregation", 0, (1, 2), (0,)),
        # Up to the first event, which may be earlier than the one to explain, or later when the user has chosen.
        ("amplify_variance", 2, (1, 2), (0, 1, 2)),  # a jump over two blocks in a row
        ("amplify_variance", 2, (0, 2), (0,)),
        ("amplify_variance", 2, (2,), (0, 1, 2)),
        ("amplify_variance", 2, (), (0, 1, 2)),
        ("amplify_variance", 0, (1, 2), (0,)),
    ],
)
def test_default_blocks(tiny_llama, batch, kind, layer, events, expected):
    formation = Formation(layer, (0, 2, 1), (), (), tuple(event(i) for i in events))
    (root,) = pair_at(tiny_llama, batch, formation=formation, kind=kind).runs["anchored"]
    assert root.layers == expected


@pytest.mark.parametrize("kind", ["block_aggregation", "amplify_variance"])
def test_blocks_can_be_chosen(tiny_llama, batch, kind):
    (root,) = pair_at(tiny_llama, batch, kind=kind, layers=(0, 2)).runs["anchored"]
    assert root.layers == (0, 2)


def test_an_induced_pair_is_run_both_ways(tiny_llama, batch):
    pair = pair_at(tiny_llama, batch)
    assert pair.kind == "block_aggregation"
    assert pair.target == Positions.of((TARGET,))
    assert pair.runs["base"] == ()
    assert pair.directions == ("denoise", "noise")
    assert pair.ends("denoise") == ("base", Source("anchored"))
    assert pair.ends("noise") == ("anchored", Source("base"))


def attention_out(model: Any, batch: PromptBatch, pair: SinkPair, run: str) -> torch.Tensor:
    """Attention output of the last block up to formation, in a run of the pair."""
    store = capture_runs(model, batch.tokens, pair.runs, [Want(run, ATTN_OUT, 2)], max_rows=2)
    return store.tensor(run, ATTN_OUT, 2)


def test_the_anchored_run_is_block_aggregation(tiny_llama, batch):
    pair = pair_at(tiny_llama, batch)
    (root,) = pair.runs["anchored"]
    assert root.site == PATTERN
    for run, hooks in (("base", []), ("anchored", interventions.block_aggregation(TARGET, range(3)))):
        expected = cache_of(tiny_llama, batch.tokens, hooks, {ATTN_OUT.at(2)})[ATTN_OUT.at(2)]
        torch.testing.assert_close(attention_out(tiny_llama, batch, pair, run), expected, atol=1e-5, rtol=1e-5)


def test_the_anchored_run_is_variance_amplification(tiny_llama, batch):
    """Around the mean of the *base* run, whatever the number of rows that fit in one forward pass."""
    names = {Z.at(layer) for layer in (0, 1)}
    clean = cache_of(tiny_llama, batch.tokens, [], names)
    mean = {layer: clean[Z.at(layer)][:, TARGET].mean(0) for layer in (0, 1)}
    hooks = interventions.amplify_variance(TARGET, (0, 1), 5.0, mean)
    expected = cache_of(tiny_llama, batch.tokens, hooks, {ATTN_OUT.at(2)})[ATTN_OUT.at(2)]
    for rows in (1, 2, 64):
        pair = pair_at(tiny_llama, batch, kind="amplify_variance", layers=(0, 1), strength=5.0, max_rows=rows)
        (root,) = pair.runs["anchored"]
        assert root.site == Z and isinstance(root.edit, edits.Rescale)
        assert root.edit.mean[0].shape == (N_HEADS, D_HEAD)
        found = attention_out(tiny_llama, batch, pair, "anchored")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - attention_out(tiny_llama, batch, pair, "base")).abs().max() > 1e-3


@pytest.mark.parametrize(("axis", "over"), [("prompts", (0,)), ("positions", (1,)), ("global", (0, 1))])
def test_the_mean_that_amplification_leaves_in_place(tiny_llama, batch, axis, over):
    """Of the base run, also in the second block; over prompts at the target alone."""
    names = {Z.at(layer) for layer in (0, 1)}
    clean = cache_of(tiny_llama, batch.tokens, [], names)
    for rows in (1, 64):
        pair = pair_at(tiny_llama, batch, kind="amplify_variance", layers=(0, 1), axis=axis, max_rows=rows)
        (root,) = pair.runs["anchored"]
        assert isinstance(root.edit, edits.Rescale)
        for layer in (0, 1):
            z = clean[Z.at(layer)][:, [TARGET]] if axis == "prompts" else clean[Z.at(layer)]
            expected = z.mean(over, keepdim=True).squeeze(1)
            mean = root.edit.mean[layer]
            torch.testing.assert_close(mean.expand_as(expected), expected)
            assert mean.shape[:-2] == ((N,) if axis == "positions" else ())
    with pytest.raises(InputError, match="at least 2") if axis == "prompts" else nullcontext():
        one = replace(FORMATION, sink_positions=(0,))
        pair_at(tiny_llama, batch.subset([0]), kind="amplify_variance", axis=axis, formation=one)


@pytest.mark.parametrize("kind", ["block_aggregation", "amplify_variance"])
def test_root_patches_have_ids(tiny_llama, batch, kind):
    """Equal for the same pair, different for another target."""
    ids = [pair_at(tiny_llama, batch, target, kind=kind).runs["anchored"][0].id for target in (TARGET, TARGET, 5)]
    assert ids[0] == ids[1] != ids[2]


def test_ordinary_positions_of_an_induced_pair(tiny_llama, batch):
    """Neither sink, nor target, nor the last quarter, which too few later queries see."""
    pair = pair_at(tiny_llama, batch)
    expected = [
        [0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0],
    ]
    assert pair.ordinary.tolist() == expected


def test_a_natural_pair_with_different_sinks(batch):
    pair = natural_pair(batch, FORMATION, seed=0)
    assert pair.kind == "natural"
    assert pair.target == Positions.of(((0,), (2,), (1,)))
    assert pair.runs == {"natural": ()}
    assert pair.directions == ("noise",)
    assert pair.ends("noise") == ("natural", Source("natural", pair.reference))
    expected = [
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    ]
    assert pair.ordinary.tolist() == expected


def drawn_by(batch: PromptBatch, seed: int) -> list[int]:
    reference = natural_pair(batch, FORMATION, seed).reference
    chosen = [reference.at(prompt) for prompt in range(N)]
    assert all(len(item) == 1 for item in chosen)
    return [item[0] for item in chosen]


def test_the_reference_is_ordinary_and_from_the_middle(tiny_llama, batch):
    """Over many seeds every ordinary position of the two middle quarters is drawn, and nothing else."""
    draws = torch.tensor([drawn_by(batch, seed) for seed in range(200)])
    assert [sorted(set(column.tolist())) for column in draws.T] == [[3, 4, 5, 6, 7, 8]] * 3
    for seed in range(50):
        reference = pair_at(tiny_llama, batch, seed=seed).reference
        assert all(position in {3, 5, 6, 7, 8} for (position,) in reference.rows)


def test_the_reference_is_drawn_by_the_seed(tiny_llama, batch):
    state = torch.get_rng_state()
    assert drawn_by(batch, 3) == drawn_by(batch, 3)
    assert len({tuple(drawn_by(batch, seed)) for seed in range(10)}) > 5
    references = [pair_at(tiny_llama, batch, seed=seed).reference for seed in (3, 3, 4)]
    assert references[0] == references[1] != references[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_reference_comes_from_outside_the_middle_when_it_must(tiny_llama):
    """Of four positions 3 is last, 1 a sink, 2 the target: 0 is left."""
    batch = from_tokens(tiny_llama, tiny_tokens(1, 4))
    pair = pair_at(tiny_llama, batch, 2, replace(FORMATION, sink_positions=(1,)))
    assert pair.ordinary.tolist() == [[1, 0, 0, 0]]
    assert pair.reference == Positions.of(((0,),))


def test_prompts_without_an_ordinary_position_are_refused(tiny_llama):
    first = replace(FORMATION, sink_positions=(0,))
    with pytest.raises(InputError, match="3 tokens have no ordinary position"):
        pair_at(tiny_llama, from_tokens(tiny_llama, tiny_tokens(1, 3)), 1, first)
    with pytest.raises(InputError, match="2 tokens have no ordinary position"):
        natural_pair(from_tokens(tiny_llama, tiny_tokens(1, 2)), first)
