"""Exact edges: one input of one receiver hears what a sender writes in the other run, and nobody else does.

For an edge from ``s`` to an input ``r`` (path patching, Wang et al. 2022; Goldowsky-Dill et al. 2023) in the run that
is patched, with ``x`` its residual stream in front of the norm at the receiver,

    input_r  :=  W_r norm(x + s_other - s_own)

and all other readers of ``s`` are left as they are. The norm is computed anew, so that what a sender does to the norm's
scale is part of what it says. What the receiver makes of it goes on freely. A *path* of several hops hands on what
changes at each node on the way to the next one alone. Every edge is a row of the engine.

The control of an edge says something of the same size: what the sender writes at another token, moved to the length of
the real difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from sinklens.circuits.nodes import Edge
from sinklens.circuits.parts import Parts, Reader
from sinklens.edits.base import Edit, EditSite, Gathered, Read
from sinklens.patches import Patch
from sinklens.stages.base import Setting


@dataclass(frozen=True, eq=False)
class Hears(Edit):
    """What an input becomes when something is added to the residual stream that it alone reads."""

    name: str = "edge"
    added: Float[Tensor, "prompt d_model"] = field(default_factory=lambda: torch.zeros(0, 0))
    """What is added, for every prompt."""
    reader: Reader | None = None
    """How the input reads."""

    @property
    @override
    def reads(self) -> tuple[Read, ...]:
        assert self.reader is not None
        return (self.reader.reads,)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        reader = self.reader
        assert reader is not None
        heard = at.read(reader.reads).float()
        moved = heard + self.added.to(heard)[at.prompts.to(self.added.device)]
        both = reader(torch.cat([moved, heard]))
        new, old = both.split(len(x))
        return x + (new - old).view_as(x).to(x)


def edge_patch(setting: Setting, parts: Parts, edge: Edge, run: str, added: Float[Tensor, "prompt d_model"]) -> Patch:
    """The patch in ``run`` in which one input hears ``added`` besides."""
    first, *others = [
        Patch(
            site=reader.site,
            layers=(edge.receiver.block,),
            positions=setting.pair.target,
            edit=Hears(added=added, reader=reader),
            units=reader.units,
            run=run,
            label=edge.name,
            allow_unchanged=True,  # a sender may write the same in both runs: an effect of 0
        )
        for reader in parts.readers(edge.receiver, edge.branch)
    ]
    return Patch(**{**vars(first), "also": tuple(others)}) if others else first
