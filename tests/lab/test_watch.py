"""Measures are those of the metrics, of patterns that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinklens.lab import BigramBackcopy, measured
from sinklens.lab.watch import held_out_loss, watch_steps
from sinklens.models.decoder import Decoder, DecoderConfig


def values(model, rows):
    found = measured(model, rows)
    return {(one.measure, one.layer, one.position): one.value for one in found}


@pytest.fixture(scope="module")
def rows():
    return torch.from_numpy(BigramBackcopy(24).held_out(6))


def model(variant="softmax", **options):
    cfg = DecoderConfig(
        d_model=16, n_layers=2, n_heads=2, d_head=8, d_mlp=32, d_vocab=28, n_ctx=24, variant=variant, **options
    )
    return Decoder(cfg, seed=1).eval()


def test_steps_are_closer_together_at_the_beginning():
    steps = watch_steps(1000, 20)
    assert (steps[0], steps[-1]) == (0, 1000)
    assert steps[1:4] == (1, 2, 3)
    assert all(np.diff(steps)[i] <= np.diff(steps)[i + 1] + 1 for i in range(len(steps) - 2))


def test_uniform_attention_is_measured_exactly(rows):
    flat = model()
    for block in flat.blocks:
        block.attn.W_Q.data.zero_()
    seen, length = values(flat, rows), 24
    received = np.mean([1 / (i + 1) for i in range(1, length)])
    assert seen["share", 0, 0] == pytest.approx(received, rel=1e-5)
    assert seen["alpha", 0, 0] == pytest.approx(np.mean([1 / (i + 1) for i in range(length)]), rel=1e-5)
    assert seen["entropy", 1, None] == pytest.approx(np.mean([np.log(i + 1) for i in range(1, length)]), rel=1e-5)
    assert seen["missing_mass", 0, None] == pytest.approx(0, abs=1e-6)
    assert seen["sink_rate", None, 0] == 0
    assert seen["highest", None, None] == 0
    assert seen["z_variance", 0, 0] == pytest.approx(0, abs=1e-12)  # BOS in every row


def test_a_sink_is_seen_and_a_neuron_with_it(rows):
    """One head looks at the first token alone, and one neuron fires for it."""
    sunk = model()
    first = sunk.embed.W_E.data[0]
    first.zero_()[0] = 5.0
    sunk.embed.W_E.data[1:, 0] = 0
    for kind in ("W_Q", "W_K", "W_V"):
        getattr(sunk.blocks[0].attn, kind).data.zero_()
    sunk.blocks[0].attn.W_O.data.zero_()
    sunk.blocks[0].mlp.W_in.data.zero_()[0, 3] = 2.0
    sunk.blocks[0].mlp.W_gate.data.zero_()[0, 3] = 2.0
    sunk.blocks[0].mlp.W_out.data.zero_()
    seen = values(sunk, rows)
    assert seen["super_neuron", 0, 0] > 30
    assert seen["super_neuron_others", 0, 0] == pytest.approx(0, abs=1e-6)
    assert seen["dominance", 0, 0] == pytest.approx(16, rel=1e-4)
    assert seen["norm", 0, 0] == pytest.approx(5, rel=1e-5)


def test_rows_that_do_not_sum_to_one_are_shares_of_their_sums(rows):
    half = model("sigmoid")
    for block in half.blocks:
        block.attn.W_Q.data.zero_()
    seen = values(half, rows)
    assert seen["missing_mass", 0, None] == pytest.approx(1 - np.mean([(i + 1) / 2 for i in range(24)]), rel=1e-4)
    assert seen["share", 0, 0] == pytest.approx(np.mean([1 / (i + 1) for i in range(1, 24)]), rel=1e-5)


def test_the_held_out_loss_does_not_depend_on_how_many_at_once(rows):
    one = model()
    got = [held_out_loss(one, rows, at_once) for at_once in (1, 4, 6)]
    assert got == pytest.approx([float(one(rows, return_type="loss").detach())] * 3, rel=1e-5)


def test_no_measure_is_missing_and_none_is_there_twice(rows):
    found = measured(model(), rows)
    keys = [(one.measure, one.layer, one.position) for one in found]
    assert len(keys) == len(set(keys))
    assert all(np.isfinite(one.value) for one in found)
