"""Sweeps that estimate: the same grid, rows and effects as an exact sweep, from gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sinklens.attribution import estimate
from sinklens.edits import Transplant
from sinklens.errors import InputError
from sinklens.formation import find_formation
from sinklens.pairs.pair import Direction, induced_pair
from sinklens.patches import Patch
from sinklens.prompts import from_tokens
from sinklens.readouts.base import Readout
from sinklens.readouts.build import attention_received
from sinklens.sites import RESID_POST, RESID_PRE, K
from sinklens.sweeps import SweepResult, sweep
from sinklens.sweeps.judging import judge
from tests.helpers.tiny import tiny_model

N, LENGTH, TARGET = 3, 16, 4
GRID: dict[str, Any] = {"stages": ("resid_pre", "k", "mlp_post"), "layers": "0-2", "positions": "4,9", "target": TARGET}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def batch(model: Any) -> Any:
    return from_tokens(model, torch.randint(3, 101, (N, LENGTH), generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def formation(model: Any, batch: Any) -> Any:
    return find_formation(model, batch, layer=1, super_neurons=[3, 7], outlier_dims=[2, 5])


@pytest.fixture(scope="module")
def estimated(model: Any, batch: Any, formation: Any) -> Any:
    return sweep(model, batch, formation=formation, min_gap=0, method="attribution", task_size=5, **GRID)


def test_rows_are_those_of_an_exact_sweep(model, batch, formation, estimated):
    """Only what is estimated differs."""
    exact = sweep(model, batch, formation=formation, min_gap=0, **GRID)
    same = ["stage", "site", "layer", "window", "position", "unit", "edit", "direction", "prompt", "readout"]
    assert exact.table[same].astype(str).equals(estimated.table[same].astype(str))
    for run in ("base", "anchored"):
        np.testing.assert_array_equal(exact.table[run], estimated.table[run])
    assert {*exact.table.method} == {"exact"}
    assert {*estimated.table.method} == {"attribution"}
    assert abs(exact.table.value - estimated.table.value).max() > 1e-3


@pytest.mark.slow
@pytest.mark.backend
def test_a_bridge_s_sweep_estimates_the_same(batch, formation, estimated):
    """Keys among it: the same numbers from another class of models, and the only one that newer versions have."""
    found = sweep(tiny_model("llama", "bridge"), batch, formation=formation, min_gap=0, method="attribution", **GRID)
    assert {"k", "resid_pre"} < {*found.table.stage}
    torch.testing.assert_close(
        torch.tensor(found.table.value.array), torch.tensor(estimated.table.value.array), atol=1e-6, rtol=1e-3
    )


@pytest.mark.slow
def test_effects_are_estimated_changes_over_the_pair_s_difference(model, batch, formation, estimated):
    """Denoised it counts from the run without the sink, noised from the run with it."""
    pair = induced_pair(model, batch, formation, TARGET)
    readout = attention_received("m", (2, 3), (TARGET,), N)
    signs: dict[Direction, int] = {"denoise": 1, "noise": -1}
    for direction, sign in signs.items():
        run, source = pair.ends(direction)
        for site, stage in ((RESID_PRE, "resid_pre"), (K, "k")):
            patch = Patch(site, (2,), (9,), Transplant(), None, run, source)
            found = estimate(model, batch, [patch], [readout], runs=pair.runs)
            runs = estimate(
                model,
                batch,
                [Patch(site, (0,), (0,), Transplant(), None, r, source) for r in pair.runs],
                [readout],
                runs=pair.runs,
            ).runs
            gap = runs["anchored"]["m"] - runs["base"]["m"]
            expected = sign * found.changes["m"][0] / gap
            table = estimated.table
            row = table[(table.stage == stage) & (table.layer == 2) & (table.position == 9)]
            row = row[row.direction == direction].sort_values("prompt")
            np.testing.assert_allclose(row.effect, expected, rtol=1e-3, atol=1e-5)
            assert abs(expected).max() > 1e-4


def test_a_whole_residual_stream_read_linearly_has_an_effect_of_one(model, batch, formation):
    """The estimate is exact there, so all of the effect is found, in both directions."""
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0))
    linear = Readout("linear", RESID_POST, (3,), lambda act, _rows: act[:, TARGET] @ weight)
    result = sweep(
        model,
        batch,
        formation=formation,
        stages=("resid_post",),
        layers="3",
        target=TARGET,
        readouts=(linear,),
        method="attribution",
    )
    assert len(result.table) == 2 * N
    np.testing.assert_allclose(result.table.effect, 1, atol=1e-4)


def test_tasks_do_not_change_estimates(model, batch, formation, estimated, tmp_path):
    """Nor do groups of prompts, or a folder."""
    whole = sweep(
        model, batch, formation=formation, min_gap=0, method="attribution", group_size=2, out=tmp_path / "s", **GRID
    )
    keys = ["stage", "layer", "position", "direction", "prompt"]
    both = [result.table.sort_values(keys).effect.to_numpy() for result in (whole, estimated)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-4, atol=1e-6)


def test_an_exact_sweep_is_not_taken_up_with_estimates(model, batch, formation, tmp_path):
    sweep(model, batch, formation=formation, out=tmp_path / "s", **GRID)
    with pytest.raises(InputError, match='another sweep.*method was "exact"'):
        sweep(model, batch, formation=formation, out=tmp_path / "s", method="attribution", **GRID)


def test_a_readout_without_a_gradient_is_refused(model, batch, formation):
    with pytest.raises(InputError, match="sink_rate.*has no gradient"):
        sweep(model, batch, formation=formation, method="attribution", readouts=("sink_rate",), **GRID)


def assert_same(one: Any, other: Any, **tolerance: Any) -> None:
    pd.testing.assert_frame_equal(one, other, **tolerance)


SCREEN: dict[str, Any] = {"method": "screen", "top": 4, "sample": 8, "min_gap": 0, "group_size": 2, "task_size": 7}
CELL = ["stage", "layer", "position", "direction", "prompt", "readout"]


@pytest.fixture(scope="module")
def screened(model: Any, batch: Any, formation: Any, tmp_path_factory: Any) -> Any:
    """Two readouts, groups of two prompts, tasks of seven patches, in a folder."""
    out = tmp_path_factory.mktemp("sweep") / "s"
    return sweep(
        model, batch, formation=formation, readouts=("attention_received", "residual_norm"), out=out, **SCREEN, **GRID
    )


@pytest.mark.slow
def test_a_screened_sweep_runs_its_strongest_and_a_sample(model, batch, formation, screened):
    verified = screened.verified
    exact = sweep(
        model, batch, formation=formation, min_gap=0, readouts=("attention_received", "residual_norm"), **GRID
    )
    assert {*screened.table.method} == {"attribution"}
    assert {*verified.method} == {"exact"}
    assert verified[verified.kind == "top"].patch.nunique() == 4
    assert verified[verified.sampled].patch.nunique() == 8
    for truth, mine, theirs in ((exact, "value", "value"), (screened, "estimate", "effect")):
        both = verified.astype({"stage": str, "direction": str, "readout": str}).merge(
            truth.table.astype({"stage": str, "direction": str, "readout": str})[[*CELL, theirs]],
            on=CELL,
            suffixes=("", "_there"),
            how="left",
        )
        assert len(both) == len(verified) == verified.patch.nunique() * N * 2
        there = both[f"{theirs}_there"]
        np.testing.assert_allclose(both[mine], there, rtol=1e-4, atol=1e-5)
    first = screened.table[screened.table.readout == "attention_received"]
    means = first.groupby(["stage", "layer", "position", "direction"], observed=True).effect.mean().abs().nlargest(4)
    top = verified[verified.kind == "top"]
    assert {*zip(top.stage, top.layer, top.position, top.direction, strict=True)} == {*means.index}


def test_a_screened_sweep_is_read_back_and_not_run_again(model, batch, formation, screened, monkeypatch):
    there = SweepResult.load(screened.folder)
    assert_same(there.verified, screened.verified)
    monkeypatch.setattr("sinklens.sweeps.run.verify", None)
    again = sweep(
        model,
        batch,
        formation=formation,
        readouts=("attention_received", "residual_norm"),
        out=screened.folder,
        **SCREEN,
        **GRID,
    )
    assert_same(again.verified, screened.verified)


@pytest.mark.slow
def test_shards_are_screened_when_all_are_there(model, batch, formation, screened, tmp_path):
    options: dict[str, Any] = {"formation": formation, "readouts": ("attention_received", "residual_norm")}
    options |= {"out": tmp_path / "s"} | SCREEN | GRID
    first = sweep(model, batch, shard=(1, 2), **options)
    assert first.verified is None
    second = sweep(model, batch, shard=(2, 2), **options)
    assert_same(second.verified, screened.verified, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_estimates_are_judged_by_the_sample_alone():
    """Made rows: the top agrees perfectly, the sample runs the other way."""
    rows = [
        {"readout": "m", "patch": i, "kind": kind, "sampled": kind == "sample", "estimate": float(i), "effect": effect}
        for i, (kind, effect) in enumerate([("sample", -float(i)) for i in range(6)] + [("top", 9.0), ("top", 10.0)])
    ]
    (found,) = judge(pd.DataFrame(rows)).to_dict("records")
    assert (found["n"], found["largest_missed"]) == (6, 5)
    assert found["spearman"] == pytest.approx(-1)
    assert found["spearman_size"] == pytest.approx(1)
    assert found["kendall"] == pytest.approx(-1)


@pytest.mark.slow
def test_a_screened_sweep_judges_its_estimates(screened):
    judged = screened.judged()
    assert list(judged.readout) == [*screened.table.readout.unique()]
    pd.testing.assert_frame_equal(judged, judge(screened.verified, screened.config["seed"]))


def test_an_exact_sweep_has_nothing_verified(estimated):
    assert estimated.verified is None
    with pytest.raises(InputError, match="method='screen'"):
        estimated.judged()
    assert estimated.config["method"] == "attribution"


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["loss", "logit_diff", lambda logits, _rows: logits[:, -1, 5]])
def test_readouts_of_the_logits_are_estimated(model, batch, formation, readout):
    """They stand behind the last block, which has no block behind it."""
    given: dict[str, Any] = {"stages": "resid_pre", "layers": "0-3", "target": TARGET, "formation": formation}
    exact = sweep(model, batch, readouts=readout, min_gap=0, **given)
    for method in ("attribution", "screen"):
        found = sweep(model, batch, readouts=readout, min_gap=0, method=method, top=4, sample=3, **given)
        np.testing.assert_allclose(found.table.base, exact.table.base, rtol=1e-5)
        assert len(found.table) == len(exact.table)
        assert (found.table.value - found.table.base).abs().max() > 1e-3
