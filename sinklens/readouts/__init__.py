"""Readouts: scalars that say how far a run has gone, for the engine to reduce inside the forward pass.

:mod:`sinklens.readouts.base` says what a readout is, :mod:`sinklens.readouts.build` makes them, and
:mod:`sinklens.readouts.named` has those with a name.
"""

from sinklens.readouts.base import PositionReadout, Readout, Rows, Tokens
from sinklens.readouts.build import (
    at_position,
    attention_ordinary,
    attention_received,
    attention_rows,
    deviation,
    next_token_loss,
    over_positions,
    vector_readout,
)
from sinklens.readouts.named import READOUTS, Context, NamedReadout, named_readout, register_readout

__all__ = [
    "Context",
    "NamedReadout",
    "READOUTS",
    "PositionReadout",
    "Readout",
    "Rows",
    "Tokens",
    "at_position",
    "attention_ordinary",
    "attention_received",
    "attention_rows",
    "deviation",
    "named_readout",
    "next_token_loss",
    "over_positions",
    "register_readout",
    "vector_readout",
]
