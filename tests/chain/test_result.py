"""Results: effects, intervals, summaries; folders that appear as a whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from sinklens.chain.result import SCORE_KEYS, ChainResult, summarise
from sinklens.cli.tables import chain_footer, chain_table, console, formation_tables
from sinklens.errors import InputError
from sinklens.formation import Formation, FormationEvent, OutlierDim, SuperNeuron
from sinklens.pairs.effects import effect
from sinklens.records.files import atomic_folder, check_out
from sinklens.records.plain import to_plain
from sinklens.statistics import bootstrap_interval

NAN = math.nan
FILES = {"chain.json", "scores.parquet", "effects.parquet", "attention.safetensors", "tokens.safetensors"}


def synthetic_result(n_prompts: int = 3) -> ChainResult:
    """A small result with everything that a real one has: two stages, controls, an excluded prompt, no units, NaN."""
    rows = []
    for stage, edit, control, units in (
        ("value_aggregation", "transplant", "", None),
        ("super_neurons", "transplant", "", [7, 3]),
        ("super_neurons", "transplant", "other_neurons", None),
    ):
        for direction in ("denoise", "noise"):
            for prompt in range(n_prompts):
                value = NAN if prompt == 2 else (0.1 if control else 1.0) + 0.02 * prompt
                rows.append(
                    {
                        "stage": stage,
                        "edit": edit,
                        "direction": direction,
                        "control": control,
                        "draw": 0,
                        "prompt": prompt,
                        "effect": value,
                        "units": units,
                    }
                )
    effects = pd.DataFrame(rows)
    scores = summarise(effects, SCORE_KEYS, seed=0)
    scores["predicted"] = [0.0 if control else 1.0 for control in scores.control]
    scores["layers"] = [[0, 1, 2] if stage == "value_aggregation" else [2] for stage in scores.stage]
    is_super = (scores.stage == "super_neurons") & (scores.control == "")
    scores["units"] = [[7, 3] if flag else None for flag in is_super]
    scores["draws"] = 1
    matrix = pd.DataFrame(
        {
            "stage": ["value_aggregation"] * 2,
            "direction": ["denoise", "noise"],
            "readout": ["sink"] * 2,
            "effect": [1.0, 1.0],
            "ci_low": [NAN, NAN],
            "ci_high": [NAN, NAN],
            "n": [1, 1],
            "n_excluded": [0, 0],
        }
    )
    return ChainResult(
        scores=scores,
        effects=effects,
        matrix=matrix,
        checks=pd.DataFrame({"quantity": ["entropy"], "where": ["target"], "layers": [[0, 1]], "base": [1.5]}),
        formation=Formation(
            layer=2,
            sink_positions=(0,) * n_prompts,
            super_neurons=(SuperNeuron(7, 12.5, 11.0, 300.0, 0.5), SuperNeuron(3, None, 9.0, 30.0, 0.1)),
            outlier_dims=(OutlierDim(5, -250.0, math.inf),),
            events=(FormationEvent(2, 1.0, 100.0, 1.5, 80.0, 99.0, NAN),),
            profile=pd.DataFrame({"layer": [0, 1, 2], "norm_sink_after": [1.0, NAN, 100.0]}),
        ),
        runs={run: {"sink": [value] * n_prompts} for run, value in (("base", 0.02), ("anchored", 0.6))},
        config={
            "target": 10,
            "pair": "block_aggregation",
            "readout_layers": [3, 4],
            "n_prompts": n_prompts,
            "length": 16,
            "prompts": "synthetic ✓",
            "n_skipped": 1,
            "min_gap": 0.01,
            "seed": 0,
            "strength": None,
        },
        provenance={"versions": {"python": "3"}, "git_commit": None, "device": "cpu", "dtype": "float32"},
        engine={"n_patches": 6, "n_rows": 18, "n_forwards": 4, "seconds": 0.5, "peak_bytes": None},
        tokens=[["<b>", " ", "é", "\n"] * 4],
        attention={run: torch.rand(1, 2, 16, 16).half() for run in ("base", "anchored")},
        received={run: torch.rand(1, 16) for run in ("base", "anchored")},
        neurons={run: torch.rand(1, 16, 2) for run in ("base", "anchored")},
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- Effects ----------------------------------------------------------------------------------------------------------


def test_effect_counts_from_the_run_that_was_patched() -> None:
    base, anchored = np.array([0.1, 0.2]), np.array([0.5, 0.6])
    denoised, noised = np.array([0.2, 0.5]), np.array([0.2, 0.5])
    np.testing.assert_allclose(effect(denoised, base, anchored, 0.01), [0.1 / 0.4, 0.3 / 0.4])
    np.testing.assert_allclose(effect(noised, anchored, base, 0.01), [0.3 / 0.4, 0.1 / 0.4])
    # As the definition of the noise direction writes it: (M_anchored - M_patched) / (M_anchored - M_base).
    np.testing.assert_allclose(effect(noised, anchored, base, 0.01), (anchored - noised) / (anchored - base))


def test_effect_identities_are_exact() -> None:
    rng = np.random.default_rng(0)
    start, end = rng.random(1000), rng.random(1000)
    for a, b in ((start, end), (end, start)):
        kept = np.abs(b - a) >= 0.01
        assert (effect(b, a, b, 0.01)[kept] == 1).all()
        assert (effect(a, a, b, 0.01)[kept] == 0).all()


def test_effect_is_never_clipped() -> None:
    found = effect(np.array([-0.4, 1.6]), np.array([0.0, 0.0]), np.array([0.8, 0.8]), 0.01)
    np.testing.assert_allclose(found, [-0.5, 2.0])


def test_effect_keeps_its_sign_when_the_pair_lowers_the_metric() -> None:
    np.testing.assert_allclose(effect(np.array([0.4]), np.array([0.5]), np.array([0.1]), 0.01), [0.25])


def test_effect_is_missing_where_the_gap_is_too_small() -> None:
    start = np.zeros(4)
    found = effect(np.ones(4), start, np.array([0.25, -0.25, 0.249, -0.249]), 0.25)
    np.testing.assert_allclose(found, [4, -4, NAN, NAN])
    assert np.isnan(effect(np.ones(1), np.zeros(1), np.zeros(1), 0.0)).all()  # never divided by zero


def test_effect_towards_one_number_for_all() -> None:
    np.testing.assert_allclose(effect(np.array([1.0, 3.0]), np.array([2.0, 4.0]), 0.0, 0.01), [0.5, 0.25])


# -- Intervals --------------------------------------------------------------------------------------------------------


def test_bootstrap_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(1).normal(size=16)
    np.random.seed(5)
    first = bootstrap_interval(values, seed=3)
    np.random.seed(6)
    assert bootstrap_interval(values, seed=3) == first
    assert bootstrap_interval(list(values), seed=3) == first
    assert bootstrap_interval(values, seed=4) != first


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval([0.7] * 5, seed=0) == (0.7, 0.7)


@pytest.mark.parametrize("values", [[], [1.0], [NAN, 1.0], [NAN, NAN], [math.inf, 1.0]])
def test_bootstrap_of_fewer_than_two_values_is_missing(values: list[float]) -> None:
    assert np.isnan(bootstrap_interval(values, seed=0)).all()


def test_bootstrap_leaves_out_what_is_missing() -> None:
    values = [0.1, 0.5, 0.9, 0.3]
    assert bootstrap_interval([0.1, NAN, 0.5, 0.9, 0.3], seed=0) == bootstrap_interval(values, seed=0)


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_bootstrap_against_one_written_out(level: float) -> None:
    values = np.random.default_rng(2).exponential(size=24)
    rng = np.random.default_rng(99)
    means = values[rng.integers(0, len(values), size=(50_000, len(values)))].mean(1)
    tail = 50 * (1 - level)
    expected = np.percentile(means, [tail, 100 - tail])
    # 2000 resamples: the ends of a 95% interval scatter by about a twentieth of a standard error.
    found = bootstrap_interval(values, seed=0, level=level)
    np.testing.assert_allclose(found, expected, atol=0.25 * means.std())
    assert found[0] < values.mean() < found[1]


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
    assert (row.ci_low, row.ci_high) == bootstrap_interval([0.3, 1.0], seed=0)
    assert (row.n, row.n_excluded) == (2, 0)


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


# -- Plain values -----------------------------------------------------------------------------------------------------


def test_to_plain() -> None:
    value = {
        "nan": NAN,
        "inf": -math.inf,
        "np_nan": np.float32("nan"),
        3: np.int64(4),
        "tuple": (1, (2.5,)),
        "array": np.array([[1.0, NAN]]),
        "scalar": np.array(2),
        "bool": np.bool_(True),
        "none": None,
        "path": Path("a") / "b",
        "text": "é",
        "true": True,
    }
    plain = to_plain(value)
    assert plain == {
        "nan": None,
        "inf": None,
        "np_nan": None,
        "3": 4,
        "tuple": [1, [2.5]],
        "array": [[1.0, None]],
        "scalar": 2,
        "bool": True,
        "none": None,
        "path": os.path.join("a", "b"),
        "text": "é",
        "true": True,
    }
    assert type(plain["3"]) is int and plain["bool"] is True
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


# -- Folders ----------------------------------------------------------------------------------------------------------


def earlier_run(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "chain.json").write_text(content)
    (folder / "extra.txt").write_text("only in the old one")
    return folder


def write_run(out: Path, *, force: bool = False) -> None:
    with atomic_folder(out, force=force) as folder:
        assert out != folder
        (folder / "chain.json").write_text("new")


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "run"
    with atomic_folder(out, force=False) as folder:
        (folder / "chain.json").write_text("new")
        assert not out.exists()
    assert names(out) == {"chain.json"}
    assert names(out.parent) == {"run"}


def test_a_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "run").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_exists_needs_force(tmp_path: Path) -> None:
    out = earlier_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"exists already: choose another --out, or replace it with --force"):
        write_run(out)
    assert (out / "chain.json").read_text() == "old"
    write_run(out, force=True)
    assert (out / "chain.json").read_text() == "new"
    assert names(out) == {"chain.json"} and names(tmp_path) == {"run"}


def test_force_makes_a_new_folder_and_fills_an_empty_one(tmp_path: Path) -> None:
    write_run(tmp_path / "new", force=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write_run(tmp_path / "empty")
    write_run(tmp_path / "empty", force=True)
    assert names(tmp_path / "new") == names(tmp_path / "empty") == {"chain.json"}


def test_force_replaces_only_earlier_runs(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not the folder of an earlier run"):
        write_run(tmp_path / "precious", force=True)
    (tmp_path / "file").write_text("text")
    for force in (False, True):
        with pytest.raises(InputError, match="is a file: give a folder"):
            write_run(tmp_path / "file", force=force)
    assert names(tmp_path) == {"precious", "file"} and names(tmp_path / "precious") == {"thesis.txt"}


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    out = earlier_run(tmp_path / "run")
    for target, force in ((out, True), (tmp_path / "new", False), (tmp_path / "made" / "for" / "it", False)):
        with pytest.raises(type(error)), atomic_folder(target, force=force) as folder:
            (folder / "chain.json").write_text("half")
            raise error
    assert names(tmp_path) == {"run"}
    assert names(out) == {"chain.json", "extra.txt"} and (out / "chain.json").read_text() == "old"


def test_parents_that_are_in_use_stay(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "first"
    with pytest.raises(RuntimeError), atomic_folder(out, force=False):
        (tmp_path / "runs" / "other").mkdir()
        raise RuntimeError
    assert names(tmp_path / "runs") == {"other"}


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    match = r"run cannot be written \(No space left"
    with pytest.raises(InputError, match=match), atomic_folder(tmp_path / "run", force=False):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == set()


def test_a_rename_that_fails_brings_the_old_run_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, replace_file, calls = earlier_run(tmp_path / "run"), os.replace, []

    def second_fails(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(InputError, match="cannot be written"):
        write_run(out, force=True)
    assert len(calls) == 3
    assert names(tmp_path) == {"run"} and (out / "chain.json").read_text() == "old"


def test_somebody_elses_run_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="cannot be written"), atomic_folder(out, force=False) as folder:
        (folder / "chain.json").write_text("mine")
        earlier_run(out, "theirs")
    assert names(tmp_path) == {"run"} and (out / "chain.json").read_text() == "theirs"


def test_a_link_to_an_earlier_run_stays_a_link(tmp_path: Path) -> None:
    earlier_run(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write_run(tmp_path / "link", force=True)
    assert names(tmp_path) == {"real", "link"} and (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "chain.json").read_text() == "new"


def test_the_working_folder_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(earlier_run(tmp_path / "run"))
    write_run(Path(), force=True)
    assert (tmp_path / "run" / "chain.json").read_text() == "new"
    assert names(tmp_path) == {"run"}


@pytest.mark.parametrize("name", ["file/run", "file/deep/run", "x" * 300, f"new/{'x' * 300}", "circle/run"])
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "circle").symlink_to("circle")
    for attempt in (lambda: check_out(tmp_path / name, force=False), lambda: write_run(tmp_path / name)):
        with pytest.raises(InputError, match=r"cannot be written \(.+\): choose another --out"):
            attempt()
    assert names(tmp_path) == {"file", "circle"}


def test_a_parent_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refuse(**_: Any) -> Iterator[None]:  # permission bits do not stop root
        raise PermissionError(13, "Permission denied")
        yield

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        check_out(tmp_path / "run", force=False)


def test_a_look_leaves_no_trace(tmp_path: Path) -> None:
    check_out(tmp_path / "a" / "b" / "run", force=False)
    check_out(earlier_run(tmp_path / "run"), force=True)
    assert names(tmp_path) == {"run"} and names(tmp_path / "run") == {"chain.json", "extra.txt"}


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


# -- Tables -----------------------------------------------------------------------------------------------------------


def test_tables_say_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_result()
    screen = console()
    screen.print(chain_table(result))
    for line in chain_footer(result):
        print(line)  # noqa: T201
    for table in formation_tables(result.formation):
        screen.print(table)
    text = capsys.readouterr().out
    for part in (
        "value_aggregation",
        "super_neurons",
        "control: other_neurons",
        "0-2",
        "1.01 [1.00, 1.02] (1)",
        "0.11 [0.10, 0.12] (0)",
        "0.020 in the base run, 0.600 in the anchored run",
        "blocks 3-4",
        "3 prompts of 16 tokens",
        "1 skipped as too short; 1 excluded",
        "2 (explained)",
        "no gate",
    ):
        assert part in text, part
    assert "…" not in text


def test_tables_are_never_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    result = synthetic_result()
    scores = result.scores.assign(control="random_subspace", effect=-123.456, ci_low=-1234.5, ci_high=1234.5)
    console().print(chain_table(replace(result, scores=scores)))
    text = capsys.readouterr().out
    assert "control: random_subspace" in text and "-123.46 [-1234.50, 1234.50] (1)" in text
    assert "…" not in text


def test_a_score_is_looked_up_by_name():
    result = synthetic_result()
    row = result.scores.iloc[-1]
    assert result.score(row.stage, row.edit, row.direction, row.control).equals(row)
    with pytest.raises(KeyError, match="no score for"):
        result.score("no_such_stage", "transplant", "noise")
