"""``sinklens sweep --engine ray``: what is refused, and how it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sinklens.sweeps import SweepResult
from tests.helpers.command_line import MANY, QUICK, refused, start
from tests.helpers.sweeps import until

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--engine", "ray"], ["--engine ray needs --workers"]),
        (["--workers", "2"], ["--workers is for engine ray, and this is local"]),
        (["--engine", "ray", "--workers", "0"], ["workers 0 must be at least 1"]),
        (["--engine", "ray", "--workers", "1", "--threads-per-worker", "0"], ["threads-per-worker 0 must be"]),
        (
            ["--engine", "ray", "--workers", "1", "--gpus-per-worker", "1.5"],
            ["gpus-per-worker 1.5 must be from"],
        ),
        (
            ["--engine", "ray", "--workers", "1", "--gpus-per-worker", "nan"],
            ["gpus-per-worker nan must be a finite number"],
        ),
        (["--engine", "ray", "--workers", "1", "--ray-address", "ray://a:1"], ["must be HOST:PORT or auto"]),
        (["--engine", "ray", "--workers", "1", "--ray-address", "127.0.0.1"], ["must be HOST:PORT or auto"]),
        (
            ["--engine", "ray", "--workers", "1", "--ray-address", "127.0.0.1:1"],
            ["no Ray cluster answers at 127.0.0.1"],
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if value and value[0].startswith("--") else "",
)
def test_bad_arguments(sweep: Any, here: Path, arguments: list[str], parts: list[str]) -> None:
    refused(sweep(*arguments), *parts)
    assert not (here / "runs").exists()


@pytest.mark.usefixtures("no_model")
def test_without_ray_it_is_said_how_to_install_it(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *_: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    refused(sweep("--engine", "ray", "--workers", "2"), "ray is not installed: pip install 'sinklens[ray]'")


def test_ray_is_imported_for_this_engine_alone() -> None:
    script = "import sys, sinklens.cli, sinklens.sweeps.run, sinklens.cli.sweep; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_ctrl_c_leaves_no_processes(here: Path, tiny_folder: Path) -> None:
    """A real SIGINT to the whole process group, as a terminal sends it: exit code 130, two lines, no orphans."""
    psutil = pytest.importorskip("psutil")
    options = [*QUICK, *f"{MANY} --engine ray --workers 1".split()]
    process = start("sweep", "--model", str(tiny_folder), *options, cwd=here, start_new_session=True)
    until(lambda: any((here / "run").glob("shards/*.parquet")), 120)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("Actor" in child.name() or "ray" in " ".join(child.cmdline()) for child in children)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[0].startswith("Grid:") and len(err.splitlines()) <= 4
    assert "run the same command again to go on" in err.splitlines()[2]
    assert psutil.wait_procs(children, timeout=10)[1] == []
    part = SweepResult.load(here / "run")
    assert 0 < len(part.missing) < len(part.task_ids())
