"""Interventions on the sink: a token masked, its variance amplified, the super neurons' down-projections removed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import sinklens as sl
from sinklens.analysis.run import load_analysis
from sinklens.analysis.tables import tidy
from sinklens.errors import InputError, NoSinkError, NotApplicableError
from sinklens.statistics import estimate_text
from tests.helpers.one_at_a_time import cache_of
from tests.helpers.planted import planted_model, planted_twice
from tests.helpers.planted import prompts as planted_prompts
from tests.helpers.tiny import tiny_model, tiny_tokens

pytestmark = pytest.mark.slow

pytest.importorskip("transformer_lens.HookedTransformer")

LENGTH = 24
GIVEN = {"layer": 1, "super_neurons": [3, 7], "outlier_dims": [5]}
AFTER = (2, 3)  # the blocks after formation of a tiny model of four


def planted(**given: Any) -> sl.Study:
    """Three prompts alike: position 0 is the sink of each, position 5 a token that fires when it attends to itself."""
    model = planted_model()
    return sl.Study(model, sl.prompts.from_tokens(model, planted_prompts(16)[1:].repeat(3, 1)), given=given)


def tiny(model: Any, **options: Any) -> sl.Study:
    return sl.Study(model, sl.prompts.from_tokens(model, tiny_tokens(4, LENGTH)), given=GIVEN, **options)


def findings(name: str, study: sl.Study, **options: Any) -> Any:
    return sl.run_analysis(load_analysis(name), study, **options).findings


def same_tables(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, atol=1e-5, rtol=1e-4)


def received(pattern: Tensor) -> Tensor:
    """Mean attention from later queries and over heads, written out: ``[batch, key]``."""
    n = pattern.shape[-1]
    return torch.stack([pattern[:, :, k + 1 :, k].mean((1, 2)) for k in range(n - 1)], -1)


def masked_hooks(position: int, layers: Any) -> list:
    """Minus infinity in the scores: another way to the same mask."""

    def mask(scores: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        scores = scores.clone()
        scores[:, :, position, :position] = -torch.inf
        return scores

    return [(f"blocks.{layer}.attn.hook_attn_scores", mask) for layer in layers]


def patterns(model: Any, tokens: Tensor, hooks: list) -> list[Tensor]:
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(4)]
    cache = cache_of(model, tokens, hooks, set(names))
    return [cache[name] for name in names]


# What they share.


def test_a_tidy_table_has_a_row_for_every_entry_that_is_a_number():
    table = tidy(torch.tensor([[1.0, float("nan")], [3, 4]]), {"layer": (7, 8), "who": ("a", "b")}, quantity="x")
    expected = {"layer": [7, 8, 8], "who": ["a", "a", "b"], "value": [1.0, 3.0, 4.0], "quantity": ["x"] * 3}
    pd.testing.assert_frame_equal(table, pd.DataFrame(expected))


def test_the_first_prompts_of_a_study_keep_its_formation(tiny_llama):
    study = tiny(tiny_llama)
    few = study.first(2)
    assert few.batch.n == 2 and study.first(99).batch.n == 4
    assert torch.equal(few.batch.tokens, study.batch.tokens[:2])
    assert few.formation.sink_positions == study.formation.sink_positions[:2]
    assert few.formation.super_neurons == study.formation.super_neurons  # measured on all prompts
    assert study.batch.n == 4


def test_an_ordinary_position_is_drawn_by_name_and_never_an_excluded_one(tiny_llama):
    study = tiny(tiny_llama)
    for prompt, left in enumerate(study.ordinary):
        free = left.nonzero().flatten().tolist()[1:]  # all but one
        drawn = [int(study.ordinary_position(name, free)[prompt]) for name in ("a", "b")]
        assert drawn == [int(left.nonzero()[0])] * 2
    assert torch.equal(study.ordinary_position("a"), study.ordinary_position("a"))
    assert not torch.equal(study.ordinary_position("a"), study.ordinary_position("b"))
    with pytest.raises(InputError, match="no ordinary position is left"):
        study.ordinary_position("a", range(LENGTH))


# mask_intervention


def test_a_masked_token_of_the_planted_model_takes_half_of_the_sink():
    """By hand: its neuron fires, its key equals the sink's, and every later query shares its attention evenly."""
    found = findings("mask_intervention", planted(), positions=(5,))
    verdict, numbers = found.verdict, found.numbers
    assert verdict.parts[0].outcome == "holds"
    assert verdict.estimate.value == pytest.approx(0.5, abs=2e-3)
    # Another token that becomes a sink has no query left and spreads its own attention evenly: one query of ten, on at
    # least seven keys.
    assert 0 <= verdict.control_estimate.value < 1 / 70
    assert numbers["share gained by token 5 at 8 tokens"].value == pytest.approx(0.5, abs=2e-3)
    assert "share gained by token 5 at 4 tokens" not in numbers
    assert numbers["attention gained by the masked token"].value == pytest.approx(0.5, abs=2e-3)
    lost = numbers["attention to the natural sink, after formation, at later queries, change by the mask"]
    assert lost.value == pytest.approx(-0.5, abs=2e-3)
    carried = numbers["share gained by token 5 from its residual after formation alone, all else clean"]
    assert carried.value == pytest.approx(0.5, abs=2e-3)
    blocks = found.table[found.table.quantity == "by block"]
    np.testing.assert_allclose(blocks.value, 0.5, atol=2e-3)  # there is one block: alone it is all
    # One key has all attention of a later query; with the mask, two share it.
    assert numbers["entropy, nats, after formation, at later queries"].value == pytest.approx(0, abs=1e-3)
    change = numbers["entropy, nats, after formation, at later queries, change by the mask"]
    assert change.value == pytest.approx(np.log(2), abs=2e-3)
    change = numbers["values averaged, after formation, at later queries, change by the mask"]
    assert change.value == pytest.approx(1, abs=5e-3)
    # Attention is uniform in block 0 whatever the values are: the mask changes nothing for later queries there.
    assert numbers["entropy, nats, up to formation, at later queries, change by the mask"].value == 0


