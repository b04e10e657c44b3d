"""A learned token in front of every prompt."""

from __future__ import annotations

from sinklens.variants.base import Variant


class SinkToken(Variant):
    """Softmax attention behind one learned embedding, which stands in front of every prompt and predicts nothing.

    Sources: Xiao et al., arXiv 2309.17453, section 3.3; Gu et al., arXiv 2410.10781, table 4. It goes through the
    blocks like a token at position -1 (rotations know only differences), but sees itself alone, so that its stream is
    the same for all prompts and is computed once. Prompts keep their positions: token 0 is the first one of the text,
    and the pattern is that of the text, of which rows sum to less than one. Starts from a normal with sd 0.02.
    """

    name = "sink_token"
    claim = "the sink moves from the first token to the learned one"
    sink_token = True
