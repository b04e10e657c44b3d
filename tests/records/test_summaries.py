"""How results show themselves: short, safe, and without work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import sinklens as sl
from sinklens.analysis import AnalysisResult
from sinklens.analysis.base import Findings, Verdict
from sinklens.engine.run import PatchRunner
from sinklens.prompts import PromptBatch
from sinklens.readouts.build import attention_received
from sinklens.records.summaries import html, some, summary
from sinklens.records.text import effect_text, interval_text
from sinklens.statistics import Estimate
from sinklens.study import Study
from sinklens.sweeps import Worker
from tests.helpers.sweeps import FORMATION, TARGET, run, tiny_batch
from tests.helpers.synthetic import synthetic_result

EVIL = "<script>alert(1)</script>\n\u202e"


def analysis_result() -> AnalysisResult:
    verdict = Verdict("holds", f"a claim {EVIL}", f"a statistic {EVIL}", Estimate(0.5, 0.4, 0.6, 8))
    table = pd.DataFrame({f"name {EVIL}": [EVIL] * 30, "value": range(30)})
    return AnalysisResult(f"name {EVIL}", "title", "paper", Findings(verdict, table), None, {}, {}, 1.0)


@pytest.fixture(scope="module")
def shown(tiny_llama: Any) -> dict[str, Any]:
    """One of everything that shows itself."""
    batch = tiny_batch(tiny_llama)
    labels = tuple((EVIL, *row[1:]) for row in batch.labels)
    patches = PatchRunner(tiny_llama, batch.tokens, [attention_received(f"r{EVIL}", (3,), (TARGET,), batch.n)])
    sweep = run(tiny_llama)
    return {
        "SweepResult(": sweep,
        "LabelledTensor(": sweep.to_tensor().mean("prompt", "unit", "position", "direction"),
        "ChainResult(": synthetic_result(),
        "AnalysisResult(": analysis_result(),
        "Formation(": replace(FORMATION, sink_positions=(0,) * 5000),
        "PatchResult(": patches.run([]),
        "PromptBatch(": PromptBatch(batch.tokens, labels, f"file:{EVIL}"),
        "Study(": Study(tiny_llama, batch),
    }


def test_in_a_line_and_as_a_table(shown: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for kind, thing in shown.items():
        line, page = repr(thing), thing._repr_html_()
        assert line.startswith(kind) and len(line) < 400 and "\n" not in line, line
        assert "<script" not in page and "\u202e" not in page + line and len(page) < 60_000, page[:500]
        assert "<table" in page or kind == "Study("
        print(line)  # noqa: T201
    told = capsys.readouterr().out
    assert "Study(" in told and "formation" not in told.split("Study(")[1]  # nothing was looked for


def test_a_chain_s_table_is_the_command_s_without_its_controls() -> None:
    result = synthetic_result()
    page, scores = result._repr_html_(), result.scores
    own: Any = scores[scores.control == ""]
    for name in ("stage", "edit", "layers", *scores.direction.unique(), "n"):
        assert f"<th>{name}</th>" in page, name
    for row in own.to_dict("records"):
        interval = "" if pd.isna(row["ci_low"]) else f" {interval_text(row['ci_low'], row['ci_high'])}"
        assert f"<td>{effect_text(row['effect'])}{interval} ({row['predicted']:g})</td>" in page
    edits = own[["stage", "edit"]].drop_duplicates()
    assert page.count("<tr>") == len(edits)  # the head's has a style
    assert f"{len(scores) - len(own)} scores of controls are in .scores" in page or len(scores) == len(own)
    assert [page.count(f"<td>{stage}</td>") for stage in edits.stage.unique()] == [1] * edits.stage.nunique()


@pytest.mark.slow
def test_what_a_sweep_says_of_itself(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(logits: Any, _rows: Any) -> Any:
        return logits[:, -1, 0]

    result = run(tiny_llama, tmp_path, shard=(1, 2), readouts=[mine, "alpha"])
    assert "readouts mine, alpha" in repr(result) and "90 patches x 3 prompts" in repr(result)
    assert "13 of 26 tasks missing" in repr(result) and str(tmp_path)[:40] in repr(result)
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("to show a result is no work"))
    path = sorted((tmp_path / "shards").iterdir())[0]
    path.write_bytes(path.read_bytes()[:50])
    assert "is damaged" in sl.SweepResult.load(tmp_path)._repr_html_()
    monkeypatch.setattr("sinklens.sweeps.result.SHOWN_CELLS", 10)
    assert "overview() has a table" in sl.SweepResult.load(tmp_path)._repr_html_()


def test_the_parts() -> None:
    assert summary({}, "a", "", None, 3, "x" * 100) == f"dict(a; 3; {'x' * 59}…)"
    assert some(range(9), 2) == "0, 1 and 7 more" and some("ab") == "a, b"
    assert "and 5 more rows" in html("x", [{"a": number} for number in range(25)])
    assert html("<b>", []) == "<div>&lt;b&gt;</div>"
    assert "–" in html("", [{"a": None, "b": 1.0}, {"a": float("nan"), "b": pd.NA}])
