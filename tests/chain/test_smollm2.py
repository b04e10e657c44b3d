"""The real model: known facts of it, and the properties that every run on it must have.

What is literal here (blocks, neurons, dimensions) is known of this model; the package finds it and assumes none of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from sinklens import interventions, prompts, readouts, stages
from sinklens.chain.result import ChainResult
from sinklens.chain.run import _trials, run_chain
from sinklens.chain.scoring import SINK
from sinklens.edits import Constant
from sinklens.formation import Formation, find_formation
from sinklens.pairs.pair import induced_pair
from sinklens.patches import Patch
from sinklens.prompts import PromptBatch
from sinklens.sites import MLP_POST, Z
from sinklens.stages.base import Setting
from sinklens.study import Study
from tests.helpers.one_at_a_time import OneAtATime, cache_of, read
from tests.helpers.tiny import hooks_left

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

FORMATION_BLOCK, SUPER_NEURONS, OUTLIER = 11, (1229, 1487), 507
TARGET = 10
TWO_STAGES = (stages.SUPER_NEURONS, stages.QK_LOCKING)


@pytest.fixture(scope="module")
def natural(smollm2: Any) -> PromptBatch:
    return prompts.natural(smollm2, n=4, length=48)


@pytest.fixture(scope="module")
def random_tokens(smollm2: Any) -> PromptBatch:
    return prompts.random_tokens(smollm2, n=4, length=32)


@pytest.fixture(scope="module")
def formation(smollm2: Any, natural: PromptBatch) -> Formation:
    return find_formation(smollm2, natural)


@pytest.fixture(scope="module")
def formation_on_random(smollm2: Any, random_tokens: PromptBatch) -> Formation:
    return find_formation(smollm2, random_tokens)


@pytest.fixture(scope="module")
def result(smollm2: Any, natural: PromptBatch, formation: Formation) -> ChainResult:
    """The main job, with one draw of every control."""
    return run_chain(smollm2, natural, target=TARGET, formation=formation, control_draws=1)


@pytest.fixture(scope="module")
def few(smollm2: Any) -> PromptBatch:
    return prompts.natural(smollm2, n=2, length=24)


@pytest.fixture(scope="module")
def few_formation(formation: Formation) -> Formation:
    return replace(formation, sink_positions=(0, 0))


def two_stages(model: Any, batch: PromptBatch, formation: Formation, seed: int = 0) -> ChainResult:
    return run_chain(model, batch, target=TARGET, stages=TWO_STAGES, formation=formation, control_draws=1, seed=seed)


@pytest.fixture(scope="module")
def small(smollm2: Any, few: PromptBatch, few_formation: Formation) -> ChainResult:
    return two_stages(smollm2, few, few_formation)


def scores(result: ChainResult, **wanted: str) -> pd.DataFrame:
    chosen = np.logical_and.reduce([result.scores[column] == value for column, value in wanted.items()])
    assert chosen.any(), wanted
    return result.scores.loc[chosen]


@pytest.mark.parametrize("which", ["formation", "formation_on_random"])
def test_the_sink_forms_where_it_is_known_to(which, request):
    found: Formation = request.getfixturevalue(which)
    assert found.layer == FORMATION_BLOCK
    assert found.sink_positions == (0, 0, 0, 0)
    assert found.neurons == SUPER_NEURONS
    assert found.dims[0] == OUTLIER
    layers = [event.layer for event in found.events]
    assert 2 in layers and layers[-1] == FORMATION_BLOCK
    event = found.events[-1]
    assert event.norm_before < 300 and event.norm_after > 10_000
    assert event.mlp_norm > 100 * event.attn_norm
    assert all(neuron.activation_sink > 500 and neuron.activation_other < 5 for neuron in found.super_neurons)


def test_attention_rises_just_after_formation(formation):
    attention = formation.profile.set_index("layer").attention_sink
    assert attention[FORMATION_BLOCK] < 0.1 < 0.3 < attention[FORMATION_BLOCK + 1]


@pytest.mark.parametrize("event", [1, 2])
def test_each_event_makes_the_sink_of_the_blocks_behind_it(smollm2, natural, formation, event):
    """Two blocks make the sink of blocks 3 to 10, and block 11 that of those behind; each leaves the other's alone."""
    assert [step.blocks for step in formation.steps] == [(1, 2), (FORMATION_BLOCK,)]
    study = Study.of(smollm2, natural, formation)
    found = [study.at_block(layer) for layer in formation.step(event).blocks]
    assert all(at.neurons for at in found)
    behind = {1: tuple(range(3, 10)), 2: (12, 13, 14, 15)}
    readings = [readouts.attention_received(str(i), blocks, study.sink, natural.n) for i, blocks in behind.items()]
    first, *more = (Patch(MLP_POST, (at.formation.layer,), study.sink, Constant("zero"), at.neurons) for at in found)
    effects = study.run([replace(first, also=tuple(more))], readings)
    before = {i: effects.runs["base"][str(i)].mean() for i in behind}
    removed = {i: float(1 - effects.values[str(i)][0].mean() / before[i]) for i in behind}
    assert removed[event] > 0.4
    assert abs(removed[3 - event]) < (0.15 if event == 1 else 1e-6)  # what is behind comes later


