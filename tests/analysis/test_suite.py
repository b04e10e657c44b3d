"""Everything in one go: what is redone, what is kept, and what happens when a part fails."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sinklens import stages
from sinklens.analysis import suite
from sinklens.analysis.base import Analysis, AnalysisResult, Findings, verdict
from sinklens.analysis.replicate import replicate_into
from sinklens.analysis.suite import Part, run_all
from sinklens.chain import result as result_file
from sinklens.chain.result import ChainResult
from sinklens.errors import InputError, NotApplicableError
from sinklens.prompts import from_tokens
from sinklens.records import files
from sinklens.statistics import Estimate
from sinklens.study import Study
from tests.helpers.analyses import SIMPLE
from tests.helpers.tiny import tiny_model, tiny_tokens

pytestmark = pytest.mark.slow

GIVEN = {"layer": 1, "super_neurons": (3, 7), "outlier_dims": (2, 5)}


class Calls:
    """Analyses that count how often they are run, in place of the real ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.made: list[str] = []
        self.errors: dict[str, Exception] = {}

    def analysis(self, name: str) -> Analysis:
        def run(study: Study, *, top: int = 3) -> Findings:
            self.made.append(name)
            if name in self.errors:
                raise self.errors[name]
            layer = float(study.formation.layer)
            said = verdict("So.", "block", Estimate(layer), "none", None, "1", holds=True)
            return Findings(said, pd.DataFrame({"top": [top], "layer": [layer]}))

        def draw(findings: Findings) -> Any:
            from sinklens import viz

            return viz.points(findings.table, "top", "layer")

        # What counts, and is another every time, is no part of what the analysis does.
        return Analysis(name, name, "So.", run, draw, code=verdict)


