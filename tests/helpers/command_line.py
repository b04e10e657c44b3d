"""Commands, run here or in a process of their own, and what they left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from sinklens import cli
from tests.helpers.tiny import WORDS

LINE = " ".join(WORDS[:16])
NOTE = "sinklens: note: "
_PROMPTS = "--prompts texts.txt --length 16 --n 2 --device cpu"
QUICK = f"{_PROMPTS} --block 1 --super-neurons 3,7 --outlier-dims 1".split()
"""A sweep's options on the tiny model, which has no sink to find."""

MANY = "--task-size 1 --stages z,resid_pre,mlp_out --positions all --out run"
"""More of them: a sweep that takes long enough to be interrupted."""

Run = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line that says what is wrong; remarks may stand before it."""
        *notes, last = self.err.splitlines()
        assert all(line.startswith(NOTE) for line in notes), self.err
        assert last.startswith("sinklens: ") and not last.startswith(NOTE), self.err
        return last.removeprefix("sinklens: ")


def invoke(*arguments: str) -> Outcome:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def environment() -> dict[str, str]:
    """Of a process that finds this checkout, fetches nothing, and shares the cores with other tests."""
    root = str(Path(cli.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def process(*arguments: str, cwd: Path, **changes: str) -> Outcome:
    """A process of its own, whose streams are pipes."""
    command = [sys.executable, "-m", "sinklens.cli", *arguments]
    env = environment() | changes
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


def start(*arguments: str, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """The same, without waiting for its end."""
    command = [sys.executable, "-m", "sinklens.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=cwd, env=environment(), **pipes, **options)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(outcome: Outcome, *parts: str) -> None:
    """Exit code 2, nothing on stdout, and one sentence on stderr with every part in it."""
    assert outcome.code == 2
    assert outcome.out == ""
    for part in parts:
        assert part in outcome.sentence
