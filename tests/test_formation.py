"""Where the sink forms: on a planted model by hand, what is refused, and as JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pandas.testing import assert_frame_equal

from sinklens.errors import InputError
from sinklens.formation import find_formation, formation_from_json, formation_to_json
from sinklens.prompts import from_tokens
from sinklens.records.plain import to_plain
from tests.helpers.planted import OUTLIER, SUPER, planted_model, prompts
from tests.helpers.settings import tokens_for
from tests.helpers.synthetic import synthetic_result
from tests.helpers.tiny import tiny_model, tiny_tokens

LENGTH = 16


def test_formation_is_found():
    """In prompts with a sink of their own: block 0, the planted neuron, the planted dimension, and nothing else."""
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = planted_model()
    batch = from_tokens(model, prompts(LENGTH)[1:].repeat(3, 1))
    found = find_formation(model, batch)
    assert found.layer == 0
    assert found.sink_positions == (0, 0, 0)
    assert found.neurons == (SUPER,)
    assert found.dims == (OUTLIER,)
    # 10 (1 - 1/2) / rms for the gate, 10 / rms for the linear branch, rms^2 = (1 + 1 + 1) / 8.
    assert found.super_neurons[0].activation_sink == pytest.approx(10 * 0.5 * 10 / (3 / 8), rel=1e-5)
    assert found.outlier_dims[0].written == pytest.approx(100 * 10 * 0.5 * 10 / (3 / 8), rel=1e-5)


@pytest.mark.backend
def test_outlier_dimensions_behind_a_norm_are_those_that_the_mlp_adds_to():
    model = tiny_model("gemma2", "bridge")
    batch = from_tokens(model, tokens_for(model))
    found = find_formation(model, batch, layer=1, super_neurons=[3, 7])
    _, cache = model.run_with_cache(batch.tokens)
    sinks = torch.tensor(found.sink_positions)
    added = cache["blocks.1.hook_mlp_out"][torch.arange(batch.n), sinks].mean(0)
    assert found.dims[0] == int(added.abs().argmax())
    assert found.outlier_dims[0].written == pytest.approx(float(added[found.dims[0]]), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": 4}, r"block \[4\] is not in 0\.\.3"),
        ({"layer": 1, "super_neurons": [3, 48]}, r"neuron \[3, 48\] is not in 0\.\.47"),
        ({"layer": 1, "super_neurons": [3], "outlier_dims": [-1]}, r"dimension \[-1\] is not in 0\.\.31"),
    ],
)
def test_blocks_neurons_and_dimensions_that_do_not_exist_are_refused(tiny_llama, given, message):
    with pytest.raises(InputError, match=message):
        find_formation(tiny_llama, from_tokens(tiny_llama, tiny_tokens()), **given)


def test_a_formation_comes_back_from_json():
    """What JSON cannot hold is missing there, and NaN again; what is none stays none."""
    formation = synthetic_result().formation
    again = formation_from_json(json.loads(json.dumps(to_plain(formation_to_json(formation)), allow_nan=False)))
    assert (again.layer, again.sink_positions) == (formation.layer, formation.sink_positions)
    assert again.super_neurons == formation.super_neurons and again.super_neurons[1].gate_z is None
    assert math.isnan(again.outlier_dims[0].z) and math.isnan(again.events[0].attn_norm)
    assert_frame_equal(again.profile, formation.profile)