def test_a_token_that_does_not_fire_gains_nothing_by_the_mask():
    """Position 3 has the other sign: alone with itself it lies on the wrong side of the neuron's threshold."""
    found = findings("mask_intervention", planted(), positions=(3,))
    assert found.verdict.parts[0].outcome == "does not hold"
    assert found.verdict.estimate.value == pytest.approx(0, abs=1e-5)
    both = findings("mask_intervention", planted(), positions=(3, 5))
    assert both.verdict.estimate.value == pytest.approx(0.25, abs=1e-3)
    told = both.verdict.parts[0].detail
    assert told.startswith("it depends on where one asks") and "token 3" in told and "token 5" in told


def test_the_mask_by_another_way(tiny_llama):
    """Scores of minus infinity, in plain TransformerLens; attention cut to the length, entropies by scipy."""
    from scipy import stats

    study, k = tiny(tiny_llama), 10
    table = findings("mask_intervention", study, positions=(k,)).table
    for run, hooks in (("clean", []), ("masked", masked_hooks(k, (0, 1)))):
        seen = patterns(tiny_llama, study.batch.tokens, hooks)
        mine = table[(table.run == run) & (table.token == k)]
        for length in (6, 12, 24):
            rows = mine[(mine.quantity == "received") & (mine.length == length)].sort_values("position")
            expected = torch.stack([received(seen[b][:, :, :length, :length]) for b in AFTER]).mean((0, 1))
            np.testing.assert_allclose(rows.value, expected, atol=1e-5)
            assert rows.position.tolist() == list(range(length - 1))
        paid = torch.stack([seen[b][range(4), :, :, study.sinks] for b in AFTER]).mean((0, 1, 2))
        rows = mine[mine.quantity == "attention to the natural sink, after formation"].sort_values("position")
        np.testing.assert_allclose(rows.value, paid, atol=1e-5)
        for part, blocks in (("up to formation", (0, 1)), ("after formation", AFTER)):
            entropy = np.stack([stats.entropy(seen[b], axis=-1) for b in blocks]).mean((0, 1, 2))
            rows = mine[mine.quantity == f"entropy, nats, {part}"].sort_values("position")
            np.testing.assert_allclose(rows.value, entropy, atol=1e-5)
            averaged = np.stack([1 / (seen[b] ** 2).sum(-1) for b in blocks]).mean((0, 1, 2))
            rows = mine[mine.quantity == f"values averaged, {part}"].sort_values("position")
            np.testing.assert_allclose(rows.value, averaged, rtol=1e-5)


