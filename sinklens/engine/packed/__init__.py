"""The fast forward pass: sinklens's own, over packed tokens.

TransformerLens computes every position of every row. Under a causal mask a patch moves nothing before the first
position that it edits, so here a row holds only the positions from there on; the keys and values of its prefix are
those of the unpatched run. Rows of different lengths lie one after another in one tensor ``[token, ...]``, without
padding, and join the pass at the block that they are patched in: one pass serves patches of all blocks and positions.

The arithmetic is the model's own, block by block, with the same weights. :mod:`sinklens.engine.packed.weights`
says which models have a part that is not known here; the engine runs those with TransformerLens. The first batch
of every runner is checked against the model's own numbers.
"""

from sinklens.engine.packed.job import DifferentModelError, PackedJob, unpackable
from sinklens.engine.packed.weights import PackedModel

__all__ = ["DifferentModelError", "PackedJob", "PackedModel", "unpackable"]