def test_a_chain_of_the_first_event(smollm2, few):
    found = run_chain(smollm2, few, event=1, stages=TWO_STAGES, target=TARGET, control_draws=1)
    assert (found.formation.layer, found.formation.event) == (2, 1)
    assert found.config["readout_layers"] == [3, 4, 5, 6]
    assert found.score("super_neurons", "transplant", "denoise").effect > 0.8
    assert abs(found.score("super_neurons", "transplant", "denoise", "random_neurons").effect) < 0.1
    assert found.score("qk_locking", "transplant", "noise").effect > 0.8


def test_every_stage_is_scored(result):
    assert list(result.scores.stage.drop_duplicates()) == [stage.name for stage in stages.CHAIN]
    assert np.isfinite(result.scores[["effect", "ci_low", "ci_high"]].to_numpy(float)).all()
    assert np.isfinite(result.effects.effect.to_numpy(float)).all()
    assert (result.scores.n == 4).all() and (result.scores.n_excluded == 0).all()
    assert result.formation.neurons == SUPER_NEURONS
    assert result.engine["n_rows"] == 4 * result.engine["n_patches"]


def test_no_hook_is_left(smollm2, result):
    assert result is not None
    assert hooks_left(smollm2) == []


def test_identities_are_one(result):
    root = scores(result, stage="value_aggregation", edit="transplant", control="")
    np.testing.assert_allclose(root.effect, [1, 1], atol=1e-4)
    own = result.matrix[result.matrix.stage == result.matrix.readout]
    assert len(own) == 2 * len(stages.CHAIN)
    np.testing.assert_allclose(own.effect, 1, atol=1e-4)


def test_the_pair_makes_a_sink(result):
    base, anchored = (np.array(result.runs[run][SINK]) for run in ("base", "anchored"))
    assert (base < 0.05).all() and (anchored > 0.15).all()


@pytest.mark.parametrize("control", ["random_neurons", "other_dims", "other_position"])
def test_controls_that_must_not_move_do_not(result, control):
    """They differ from what is predicted of something beside the point by less than 0.05, in both directions."""
    found = scores(result, control=control)
    if control == "other_position":
        found = found[found.edit == "transplant"]
    assert set(found.direction) == {"denoise", "noise"}
    assert (found.effect - found.predicted).abs().max() < 0.05, found


def test_ablating_super_neurons_is_not_like_ablating_others(result):
    """Noise: theirs takes most of the sink away. Denoise: without theirs, what is put into the base run makes none."""
    for edit in ("zero", "mean", "resample"):
        found = scores(result, stage="super_neurons", edit=edit).set_index(["control", "direction"]).effect
        assert found["", "noise"] > found["random_neurons", "noise"] + 0.3, edit
        assert found["", "denoise"] < found["random_neurons", "denoise"] - 0.9, edit


