"""Models side by side: arms, seeds and differences by hand, and what does not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

import sinklens as sl
from sinklens.analysis.base import AnalysisResult, Findings, verdict
from sinklens.cli import app
from sinklens.errors import InputError
from sinklens.lab.compare import t_interval
from sinklens.pages.comparison import comparison_page
from sinklens.statistics import Estimate

LOSS = {("softmax", 0): 2.0, ("softmax", 1): 2.4, ("softmax", 2): 3.1, ("normed", 0): 1.9, ("normed", 1): 2.2}


def trained(root: Path, *, data: str = "text", lr: float = 1e-3, arms: dict[tuple[str, int], float] = LOSS) -> Path:
    """Folders as training leaves them: the loss falls by 1 over training, the share of block 3 is three times that of
    block 1.
    """
    for (arm, seed), loss in arms.items():
        folder = root / f"{arm}-{seed}"
        folder.mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        for step, more in ((0, 1.0), (50, 0.0)):
            here = {"step": step, "tokens": step * 8}
            rows.append({**here, "measure": "loss", "layer": None, "position": None, "value": loss + more})
            for layer in (1, 3):
                share = {
                    "measure": "share",
                    "layer": layer,
                    "position": 0,
                    "value": 0.1 * layer * (1 - more),
                }
                rows.append(here | share)
        pd.DataFrame(rows).to_parquet(folder / "watch.parquet")
        settings = {"variant": arm, "options": {}, "seed": seed, "lr": lr}
        record = {"settings": settings, "data": {"name": data}, "parameters": 1000, "finished": {"tokens": 400}}
        (folder / "lab.json").write_text(json.dumps(record))
    return root


def test_arms_differ_by_the_seeds_that_both_have(tmp_path: Path) -> None:
    found = sl.compare([trained(tmp_path)])
    assert (found.arms, found.reference) == (["normed", "softmax"], "softmax")
    table: Any = found.finals.set_index(["measure", "arm"])
    loss = table.loc[("loss", "normed")]
    assert loss["value"] == pytest.approx(2.05)
    assert loss["difference"] == pytest.approx(((1.9 - 2.0) + (2.2 - 2.4)) / 2)  # seed 2 has no partner
    assert loss["n_paired"] == 2
    assert np.isnan(table.loc[("loss", "softmax"), "difference"])
    # the mean over blocks, at the last step alone
    assert table.loc[("share", "softmax"), "value"] == pytest.approx(0.2)


def test_an_interval_is_that_of_a_paired_t_test(tmp_path: Path) -> None:
    arms = LOSS | {("normed", 2): 2.8}
    found = sl.compare([trained(tmp_path, arms=arms)])
    row: Any = found.finals.set_index(["measure", "arm"]).loc[("loss", "normed")]
    test: Any = stats.ttest_rel([1.9, 2.2, 2.8], [2.0, 2.4, 3.1]).confidence_interval(0.95)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((test.low, test.high))
    assert t_interval(pd.Series([1.0]))[0::3] == (1.0, 1)
    assert np.isnan(t_interval(pd.Series([1.0]))[1:3]).all()


def result(outcome: bool, value: float, model: str = "<b>model</b>") -> AnalysisResult:
    said = verdict("So.", "it", Estimate(value), "none", None, "1", holds=outcome)
    return AnalysisResult("onset", "Onset", "", Findings(said, pd.DataFrame()), None, {}, {"model": model}, 0.0)


def test_verdicts_of_models_stand_side_by_side() -> None:
    found = sl.compare({"one": result(True, 0.9), "two": [result(False, 0.4)]})
    (row,) = found.verdicts.to_dict("records")
    assert (row["verdict: one"], row["verdict: two"], row["same"]) == ("holds", "does not hold", False)
    assert "0 of 1 verdicts are the same for 2 runs" in found.told
    assert found.finals.empty
    assert "2 runs" in repr(found)
    assert "<b>" not in comparison_page(found)


def test_arms_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    one, two = {("softmax", 0): 1.0, ("normed", 0): 1.0}, {("softmax", 0): 2.0}
    slow = trained(tmp_path / "slow", lr=1e-4, arms=two)
    (slow / "softmax-0").rename(slow / "softmax-slow-0")
    found = sl.compare([trained(tmp_path / "fast", arms=one), slow])
    assert found.arms == ["normed", "softmax, lr 0.001", "softmax, lr 0.0001"]
    assert sl.compare([tmp_path / "fast", slow], reference="softmax, lr 0.0001").reference == "softmax, lr 0.0001"


def test_what_does_not_compare_is_refused(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", arms={("softmax", 0): 1.0})
    other = trained(tmp_path / "other", data="others", arms={("normed", 0): 1.0})
    with pytest.raises(InputError, match="different data"):
        sl.compare([one, other])
    with pytest.raises(InputError, match="two runs or more"):
        sl.compare([one])
    with pytest.raises(InputError, match="two runs are called 'softmax-0'"):
        sl.compare([one, one / "softmax-0"])
    with pytest.raises(InputError, match="no trained arm 'sigmoid': the arms are normed, softmax"):
        sl.compare([trained(tmp_path / "both")], reference="sigmoid")
    with pytest.raises(InputError, match="there is no folder"):
        sl.compare([tmp_path / "nowhere"])
    (one / "softmax-0" / "lab.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        sl.compare([one, other])


@pytest.mark.slow
def test_the_command_writes_tables_and_a_page(tmp_path: Path) -> None:
    runs, out = trained(tmp_path / "lab"), tmp_path / "out"
    told = CliRunner().invoke(app, ["compare", str(runs), "--out", str(out)])
    assert told.exit_code == 0, told.output
    assert "difference from softmax" in told.output
    assert {path.name for path in out.iterdir()} == {"compare.json", "curves.parquet", "finals.parquet", "report.html"}
    page = (out / "report.html").read_text()
    assert page.count('data-figure="') == 3  # the loss over training; the share over training and by block
    again = CliRunner().invoke(app, ["compare", str(runs), "--out", str(out)])
    assert again.exit_code == 2
    assert CliRunner().invoke(app, ["compare", str(runs), "--out", str(out), "--force", "--json"]).exit_code == 0