def test_what_single_blocks_and_the_residual_alone_do_by_another_way(tiny_llama):
    study, k = tiny(tiny_llama), 10
    found = findings("mask_intervention", study, positions=(k,))
    table, tokens, sinks = found.table, study.batch.tokens, study.sinks

    def seen(hooks: list) -> Tensor:
        return torch.stack([received(patterns(tiny_llama, tokens, hooks)[b]) for b in AFTER]).mean(0)

    clean = seen([])
    sink = clean[torch.arange(4), sinks]
    for which, layer, masked in (
        ("that block alone", 0, (0,)),
        ("that block alone", 1, (1,)),
        ("block 0 to that", 1, (0, 1)),
    ):
        rows = table[(table.quantity == "by block") & (table.run == which) & (table.layer == layer)]
        share = (seen(masked_hooks(k, masked)) - clean)[:, k] / sink
        np.testing.assert_allclose(rows.sort_values("prompt").value, share, atol=1e-5)
    name = "blocks.1.hook_resid_post"
    resid = cache_of(tiny_llama, tokens, masked_hooks(k, (0, 1)), {name})[name]

    def carry(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        act = act.clone()
        act[:, k] = resid[:, k]
        return act

    share = (seen([(name, carry)]) - clean)[:, k] / sink
    np.testing.assert_allclose(table[table.run == "residual after formation alone"].value, share, atol=1e-5)


def test_the_mask_changes_nothing_before_its_token_and_averages_nothing_at_it(tiny_llama):
    table = findings("mask_intervention", tiny(tiny_llama), positions=(10,)).table
    wide = table[table.quantity.str.contains("formation")].pivot_table("value", ["quantity", "position"], "run")
    change = (wide["masked"] - wide["clean"]).unstack("position")
    assert (change.loc[:, :9] == 0).all(axis=None)
    assert (change.loc[:, 11:].abs().max(axis=1) > 1e-3).all()
    assert wide.loc[("entropy, nats, up to formation", 10), "masked"] == 0
    assert wide.loc[("values averaged, up to formation", 10), "masked"] == 1
    assert wide.loc[("values averaged, after formation", 10), "masked"] > 1


@pytest.mark.parametrize(("blocks", "masked"), [("up_to_formation", (0, 1)), ("onset", (0,)), ("formation", (1,))])
def test_the_blocks_that_are_masked(tiny_llama, monkeypatch, blocks, masked):
    study = tiny(tiny_llama)
    monkeypatch.setattr(sl.Study, "onset", (0,))
    table = findings("mask_intervention", study, positions=(10,), blocks=blocks).table
    rows = table[(table.quantity == "received") & (table.run == "masked") & (table.length == LENGTH)]
    seen = patterns(tiny_llama, study.batch.tokens, masked_hooks(10, masked))
    expected = torch.stack([received(seen[b]) for b in AFTER]).mean((0, 1))
    np.testing.assert_allclose(rows.sort_values("position").value, expected, atol=1e-5)


# variance_amplification

PLUS, MINUS = 0, 1


def ladder(usual: list[int], rare: list[int]) -> sl.Study:
    """19 prompts of one kind and one of another, on the planted model: position len - 1 deviates little from its mean.

    Every prompt goes on so that no other token fires: alternating, from the opposite of its last token.
    """
    model, rows = planted_model(), []
    for begin in [usual] * 19 + [rare]:
        rows.append((begin + [MINUS, PLUS] * 8)[:16])
    return sl.Study(model, sl.prompts.from_tokens(model, rows))


BELOW_ZERO = [PLUS, MINUS, MINUS, MINUS, PLUS], [PLUS, MINUS, MINUS, MINUS, MINUS]
"""z at position 4 is -1/5, and -3/5 in one prompt: the mean is -0.22, and nearly all lie 0.02 above it."""
ABOVE_ZERO = [PLUS, MINUS, PLUS, MINUS, PLUS, MINUS, PLUS], [PLUS, MINUS, MINUS, PLUS, PLUS, PLUS, PLUS]
"""z at position 6 is 1/7, and 3/7 in one prompt: nearly all lie 1/70 below the mean of 11/70."""


def test_amplification_fires_the_planted_neuron_where_the_arithmetic_says():
    """It fires beyond one half: -0.22 + 8 * 0.02 does not, -0.22 + 64 * 0.02 = 1.06 does; -1.06, the same norm, does
    not. Then 19 of 20 prompts share the sink evenly.
    """
    study = ladder(*BELOW_ZERO)
    found = findings("variance_amplification", study, positions=(4,), strengths=(8.0, 64.0), sweep_prompts=20)
    assert found.verdict.parts[0].outcome == "holds"
    assert found.verdict.estimate.value == pytest.approx(0.95 / 2, abs=2e-3)
    assert found.verdict.control_estimate.value == pytest.approx(0, abs=1e-4)
    assert found.numbers["share of prompts in which a token gains more than 0.25"].value == pytest.approx(0.95)
    assert found.numbers["share gained, amplified, super neurons ablated"].value == pytest.approx(0, abs=1e-4)
    others = found.numbers["share gained, amplified, as many others ablated"]
    assert others.value == pytest.approx(0.95 / 2, abs=2e-3)
    dose = found.table[(found.table.part == "prompts") & (found.table.edit == "amplified")]
    assert dose[dose.strength == 8].share.abs().max() < 1e-4
    assert dose[dose.strength == 64].share.mean() == pytest.approx(0.95 / 2, abs=2e-3)
    z = dose[(dose.strength == 64) & (dose.prompt == 0)].z_norm.item()
    assert z == pytest.approx(1.06, abs=1e-4)
    plain = found.table[(found.table.edit == "lambda z") & (found.table.part == "prompts")]
    assert plain[(plain.strength == 64) & (plain.prompt == 0)].z_norm.item() == pytest.approx(64 / 5, abs=1e-4)


def test_too_weak_an_amplification_does_nothing():
    found = findings("variance_amplification", ladder(*BELOW_ZERO), positions=(4,), strengths=(4.0, 8.0))
    assert found.verdict.parts[0].outcome == "does not hold"
    assert found.verdict.estimate.value == pytest.approx(0, abs=1e-4)


def test_the_norm_control_counts_against_the_claim():
    """Above zero and below the mean: amplified it is 11/70 - 64/70, which does not fire; of the same norm, it does."""
    found = findings("variance_amplification", ladder(*ABOVE_ZERO), positions=(6,), strengths=(64.0,))
    assert found.verdict.parts[0].outcome == "does not hold"
    assert found.verdict.estimate.value < 0.05
    assert found.verdict.control_estimate.value > 0.4


def test_without_any_variance_there_is_nothing_to_amplify():
    found = findings("variance_amplification", planted(), positions=(5,), strengths=(64.0,))
    assert found.verdict.parts[0].outcome == "does not hold"
    assert found.verdict.estimate.value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("axis", "over"), [("prompts", None), ("positions", (1,)), ("global", (0, 1))])
