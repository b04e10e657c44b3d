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
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    """Models of one seed after the other, up to the first that grows a sink.

    Which seeds do is decided by rounding too, and so by the processor: with 800 steps nearly all.
    """
    out, options = tmp_path_factory.mktemp("toy"), {"steps": 800, "schedule": "constant", "watch_points": 2}
    arms: list[Trained] = []
    for seed in range(4):
        arms += sl.lab.train("softmax", size="toy", out=out, device="cpu", seed=seed, **options)
        if rests(arms[-1]).any():
            break
    return arms


def rests(one: Trained) -> np.ndarray:
    """Blocks that attend to BOS where there is nothing to do, and do their work at triggers."""
    return (first_share(one, TASK, at_triggers=False) > 0.5) & (first_share(one, TASK, at_triggers=True) < 0.1)


TASK = BigramBackcopy(64)


@pytest.mark.slow
def test_a_model_of_two_blocks_learns_the_task(toys: list[Trained]):
    assert all(0.99 * TASK.optimum < toy.held_out() < 1.1 * TASK.optimum for toy in toys)


@pytest.mark.slow
def test_it_grows_a_sink(toys: list[Trained]):
    assert rests(toys[-1]).any()
