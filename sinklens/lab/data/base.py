"""What training data are: rows of tokens that are drawn by number, so that nothing has to be remembered."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

Tokens = Int[np.ndarray, "row token"]


class Data(Protocol):
    """A stream of token rows.

    Which tokens a row has depends on the seed and the row's number alone: every arm of a seed sees the same rows in the
    same order, however they are split over batches and processes, and however often the run was interrupted.
    """

    tokenizer: PreTrainedTokenizerBase
    """What text is cut into tokens by."""

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        ...

    @property
    def prepends_bos(self) -> bool:
        """Whether every row begins with a beginning-of-sequence token."""
        ...

    @property
    def optimum(self) -> float | None:
        """The loss that no model can get below, in nats a token; None where nobody knows it."""
        ...

    def rows(self, seed: int, first: int, n: int) -> Tokens:
        """Rows ``first`` to ``first + n`` of the training stream, ``[n, length + 1]``: inputs, and one token more."""
        ...

    def held_out(self, n: int) -> Tokens:
        """``n`` rows, always the same, that are never trained on; fewer where there are no more."""
        ...

    def described(self) -> dict[str, Any]:
        """What they are, as a record of the run keeps it: equal where the rows are equal."""
        ...
