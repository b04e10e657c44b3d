"""What the lab is for: a small model learns bigram-backcopy, and where its attention is softmax it grows a sink."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens.lab import BigramBackcopy, Trained
from sinklens.metrics import normalised_rows


def first_share(one: Trained, task: BigramBackcopy, *, at_triggers: bool) -> np.ndarray:
    """Attention that BOS receives from tokens that are triggers, or from those that are not, by block."""
    model = sl.load_model(one.folder, device="cpu")
    rows = torch.from_numpy(task.held_out(64))[:, :-1]
    _, cache = model.run_with_cache(rows)
    at = torch.from_numpy(task.at_triggers(rows.numpy()) == at_triggers)
    at[:, 0] = False
    patterns = [normalised_rows(cache[f"blocks.{i}.attn.hook_pattern"])[0] for i in range(model.cfg.n_layers)]
    return np.array([float(pattern[..., 0].mean(1)[at].mean()) for pattern in patterns])


@pytest.mark.slow
def test_a_model_of_two_blocks_learns_the_task_and_grows_a_sink(tmp_path: Path):
    (one,) = sl.lab.train("softmax", size="toy", out=tmp_path, device="cpu", watch_points=6)
    task = BigramBackcopy(64)
    assert one.held_out() < 1.1 * task.optimum
    assert one.held_out() > 0.99 * task.optimum
    dormant, active = (first_share(one, task, at_triggers=at) for at in (False, True))
    assert dormant.max() > 0.5
    assert active[dormant.argmax()] < 0.1  # the head is at work there
    watched = one.watch[one.watch.measure == "value_norm_ratio"]
    last = watched[(watched.step == watched.step.max()) & (watched.layer == dormant.argmax())]
    assert last[last.position == 0].value.iloc[0] < 0.7  # its value is drained
