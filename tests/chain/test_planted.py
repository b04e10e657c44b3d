"""Scores of the planted model against what they must be, worked out by hand.

Prompt 0 has no sink of its own: in the base run every later query i spreads attention evenly over its i + 1 keys, so
the target receives ``mean 1 / (i + 1)``; in the anchored run it receives 1. Prompt 1 has a sink at position 0: there
the target receives 0 in the base run, and shares evenly with position 0 in the anchored run: 1/2.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sinklens import stages
from sinklens.chain.run import run_chain
from sinklens.edits import AttendTo, Transplant
from sinklens.edits.base import need
from sinklens.errors import EngineError, InputError
from sinklens.formation import find_formation
from sinklens.pairs import PairChoice
from sinklens.prompts import from_tokens
from sinklens.study import Study
from tests.helpers.planted import MIRROR, OUTLIER, SUPER, planted_model, planted_twice, prompts, value

LENGTH, TARGET = 16, 5
BASE = [np.mean([1 / (i + 1) for i in range(TARGET + 1, LENGTH)]), 0.0]
ANCHORED = [1.0, 0.5]

pytest.importorskip("transformer_lens.HookedTransformer")


class Halfway(Transplant):
    """No transplant, whatever its name."""

    def __call__(self, x, source, at):  # noqa: ARG002
        return (x + need(source, self)) / 2


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def batch(model):
    return from_tokens(model, prompts(LENGTH))


@pytest.fixture(scope="module")
def formation(model, batch):
    # Prompt 0 has no sink, so the block and neurons are given; what would be found is tested on its own below.
    found = find_formation(model, batch, layer=0, super_neurons=[SUPER], outlier_dims=[OUTLIER])
    return replace(found, sink_positions=(0, 0))


def chosen(stage, *names):
    """The stage with only the experiments named, as (edit, control)."""
    kept = tuple(e for e in stage.experiments if (e.edit, e.control) in names)
    assert len(kept) == len(names)
    return replace(stage, experiments=kept)


# (stage, edit, control) -> effects by hand: denoise per prompt, noise per prompt.
ALL, NONE = ([1, 1], [1, 1]), ([0, 0], [0, 0])
GONE, SPARED = ([0, 0], [1, 1]), ([1, 1], [0, 0])
BY_HAND = {
    ("value_aggregation", "transplant", ""): ALL,
    # The values are 1 and 0.95 in the anchored run (mean 0.97) and 0 and 0.32 in the base run (mean 0.16): the neuron
    # fires beyond one half, so the mean decides, whatever varies about it.
    ("value_aggregation", "deviation_exchanged", ""): NONE,
    ("value_aggregation", "mean_exchanged", ""): ALL,
    ("value_aggregation", "no_variance", ""): SPARED,
    ("value_aggregation", "no_variance", "other_prompt"): SPARED,
    ("value_aggregation", "no_write", ""): GONE,
    ("value_aggregation", "ordinary_write", ""): GONE,
    # The five tokens before have a mean of -0.2 and 0.2; with the target's own they are the base run itself.
    ("value_aggregation", "one_source", "all_but_itself"): GONE,
    ("value_aggregation", "one_source", "all_sources"): GONE,
    ("w_o_alignment", "transplant", ""): ALL,
    # attn_out lies in dimension 0, and the super neuron reads dimensions 0 and 3.
    ("w_o_alignment", "reading_subspace", ""): ALL,
    ("reading", "transplant", ""): ALL,
    ("reading", "reading_subspace", ""): ALL,
    ("reading", "reading_subspace", "all_the_rest"): NONE,
    ("reading", "read_of_attention", ""): ALL,
    ("super_neurons", "transplant", ""): ALL,
    ("super_neurons", "transplant", "random_neurons"): NONE,
    ("super_neurons", "transplant", "all_the_others"): NONE,
    ("super_neurons", "zero", ""): GONE,
    ("super_neurons", "zero", "random_neurons"): SPARED,
    ("super_neurons", "mean", ""): GONE,
    ("super_neurons", "mean", "random_neurons"): SPARED,
    ("super_neurons", "resample", ""): GONE,
    ("super_neurons", "resample", "random_neurons"): SPARED,
    ("down_projection", "transplant", ""): ALL,
    ("down_projection", "outlier_dims", ""): ALL,
    ("down_projection", "outlier_dims", "other_dims"): NONE,
    ("down_projection", "spike_exchanged", ""): ALL,
    ("down_projection", "spike_exchanged", "other_dims"): NONE,
    # The key turns round: later queries avoid the target, which in prompt 0 had its share of attention.
    ("down_projection", "spike_flipped", ""): ([-BASE[0] / (1 - BASE[0]), 0], [1 / (1 - BASE[0]), 1]),
    ("down_projection", "spike_flipped", "other_dims"): SPARED,
    ("down_projection", "dense_direction", "spike_moved"): GONE,
    ("rmsnorm_filter", "transplant", ""): ALL,
    ("rmsnorm_filter", "constant_input", ""): SPARED,
    ("rmsnorm_filter", "constant_input", "ordinary_input"): GONE,
    ("rmsnorm_filter", "largest_dims", ""): ALL,
    ("rmsnorm_filter", "largest_dims", "other_dims"): NONE,
    ("rmsnorm_filter", "dims_removed", ""): GONE,
    ("rmsnorm_filter", "dims_removed", "other_dims"): SPARED,
    # Without the outlier in the denominator the key is hundreds of times larger: the target takes all of the
    # attention. In prompt 0 it had that already; in prompt 1 it goes from 1/2 to 1, twice the pair's effect.
    ("rmsnorm_filter", "denominator_only", ""): ([1, 2], [0, -1]),
    ("qk_locking", "transplant", ""): ALL,
    # Attention in the block that is read does not depend on its own values.
    ("qk_locking", "transplant", "value"): NONE,
    ("qk_locking", "query_direction_removed", ""): GONE,
    ("qk_locking", "constant_key", ""): SPARED,
    ("qk_locking", "constant_key", "ordinary_key"): GONE,
    ("qk_locking", "constant_key", "zero"): GONE,
    # The first token is a sink in prompt 1 alone, so the mean of the two keys is half of one: in prompt 0 enough for
    # all of the attention, and nothing beside the whole key that prompt 1 has at position 0.
    ("qk_locking", "natural_key", ""): ([1, 0], [0, 1]),
}


@pytest.fixture(scope="module")
def result(model, batch, formation):
    keys: dict[str, list[tuple[str, str]]] = {}
    for stage, edit, control in BY_HAND:
        keys.setdefault(stage, []).append((edit, control))
    wanted = tuple(chosen(stages.STAGES[name], *names) for name, names in keys.items())
    return run_chain(model, batch, target=TARGET, stages=wanted, formation=formation, readout_blocks=1, seed=0)


def test_the_metric_is_what_it_must_be(result):
    np.testing.assert_allclose(result.runs["base"]["sink"], BASE, atol=1e-6)
    np.testing.assert_allclose(result.runs["anchored"]["sink"], ANCHORED, atol=1e-4)


@pytest.mark.parametrize("key", BY_HAND, ids=lambda key: "-".join(filter(None, key)))
def test_effects_are_those_worked_out_by_hand(result, key):
    stage, edit, control = key
    rows = result.effects.query("stage == @stage and edit == @edit and control == @control")
    for direction, expected in zip(("denoise", "noise"), BY_HAND[key], strict=True):
        found = rows[rows.direction == direction].groupby("prompt").effect.mean()
        # Two near-equal scores of about 100 share the attention of prompt 1: rounding shows there.
        assert abs(found[0] - expected[0]) < 1e-5, direction
        assert abs(found[1] - expected[1]) < 2e-3, direction


def test_moment_matching_fires_where_the_arithmetic_says(model, batch, formation):
    """Denoise: mean + (sigma_0 / sigma_5) (z - mean), over two prompts; the neuron fires beyond half of the
    constant.
    """
    tokens = prompts(LENGTH)
    z = np.array([np.mean([value(int(t)) for t in row[: TARGET + 1]]) for row in tokens])
    first = np.array([value(int(row[0])) for row in tokens])
    matched = z.mean() + (z - z.mean()) * np.ptp(first) / np.ptp(z)
    fires = matched > 0.5
    assert list(fires) == [False, True]  # or the test says nothing
    stage = chosen(stages.VALUE_AGGREGATION, ("transplant", ""), ("moment_match", ""))
    result = run_chain(model, batch, target=TARGET, stages=(stage,), formation=formation, readout_blocks=1)
    rows = result.effects.query("edit == 'moment_match'")
    found = rows.query("direction == 'denoise'").effect
    np.testing.assert_allclose(found, fires.astype(float), atol=2e-3)
    # Noise: the anchored values are 1 and nearly 1; rescaled to the spread at position 5 both still exceed one half.
    own = np.array([value(int(row[TARGET])) for row in tokens])
    rescaled = own.mean() + (own - own.mean()) * np.ptp(z) / np.ptp(own)
    assert (rescaled > 0.5).all()
    np.testing.assert_allclose(rows.query("direction == 'noise'").effect, [0, 0], atol=2e-3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_whether_variance_is_the_cause(symmetric):
    """In one model a value above one half makes a sink, in the other one that is far from the mean on either side.

    In the second the target is a plus in one prompt and a minus in the other: its own value is 1 or -1, the values that
    it averages cancel, and both means over prompts are 0. Position 0 is a sink of its own in both.
    """
    model = planted_model(symmetric=symmetric)
    tokens = prompts(LENGTH)
    if symmetric:
        tokens[1] = 1 - tokens[0]
    batch = from_tokens(model, tokens)
    neurons = [SUPER, MIRROR] if symmetric else [SUPER]
    formation = find_formation(model, batch, layer=0, super_neurons=neurons, outlier_dims=[OUTLIER])
    formation = replace(formation, sink_positions=(0, 0))
    names = ("deviation_exchanged", "mean_exchanged", "no_variance", "no_write")
    stage = chosen(stages.VALUE_AGGREGATION, ("transplant", ""), *((name, "") for name in names))
    result = run_chain(model, batch, target=TARGET, stages=(stage,), formation=formation, readout_blocks=1)
    found = {
        name: tuple(result.score("value_aggregation", name, way).effect for way in ("denoise", "noise"))
        for name in names
    }
    varies, mean = (found["deviation_exchanged"], found["mean_exchanged"])
    assert (varies, mean)[symmetric] == pytest.approx((0, 0), abs=2e-3)
    assert (mean, varies)[symmetric] == pytest.approx((1, 1), abs=2e-3)
    assert found["no_variance"] == pytest.approx((0, 1) if symmetric else (1, 0), abs=2e-3)
    assert found["no_write"] == pytest.approx((0, 1), abs=2e-3)


def test_one_source_is_enough_where_its_token_is(model, formation):
    """Attending to one earlier token alone the target has that token's value: the neuron fires for a plus."""
    stage = chosen(stages.VALUE_AGGREGATION, ("transplant", ""), ("one_source", ""))
    many = from_tokens(model, prompts(LENGTH).repeat(8, 1))
    known = replace(formation, sink_positions=(0,) * many.n)
    result = run_chain(model, many, target=TARGET, stages=(stage,), formation=known, readout_blocks=1)
    setting = stages.Setting.of(Study.of(model, many, known), PairChoice(TARGET))
    drawn = setting.study.generator("value_aggregation/one_source//0")
    edit = stage.experiments[1].build(setting, stage, "denoise", drawn).edit
    assert isinstance(edit, AttendTo)
    sources = edit.weights.argmax(-1)
    assert ((sources > 0) & (sources < TARGET)).all()
    fires = [value(int(many.tokens[i, j])) > 0.5 for i, j in enumerate(sources)]
    assert 0 < np.mean(fires) < 1
    rows = result.effects.query("edit == 'one_source' and direction == 'denoise'").sort_values("prompt")
    np.testing.assert_allclose(rows.effect, np.array(fires, dtype=float), atol=2e-3)


