"""What analyses need of a study before they measure: each refuses in a sentence."""

from __future__ import annotations

from sinklens.errors import InputError, NotApplicableError
from sinklens.study import Study


def check_k(study: Study, k: int) -> None:
    """Make sure that the residual stream is wider than ``k``, so that the ``k`` largest entries are not all of them.

    Raises:
        InputError: it is not, or ``k`` is below 1.
    """
    d_model = study.shape.d_model
    if not 0 < k < d_model:
        raise InputError(f"k={k} must be in 1..{d_model - 1}, below the width of the residual stream")


def check_first_varies(study: Study) -> None:
    """Make sure that the first token can vary across prompts: one that all share (BOS) has the same values in all.

    Raises:
        NotApplicableError: it cannot.
    """
    if len(study.batch.tokens[:, 0].unique()) == 1:
        raise NotApplicableError("the first token is the same in all prompts (BOS?): it has no variance")


def check_sink_varies(study: Study) -> None:
    """Make sure that the sink can vary across prompts: behind a first token that all share (BOS), say, it cannot.

    Raises:
        NotApplicableError: it cannot.
    """
    if not study.sink_varies:
        raise NotApplicableError(
            "the sink's token, and what stands before it, is the same in all prompts (BOS?): it has no variance"
        )
