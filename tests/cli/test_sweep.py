"""``sinklens sweep`` and ``sinklens gather``: what they print, what they refuse, and how they stop."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from sinklens.cli import display as cli_display
from sinklens.sweeps import SweepResult, Worker
from tests.helpers.command_line import MANY, QUICK, Outcome, invoke, refused, snapshot, start
from tests.helpers.sweeps import until

SMALL = ["--stages", "z,resid_pre", "--layers", "0-2", "--positions", "9-11", "--units", "heads", "--task-size", "20"]


@pytest.mark.slow
def test_a_sweep(sweep: Any, here: Path) -> None:
    done: Outcome = sweep(*SMALL)
    assert done.code == 0, done.err
    first = done.err.splitlines()[0]
    assert (
        first == "Grid: 2 stages x 2 directions x 3 layers x 3 positions x 1-4 units = 90 patches, on 2 prompts "
        "180 rows; 5 tasks"
    )
    assert re.search(r"resid_pre +│ transplant +│ denoise +│ attention_received", done.out)
    assert "strongest cells" in done.out and "180 rows in" in done.out and "Results: runs/sweep" in done.out
    result = SweepResult.load(here / "runs" / "sweep")
    assert len(result.table) == 180 and result.missing == []
    assert result.config["formation"]["neurons"] == [3, 7]
    before = snapshot(here)
    again = sweep(*SMALL)
    assert again.code == 0 and "5 tasks, of which 0 are to be run here: nothing is run" in again.err
    assert again.out.split("rows in")[0] == done.out.split("rows in")[0] and snapshot(here) == before


@pytest.mark.slow
def test_json(sweep: Any) -> None:
    done: Outcome = sweep(*SMALL, "--json")
    data = json.loads(done.out)
    assert data["tasks"]["n_patches"] == 90 and data["choices"]["units"] == "heads" and len(data["overview"]) == 4


@pytest.mark.slow
def test_shards_and_gather(sweep: Any, here: Path) -> None:
    one: Outcome = sweep(*SMALL, "--out", "one", "--shard", "1/2")
    assert one.code == 0 and "2 of 5 tasks are left to other shards; results so far: one" in one.out
    refused(invoke("gather", "one", "--out", "all.parquet"), "2 of 5 tasks are missing (numbers 1, 3)")
    assert not (here / "all.parquet").exists()
    sweep(*SMALL, "--out", "two", "--shard", "2/2")
    for place in ("", ".", "one"):
        refused(invoke("gather", "one", "two", "--out", place), "is a folder: give a file for the rows")
    done = invoke("gather", "one", "two", "--out", "all.parquet")
    assert done.code == 0 and done.out == "all.parquet: 180 rows\n"
    sweep(*SMALL, "--out", "whole")
    assert SweepResult.load(here / "all.parquet").table.equals(SweepResult.load(here / "whole").table)


@pytest.mark.slow
def test_another_sweep_in_the_folder(sweep: Any, here: Path) -> None:
    sweep(*SMALL)
    before = snapshot(here)
    refused(sweep(*SMALL, "--seed", "1"), "runs/sweep holds another sweep (seed was 0, now 1)", "--force")
    assert snapshot(here) == before
    assert sweep(*SMALL, "--seed", "1", "--force").code == 0
    assert SweepResult.load(here / "runs" / "sweep").config["seed"] == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--stages", "resid_prey"], ["--stages 'resid_prey' is not known", "did you mean resid_pre"]),
        (["--stages", ","], ["--stages is empty"]),
        (["--layers", "5-2"], ["layers '5-2' runs backwards: write 2-5"]),
        (["--layers", ""], ["layers is empty"]),
        (["--layers", "first"], ["layers 'first' is not a range"]),
        (["--positions", "1-20"], ["positions 16, 17, 18, 19 and 1 more", "16 tokens are 0-15"]),
        (["--positions", "3:"], ["positions '3:' is not a range"]),
        (["--readout-layers", "top"], ["--readout-layers 'top' is not a range"]),
        (["--edits", "swap"], ["--edits 'swap' is not known"]),
        (["--readouts", "kld"], ["--readouts 'kld' is not known"]),
        (["--directions", "up"], ["--directions 'up': choose denoise or noise"]),
        (["--directions", "denoise", "--target", "natural"], ["can only be noised"]),
        (["--target", "15"], ["target 15 must be in 1..14"]),
        (["--target", "here"], ["target 'here' must be a position"]),
        (["--method", "magic"], ["method 'magic': choose exact"]),
        (["--engine", "steam"], ["engine 'steam': choose local"]),
        (["--shard", "2"], ["--shard '2' must be I/N"]),
        (["--shard", "0/4"], ["shard 0/4: write I/N"]),
        (["--task-size", "0"], ["--task-size"]),
        (["--min-gap", "nan"], ["--min-gap nan must be a finite number"]),
        (["--prompts", "missing.txt"], ["--prompts 'missing.txt' is neither"]),
        (["--memory-budget", "0"], ["--memory-budget 0.0 must be"]),
        (["--out", "texts.txt"], ["texts.txt"]),
        (["--out", "notes"], ["notes holds no sweep.json"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and value[0].startswith("--") else "",
)
def test_bad_arguments(sweep: Any, here: Path, arguments: list[str], parts: list[str]) -> None:
    (here / "notes").mkdir()
    (here / "notes" / "thesis.txt").write_text("years of work")
    before = snapshot(here)
    refused(sweep(*arguments), *parts)
    assert snapshot(here) == before


def test_ranges_beyond_the_model_leave_nothing(sweep: Any, here: Path) -> None:
    before = snapshot(here)
    refused(sweep("--layers", "0-9"), "layers 4, 5, 6, 7 and 2 more: the model's blocks are 0-3")
    refused(sweep("--units", "0-9", "--stages", "z"), "units 4, 5, 6, 7 and 2 more: the units (head) of z are 0-3")
    assert snapshot(here) == before


@pytest.mark.slow
def test_interrupted(sweep: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Worker.run

    def interrupted(self: Worker, index: int, progress: Any = None) -> Any:
        if index == 2:
            signal.raise_signal(signal.SIGINT)
        return run(self, index, progress)

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "run", interrupted)
        stopped: Outcome = sweep(*SMALL)
    assert stopped.code == 130 and stopped.out == ""
    assert "sinklens: note: interrupted: what is running is finished first; press Ctrl-C again" in stopped.err
    assert stopped.err.splitlines()[-1] == (
        "sinklens: interrupted: 3 tasks finished now, 2 are left; run the same command again to go on"
    )
    assert len(SweepResult.load(here / "runs" / "sweep").missing) == 2
    assert "5 tasks, of which 2 are to be run here" in sweep(*SMALL).err
    assert SweepResult.load(here / "runs" / "sweep").missing == []


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(here: Path, tiny_folder: Path) -> None:
    """The whole command with a real SIGINT: exit code 130, and the same command goes on."""
    process = start("sweep", "--model", str(tiny_folder), *QUICK, *MANY.split(), cwd=here)
    until(lambda: any((here / "run").glob("shards/*.parquet")), 120)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "run the same command again to go on" in err and "Traceback" not in err
    part = SweepResult.load(here / "run")
    assert 0 < len(part.missing) < len(part.task_ids())


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_display, "EVERY_SECONDS", 0.0)
    with cli_display.sweep_display() as display:
        display.began -= 10
        display.rows(250, 1000)
    assert re.search(r"250 of 1,000 \(25%\), 2\d/s, about \d+ s left", capsys.readouterr().err)
