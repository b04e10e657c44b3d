"""A pair on some of its prompts: everything that is each prompt's own is that of these prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sinklens.edits import AttendSelf, Constant, PerPrompt
from sinklens.pairs.subset import Shifted, edit_for_prompts, roots_for_prompts
from sinklens.patches import Patch, Positions, Source
from sinklens.sites import MLP_OUT, PATTERN, Z


@dataclass(frozen=True, eq=False)
class LooksUp(Constant):
    """An edit of the user's, made of one that is the same for all prompts, and itself is not."""

    def __call__(self, x: Any, source: Any, at: Any) -> Any:  # noqa: ARG002
        return torch.zeros_like(x) + at.prompts.view(-1, *[1] * (x.ndim - 1))


def test_an_edit_of_one_s_own_is_told_the_numbers_of_its_prompts() -> None:
    shifted = edit_for_prompts(LooksUp("own"), 2)
    assert isinstance(shifted, Shifted) and shifted.offset == 2
    assert not isinstance(edit_for_prompts(Constant("zero"), 2), Shifted)
    assert not isinstance(edit_for_prompts(LooksUp("own"), 0), Shifted)


def test_roots_have_the_positions_of_their_prompts() -> None:
    values = PerPrompt("own", {1: torch.arange(4.0)[:, None]})
    also = Patch(MLP_OUT, (1,), Positions.one_each((3, 4, 5, 6)), values, run="anchored")
    source = Source("other", Positions.one_each((0, 1, 0, 1)))
    root = Patch(Z, (1,), Positions.one_each((4, 5, 6, 7)), AttendSelf(), run="anchored", source=source, also=(also,))
    shared = Patch(PATTERN, (0,), (4,), AttendSelf(), run="anchored")
    some, same = roots_for_prompts((root, shared), 1, 3)
    assert some.positions == Positions.one_each((5, 6)) and some.source_where == Positions.one_each((1, 0))
    assert some.also[0].positions == Positions.one_each((4, 5))
    assert isinstance(some.also[0].edit, Shifted) and some.also[0].edit.offset == 1
    assert same.positions == shared.positions and same.source is None
