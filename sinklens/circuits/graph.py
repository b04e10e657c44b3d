"""The graph: every node of the sink's token up to the last block that is read, and every edge between them.

Conventions:

* *Grouped heads.* Queries belong to a query head; keys and values to the head that shares them, a ``kv`` node that
  reads but does not write. Where every query head has its own, ``k`` and ``v`` are inputs of the head itself.
* *Parallel blocks.* The MLP reads what attention reads: no edge leads from a head to the MLP of its own block.
* *Norms behind a sublayer* (and multipliers): a node writes what reaches the residual stream, its linear share of the
  normed sum with that run's own scale.
* *Super neurons* are a node of their own; the MLP of the formation block is the others, with the bias.
* *What is read out* is attention to the token, by keys: in the last block that is read only these count, since nothing
  behind its pattern is looked at. A measure of the residual stream itself would need a receiver of its own.
* *One token.* All nodes are the sink's. Tokens before it cannot hear it, and those behind it hear its keys and values;
  what these are in turn made of (a head's query, the values that it mixes) is not taken apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from sinklens.circuits.nodes import Branch, Edge, Node
from sinklens.models.view import ModelShape

Input: TypeAlias = tuple[Node, Branch]
"""A receiver and one of its inputs."""


@dataclass(frozen=True)
class Graph:
    """Nodes and edges at one token."""

    shape: ModelShape
    """Sizes of the model."""
    formation: int
    """The block of the super neurons."""
    neurons: tuple[int, ...]
    """The super neurons."""
    last: int
    """The last block that is read."""

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """All nodes that write, in the order of the forward pass."""
        found = [Node("embed")]
        for block in range(self.last):
            found += [Node("head", block, head) for head in range(self.shape.n_heads)]
            found.append(Node("mlp", block))
            if block == self.formation:
                found.append(Node("super", block))
        return tuple(found)

    @cached_property
    def number(self) -> dict[Node, int]:
        """Each sender's place among :attr:`senders`."""
        return {node: i for i, node in enumerate(self.senders)}

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in the order of the forward pass."""
        return tuple(found for block in range(self.last + 1) for found in self.inputs_of(block))

    def inputs_of(self, block: int) -> tuple[Input, ...]:
        """The inputs in one block: of attention first."""
        kv = [self.kv(block, head) for head in range(self.shape.n_kv_heads)]
        keys: list[Input] = [(node, "k") for node in kv]
        if block == self.last:
            return tuple(keys)
        queries: list[Input] = [(Node("head", block, head), "q") for head in range(self.shape.n_heads)]
        values: list[Input] = [(node, "v") for node in kv]
        own = self.super_inputs if block == self.formation else ()
        return (*queries, *keys, *values, (Node("mlp", block), "in"), *own)

    @property
    def super_inputs(self) -> tuple[Input, ...]:
        """The inputs of the super neurons."""
        node = Node("super", self.formation)
        return ((node, "gate"), (node, "linear")) if self.shape.gated else ((node, "in"),)

    def kv(self, block: int, head: int) -> Node:
        """The node that reads keys and values of a key/value head."""
        return Node("kv" if self.shape.n_kv_heads < self.shape.n_heads else "head", block, head)

    def heard(self, receiver: Node) -> int:
        """How many of the senders an input hears: the first so many."""
        n_block = self.shape.n_heads + 1
        before = 1 + receiver.block * n_block + (receiver.block > self.formation)
        behind_attention = receiver.kind in ("mlp", "super") and not self.shape.parallel
        return before + (self.shape.n_heads if behind_attention else 0)

    def edges_into(self, inputs: Sequence[Input]) -> tuple[Edge, ...]:
        """All edges into some inputs."""
        return tuple(Edge(node, to, branch) for to, branch in inputs for node in self.senders[: self.heard(to)])

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges."""
        return self.edges_into(self.inputs)

    @cached_property
    def place(self) -> dict[Edge, int]:
        """Each edge's place among :attr:`edges`."""
        return {edge: i for i, edge in enumerate(self.edges)}
