"""A compiled model, if it learns as the model itself does: it has been seen that one does not."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sinklens.errors import InputError
from sinklens.lab.data import Data
from sinklens.lab.optimiser import Optimiser
from sinklens.lab.settings import Settings
from sinklens.lab.watch import row_loss
from sinklens.models.decoder import Decoder

STEPS, ROWS, TOLERANCE = 10, 4, {"float32": 1e-3, "bfloat16": 2e-2}
"""How many steps on how many rows are compared, and how far their losses may be from each other."""


def compiled(model: Decoder, settings: Settings, data: Data) -> nn.Module:
    """``torch.compile`` of a model.

    Raises:
        InputError: it cannot be compiled, or its first steps are not those of the model itself.
    """
    device = next(model.parameters()).device
    curves = []
    for compile_it in (False, True):
        twin = copy.deepcopy(model).train()
        optimiser = Optimiser(twin, settings)
        module = torch.compile(twin) if compile_it else twin
        losses = []
        for step in range(STEPS):
            rows = torch.from_numpy(data.rows(settings.seed, step * ROWS, ROWS)).to(device)
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                    loss = row_loss(module(rows[:, :-1]), rows)  # type: ignore[operator]
                loss.backward()
            except Exception as error:
                if not compile_it:
                    raise
                told = " ".join(str(error).split())[:200]
                raise InputError(f"the model cannot be compiled here ({told}): leave compile out.") from error
            optimiser.step(settings.lr)
            losses.append(float(loss))
        curves.append(losses)
    apart = max(abs(a - b) for a, b in zip(*curves, strict=True))
    if not apart < TOLERANCE[settings.dtype]:
        raise InputError(f"compiled, the model learns something else (losses {apart:.2g} apart): leave compile out.")
    return torch.compile(model)  # type: ignore[return-value]