def test_amplification_by_another_way(tiny_llama, axis, over):
    """Means from a plain cache, plain hooks, and what is read from plain caches."""
    study, k, blocks = tiny(tiny_llama), 10, (0, 1)
    options = {"positions": (k,), "strengths": (3.0, 5.0), "axis": axis, "layers": blocks, "sweep_prompts": 3}
    table = findings("variance_amplification", study, **options).table
    names = {f"blocks.{b}.attn.hook_z" for b in blocks} | {f"blocks.{b}.attn.hook_pattern" for b in AFTER}
    names |= {"blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"}
    clean = cache_of(tiny_llama, study.batch.tokens, [], names)
    sink = torch.stack([received(clean[f"blocks.{b}.attn.hook_pattern"]) for b in AFTER]).mean(0)
    base, sink = sink[:, k], sink[torch.arange(4), study.sinks]

    def hooks(edit: str, strength: float) -> list:
        def hook(layer: int) -> Any:
            z = clean[f"blocks.{layer}.attn.hook_z"]
            mean = z[:, k].mean(0, keepdim=True) if over is None else z.mean(over, keepdim=True)[:, 0]

            def change(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
                old = act[:, k]
                new = mean + strength * (old - mean)
                if edit == "norm only":
                    new = old * (new.flatten(1).norm(dim=-1) / old.flatten(1).norm(dim=-1))[:, None, None]
                act = act.clone()
                act[:, k] = strength * old if edit == "lambda z" else new
                return act

            return f"blocks.{layer}.attn.hook_z", change

        return [hook(layer) for layer in blocks] if edit != "clean" else []

    assert (table.part == "verdict").sum() == 4 * 5
    wanted = [("prompts", e, s) for e in ("amplified", "norm only", "lambda z") for s in (3.0, 5.0)]
    wanted += [("verdict", "amplified", 5.0), ("verdict", "norm only", 5.0), ("verdict", "clean", 1.0)]
    for part, edit, strength in [*wanted, ("prompts", "clean", 1.0)]:
        cache = cache_of(tiny_llama, study.batch.tokens, hooks(edit, strength), names)
        rows = table[(table.part == part) & (table.edit == edit) & (table.strength == strength)].sort_values("prompt")
        n = len(rows)
        assert n == (4 if part == "verdict" else 3)
        seen = torch.stack([received(cache[f"blocks.{b}.attn.hook_pattern"]) for b in AFTER]).mean(0)[:, k]
        np.testing.assert_allclose(rows.attention, seen[:n], atol=1e-5)
        np.testing.assert_allclose(rows.share, ((seen - base) / sink)[:n], atol=1e-4)
        fires = cache["blocks.1.mlp.hook_post"][:, k, [3, 7]].abs().mean(-1)
        np.testing.assert_allclose(rows.activation, fires[:n], rtol=1e-3, atol=1e-5)
        norms = torch.stack([cache[f"blocks.{b}.attn.hook_z"][:, k].flatten(1).norm(dim=-1) for b in blocks]).mean(0)
        np.testing.assert_allclose(rows.z_norm, norms[:n], rtol=1e-4)
        resid = cache["blocks.1.hook_resid_post"][:, k].norm(dim=-1)
        np.testing.assert_allclose(rows.residual_norm, resid[:n], rtol=1e-4)


@pytest.mark.slow
def test_random_tokens_are_treated_as_prompts_are(tiny_llama):
    options = {"positions": (10,), "strengths": (4.0,), "sweep_prompts": 4}
    table = findings("variance_amplification", tiny(tiny_llama), **options).table
    batch = tiny(tiny_llama).random.batch
    own = findings("variance_amplification", sl.Study(tiny_llama, batch, given=GIVEN), **options).table
    one = table[table.part == "random tokens"].drop(columns="part").reset_index(drop=True)
    other = own[own.part == "prompts"].drop(columns="part").reset_index(drop=True)
    assert len(one) == 4 * 6
    same_tables(one, other)
    assert not np.allclose(one.attention, table[table.part == "prompts"].attention)


def test_random_tokens_without_a_sink_are_left_out(tiny_llama, monkeypatch):
    def refuse(_study: Any) -> Any:
        raise NoSinkError("no sink here")

    monkeypatch.setattr(sl.Study, "random", property(refuse))
    found = findings("variance_amplification", tiny(tiny_llama), positions=(10,), strengths=(4.0,))
    assert set(found.table.part) == {"verdict", "prompts"}
    assert found.caption.endswith("Random tokens are left out: no sink here.")
    load_analysis("variance_amplification").draw(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": (1.0, 2.0)}, "strengths must be above 1"),
        ({"layers": (0, 2)}, "blocks at most 1"),
        ({"sweep_prompts": 1}, "at least 2 of them"),
    ],
)
def test_what_cannot_be_amplified_is_refused(tiny_llama, options, message):
    with pytest.raises(InputError, match=message):
        findings("variance_amplification", tiny(tiny_llama), **options)


