"""How much of a vector is a constant: what is left of it when the mean of the other prompts' takes its place."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sinklens.errors import InputError


def mean_of_others(x: Float[Tensor, "prompt *rest"]) -> Float[Tensor, "prompt *rest"]:
    """For every prompt the mean over all others: a constant that has not seen the prompt it stands for.

    Raises:
        InputError: there are fewer than two prompts.
    """
    if len(x) < 2:
        raise InputError(f"a mean over the other prompts needs at least two prompts, not {len(x)}: give more")
    wide = x.float()
    return (wide.sum(0) - wide) / (len(wide) - 1)


def constant_share(x: Float[Tensor, "prompt *rest d"]) -> Float[Tensor, "prompt *rest"]:
    """``1 - |x - mean of others|^2 / |x|^2``: 1 for a vector that all prompts share, about 0 where the others say
    nothing of it, negative where they mislead; NaN for a zero vector.
    """
    wide = x.float()
    return 1 - (wide - mean_of_others(wide)).pow(2).sum(-1) / wide.pow(2).sum(-1)
