"""One block of the packed pass, with all that it computes looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from sinklens.engine.packed.points import PATTERN, SCORES


def as_tokens(mine: Tensor, theirs: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Both as ``[token, ...]``; scores that are masked are not compared, but have to be the same ones."""
    if f"blocks.{{layer}}.{name}" not in (SCORES, PATTERN):
        return mine, theirs.flatten(0, 1)
    theirs = theirs.transpose(1, 2).flatten(0, 1)
    masked = mine <= torch.finfo(torch.float16).min
    same = torch.equal(masked, theirs <= torch.finfo(torch.float16).min)
    return mine.masked_fill(masked, 0), theirs.masked_fill(masked, 0 if same else torch.nan)


class Watch:
    """All points of a block, looked at."""

    def __init__(self, n_layers: int, explicit: bool) -> None:
        self.n_layers, self.explicit = n_layers, explicit
        self.seen: dict[str, Tensor] = {}

    def asked(self, template: str, layer: int) -> bool:  # noqa: ARG002
        """Whether the pass has to come by a point even if that takes longer."""
        return self.explicit

    def queries(self, layer: int, q: Tensor) -> Tensor | None:  # noqa: ARG002
        """Look at the pattern as a whole, or not at all."""
        return None if self.explicit else torch.empty(0, dtype=torch.long, device=q.device)

    def edits_attention(self, layer: int) -> bool:  # noqa: ARG002
        """Nothing is edited."""
        return False

    def visit_queries(self, template: str, layer: int, act: Tensor, piece: object) -> Tensor:  # noqa: ARG002
        """Nothing is looked at in pieces."""
        return act

    def visit(self, template: str, layer: int, act: Tensor) -> Tensor:  # noqa: ARG002
        """Keep what is there."""
        self.seen[template.removeprefix("blocks.{layer}.")] = act.float().clone()
        return act
