"""A run's curves for TensorBoard, where that is installed."""

from __future__ import annotations

from typing import Any

from sinklens.errors import need
from sinklens.lab.training import Trained


def write_events(trained: Trained) -> None:
    """Write the curves of a run into its folder ``tensorboard``.

    Raises:
        InputError: TensorBoard is not installed.
    """
    need("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(trained.folder / "tensorboard")) as writer:
        row: Any
        for row in trained.loss.itertuples():
            writer.add_scalar("loss", row.loss, int(row.tokens))
        for row in trained.watch.itertuples():
            parts = [str(row.measure)]
            parts += [f"block {row.layer}"] if row.layer == row.layer and row.layer is not None else []
            parts += [f"position {row.position}"] if row.position == row.position and row.position is not None else []
            writer.add_scalar("/".join(parts), row.value, int(row.tokens))
