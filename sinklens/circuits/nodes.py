"""Nodes and edges of a circuit, as auto-circuit and TransformerLens use the words.

All are of one token, the sink's: with the tokens before it as they are, what it becomes follows from what its own heads
and MLPs write into its residual stream, and the rest of the model hears of it by the keys and values that it gives.

A *node* writes into the residual stream: the embedding, a query head, an MLP, or the super neurons of the formation
block (whose MLP is a node without them). An *edge* goes from a node to an input of a later one, which has a name of its
own: ``q`` of a head, ``k`` and ``v`` of the head that shares them (a key/value head, ``kv``, where several query heads
do), ``in`` of an MLP, ``gate`` and ``linear`` of the super neurons (``in`` where there is no gate). What a node writes
is what reaches the residual stream; a receiver's input is the residual stream in front of its norm. In parallel blocks,
where the MLP reads what attention reads, it hears no head of its own block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from sinklens.errors import InputError

NodeKind: TypeAlias = Literal["embed", "head", "kv", "mlp", "super", "neuron"]
"""Embedding, query head, key/value head, MLP, super neurons together, and one of them alone (in pairs of nodes)."""
Branch: TypeAlias = Literal["q", "k", "v", "in", "gate", "linear"]
"""Inputs of nodes."""
ORDER = {"embed": 0, "kv": 1, "head": 2, "mlp": 3, "super": 4, "neuron": 5}
"""Kinds of one block in the order in which they are drawn."""


INDEXED = ("head", "kv", "neuron")
"""Kinds of which a block has several."""


@dataclass(frozen=True)
class Node:
    """A part of the model at the sink's token."""

    kind: NodeKind
    """What it is."""
    block: int = -1
    """Its block; -1 for the embedding."""
    index: int = 0
    """Which head or neuron; 0 where there is one of its kind in a block."""

    @property
    def name(self) -> str:
        """``embed``, ``head 3.5``, ``kv 3.1``, ``mlp 4``, ``super 11``, ``neuron 11.1229``: how tables call it."""
        if self.kind == "embed":
            return self.kind
        return f"{self.kind} {self.block}" + (f".{self.index}" if self.kind in INDEXED else "")

    @staticmethod
    def of(name: str) -> Node:
        """The inverse of :attr:`name`.

        Raises:
            InputError: it is no name of a node.
        """
        kind, _, where = name.partition(" ")
        block, _, index = where.partition(".")
        known = {each: each for each in get_args(NodeKind)}
        if kind not in known or (kind != "embed" and not block.isdigit()) or (index and not index.isdigit()):
            raise InputError(f"node {name!r}: write it as embed, head 3.5, kv 3.1, mlp 4 or super 11")
        return Node(known[kind]) if kind == "embed" else Node(known[kind], int(block), int(index or 0))

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sorts nodes as the forward pass comes to them."""
        return (self.block, ORDER[self.kind], self.index)


@dataclass(frozen=True)
class Edge:
    """From what a node writes to one input of a later node."""

    sender: Node
    """Which writes."""
    receiver: Node
    """Which reads."""
    branch: Branch
    """By which of its inputs."""

    @property
    def name(self) -> str:
        """``head 3.5 > super 11 gate``: how messages call it."""
        return f"{self.sender} > {self.receiver} {self.branch}"

    @staticmethod
    def of(name: str) -> Edge:
        """The inverse of :attr:`name`.

        Raises:
            InputError: it is no name of an edge.
        """
        sender, found, rest = name.partition(" > ")
        receiver, _, branch = rest.rpartition(" ")
        known = {each: each for each in get_args(Branch)}
        if not found or branch not in known:
            raise InputError(f"edge {name!r}: write it as 'head 3.5 > super 11 gate'")
        return Edge(Node.of(sender), Node.of(receiver), known[branch])

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> tuple[object, ...]:
        """Sorts edges by receiver, then sender."""
        return (self.receiver.rank, self.branch, self.sender.rank)