# settle_it

LATER = "natural sink, all later blocks"


def test_the_planted_sink_goes_with_its_neuron(monkeypatch):
    """By hand: without it each query spreads evenly over i + 1 keys; of the induced sink nothing is left."""
    monkeypatch.setattr(sl.models, "check_writes_directly", refuse)  # a rotation of 8 dimensions is no densification
    found = findings("settle_it", planted(), positions=(5,))
    left = np.mean([1 / (i + 1) for i in range(1, 16)])
    assert found.verdict.parts[0].outcome == "holds"
    assert found.verdict.estimate.value == pytest.approx(1 - left, abs=1e-5)
    assert found.verdict.control_estimate.value == pytest.approx(0, abs=1e-5)
    assert found.verdict.statistic.endswith("lowest: zero, mean") and "cannot be made dense" in found.caption
    numbers = found.numbers
    assert numbers["removed, natural sink, all later blocks, super neurons, zero"].value == pytest.approx(1 - left)
    # As a query the induced sink still spreads its own attention, on ordinary tokens too: so a little more than all.
    assert 1 < numbers["removed, induced sink, super neurons, mean"].value < 1.02
    # The key is what it was, however little is written: the norm sees the direction alone.
    assert numbers["removed, natural sink, super neurons, times 0.25"].value == pytest.approx(0, abs=1e-5)
    assert numbers["removed, natural sink, strongest other neurons, zero"].value == pytest.approx(0, abs=1e-5)
    assert numbers["massive activations of the natural sink, none"].value == 1
    assert numbers["massive activations of the natural sink, zero"].value == 0
    fires = 10 * 0.5 * 10 / (3 / 8)  # see the test of the formation
    norm = numbers["residual norm of the natural sink, none"].value
    assert norm == pytest.approx(fires * (100**2 + 7 * 0.01**2) ** 0.5, rel=1e-3)
    assert numbers["residual norm of the natural sink, zero"].value < 10


def refuse(_model: Any, _layer: int) -> None:
    raise NotApplicableError("normalised")


def test_the_sink_stays_when_the_wrong_neuron_goes():
    """And then the strongest other neuron is the one that makes it."""
    found = findings("settle_it", planted(layer=0, super_neurons=[3], outlier_dims=[2]), positions=(5,))
    assert found.verdict.parts[0].outcome == "does not hold"
    assert found.verdict.estimate.value == pytest.approx(0, abs=1e-4)
    assert found.numbers["removed, natural sink, strongest other neurons, zero"].value > 0.8