def test_what_stands_beside_the_mean(result):
    """A median and the share of prompts beyond one half: of a key that makes a sink in one prompt of two."""
    row = result.score("qk_locking", "natural_key", "denoise")
    assert (row["median"], row.share) == (pytest.approx(0.5, abs=2e-3), 0.5)
    row = result.score("super_neurons", "zero", "noise")
    assert (row["median"], row.share) == (pytest.approx(1, abs=2e-3), 1.0)


def test_the_natural_sink(model):
    """Noising it with an ordinary position's activations takes it away; ordinary positions get the rest of nothing."""
    batch = from_tokens(model, prompts(LENGTH)[1:].repeat(3, 1))
    stage = chosen(stages.SUPER_NEURONS, ("transplant", ""), ("transplant", "random_neurons"), ("zero", ""))
    result = run_chain(model, batch, target="natural", stages=(stage,), readout_blocks=1)
    assert set(result.scores.direction) == {"noise"}
    np.testing.assert_allclose(result.runs["natural"]["sink"], 1.0, atol=1e-5)
    np.testing.assert_allclose(result.runs["natural"]["ordinary"], 0.0, atol=1e-5)
    # Without its super neuron, the first token is like the others: each query spreads over i + 1 keys.
    left = np.mean([1 / (i + 1) for i in range(1, LENGTH)])
    for edit in ("transplant", "zero"):
        rows = result.effects.query(f"edit == '{edit}' and control == ''")
        np.testing.assert_allclose(rows.effect, 1 - left, atol=1e-5)
    rows = result.effects.query("control == 'random_neurons'")
    np.testing.assert_allclose(rows.effect, 0, atol=1e-5)


