"""Where the sink forms: on a planted model by hand, what is refused, and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from pandas.testing import assert_frame_equal

from sinklens.errors import InputError, NotApplicableError
from sinklens.formation import Formation, FormationEvent, find_formation, formation_from_json, formation_to_json
from sinklens.prompts import from_tokens
from sinklens.records.plain import to_plain
from tests.helpers.planted import OUTLIER, SECOND, SECOND_OUTLIER, SUPER, planted_model, planted_twice, prompts
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


@pytest.mark.slow
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


def made_in(*layers: int, layer: int, growth: dict[int, float] | None = None) -> Formation:
    """A formation with jumps in these blocks, each larger than the one before unless ``growth`` says otherwise."""
    after = {block: 10.0 * (i + 1) for i, block in enumerate(layers)} | (growth or {})
    events = tuple(FormationEvent(block, 1.0, after[block], 0.0, after[block], 1.0, 1.0) for block in layers)
    return Formation(layer, (0,), (), (), events)


def test_blocks_in_a_row_are_one_event():
    found = made_in(1, 2, 5, 11, 12, layer=11, growth={11: 500.0})
    assert [(step.blocks, step.layer) for step in found.steps] == [((1, 2), 2), ((5,), 5), ((11, 12), 11)]
    assert [str(step) for step in found.steps] == ["1 (blocks 1-2)", "2 (block 5)", "3 (blocks 11-12)"]
    assert found.event == 3 and found.first == 2
    assert replace(found, layer=1).event == 1 and replace(found, layer=7).event is None
    assert made_in(layer=3).steps == () and made_in(layer=3).event is None
    assert "block 11 (event 3 of 3)" in repr(found) and "event" not in repr(made_in(11, layer=11))


@pytest.mark.parametrize(
    ("layer", "blocks", "expected"),
    [
        (2, 4, (3, 4)),  # block 5 is where the next one begins
        (1, 4, (2, 3, 4)),  # the rest of an event does not end its own blocks
        (2, 1, (3,)),
        (5, 4, (6, 7, 8, 9)),
        (5, None, (6, 7, 8, 9, 10)),
        (11, 4, (12, 13, 14, 15)),  # the last event has all blocks behind it
        (11, None, tuple(range(12, 30))),
        (7, None, (8, 9, 10)),  # a block of no event
        (0, None, None),
        (4, 4, None),
    ],
)
def test_attention_is_read_before_the_next_event(layer, blocks, expected):
    found = made_in(1, 2, 5, 11, layer=layer)
    if expected is None:
        with pytest.raises(NotApplicableError, match=f"begins right behind block {layer}, .* explain that event"):
            found.after(30, blocks)
    else:
        assert found.after(30, blocks) == expected


@pytest.mark.parametrize(("layer", "end"), [(1, 5), (4, 5), (5, 11), (7, 11), (11, 30), (29, 30)])
def test_a_sink_ends_where_the_next_event_begins(layer, end):
    assert made_in(1, 2, 5, 11, layer=layer).until(30) == end


def test_an_event_is_explained_by_its_number():
    pytest.importorskip("transformer_lens.HookedTransformer")
    model = planted_twice()
    batch = from_tokens(model, prompts(LENGTH)[1:].repeat(3, 1))
    first, second, usual = (find_formation(model, batch, event=event) for event in (1, 2, None))
    assert [step.blocks for step in usual.steps] == [(0,), (2,)]
    assert (usual.layer, usual.neurons, usual.dims) == (2, (SECOND,), (SECOND_OUTLIER,))
    assert (first.layer, first.neurons, first.dims) == (0, (SUPER,), (OUTLIER,))
    assert second == usual and first.events == usual.events
    assert (first.after(4), second.after(4)) == ((1,), (3,))
    told = json.loads(json.dumps(to_plain(formation_to_json(first))))
    assert told["event"] == 1 and [step["blocks"] for step in told["steps"]] == [[0], [2]]
    again = formation_from_json(told)
    assert (again.event, again.steps, again.layer) == (1, first.steps, 0)
    with pytest.raises(InputError, match=r"there is no event 3: the formation events .* 1 \(block 0\), 2 \(block 2\)$"):
        find_formation(model, batch, event=3)
    with pytest.raises(InputError, match="a block .0. or an event .1. to explain, not both"):
        find_formation(model, batch, event=1, layer=0)
    for event in (0, 1.5, "first"):
        with pytest.raises(InputError, match="event .* must be a whole number, 1 or more"):
            find_formation(model, batch, event=event)  # type: ignore[arg-type]
