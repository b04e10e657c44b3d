"""What the lab is for: a small model learns bigram-backcopy, and where its attention is softmax it grows a sink."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out, options = tmp_path_factory.mktemp("toy"), {"steps": 1200, "schedule": "constant", "watch_points": 2}
    (one,) = sl.lab.train("softmax", size="toy", out=out, device="cpu", **options)
    return one


TASK = BigramBackcopy(64)


@pytest.mark.slow
def test_a_model_of_two_blocks_learns_the_task(toy: Trained):
    assert 0.99 * TASK.optimum < toy.held_out() < 1.1 * TASK.optimum


@pytest.mark.slow
def test_it_grows_a_sink(toy: Trained):
    dormant, active = (first_share(toy, TASK, at_triggers=at) for at in (False, True))
    assert dormant.max() > 0.5
    assert active[dormant.argmax()] < 0.1  # the head is at work there
