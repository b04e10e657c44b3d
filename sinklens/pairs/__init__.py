"""Sink pairs: two runs on the same tokens, one without a sink at a position and one with.

:class:`~sinklens.pairs.choice.PairChoice` says which, :func:`~sinklens.pairs.pair.make_pair` makes them.
"""

from sinklens.pairs.ablations import EDITS, NamedEdit, register_edit
from sinklens.pairs.choice import NATURAL, InducedKind, PairChoice, PairKind, check_target, is_natural, target_positions
from sinklens.pairs.pair import Direction, SinkPair, induced_pair, make_pair, natural_pair, ordinary_positions
from sinklens.pairs.subset import pair_for_prompts

__all__ = [
    "Direction",
    "EDITS",
    "InducedKind",
    "NATURAL",
    "NamedEdit",
    "PairChoice",
    "PairKind",
    "SinkPair",
    "check_target",
    "induced_pair",
    "is_natural",
    "make_pair",
    "natural_pair",
    "ordinary_positions",
    "pair_for_prompts",
    "register_edit",
    "target_positions",
]
