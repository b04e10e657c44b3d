"""The head of a row: the tokens that are edited in its first block, where nothing else can move.

What is written behind the keys and values of a block (a head's output, the MLP's, a row of the pattern) changes that
block's residual stream at the edited tokens alone: the later ones see it in the next block, through attention. So in
its first block such a row is a head of a few tokens, and the whole row comes in one block later, with the unpatched
run's residual stream behind its head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from sinklens.engine.packed.layout import IntArray
from sinklens.engine.packed.points import KEYS, SITES, reach
from sinklens.engine.places import PlaceGroup
from sinklens.patches import Patch, Runs
from sinklens.readouts.base import Readout
from sinklens.sites import RESID_PRE, ROT_Q, Q

ALONE = frozenset(SITES[SITES.index(KEYS.template) + 1 :]) | {Q.template, ROT_Q.template}
"""Sites at which a token's activation reaches no other token within the block."""


def can_begin_alone(patch: Patch, runs: Runs) -> bool:
    """Whether what a patch edits in its first block reaches no other token there, whatever else happens in its run."""
    roots = [part for root in runs[patch.run] for part in root.parts]
    if any(part.site == RESID_PRE for part in roots):
        return False  # a row comes in behind such an edit, which its head would not have seen
    first = [part for part in patch.parts if patch.start in part.layers]
    across = any(
        place.layer != layer
        for part in [*patch.parts, *roots]
        for layer in part.layers
        for place in part.edit.reads_in(layer)
    )
    return not across and all(part.site.template in ALONE for part in first)


def edited_until(groups: Sequence[PlaceGroup], patches: Sequence[Patch], n_prompts: int) -> IntArray:
    """``[patch, prompt]``: one past the last position that a patch edits in its first block."""
    ends = np.zeros((len(patches), n_prompts), dtype=np.int64)
    starts = np.array([patch.start for patch in patches], dtype=np.int64)
    for group in groups:
        numbers = group.patches.numpy()
        mine = np.isin(starts[numbers], group.like.layers)
        np.maximum.at(ends, numbers[mine], group.positions.amax(-1).numpy()[mine] + 1)
    return ends


def head_ends(readouts: Sequence[Readout], n_prompts: int, length: int, last: int) -> Callable[[int], IntArray]:
    """For a block, one past the last position of every prompt that a head must have: all that is read in that block.

    In the last block, ``last``, a row has no next one to come into.
    """

    def ends(layer: int) -> IntArray:
        if layer >= last:
            return np.full(n_prompts, length)
        here = [readout for readout in readouts if layer in readout.layers]
        return reach(here, n_prompts, length).numpy() if here else np.zeros(n_prompts, dtype=np.int64)

    return ends


def first_tokens(starts: IntArray, heads: IntArray) -> torch.Tensor:
    """Packed tokens of the heads of rows that begin at the tokens ``starts``."""
    within = np.arange(int(heads.sum())) - np.repeat(np.cumsum(heads) - heads, heads)
    return torch.from_numpy(np.repeat(starts, heads) + within)