@pytest.mark.slow
def test_the_root_is_known_by_where_it_is_not_by_its_name(model, batch, formation):
    """Under another name a stage at the pair's own site is still held to an effect of exactly 1."""
    renamed = replace(stages.VALUE_AGGREGATION, name="other")
    found = run_chain(model, batch, target=TARGET, formation=formation, stages=(renamed,))
    assert found.score("other", "transplant", "noise").effect == 1.0

    def nothing(setting, stage, direction, generator):
        patch = transplant.build(setting, stage, direction, generator)
        return replace(patch, edit=Halfway("transplant"))

    (transplant,) = [e for e in renamed.experiments if (e.edit, e.control) == ("transplant", "")]
    wrong = replace(renamed, experiments=(replace(transplant, build=nothing),))
    with pytest.raises(EngineError, match="identity"):
        run_chain(model, batch, target=TARGET, formation=formation, stages=(wrong,))


@pytest.mark.slow
def test_another_metric(model, batch, formation):
    """The norm of what enters the readout block: it is measured, divided and named as such."""
    keys = {"target": TARGET, "formation": formation, "stages": (stages.VALUE_AGGREGATION,)}
    found = run_chain(model, batch, metric="residual_norm", **keys)
    assert found.metric == found.config["metric"] == "residual_norm"
    for run, tokens in (("base", batch.tokens), ("anchored", batch.tokens)):
        hooks = [] if run == "base" else [("blocks.0.attn.hook_pattern", attend_self)]
        with torch.no_grad(), model.hooks(hooks):
            _, cache = model.run_with_cache(tokens)
        expected = cache["blocks.1.hook_resid_pre"][:, TARGET].norm(dim=-1)
        np.testing.assert_allclose(found.runs[run]["sink"], expected, rtol=1e-5)
    assert found.score("value_aggregation", "transplant", "denoise").effect == pytest.approx(1)


