"""What is made of a sweep's rows: summary, strongest cells, overview, tensors, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sinklens as sl
from sinklens.errors import InputError
from sinklens.sweeps import LabelledTensor, SweepResult
from sinklens.sweeps.schema import CELL
from tests.helpers.sweeps import FORMATION, TARGET, N, tiny_batch

OPTIONS: dict[str, Any] = {
    "stages": "z,resid_pre",
    "layers": "0,2-3",
    "positions": "3-6",
    "units": "heads",
    "edits": "transplant,zero",
    "readouts": "attention_received,loss",
    "target": TARGET,
    "formation": FORMATION,
    "task_size": 13,
    "group_size": 2,
    "min_gap": 0.02,
}


@pytest.fixture(scope="module")
def result(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    out = tmp_path_factory.mktemp("sweep")
    return sl.sweep(tiny_llama, tiny_batch(tiny_llama), out=out, **OPTIONS)


@pytest.fixture(scope="module")
def natural(tiny_llama: Any) -> SweepResult:
    options = {**OPTIONS, "target": "natural", "positions": "target", "min_gap": 0.0}
    return sl.sweep(tiny_llama, tiny_batch(tiny_llama), **options)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 200, 1 << 21])
def test_summary_is_the_mean_over_prompts(result: SweepResult, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinklens.sweeps.result.ROWS_AT_ONCE", rows)
    summary = result.summary()
    assert len([*result.cells()]) == {1: 19, 200: 10, 1 << 21: 1}[rows]
    table = result.table.astype({"unit": float}).fillna({"unit": -1})
    assert len(summary) == len(table) // N
    assert (summary.n + summary.n_excluded == N).all() and summary.n_excluded.sum() > 0
    expected = table.groupby(CELL, observed=True, sort=False).agg(
        effect=("effect", "mean"), effect_std=("effect", "std"), value=("value", "mean"), n=("effect", "count")
    )
    found = summary.astype({"unit": float}).fillna({"unit": -1}).set_index(CELL)
    for name in expected:
        np.testing.assert_allclose(found[name].loc[expected.index], expected[name], rtol=1e-9, err_msg=name)


@pytest.mark.slow
def test_strongest_cells_and_overview(result: SweepResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinklens.sweeps.result.ROWS_AT_ONCE", 200)
    summary = result.summary()
    strongest = result.strongest(7)
    sizes = np.sort(summary.effect.abs().dropna())[::-1]
    np.testing.assert_allclose(strongest.effect.abs(), sizes[:7])
    keys = ["stage", "edit", "direction", "readout"]
    overview = result.overview().set_index(keys)
    assert len(overview) == 2 * 2 * 2 * 2 and overview.cells.sum() == len(summary)
    for key, cells in summary.groupby(keys, observed=True):
        row = overview.loc[key]
        assert row.effect == pytest.approx(cells.effect.mean())
        best = cells.loc[cells.effect.abs().idxmax()]
        assert (row.strongest, row.layer, row.position) == (best.effect, best.layer, best.position)


@pytest.mark.slow
def test_every_row_is_in_its_place_in_the_tensor(result: SweepResult) -> None:
    for readout, value in (("loss", "effect"), ("loss", "value"), ("attention_received", "base")):
        tensor: LabelledTensor = result.to_tensor(readout, value)  # pyright: ignore[reportArgumentType]: a literal
        assert tensor.axes == ("stage", "layer", "position", "unit", "edit", "direction", "prompt")
        assert tensor.coords["layer"] == (0, 2, 3) and tensor.coords["unit"] == (None, 0, 1, 2, 3)
        rows = result.table[result.table.readout == readout]
        for row in rows.iloc[::11].to_dict("records"):
            place = {axis: row[axis] for axis in tensor.axes}
            place["unit"] = None if pd.isna(place["unit"]) else int(place["unit"])
            found = tensor.select(**place).values.item()
            assert found == row[value] or (np.isnan(found) and np.isnan(row[value]))
    assert tensor.values.isfinite().sum() == len(rows)
    assert tensor.select(stage="resid_pre", unit=1).values.isnan().all()


@pytest.mark.slow
def test_change_is_counted_from_the_run_that_was_patched(result: SweepResult) -> None:
    change, value = result.to_tensor("loss", "change"), result.to_tensor("loss", "value")
    start = {"denoise": result.to_tensor("loss", "base"), "noise": result.to_tensor("loss", "anchored")}
    for direction, run in start.items():
        expected = value.select(direction=direction).values - run.select(direction=direction).values
        torch.testing.assert_close(change.select(direction=direction).values, expected, equal_nan=True)


def test_means_and_tables_of_tensors(result: SweepResult) -> None:
    tensor = result.to_tensor("attention_received").select(stage="resid_pre", unit=None, edit="zero")
    mean = tensor.mean("prompt", "direction")
    assert mean.axes == ("layer", "position")
    frame = mean.to_frame()
    assert list(frame.index) == [0, 2, 3] and list(frame.columns) == [3, 4, 5, 6]
    here = tensor.values[1, 2]
    assert frame.loc[2, 5] == pytest.approx(here[~here.isnan()].mean().item())
    with pytest.raises(InputError, match="a table has two axes"):
        tensor.to_frame()
    with pytest.raises(InputError, match="there is no axis 'head'"):
        tensor.mean("head")
    with pytest.raises(InputError, match="layer 1 is not there: it has 0, 2, 3"):
        tensor.select(layer=1)
    with pytest.raises(InputError, match="choose attention_received, loss"):
        result.to_tensor()
    with pytest.raises(InputError, match="choose effect, value, change"):
        result.to_tensor("loss", "size")  # pyright: ignore[reportArgumentType]: what a user may do


def test_each_prompt_has_its_own_sink(natural: SweepResult) -> None:
    table = natural.table
    assert {prompt: set(rows.position) for prompt, rows in table.groupby("prompt")} == {0: {0}, 1: {2}, 2: {1}}
    assert set(table.direction) == {"noise"} and table[table.readout == "loss"].effect.isna().all()
    assert table[table.readout == "attention_received"].effect.notna().all()
    summary = natural.summary()
    assert "position" not in summary and (summary.n + summary.n_excluded == N).all()
    tensor = natural.to_tensor("attention_received")
    assert tensor.coords["position"] == ("target",)
    assert tensor.values.isfinite().sum() == (table.readout == "attention_received").sum()
    figure: Any = sl.viz.heatmap(natural, readout="attention_received", x="unit")
    assert len(figure.data) == 4  # stages x edits


def test_the_record(result: SweepResult) -> None:
    assert result.config["target"] == TARGET and result.config["layers"] == [0, 2, 3]
    assert result.formation.layer == FORMATION.layer and result.formation.sink_positions == FORMATION.sink_positions
    assert result.record["provenance"]["prompts_digest"] and result.record["readout_layers"] == [2, 3]
    for path in (Path("nowhere"), Path(__file__).parent):
        with pytest.raises(InputError, match=r"holds no sweep\.json"):
            SweepResult.load(path)
    with pytest.raises(InputError, match="is not a file that sinklens gather has written"):
        SweepResult.load(Path(__file__))


# -- Figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_heatmap_of_layers_and_positions(result: SweepResult) -> None:
    figure: Any = sl.viz.heatmap(result.to_tensor("attention_received").select(stage="resid_pre", unit=None))
    assert len(figure.data) == 4  # edits x directions
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["transplant, denoise", "transplant, noise", "zero, denoise", "zero, noise"]
    panel = figure.data[3]
    assert list(panel.y) == ["0", "2", "3"] and list(panel.x) == ["3", "4", "5", "6"]
    rows = result.table[(result.table.stage == "resid_pre") & (result.table.readout == "attention_received")]
    for i, layer in enumerate((0, 2, 3)):
        for j, position in enumerate((3, 4, 5, 6)):
            place = (rows.layer == layer) & (rows.position == position)
            mine = rows.loc[place & (rows.edit == "zero") & (rows.direction == "noise"), "effect"]
            assert panel.z[i][j] == pytest.approx(mine.mean())
    assert figure.layout.coloraxis.cmid == 0
    assert figure.layout.yaxis.autorange == "reversed" and figure.layout.yaxis.title.text == "block"


@pytest.mark.slow
def test_heatmap_of_other_axes(result: SweepResult) -> None:
    tensor = result.to_tensor("loss", "value").select(stage="z", edit="zero", direction="noise")
    heads: Any = sl.viz.heatmap(tensor.select(position=5), x="unit")
    assert len(heads.data) == 1 and list(heads.data[0].x) == ["0", "1", "2", "3"]
    assert heads.layout.coloraxis.cmid is None and heads.layout.coloraxis.colorbar.title.text == "value"
    prompts: Any = sl.viz.heatmap(tensor.select(unit=1, layer=2), y="prompt", x="position")
    assert np.shape(prompts.data[0].z) == (N, 4)
    each: Any = sl.viz.heatmap(tensor)  # a panel for every head, none for whole activations, which z has not
    assert [note.text for note in each.layout.annotations] == [f"unit {head}" for head in range(4)]


def test_heatmaps_that_are_refused(result: SweepResult) -> None:
    tensor = result.to_tensor("loss")
    with pytest.raises(InputError, match="there is no axis 'head'"):
        sl.viz.heatmap(tensor, x="head")
    with pytest.raises(InputError, match="needs two different axes"):
        sl.viz.heatmap(tensor, x="layer", y="layer")
    with pytest.raises(InputError, match="more than 24 panels"):
        sl.viz.heatmap(tensor, y="stage", x="prompt")
    empty = LabelledTensor(torch.full((2, 2), torch.nan), ("layer", "position"), {"layer": (0, 1), "position": (2, 3)})
    with pytest.raises(InputError, match="there is no value to draw"):
        sl.viz.heatmap(empty)
    with pytest.raises(ValueError, match="do not fit"):
        LabelledTensor(torch.zeros(2, 3), ("layer", "position"), {"layer": (0, 1), "position": (2, 3)})


def test_a_heatmap_says_what_it_shows(tiny_llama: Any) -> None:
    options: dict[str, Any] = {"target": TARGET, "formation": FORMATION, "positions": [TARGET]}
    swept = sl.sweep(tiny_llama, tiny_batch(tiny_llama), stages="z", units="heads", directions="noise", **options)
    figure: Any = sl.viz.heatmap(swept)
    assert figure.layout.title.text == (
        f"attention received: effect, z, position {TARGET}, transplant, noise, mean over {N} prompts"
    )
    assert figure.layout.xaxis.title.text == "head" and figure.layout.yaxis.title.text == "block"


class OfLogits(torch.nn.Module):
    """A readout may be a module, which can be called with anything: what its forward takes counts."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 7]


def test_a_readout_of_logits_alone(tiny_llama: Any) -> None:
    options: dict[str, Any] = {"target": TARGET, "formation": FORMATION, "stages": "mlp_out", "layers": "1"}
    batch = tiny_batch(tiny_llama)

    def both(logits: Any, rows: Any) -> Any:
        return logits[rows.prompts >= 0, -1, 7]

    found = [
        sl.sweep(tiny_llama, batch, readouts=each, **options).table.value.tolist()
        for each in (both, lambda logits: logits[:, -1, 7], OfLogits())
    ]
    assert found[0] == found[1] == found[2]
    with pytest.raises(InputError, match="must be a function of logits, or of logits and rows"):
        sl.sweep(tiny_llama, batch, readouts=lambda: 0, **options)  # pyright: ignore[reportArgumentType]


def test_a_finished_sweep_says_that_nothing_was_run(tiny_llama: Any, tmp_path: Path, capsys: Any) -> None:
    options: dict[str, Any] = {"target": TARGET, "formation": FORMATION, "stages": "mlp_out", "out": tmp_path / "s"}
    for told in (False, True):
        sl.sweep(tiny_llama, tiny_batch(tiny_llama), **options, progress=True)
        assert ("nothing was run" in capsys.readouterr().err) == told