def test_settling_it_by_another_way(tiny_llama):
    """Plain hooks and caches, for the natural and the induced sink, every edit and every set of neurons."""
    study, k, draws = tiny(tiny_llama), 10, 2
    table = findings("settle_it", study, positions=(k,), draws=draws, rotations=draws, scales=(0, 0.5)).table
    names = {f"blocks.{b}.attn.hook_pattern" for b in AFTER} | {"blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"}
    clean = cache_of(tiny_llama, study.batch.tokens, [], names)
    post, every = clean["blocks.1.mlp.hook_post"], torch.arange(4)
    rows_out = tiny_llama.blocks[1].mlp.W_out.detach()
    at_sink = post[every, study.sinks].abs().mean(0)
    strongest = [i for i in at_sink.argsort(descending=True).tolist() if i not in (3, 7)][:2]
    # In the order of the analysis: a rotation goes by the rows in their order.
    sets = {"super neurons": [list(study.formation.neurons)] * draws, "strongest other neurons": [strongest]}
    sets["random neurons"] = [list(units) for units in study.other_neurons("settle_it/random", draws)]
    checked = 0
    for sink, where, roots in (
        ("natural sink", study.sinks, []),
        ("natural sink, all later blocks", study.sinks, []),
        ("induced sink", torch.full((4,), k), masked_hooks(k, (0, 1))),
    ):
        ordinary = study.ordinary.clone()
        ordinary[every, where] = False

        def read(
            hooks: list, where: Tensor = where, ordinary: Tensor = ordinary, sink: str = sink
        ) -> dict[str, Tensor]:
            cache = cache_of(tiny_llama, study.batch.tokens, hooks, names)
            seen = torch.stack([received(cache[f"blocks.{b}.attn.hook_pattern"]) for b in AFTER]).mean(0)
            usual = torch.stack([s[o[:-1]].mean() for s, o in zip(seen, ordinary, strict=True)])
            norm = cache["blocks.1.hook_resid_post"][every, where].norm(dim=-1)
            found = {"attention": seen[every, where], "ordinary": usual, "residual norm": norm}
            if sink == LATER:
                said = cache["logits"][:, :-1].log_softmax(-1)
                found["loss"] = -said.gather(-1, study.batch.tokens[:, 1:, None])[..., 0].mean(-1)
            return found

        base = read(roots)
        for (neurons, edit, draw), rows in table[table.sink == sink].groupby(["neurons", "edit", "draw"]):
            hooks = []
            if neurons != "none":
                units, draw = sets[neurons][draw], int(draw)
                turned = sl.edits.rotate_rows(rows_out[units], study.generator(f"settle_it/{neurons}/{draw}"))
                hooks = changed(edit, units, where, post[study.ordinary].mean(0)[units], turned - rows_out[units])
            found = read(roots + hooks)
            for name, values in found.items():
                np.testing.assert_allclose(rows.sort_values("prompt")[name], values, rtol=1e-4, atol=1e-5)
            if sink == LATER:
                change = (found["loss"] - base["loss"]).numpy()
                np.testing.assert_allclose(rows.sort_values("prompt")["change of loss"], change, rtol=0, atol=1e-5)
            removed = (base["attention"] - found["attention"]) / (base["attention"] - base["ordinary"])
            np.testing.assert_allclose(rows.sort_values("prompt").removed, removed, rtol=1e-3, atol=1e-3)
            checked += 1
    assert checked == (1 + 5 + 6 + 3) + (1 + 5 + 6) + (1 + 5 + 6 + 3)
    assert table[table.sink != LATER][["loss", "change of loss"]].isna().all(axis=None)


def test_what_the_edits_cost_is_said_with_as_many_random_neurons_beside(tiny_llama):
    found = findings("settle_it", tiny(tiny_llama), rotations=2, draws=2)
    later = found.table[found.table.sink == LATER]
    for neurons in ("super neurons", "random neurons"):
        for edit in ("zero", "mean", "densified"):
            rows = later[(later.neurons == neurons) & (later.edit == edit)]
            cost = found.numbers[f"change of loss, {neurons}, {edit}"]
            assert cost.value == pytest.approx(rows["change of loss"].mean())
            assert cost.over == ("rotations" if (neurons, edit) == ("super neurons", "densified") else "prompts")
        assert sl.statistics.interval_text(found.numbers[f"change of loss, {neurons}, zero"]) in found.caption


