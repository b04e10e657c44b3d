"""A compiled model, if it learns as the model itself does: it has been seen that one does not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinklens.errors import InputError
from sinklens.lab.data import Data
from sinklens.lab.optimiser import Optimiser
from sinklens.lab.settings import Settings
from sinklens.lab.watch import row_loss
from sinklens.models.decoder import Decoder

STEPS, TOLERANCE, NOISE = 20, 1e-3, 4.0
"""How many steps are compared, how far their losses may be from each other in nats, and in multiples of what rounding
does: of how far apart they are when the same batch is computed in two halves."""


class LossOf(nn.Module):
    """From rows to the mean loss of a model on them, in nats."""

    def __init__(self, model: Decoder, loss: Callable[[Tensor, Tensor], Tensor] = row_loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, rows: Int[Tensor, "row token"]) -> Float[Tensor, ""]:
        """The loss of the tokens behind the first."""
        return self.loss(self.model(rows[:, :-1]), rows)


def by_blocks(model: Decoder) -> Decoder:
    """The same model, with the same weights, whose blocks run compiled.

    Block by block, as all have one graph: it is compiled once, whatever the depth.
    """
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.blocks = nn.ModuleList(torch.compile(block) for block in model.blocks)  # type: ignore[misc]
    return other


def compiled(model: Decoder, settings: Settings, data: Data, rows: int) -> LossOf:
    """The compiled loss of a model with the weights of ``model``; the first steps on batches of ``rows`` are tried on
    copies.

    Raises:
        InputError: it cannot be compiled, or its first steps are not those of the model itself.
    """
    torch._dynamo.reset()  # so that the arms before this one do not count among the graphs that it may have
    eager = _losses(copy.deepcopy(model), settings, data, rows)
    halves = _losses(copy.deepcopy(model), settings, data, rows, parts=2)
    try:
        same = _losses(copy.deepcopy(model), settings, data, rows, compile_it=True)
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise InputError(f"the model cannot be compiled here ({told}): leave compile out.") from error
    apart, noise = _apart(eager, same), _apart(eager, halves)
    if not apart < max(TOLERANCE, NOISE * noise):
        raise InputError(
            f"compiled, the model learns something else (losses {apart:.2g} apart, rounding {noise:.2g}): leave "
            "compile out."
        )
    return _compiled(model)


def _compiled(model: Decoder) -> LossOf:
    return LossOf(by_blocks(model), torch.compile(row_loss))


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _losses(
    twin: Decoder, settings: Settings, data: Data, rows: int, *, parts: int = 1, compile_it: bool = False
) -> list[float]:
    """Losses of the first steps, as they are trained, with a batch of ``rows`` in ``parts``."""
    optimiser, loss_of = Optimiser(twin.train(), settings), _compiled(twin) if compile_it else LossOf(twin)
    device = next(twin.parameters()).device
    losses = []
    for step in range(min(STEPS, settings.steps)):
        batch = torch.from_numpy(data.rows(settings.seed, step * rows, rows)).to(device)
        total = 0.0
        for part in batch.chunk(parts):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                loss = loss_of(part) * (len(part) / rows)
            loss.backward()
            total += float(loss.detach())
        if settings.clip:
            nn.utils.clip_grad_norm_(twin.parameters(), settings.clip)
        optimiser.step(settings.lr_at(step + 1))
        losses.append(total)
    return losses
