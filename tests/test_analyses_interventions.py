"""Interventions on the sink: a token masked, its variance amplified, the super neurons' down-projections removed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import sinklens as sl
from sinklens.analysis import load_analysis, tidy
from sinklens.errors import InputError
from tests.one_at_a_time import cache_of
from tests.planted import planted_model
from tests.planted import prompts as planted_prompts
from tests.tiny import tiny_model, tiny_tokens

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
    assert verdict.outcome == "holds"
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
    assert found.verdict.outcome == "does not hold"
    assert found.verdict.estimate.value == pytest.approx(0, abs=1e-5)
    both = findings("mask_intervention", planted(), positions=(3, 5))
    assert both.verdict.estimate.value == pytest.approx(0.25, abs=1e-3)


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


# All three.

SMALL = {"mask_intervention": {"positions": (10, 14)}}


@pytest.mark.parametrize("name", SMALL)
def test_numbers_do_not_depend_on_the_batch_size(tiny_llama, name):
    one, other = (findings(name, tiny(tiny_llama, memory_budget=budget), **SMALL[name]) for budget in (1, None))
    same_tables(one.table, other.table)
    assert one.verdict.estimate.value == pytest.approx(other.verdict.estimate.value, abs=1e-5)
    assert one.numbers.keys() == other.numbers.keys()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "gemma2"])
def test_they_run_on_other_architectures(arch, name):
    """A plain MLP and learned positions; parallel blocks; a bridge whose MLPs are normalised behind."""
    found = findings(name, tiny(tiny_model(arch)))
    assert found.verdict.outcome in ("holds", "does not hold")
    assert np.isfinite(found.table.value).all()
    load_analysis(name).draw(found)
