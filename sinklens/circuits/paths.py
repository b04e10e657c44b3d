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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from sinklens.circuits.graph import Graph
from sinklens.circuits.nodes import Edge, Node
from sinklens.circuits.parts import Parts, Reader
from sinklens.edits.base import Edit, EditSite, Gathered, Read
from sinklens.edits.general import Transplant
from sinklens.errors import InputError
from sinklens.patches import Patch, Source
from sinklens.sites import ATTN_OUT, MLP_OUT, MLP_POST, PATTERN, HookSite, Z
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


@dataclass(frozen=True, eq=False)
class HearsLive(Edit):
    """What an input becomes when it alone hears what a node writes now, in place of what it writes in the run."""

    name: str = "path"
    sender: Node = Node("embed")
    """A head, an MLP or the super neurons."""
    own: Float[Tensor, "prompt d_model"] = field(default_factory=lambda: torch.zeros(0, 0))
    """What it writes in the run, for every prompt."""
    parts: Parts | None = None
    """How it writes."""
    reader: Reader | None = None
    """How the input reads."""

    @property
    @override
    def reads(self) -> tuple[Read, ...]:
        assert self.reader is not None
        return (self.reader.reads, self._written)

    @property
    def _written(self) -> tuple[HookSite, int]:
        return (Z if self.sender.kind == "head" else MLP_POST, self.sender.block)

    @override
    def __call__(self, x: Gathered, source: Gathered | None, at: EditSite) -> Gathered:  # noqa: ARG002
        assert self.parts is not None
        now = self.parts.writes(self.sender, at.read(*self._written).float())
        added = now - self.own.to(now)[at.prompts.to(self.own.device)]
        # The same as a change that is known before, place by place.
        known = Hears(added=added, reader=self.reader)
        return known(x, None, replace(at, prompts=torch.arange(len(x), device=x.device)))


def edge_patch(setting: Setting, parts: Parts, edge: Edge, run: str, added: Float[Tensor, "prompt d_model"]) -> Patch:
    """The patch in ``run`` in which one input hears ``added`` besides."""
    return together(_hearing(setting, edge, run, parts, lambda reader: Hears(added=added, reader=reader)))


def path_patch(
    setting: Setting,
    graph: Graph,
    parts: Parts,
    path: Sequence[Edge],
    run: str,
    added: Float[Tensor, "prompt d_model"],
    own: Float[Tensor, "sender prompt d_model"],
) -> Patch:
    """The patch in ``run`` in which the first input of a path hears ``added`` besides, and each later one what that
    makes of the node before it; nobody else hears any of these nodes change.

    Args:
        setting: the setting.
        graph: the graph.
        parts: the model, taken apart.
        path: edges, each from the node that the one before leads to.
        run: the run that is patched.
        added: what the first sender writes more.
        own: what all senders write in ``run``.

    Raises:
        InputError: the edges are no path.
    """
    found = _hearing(setting, path[0], run, parts, lambda reader: Hears(added=added, reader=reader))
    for before, edge in zip(path, path[1:], strict=False):
        sender = edge.sender
        if not _leads_to(graph, before, sender):
            raise InputError(f"{before} does not lead to {edge}: give a path, edge after edge")
        held = own[graph.number[sender]]
        found += _held(setting, before, sender, run)
        found += _hearing(
            setting, edge, run, parts, lambda reader, s=sender, h=held: HearsLive("path", s, h, parts, reader)
        )
    return together(found)


def _leads_to(graph: Graph, edge: Edge, sender: Node) -> bool:
    """Whether an edge leads into what a node is made of: a head has keys and values of a shared node."""
    if edge.receiver == sender:
        return True
    shape = graph.shape
    shared = graph.kv(sender.block, sender.index * shape.n_kv_heads // shape.n_heads)
    return sender.kind == "head" and edge.branch in ("k", "v") and edge.receiver == shared


def _held(setting: Setting, before: Edge, node: Node, run: str) -> list[Patch]:
    """What else would hear that a node changes is as in the run: the residual stream, at the token and at the later
    ones that look at its keys and values, and what these look at.
    """
    site = ATTN_OUT if node.kind == "head" else MLP_OUT
    held = [_as_in_run(setting, site, node.block, run, 0)]
    return held + ([_as_in_run(setting, PATTERN, node.block, run, 1)] if before.branch == "k" else [])


def _as_in_run(setting: Setting, site: HookSite, block: int, run: str, behind: int) -> Patch:
    """A site in a block as it is in the run, at the token (``behind`` 0) and all later ones, or these alone (1)."""
    length = setting.batch.length
    first = setting.pair.target.single(setting.batch.n).tolist()
    return Patch(
        site=site,
        layers=(block,),
        positions=tuple(tuple(range(position + behind, length)) for position in first),
        edit=Transplant(),
        run=run,
        source=Source(run),
        label=f"{site.at(block)} held",
        allow_unchanged=True,
    )


def _hearing(setting: Setting, edge: Edge, run: str, parts: Parts, edit: Callable[[Reader], Edit]) -> list[Patch]:
    """One patch for each projection of an input."""
    return [
        Patch(
            site=reader.site,
            layers=(edge.receiver.block,),
            positions=setting.pair.target,
            edit=edit(reader),
            units=reader.units,
            run=run,
            label=edge.name,
            allow_unchanged=True,  # a sender may write the same in both runs: an effect of 0
        )
        for reader in parts.readers(edge.receiver, edge.branch)
    ]


def together(patches: Sequence[Patch]) -> Patch:
    """Several patches as one, at the same time."""
    return replace(patches[0], also=(*patches[0].also, *patches[1:]))