def attend_self(pattern, hook):  # noqa: ARG001
    pattern[:, :, TARGET] = 0
    pattern[:, :, TARGET, TARGET] = 1
    return pattern


@pytest.mark.parametrize(
    ("metric", "target", "message"),
    [
        ("logit_diff", TARGET, "compares two tokens: sweep it"),
        ("loss", "natural", "no value at ordinary positions"),
        ("nonsense", TARGET, "readout 'nonsense' is not known: choose from attention_received"),
    ],
)
def test_a_metric_that_a_chain_cannot_use(model, batch, formation, metric, target, message):
    with pytest.raises(InputError, match=message):
        run_chain(model, batch, target=target, formation=formation, metric=metric)


@pytest.mark.parametrize(("event", "read"), [(1, [1]), (2, [3]), (None, [3])])
def test_each_event_makes_the_sink_of_the_blocks_behind_it(event, read):
    """Read between it and the next: all of the sink, and nothing of it without the event's own neuron."""
    model = planted_twice()
    batch = from_tokens(model, prompts(LENGTH)[1:].repeat(3, 1))
    stage = chosen(stages.SUPER_NEURONS, ("transplant", ""), ("zero", ""), ("zero", "random_neurons"))
    result = run_chain(model, batch, target="natural", stages=(stage,), event=event)
    assert result.config["readout_layers"] == read
    left = np.mean([1 / (i + 1) for i in range(1, LENGTH)])
    np.testing.assert_allclose(result.effects.query("control == ''").effect, 1 - left, atol=1e-5)
    np.testing.assert_allclose(result.effects.query("control != ''").effect, 0, atol=1e-5)


def test_a_formation_and_an_event_are_one_too_many(model, batch, formation):
    with pytest.raises(InputError, match="give a formation or the number of an event, not both"):
        run_chain(model, batch, target=TARGET, formation=formation, event=1)
