"""``sinklens train``: what it prints, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sinklens.cli import app
from tests.helpers.lab import trained

QUICK = ["--size", "mini", "--steps", "3", "--device", "cpu", "--watch-points", "2", "--out"]


def run(*args: str):
    return CliRunner().invoke(app, ["train", *args], env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.slow
def test_arms_are_trained_and_told(tmp_path: Path):
    done = run("--variant", "softmax,sigmoid:normalised=true", *QUICK, str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "sigmoid-normalised=true-0" in done.output and "sink rate" in done.output
    record = json.loads((tmp_path / "softmax-0/lab.json").read_text())
    assert record["command"].startswith("sinklens")  # run in this process, it has no arguments of its own
    again = run("--variant", "softmax", *QUICK, str(tmp_path), "--json")
    (row,) = json.loads(again.output)
    assert row["steps"] == 3 and row["held_out_loss"] > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--variant", "softmix"], "unknown variant 'softmix'"),
        (["--size", "huge"], "unknown size"),
        (["--data", "nowhere.txt"], "is not there"),
        (["--device", "cuda:9"], "is not there"),
        (["--arm", "first"], "must be I/N"),
        (["--lr", "nan"], "--lr"),
        (["--steps", "0"], "--steps"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence(tmp_path: Path, args: list[str], words: str):
    done = run(*QUICK, str(tmp_path), *args)
    assert done.exit_code == 2, done.output
    assert words in done.output and done.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_configuration_is_refused(tmp_path: Path):
    trained(tmp_path, steps=3, watch_points=2)
    done = run(*QUICK, str(tmp_path), "--lr", "0.5")
    assert done.exit_code == 2
    assert "lr is 0.01 there and 0.5 here" in done.output


def test_an_interruption_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sinklens.lab.stopping import Stopping

    monkeypatch.setattr(Stopping, "asked", lambda _self, step: step == 2)
    done = run(*QUICK, str(tmp_path))
    assert done.exit_code == 130
    assert "stopped at step 2 of 3" in done.output and "run the same command again" in done.output
    assert (tmp_path / "softmax-0/checkpoints/step-000002/optimiser.safetensors").is_file()
