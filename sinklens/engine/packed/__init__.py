"""The fast forward pass: sinklens's own, over packed tokens.

TransformerLens computes every position of every row. Under a causal mask a patch moves nothing before the first
position that it edits, so here a row holds only the positions from there on; the keys and values of its prefix are
those of the unpatched run. Rows of different lengths lie one after another in one tensor ``[token, ...]``, without
padding, and join the pass at the block that they are patched in: one pass serves patches of all blocks and positions.

The arithmetic is the model's own, block by block, with the same weights: of a HookedTransformer
(:mod:`sinklens.engine.packed.of_hooked`) or of the Hugging Face modules in a TransformerBridge
(:mod:`sinklens.engine.packed.of_bridge`, proved on each model by :mod:`sinklens.engine.packed.proof`). Which models
have a part that is not known is said in :mod:`sinklens.engine.packed.known`; the engine runs those with
TransformerLens. The first batch of every runner is checked against the model's own numbers.
"""

from sinklens.engine.packed.job import PackedJob, places_of, unknown_place, unpackable
from sinklens.engine.packed.known import (
    TOLERANCE,
    DifferentModelError,
    check_reading,
    found_different,
    packed_model,
    rounding_allowed,
)
from sinklens.engine.packed.points import wants_whole_pattern
from sinklens.engine.packed.proof import difference
from sinklens.engine.packed.weights import PackedModel
from sinklens.engine.packed.whole import execute_whole

__all__ = [
    "TOLERANCE",
    "DifferentModelError",
    "PackedJob",
    "PackedModel",
    "check_reading",
    "difference",
    "execute_whole",
    "found_different",
    "packed_model",
    "places_of",
    "rounding_allowed",
    "unknown_place",
    "unpackable",
    "wants_whole_pattern",
]
