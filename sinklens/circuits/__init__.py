"""Circuits: which parts of the model make the super neurons fire, along which edges, and what listens to them."""

from sinklens.circuits.edges import Edges
from sinklens.circuits.nodes import Edge, Node
from sinklens.circuits.result import Circuit
from sinklens.circuits.run import circuit

__all__ = ["Circuit", "Edge", "Edges", "Node", "circuit"]
