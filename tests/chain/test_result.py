"""Results: summaries of effects, and what is saved and loaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from sinklens.chain.result import ChainResult, summarise
from sinklens.cli.tables import formation_tables
from sinklens.errors import InputError
from sinklens.statistics import bootstrap_interval
from tests.helpers.folders import names
from tests.helpers.synthetic import synthetic_result

NAN = math.nan
FILES = {"chain.json", "scores.parquet", "effects.parquet", "attention.safetensors", "tokens.safetensors"}


# -- Summaries --------------------------------------------------------------------------------------------------------


def test_draws_are_averaged_before_prompts() -> None:
    effects = pd.DataFrame(
        {
            "stage": "s",
            "prompt": [0, 0, 0, 1],
            "draw": [0, 1, 2, 0],
            "effect": [0.0, 0.3, 0.6, 1.0],
        }
    )
    row = summarise(effects, ["stage"], seed=0).iloc[0]
    assert row.effect == pytest.approx((0.3 + 1.0) / 2)  # over all rows it would be 0.475
    assert row.ci_low <= 0.3 and row.ci_high == 1.0  # prompt 0 may be its lowest draw only
    assert (row.n, row.n_excluded) == (2, 0)


def test_draws_that_differ_widen_the_interval_and_equal_ones_do_not() -> None:
    prompts, draws = np.arange(8), np.arange(3)
    own = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    shift = {"same": np.zeros(3), "different": np.array([-1.0, 0.0, 1.0])}
    rows = [
        {"stage": name, "prompt": p, "draw": d, "effect": own[p] + by[d]}
        for name, by in shift.items()
        for p in prompts
        for d in draws
    ]
    found: list[Any] = list(summarise(pd.DataFrame(rows), ["stage"], seed=4).itertuples())
    same, different = found
    assert (same.ci_low, same.ci_high) == pytest.approx(bootstrap_interval(own, seed=4))
    assert different.effect == pytest.approx(same.effect)
    assert different.ci_low < same.ci_low - 0.2 and different.ci_high > same.ci_high + 0.2


def test_prompts_of_one_text_are_one_text_in_summaries() -> None:
    effects = pd.DataFrame({"stage": "s", "prompt": range(6), "effect": [0.0, 0.0, 0.3, 0.3, NAN, 1.0]})
    groups = ["a", "a", "b", "b", "c", "d"]
    grouped, plain = (summarise(effects, ["stage"], 0, each).iloc[0] for each in (groups, None))
    assert (grouped.n, grouped.n_groups, plain.n_groups) == (5, 3, 5)
    assert grouped.effect == plain.effect
    expected = bootstrap_interval([0.0, 0.0, 0.3, 0.3, 1.0], 0, groups=["a", "a", "b", "b", "d"])
    assert (grouped.ci_low, grouped.ci_high) == expected


def test_summaries_count_excluded_prompts_and_keep_the_order() -> None:
    effects = pd.DataFrame(
        {
            "stage": ["z", "z", "z", "a", "a", "a"],
            "prompt": [0, 1, 2] * 2,
            "effect": [1.0, NAN, 2.0, NAN, NAN, NAN],
        }
    )
    found = summarise(effects, ["stage"], seed=0)
    assert found.stage.tolist() == ["z", "a"]
    assert found.n.tolist() == [2, 0] and found.n_excluded.tolist() == [1, 3]
    assert found.effect[0] == 1.5 and np.isnan(found.effect[1])
    assert np.isnan(found.ci_low[1]) and np.isnan(found.ci_high[1])


def test_summaries_by_several_keys_and_missing_ones() -> None:
    effects = pd.DataFrame({"a": ["x", "x", "y"], "b": ["p", None, "p"], "prompt": 0, "effect": [1.0, 2.0, 3.0]})
    found = summarise(effects, ["a", "b"], seed=0)
    assert found.effect.tolist() == [1, 2, 3]
    assert found.a.tolist() == ["x", "x", "y"] and found.b.isna().tolist() == [False, True, False]


# -- A whole result ---------------------------------------------------------------------------------------------------


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    result = synthetic_result()
    assert result.save(tmp_path / "run") == tmp_path / "run"
    assert names(tmp_path / "run") == FILES
    loaded = ChainResult.load(tmp_path / "run")
    for name in ("scores", "effects", "matrix", "checks"):
        assert_frame_equal(getattr(loaded, name), getattr(result, name), check_dtype=False)
    assert loaded.matrix.ci_low.dtype == float  # all missing, and still numbers
    assert loaded.scores.layers.tolist() == result.scores.layers.tolist()
    assert loaded.scores.units.tolist() == result.scores.units.tolist()
    for name in ("runs", "config", "provenance", "engine", "tokens"):
        assert getattr(loaded, name) == getattr(result, name)
    for name in ("attention", "received", "neurons"):
        found, saved = getattr(loaded, name), getattr(result, name)
        assert found.keys() == saved.keys() == {"base", "anchored"}
        assert all(torch.equal(found[run], saved[run]) for run in saved)


def test_a_result_of_an_earlier_version_has_no_values_of_tokens(tmp_path: Path) -> None:
    synthetic_result().save(tmp_path / "run")
    (tmp_path / "run" / "tokens.safetensors").unlink()
    loaded = ChainResult.load(tmp_path / "run")
    assert loaded.received == loaded.neurons == {} and loaded.attention


def test_a_formation_comes_back_with_nan_for_what_json_cannot_hold(tmp_path: Path) -> None:
    result = synthetic_result()
    result.save(tmp_path / "run")
    found = ChainResult.load(tmp_path / "run").formation
    assert (found.layer, found.sink_positions) == (2, (0, 0, 0))
    assert found.super_neurons == result.formation.super_neurons  # None stays: that neuron has no gate
    assert found.neurons == (7, 3) and found.dims == (5,)
    assert found.outlier_dims[0].written == -250 and math.isnan(found.outlier_dims[0].z)
    assert math.isnan(found.events[0].attn_norm)
    assert replace(found.events[0], attn_norm=0.0) == replace(result.formation.events[0], attn_norm=0.0)
    assert_frame_equal(found.profile, result.formation.profile)
    assert formation_tables(found)  # numbers are formatted there, so none may be None


def test_a_saved_result_can_be_saved_again(tmp_path: Path) -> None:
    synthetic_result().save(tmp_path / "first")
    ChainResult.load(tmp_path / "first").save(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "chain.json").read_text()) for name in ("first", "second"))
    assert first == second


def test_chain_json_is_strict_and_complete(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    synthetic_result().save(tmp_path / "run")
    text = (tmp_path / "run" / "chain.json").read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=refuse)
    assert set(data) == {
        "config",
        "provenance",
        "engine",
        "formation",
        "runs",
        "scores",
        "chain_matrix",
        "checks",
        "tokens",
    }
    assert "synthetic ✓" in text
    assert data["scores"][0]["layers"] == [0, 1, 2] and data["scores"][0]["n_excluded"] == 1
    assert data["formation"]["outlier_dims"][0]["z"] is None


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    result = replace(synthetic_result(), config={"target": object()})
    with pytest.raises(TypeError):
        result.save(tmp_path / "made" / "run")
    assert names(tmp_path) == set()


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"holds no chain\.json: give the folder"):
            ChainResult.load(folder)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_run_is_one_sentence(tmp_path: Path, name: str, damage: str) -> None:
    if (name, damage) == ("tokens.safetensors", "gone"):
        pytest.skip("runs of earlier versions have none")
    synthetic_result().save(tmp_path / "run")
    path = tmp_path / "run" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:40])
    else:
        path.unlink()
    with pytest.raises(InputError) as error:
        ChainResult.load(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "run") in str(error.value)


def test_a_run_of_something_else_is_one_sentence(tmp_path: Path) -> None:
    synthetic_result().save(tmp_path / "run")
    for text in ("[]", "{}", '{"formation": 3}'):
        (tmp_path / "run" / "chain.json").write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            ChainResult.load(tmp_path / "run")


def test_a_score_is_looked_up_by_name():
    result = synthetic_result()
    row = result.scores.iloc[-1]
    assert result.score(row.stage, row.edit, row.direction, row.control).equals(row)
    with pytest.raises(KeyError, match="no score for"):
        result.score("no_such_stage", "transplant", "noise")