def counting(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Two analyses that count, and a chain of a single link: what there is to be scored is of no account here."""
    found = Calls(monkeypatch)
    monkeypatch.setattr(suite, "list_analyses", lambda: {"first": "", "second": ""})
    monkeypatch.setattr(suite, "load_analysis", found.analysis)
    chain = suite.score_chain

    def counted(*args: Any, **options: Any) -> ChainResult:
        found.made.append("chain")
        return chain(*args, **options, stages=(stages.VALUE_AGGREGATION,), min_gap=1e-4, control_draws=1)

    monkeypatch.setattr(suite, "score_chain", counted)
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return counting(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in which every part was done; to be copied."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        counting(patch)
        run_all(study(), folder, target=5)
    return folder


@pytest.fixture
def done(whole: Path, tmp_path: Path) -> Path:
    """The same, for one test."""
    return Path(shutil.copytree(whole, tmp_path / "all"))


def study(seed: int = 0, given: dict[str, Any] = GIVEN, tokens: int = 0) -> Study:
    model = tiny_model("llama")
    return Study(model, from_tokens(model, tiny_tokens(3, 16, seed=tokens)), seed=seed, given=dict(given))


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def test_every_part_leaves_its_folder_and_its_record(tmp_path, calls):
    out = tmp_path / "all"
    seen: list[Any] = []
    result = run_all(
        study(),
        out,
        target=5,
        config={"command": "x"},
        begins=lambda *told: seen.append(told),
        ends=lambda part: seen.append(part.name),
    )
    assert calls.made == ["chain", "first", "second"]
    assert not result.failed
    assert [part.status for part in result.parts.values()] == ["done"] * 4
    assert ChainResult.load(out / "chain").config["target"] == 5
    assert AnalysisResult.load(out / "second").findings.verdict.outcome == "holds"
    assert json.loads((out / "formation.json").read_text())["layer"] == 1
    written = record(out)
    assert list(written["parts"]) == ["formation", "chain", "first", "second"]
    assert written["config"]["command"] == "x" and written["provenance"]["model"]
    assert seen[:2] == [("formation", 1, 4), "formation"] and seen[-1] == "second"


def test_finished_parts_are_kept(done, calls):
    before = record(done)
    again = run_all(study(), done, target=5)
    assert calls.made == []
    assert all(part.reused for part in again.parts.values())
    assert record(done) == before


@pytest.mark.parametrize(
    ("changes", "target", "redone"),
    [
        ({"seed": 1}, 5, ["chain", "first", "second"]),
        pytest.param({"given": GIVEN | {"layer": 2}}, 5, ["chain", "first", "second"], marks=pytest.mark.slow),
        pytest.param({"tokens": 1}, 5, ["chain", "first", "second"], marks=pytest.mark.slow),
        ({}, 6, ["chain"]),
    ],
)
def test_what_has_changed_is_redone(done, calls, changes, target, redone):
    run_all(study(**changes), done, target=target)
    assert calls.made == redone


def test_the_loss_is_the_chain_s_alone_and_is_asked_for(done, calls):
    assert "loss_change" not in ChainResult.load(done / "chain").scores
    run_all(study(), done, target=5, loss=True)
    assert calls.made == ["chain"]
    assert ChainResult.load(done / "chain").scores.loss_change.notna().all()
    assert all(part.reused for part in run_all(study(), done, target=5, loss=True).parts.values())


@pytest.mark.slow
def test_other_weights_are_another_model(done, calls):
    other = study()
    other.model = tiny_model("llama", seed=1)
    run_all(other, done, target=5)
    assert calls.made == ["chain", "first", "second"]


@pytest.mark.parametrize("name", ["summary.json", "table.parquet"])
def test_a_part_that_is_damaged_is_redone(done, calls, name):
    (done / "first" / name).write_text("{")
    result = run_all(study(), done, target=5)
    assert calls.made == ["first"]
    assert result.parts["first"].status == "done" and not result.parts["first"].reused


@pytest.mark.slow
def test_only_some_parts_leaves_the_record_of_the_others(done, calls):
    result = run_all(study(seed=2), done, target=5, only=("second",))
    assert calls.made == ["second"]
    assert list(result.parts) == ["formation", "chain", "first", "second"]
    assert record(done)["parts"]["second"]["key"]["seed"] == 2


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ZeroDivisionError("a bug"), "failed", "ZeroDivisionError: a bug"),
        (InputError("no position fits"), "failed", "no position fits"),
        (NotApplicableError("no gate"), "not measurable", "no gate"),
    ],
)
def test_a_part_that_fails_is_recorded_and_the_others_run(tmp_path, calls, error, status, reason):
    calls.errors["first"] = error
    result = run_all(study(), tmp_path / "all", target=5)
    assert (result.parts["first"].status, result.parts["first"].reason) == (status, reason)
    assert result.parts["second"].status == "done"
    assert result.failed == (["first"] if status == "failed" else [])
    # What failed is tried again, what cannot be measured is not.
    calls.errors.clear()
    calls.made.clear()
    again = run_all(study(), tmp_path / "all", target=5)
    assert calls.made == (["first"] if status == "failed" else [])
    assert again.failed == []


def test_an_interruption_leaves_what_was_finished(tmp_path, calls):
    calls.errors["second"] = KeyboardInterrupt()  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyboardInterrupt):
        run_all(study(), tmp_path / "all", target=5)
    assert list(record(tmp_path / "all")["parts"]) == ["formation", "chain", "first"]
    assert not list((tmp_path / "all").glob(".*"))
    calls.errors.clear()
    calls.made.clear()
    run_all(study(), tmp_path / "all", target=5)
    assert calls.made == ["second"]


@pytest.mark.slow
@pytest.mark.usefixtures("calls")
def test_the_order_of_parts_does_not_change_a_number(tmp_path):
    run_all(study(), tmp_path / "a", target=5)
    for name in ("second", "chain", "first"):
        run_all(study(), tmp_path / "b", target=5, only=(name,))
    one, other = (ChainResult.load(tmp_path / name / "chain") for name in "ab")
    pd.testing.assert_frame_equal(one.scores, other.scores)


class Disk:
    """Counts what is written, and ends at the ``last`` of it, by an error of the system or as a killed process does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int, error: BaseException) -> None:
        self.left, self.error = last, error
        for owner, name in (
            (Path, "mkdir"),
            (Path, "write_text"),
            (pd.DataFrame, "to_parquet"),
            (result_file, "write_tensors"),
            (os, "replace"),
        ):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))
        if isinstance(error, Killed):  # nobody tidies up
            monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
            monkeypatch.setattr(Path, "rmdir", lambda *_, **__: None)

    def counted(self, write: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise self.error
            return write(*args, **options)

        return call


class Killed(BaseException):
    """The process is no more."""


@pytest.fixture
def quick(calls: Calls) -> Calls:
    """The chain is scored once."""
    done: list[ChainResult] = []
    score = suite.score_chain

    def once(*args: Any, **options: Any) -> ChainResult:
        done[:] = done or [score(*args, **options)]
        return done[0]

    calls.monkeypatch.setattr(suite, "score_chain", once)
    return calls


def contents(folder: Path) -> dict[str, Any]:
    """What is in a run's folder, but for the times that it took."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix == ".parquet":
            found[name] = pd.read_parquet(path).to_json()
        elif path.suffix == ".json":
            found[name] = re.sub(r'"(seconds|peak_bytes)": [^,\n}]*', "", path.read_text())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("error", "step"),
    [
        (OSError(122, "quota"), 19),
        (OSError(30, "read only"), 23),
        (OSError(28, "full"), 1),
        (Killed(), 1),
    ],
)
def test_wherever_it_ends_the_folder_is_taken_up(tmp_path, monkeypatch, error, step):
    monkeypatch.setattr("sinklens.analysis.run._figure", lambda *_: None)
    here = study()
    run_all(here, tmp_path / "whole", target=5)
    expected = contents(tmp_path / "whole")
    monkeypatch.setattr(files, "_alive", lambda _pid: False)
    for last in range(0, 100, step):
        out = tmp_path / f"out{last}"
        with monkeypatch.context() as patch:
            Disk(patch, last, error)
            try:
                run_all(here, out, target=5)
                break  # more than all that is written
            except Killed:
                pass
            except InputError as told:
                assert "cannot be written" in str(told) and "\n" not in str(told)
                assert not out.exists() or (out / "run.json").is_file()
                assert not list(tmp_path.rglob("*.tmp"))
        assert contents(run_all(here, out, target=5).folder) == expected, last
    else:
        raise AssertionError("there is more to write")
    assert last > 20 and not list(out.rglob(".*"))


def test_a_model_in_place_of_a_study_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"give a Study\(model, prompts\), not something of type HookedTransformer"):
        run_all(study().model, tmp_path / "all")  # type: ignore[arg-type]


def test_a_block_that_the_model_does_not_have_is_refused_before_any_work(tmp_path, calls):
    for given in ({"layer": 99}, {"super_neurons": (3, 48)}, {"outlier_dims": (32,)}):
        with pytest.raises(InputError, match="is not in 0"):
            run_all(study(given=given), tmp_path / "all", target=5)
    with pytest.raises(InputError, match="target 15 must be in"):
        run_all(study(), tmp_path / "all", target=15)
    assert calls.made == [] and not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"parts": []},
        {"parts": {"first": {}}},
        {"parts": {"first": {"status": "well"}}},
        {"parts": {"first": {"status": "done", "seconds": "long"}}},
        {"parts": {"first": {"status": "done", "key": [1]}}},
        {"parts": {"first": {"status": "done", "colour": 1}}},
        [],
    ],
    ids=str,
)
def test_a_record_that_was_edited_is_refused(tmp_path, calls, damage):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "run.json").write_text(json.dumps(damage))
    with pytest.raises(InputError, match="run.json is damaged"):
        run_all(study(), tmp_path / "all", target=5)
    assert calls.made == []


def test_bad_folders_and_names_are_refused_before_any_work(tmp_path, calls):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="not the folder of an earlier run"):
        run_all(study(), tmp_path / "notes", target=5)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        run_all(study(), tmp_path / "file", target=5)
    with pytest.raises(InputError, match="there is no part third: the parts are formation, chain, first, second"):
        run_all(study(), tmp_path / "all", target=5, only=("third",))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text("{")
    with pytest.raises(InputError, match="run.json is damaged"):
        run_all(study(), tmp_path / "torn", target=5)
    assert calls.made == [] and not (tmp_path / "all").exists()
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def test_a_model_with_hooks_is_refused_before_any_work(tmp_path, calls):
    """The folder would take its numbers for those of the bare model."""
    hooked = study()
    hook = ("blocks.1.hook_resid_pre", lambda act, hook: 2 * act)  # noqa: ARG005
    nothing: Any = print
    with hooked.model.hooks(fwd_hooks=[hook]):
        with pytest.raises(InputError, match=r"there are hooks on the model, and a folder \(out\) knows nothing"):
            run_all(hooked, tmp_path / "all", target=5)
        with pytest.raises(InputError, match="there are hooks on the model"):
            replicate_into(hooked, 3, tmp_path / "sets", nothing, nothing, n=1)
    assert calls.made == [] and not list(tmp_path.iterdir())


def test_a_record_holds_no_more_than_a_part_takes():
    part = Part("first", "done", "", 1.0, {"seed": 0})
    assert Part("first", **{"status": "done", "reason": "", "seconds": 1.0, "key": {"seed": 0}}) == part


def test_analyses_of_the_user_s_run_beside_the_others(tmp_path, calls):
    mine = calls.analysis("mine")
    file = tmp_path / "theirs.py"
    file.write_text("from tests.helpers.analyses import SIMPLE as ANALYSIS\n")
    calls.monkeypatch.setattr(suite, "load_analysis", lambda it: SIMPLE if it == file else calls.analysis(it))
    given: dict[str, Any] = {"target": 5, "only": ("first", "mine", "simple"), "analyses": [mine, file]}
    found = run_all(study(), tmp_path / "all", **given)
    assert {name: part.status for name, part in found.parts.items()} == dict.fromkeys(given["only"], "done")
    assert all((tmp_path / "all" / name / "summary.json").is_file() for name in given["only"])
    assert all(part.reused for part in run_all(study(), tmp_path / "all", **given).parts.values())
    for wrong in (calls.analysis("first"), calls.analysis("chain"), calls.analysis("../up"), [mine, mine]):
        with pytest.raises(InputError, match="cannot be run beside the others"):
            run_all(study(), tmp_path / "other", target=5, analyses=wrong)
    assert not (tmp_path / "other").exists()
