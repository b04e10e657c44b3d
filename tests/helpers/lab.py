"""A model of the lab that is trained in a second."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.lab import Trained, train
from sinklens.lab.sizes import SIZES, Size

SIZES["mini"] = Size(16, 2, 2, 32, n_ctx=16, vocab=300, tied=True, batch=8, lr=1e-2, weight_decay=0.1)
OPTIONS: dict[str, Any] = {"size": "mini", "steps": 12, "device": "cpu", "checkpoint_every": 4, "watch_points": 4}


def trained(out: Path, variant: str = "softmax", **options: Any) -> Trained:
    """Some steps of a model that is far too small."""
    (one,) = train(variant, out=out, **(OPTIONS | options))
    return one


def curve(one: Trained) -> pd.DataFrame:
    """The losses, without the time that they took."""
    return one.loss.drop(columns="seconds")


def interrupted_at(step: int, out: Path, **options: Any) -> None:
    """Train, and be interrupted when so many steps have been told of."""
    told: list[int] = []

    def report(_text: str, done: int, _total: int) -> None:
        if done >= step and not told:  # once: a second one ends the process as it is
            told.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    trained(out, report=report, **options)
