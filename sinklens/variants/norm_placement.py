"""Norms at other places than in front of the sublayers."""

from __future__ import annotations

from sinklens.variants.base import Variant


class SandwichNorm(Variant):
    """``x + norm(f(norm(x)))`` for attention and MLP alike.

    Sources: Ding et al., arXiv 2105.13290; Gemma 2; Sun et al., arXiv 2603.05498: activations shrink (3818 to 520), and
    the sink stays (46.0% to 44.7%). What a sublayer adds is the output of the norm, so that what a head or a neuron
    adds cannot be read off its weights.
    """

    name = "sandwich_norm"
    claim = "massive activations shrink while the sink stays"
    norms = "sandwich"


class PostNorm(Variant):
    """``x + norm(f(x))`` for attention and MLP alike, as in OLMo 2: no norm in front of either.

    Source: OLMo team, arXiv 2501.00656. Pitfall: the post-norm of the first transformers, ``norm(x + f(x))``, which Gu
    et al. (arXiv 2410.10781) train and which has a sink of 13.5% where pre-norm has 18.2%, is another thing.
    """

    name = "post_norm"
    claim = "massive activations shrink, as nothing of an unbounded size is added"
    norms = "post"
