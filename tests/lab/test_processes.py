"""Two processes that share every batch have the losses of one; a killed run goes on bit for bit."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sinklens.lab import checkpoints
from tests.helpers.command_line import environment
from tests.helpers.lab import curve, trained

SCRIPT = """
import sys
from tests.helpers.lab import trained
trained(sys.argv[1], steps=int(sys.argv[2]), checkpoint_every=int(sys.argv[3]), accumulate=2)
"""


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", str(script), str(tmp_path / "two"), "12", "4"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = pd.read_parquet(tmp_path / "two/softmax-0/loss.parquet")
    one = trained(tmp_path / "one", accumulate=2)
    assert np.abs(two.loss.to_numpy() - one.loss.loss.to_numpy()).max() < 1e-5
    assert (tmp_path / "two/softmax-0/model.safetensors").is_file()


@pytest.mark.slow
def test_killed_and_started_again_it_has_the_same_curve(tmp_path: Path):
    script = tmp_path / "one.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "parts"), "400", "10"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    while process.poll() is None and not checkpoints(tmp_path / "parts/softmax-0"):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "parts/softmax-0/model.safetensors").exists(), "it was finished before it was killed"
    parts = trained(tmp_path / "parts", steps=400, checkpoint_every=10, accumulate=2)
    whole = trained(tmp_path / "whole", steps=400, checkpoint_every=100, accumulate=2)
    assert curve(parts).equals(curve(whole))
    assert parts.watch.equals(whole.watch)
