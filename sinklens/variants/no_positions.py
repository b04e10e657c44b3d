"""No positional encoding."""

from __future__ import annotations

from sinklens.variants.base import Variant


class NoPositions(Variant):
    """Softmax attention whose queries and keys are not turned: the causal mask alone tells positions apart.

    Sources: Kazemnejad et al., arXiv 2305.19466; Gu et al., arXiv 2410.10781, table 3 (sink 20.4%, rotary 18.2%).
    """

    name = "no_positions"
    claim = "a sink forms all the same"
    rotary = False