def changed(edit: str, units: list[int], where: Tensor, mean: Tensor, turned: Tensor) -> list:
    """Hooks in block 1: the neurons' activations changed, or what they write turned."""
    kept: dict[str, Tensor] = {}
    every = torch.arange(len(where))

    def at_post(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        old = act[every, where][:, units]
        kept["post"] = old
        factor = {"zero": 0.0, "times 0.5": 0.5}.get(edit, 1.0)
        act = act.clone()
        act[every[:, None], where[:, None], torch.tensor(units)] = mean if edit == "mean" else factor * old
        return act

    def at_out(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        act = act.clone()
        act[every, where] += kept["post"] @ turned
        return act

    hooks: list = [("blocks.1.mlp.hook_post", at_post)]
    return hooks + ([("blocks.1.hook_mlp_out", at_out)] if edit == "densified" else [])


def test_every_edit_must_remove_most_of_the_sink(tiny_llama):
    """The verdict shows the edit whose interval reaches lowest, and of the control the one that reaches highest."""
    found = findings("settle_it", tiny(tiny_llama))
    edits = ("zero", "mean", "densified")
    removed = [found.numbers[f"removed, natural sink, super neurons, {edit}"] for edit in edits]
    assert found.verdict.estimate.low == min(x.low for x in removed) < max(x.low for x in removed)
    natural = found.table[(found.table.sink == "natural sink") & (found.table.neurons == "random neurons")]
    means = natural.groupby(["edit", "prompt"]).removed.mean()
    highs = [sl.statistics.mean_estimate(means[edit].tolist(), 0).high for edit in edits]
    assert found.verdict.control_estimate.high == pytest.approx(max(highs))


@pytest.mark.parametrize(
    ("zero", "dense", "control", "outcome", "shown"),
    [
        ((0.6, 0.55, 0.65), (0.7, 0.4, 0.9), (0.0, -0.01, 0.01), "undecided", "dense"),  # larger, and less sure
        ((0.6, 0.45, 0.65), (0.9, 0.8, 1.0), (0.0, -0.01, 0.01), "undecided", "zero"),
        ((0.3, 0.25, 0.35), (0.9, 0.8, 1.0), (0.0, -0.01, 0.01), "does not hold", "zero"),
        ((0.6, 0.55, 0.65), (0.9, 0.8, 1.0), (0.0, -0.01, 0.01), "holds", "zero"),
        ((0.6, 0.55, 0.65), (0.9, 0.8, 1.0), (0.05, 0.0, 0.11), "undecided", "zero"),
    ],
)
def test_the_rule(tiny_llama: Any, zero: Any, dense: Any, control: Any, outcome: str, shown: str):
    analysis = load_analysis("settle_it")
    ends = {"zero": sl.Estimate(*zero), "mean": sl.Estimate(0.99, 0.98, 1.0), "densified": sl.Estimate(*dense)}

    def estimate(rows: Any, _column: str, _seed: int, _texts: Any = None) -> sl.Estimate:
        row = rows.iloc[0]
        usual = sl.Estimate(0.0, 0.0, 0.0)
        if row.neurons == "random neurons" and row.edit == "mean":
            return sl.Estimate(*control)
        return ends.get(row.edit, usual) if row.neurons == "super neurons" else usual

    analysis.run.__globals__["estimate"] = estimate  # the analysis is loaded anew for every test
    found = sl.run_analysis(analysis, tiny(tiny_llama), rotations=1, draws=1).findings.verdict
    assert found.outcome == outcome
    assert found.estimate == (ends["zero"] if shown == "zero" else ends["densified"])
    assert found.control_estimate is not None and found.control_estimate.value == control[0]


@pytest.mark.slow
def test_the_interval_of_dense_rows_is_over_rotations(tiny_llama):
    """One rotation has none, so that it cannot settle anything; the ablations have one over prompts."""
    for rotations in (1, 6):
        found = findings("settle_it", tiny(tiny_llama), rotations=rotations)
        dense = found.numbers["removed, natural sink, super neurons, densified"]
        zero = found.numbers["removed, natural sink, super neurons, zero"]
        assert (dense.n, dense.over) == (rotations, "rotations") and np.isnan(dense.low) == (rotations == 1)
        assert (zero.n, zero.over) == (4, "prompts")
        assert estimate_text(dense).endswith(f"n = {rotations} rotations") and estimate_text(zero).endswith("n = 4")
        assert f"over {rotations} rotations" in found.caption
    rows = found.table[(found.table.sink == "natural sink") & (found.table.neurons == "super neurons")]
    rows = rows[rows.edit == "densified"]
    assert rows.groupby("draw").removed.mean().std() > 0.01
    assert dense.value == pytest.approx(rows.removed.mean(), abs=1e-6)


def test_rows_are_not_made_dense_where_a_norm_stands_behind_the_mlp():
    found = findings("settle_it", tiny(tiny_model("gemma2")))
    assert set(found.table.edit) == {"none", "zero", "mean", "times 0.25", "times 0.5", "times 0.75"}
    assert "cannot be made dense" in found.caption


def test_an_induced_sink_that_has_no_place_is_left_out(tiny_llama):
    study = tiny(tiny_llama)
    found = findings("settle_it", study, positions=(int(study.sinks[0]),))
    assert "induced sink" not in set(found.table.sink) and "The induced sink is left out" in found.caption


def twice(**given: Any) -> sl.Study:
    """The model whose sink is made in blocks 0 and 2, neither by way of the other."""
    model = planted_twice()
    return sl.Study(model, sl.prompts.from_tokens(model, planted_prompts(16)[1:].repeat(3, 1)), given=given)


@pytest.mark.parametrize("event", [1, 2])
def test_each_event_is_settled_by_itself_and_with_the_others(event):
    """By hand: the sink of a block is that of the event before it, and of no other."""
    found = findings("settle_it", twice(event=event), positions=(5,), rotations=2, draws=1)
    gone = pytest.approx(1 - np.mean([1 / (i + 1) for i in range(1, 16)]), abs=1e-5)
    assert found.numbers["removed, natural sink, super neurons, zero"].value == gone
    removed = found.table.groupby(["sink", "neurons"]).removed.mean()
    for block, of_first, of_second in (("block 1", gone, 0), ("block 3", 0, gone)):
        rows = removed[f"natural sink, {block}"]
        assert rows["super neurons of event 1 (block 0)"] == of_first
        assert rows["super neurons of event 2 (block 2)"] == of_second
        assert rows["super neurons of all events"] == gone
        assert rows[rows.index.str.startswith("random neurons")].tolist() == pytest.approx([0, 0, 0], abs=1e-5)
        name = f"removed, natural sink, {block}, super neurons of event 1 (block 0), zero"
        assert found.numbers[name].value == of_first
    load_analysis("settle_it").draw(found)


def test_all_later_blocks_go_beyond_the_next_event():
    """Blocks 1 and 2 attend to what the first event has written, block 3 to what the second has."""
    found = findings("settle_it", twice(event=1), positions=(5,), rotations=2, draws=1)
    gone = 1 - np.mean([1 / (i + 1) for i in range(1, 16)])
    all_later = found.numbers["removed, natural sink, all later blocks, super neurons, zero"].value
    assert all_later == pytest.approx(gone * 2 / 3, abs=1e-5)


def test_a_block_without_super_neurons_is_named_and_the_others_are_settled(monkeypatch):
    real = sl.Study.at_block

    def at_block(self: Any, layer: int) -> Any:
        if layer == 0:
            raise NoSinkError("no super neuron in block 0")
        return real(self, layer)

    monkeypatch.setattr(sl.Study, "at_block", at_block)
    found = findings("settle_it", twice(), positions=(5,), rotations=2, draws=1)
    assert "Block 0 is left out of its event: no super neuron in block 0." in found.caption
    seen = {name for name in found.table.neurons if " of " in name}
    assert seen == {f"{who} neurons of event 2 (block 2)" for who in ("super", "random")}


def test_events_behind_which_there_is_no_sink_are_named(monkeypatch):
    """A ratio of two numbers near 0 says nothing."""
    study = twice()
    attends: Any = study.model.blocks[1].attn  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(attends, "W_K", torch.nn.Parameter(-attends.W_K))
    found = findings("settle_it", study, positions=(5,), rotations=2, draws=1)
    assert "natural sink, block 1: 3 of 3 prompts have too little of a sink there." in found.caption
    assert set(found.table.sink) == {
        "natural sink",
        "natural sink, all later blocks",
        "induced sink",
        "natural sink, block 3",
    }


# All three.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask_intervention", "variance_amplification", "settle_it"])
@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "gemma2"])
def test_they_run_on_other_architectures(arch, name):
    """A plain MLP and learned positions; parallel blocks; a bridge whose MLPs are normalised behind."""
    found = findings(name, tiny(tiny_model(arch)))
    assert found.verdict.parts[0].outcome in ("holds", "does not hold", "undecided")
    measured = found.table[[c for c in ("value", "share", "removed") if c in found.table]]
    assert len(measured) and np.isfinite(measured).all(axis=None)
    load_analysis(name).draw(found)
