"""Token ids as callers have them: tensors, arrays, lists, and what a tokenizer returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinklens.errors import InputError
from sinklens.prompts.batch import PromptBatch
from sinklens.prompts.checks import NO_PADDING


def unpadded(tokens: Any) -> Any:
    """The ids in what was given; raises InputError where its attention mask marks padding."""
    if isinstance(tokens, PromptBatch):
        return tokens.tokens
    if not isinstance(tokens, Mapping):
        return tokens
    if "input_ids" not in tokens:
        raise InputError('tokens has no "input_ids"; give what a tokenizer returns, or the ids themselves.')
    ids, mask = integers(tokens["input_ids"]), tokens.get("attention_mask")
    if mask is None:
        return ids
    marked = integers(mask)
    if marked.shape != ids.shape:
        raise InputError(f"The attention mask has the shape {list(marked.shape)}, and the ids {list(ids.shape)}.")
    if not bool((marked == 1).all()):
        raise InputError(f"The attention mask marks padding, {NO_PADDING}.")
    return ids


def integers(rows: Any) -> Tensor:
    """A tensor of what was given, on the CPU, which shares nothing with it."""
    try:
        if isinstance(rows, (list, tuple)) and any(isinstance(row, (Tensor, np.ndarray)) for row in rows):
            rows = torch.stack([integers(row) for row in rows])
        elif isinstance(rows, (list, tuple)) and any(isinstance(i, bool) for row in rows for i in _row(row)):
            raise TypeError("booleans among the ids")
        elif not isinstance(rows, (Tensor, list, tuple)):
            rows = np.asarray(rows)
        # Of a tensor the device is its own; of anything else the CPU, whatever the default is.
        found = torch.as_tensor(rows, device=None if isinstance(rows, Tensor) else "cpu").detach()
        found = found.to("cpu", copy=True)
        return found.to_dense() if found.layout != torch.strided else found
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # NotImplementedError: a meta tensor
        raise InputError("tokens must be integers in equally long rows, of shape [batch, pos].") from error


def _row(row: Any) -> Sequence[Any]:
    return row if isinstance(row, (list, tuple)) else ()
