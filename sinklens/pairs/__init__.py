"""Sink pairs: two runs on the same tokens, one without a sink at a position and one with."""

from sinklens.pairs.pair import (
    Direction,
    PairChoice,
    PairKind,
    SinkPair,
    check_target,
    induced_pair,
    make_pair,
    natural_pair,
    ordinary_positions,
)

__all__ = [
    "Direction",
    "PairChoice",
    "PairKind",
    "SinkPair",
    "check_target",
    "induced_pair",
    "make_pair",
    "natural_pair",
    "ordinary_positions",
]