def test_transplanting_super_neurons_makes_the_sink(result):
    """Sufficient: two of 1536 neurons carry it all."""
    found = scores(result, stage="super_neurons", edit="transplant", control="", direction="denoise")
    assert found.effect.item() > 0.9
    assert found.units.item() == list(SUPER_NEURONS)


def checked(result: ChainResult, quantity: str, where: str) -> pd.Series:
    rows = result.checks[result.checks.quantity.str.startswith(quantity) & (result.checks["where"] == where)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_side_effects_are_reported(result):
    """Up to formation the target attends to itself alone in the anchored run; elsewhere little changes."""
    spread = "attention entropy (nats), up to formation"
    mixed = "values mixed (effective number), up to formation"
    assert checked(result, spread, "target").anchored == 0
    assert checked(result, spread, "target").base > 0.5
    assert checked(result, mixed, "target").anchored == 1
    assert checked(result, mixed, "target").base > 2
    for quantity in (spread, mixed, "residual norm", "dominance", "attention received"):
        row = checked(result, quantity, "ordinary position")
        assert row.anchored == pytest.approx(row.base, rel=0.15), quantity
    for quantity in (spread, mixed, "residual norm", "super-neuron activation"):
        row = checked(result, quantity, "natural sink")  # which comes before the target, and cannot see it
        assert row.anchored == pytest.approx(row.base, rel=1e-5), quantity
    assert checked(result, "super-neuron", "target").anchored > 1000 * checked(result, "super-neuron", "target").base
    assert checked(result, "dominance", "target").anchored > 5 * checked(result, "dominance", "target").base


def test_scores_equal_one_patch_at_a_time(smollm2, few, few_formation, small):
    """All experiments of two stages: a full forward pass for each patch and direction, effects by hand."""
    pair = induced_pair(smollm2, few, few_formation, TARGET)
    study = Study.of(smollm2, few, few_formation, rows=8)
    setting = Setting(study, pair, tuple(small.config["readout_layers"]))
    metric = readouts.attention_received(SINK, setting.readout_layers, (TARGET,), few.n)
    slow = OneAtATime(smollm2, few.tokens, [metric], pair.runs)
    roots = {"base": [], "anchored": interventions.block_aggregation(TARGET, range(FORMATION_BLOCK + 1))}
    ends = {
        run: [read(cache_of(smollm2, few.tokens[[i]], hooks, slow.names), metric, i) for i in range(few.n)]
        for run, hooks in roots.items()
    }
    trials, _ = _trials(setting, TWO_STAGES, 1)
    assert len(trials) == 2 * sum(len(stage.experiments) for stage in TWO_STAGES) == len(small.effects) / few.n
    for number, trial in enumerate(trials):
        rows = small.effects[small.effects.patch_id == trial.patch.id].set_index("prompt")
        assert len(rows) == few.n
        prompt = (number + number // 2) % few.n  # one in turn, for both directions
        (patched,) = slow(trial.patch, prompt)
        base, anchored = ends["base"][prompt], ends["anchored"][prompt]
        moved = patched - base if trial.direction == "denoise" else anchored - patched
        label = (trial.stage.name, trial.experiment.edit, trial.experiment.control, trial.direction, prompt)
        assert rows.effect[prompt] == pytest.approx(moved / (anchored - base), abs=1e-5), label


def test_the_same_seed_gives_the_same_scores(smollm2, few, few_formation, small):
    again = two_stages(smollm2, few, few_formation)
    assert_frame_equal(again.scores, small.scores, check_exact=True)
    assert_frame_equal(again.effects, small.effects, check_exact=True)
    assert_frame_equal(again.matrix, small.matrix, check_exact=True)


def test_another_seed_gives_other_controls_and_the_same_effects(smollm2, few, few_formation, small):
    other = two_stages(smollm2, few, few_formation, seed=1)
    keys = ["stage", "edit", "control", "direction", "prompt"]
    one, two = small.effects.set_index(keys), other.effects.set_index(keys)
    drawn = [stage.name + item.edit + item.control for stage in TWO_STAGES for item in stage.experiments if item.drawn]
    is_drawn = np.array([stage + edit + control in drawn for stage, edit, control, *_ in one.index])
    assert (one.patch_id[is_drawn] != two.patch_id[is_drawn]).all()
    transplants = one.index.get_level_values("edit") == "transplant"
    np.testing.assert_allclose(one.effect[transplants & ~is_drawn], two.effect[transplants & ~is_drawn], atol=1e-6)


def test_prompts_in_another_order_have_their_effects_in_that_order(smollm2, natural, formation):
    chosen = tuple(replace(stage, experiments=(stages.TRANSPLANT,)) for stage in TWO_STAGES)
    order = [2, 0, 3, 1]
    one, two = (
        run_chain(smollm2, batch, target=TARGET, stages=chosen, formation=formation)
        for batch in (natural, natural.subset(order))
    )
    found, expected = (table.effects.effect.to_numpy().reshape(-1, 4) for table in (two, one))
    np.testing.assert_allclose(found, expected[:, order], atol=1e-4)
    assert np.ptp(expected, axis=1).max() > 1e-3  # the prompts differ, or their order could not be told
    np.testing.assert_allclose(two.runs["anchored"][SINK], np.array(one.runs["anchored"][SINK])[order], atol=1e-5)


def test_amplified_variance(smollm2, random_tokens, formation_on_random):
    """Makes a sink in random tokens, with the same identity; the same norm without the direction does not."""
    found = run_chain(
        smollm2,
        random_tokens,
        target=TARGET,
        pair="amplify_variance",
        strength=16.0,
        stages=(replace(stages.VALUE_AGGREGATION, experiments=(stages.TRANSPLANT,)),),
        formation=formation_on_random,
    )
    np.testing.assert_allclose(found.scores.effect, [1, 1], atol=1e-3)
    base, anchored = (np.mean(found.runs[run][SINK]) for run in ("base", "anchored"))
    assert anchored > 5 * base
    layers = found.config["pair_layers"]
    names = {Z.at(layer) for layer in layers}
    clean = cache_of(smollm2, random_tokens.tokens, [], names)
    mean = {layer: clean[Z.at(layer)][:, TARGET].mean(0) for layer in layers}
    metric = readouts.attention_received(SINK, found.config["readout_layers"], (TARGET,), random_tokens.n)
    patterns = {metric.site.at(layer) for layer in metric.layers}
    received = {}
    for norm_only in (False, True):
        hooks = interventions.amplify_variance(TARGET, layers, 16.0, mean, norm_only=norm_only)
        rows = [random_tokens.tokens[[i]] for i in range(random_tokens.n)]
        caches = [cache_of(smollm2, row, hooks, patterns) for row in rows]
        received[norm_only] = np.array([read(cache, metric, i) for i, cache in enumerate(caches)])
    np.testing.assert_allclose(received[False], found.runs["anchored"][SINK], atol=1e-4)
    assert received[True].mean() < anchored / 3


def test_the_natural_sink(smollm2, few, few_formation):
    """Noised only, and mostly gone without its super neurons; other neurons are nothing to it."""
    found = run_chain(
        smollm2, few, target="natural", stages=(stages.SUPER_NEURONS,), formation=few_formation, control_draws=1
    )
    assert set(found.scores.direction) == {"noise"}
    assert set(found.runs) == {"natural"}
    assert min(found.runs["natural"][SINK]) > 0.3
    assert max(found.runs["natural"]["ordinary"]) < 0.1
    assert scores(found, edit="transplant", control="").effect.item() > 0.4
    assert scores(found, control="random_neurons").effect.abs().max() < 0.05


def test_torch_s_random_state_is_left_alone(smollm2, few, few_formation):
    before = torch.get_rng_state()
    stage = replace(stages.SUPER_NEURONS, experiments=stages.SUPER_NEURONS.experiments[:2])
    run_chain(smollm2, few, target=TARGET, stages=(stage,), formation=few_formation, control_draws=1, readout_blocks=1)
    assert torch.equal(torch.get_rng_state(), before)
