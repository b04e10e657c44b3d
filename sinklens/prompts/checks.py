"""What prompts must be for a model, and what is worth a warning."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.errors import InputError
from sinklens.models.view import (
    Model,
    bos_token,
    check_model,
    context_length,
    prepends_bos,
    tokenizer_of,
    vocabulary_size,
)
from sinklens.prompts.batch import PromptBatch, check_tokens

FEW_GROUPS = 5
"""Fewer texts than this are too few to draw again."""


def check_ids(model: Model, tokens: Any) -> None:
    """Make sure that the model has these tokens: one beyond the embedding would end the process on a GPU.

    Raises:
        InputError: they are not a non-empty tensor [batch pos] of integers, or some are not in the vocabulary.
    """
    check_tokens(tokens)
    # Unsigned types of more than 8 bits know no minimum.
    low, high, size = int(tokens.long().min()), int(tokens.long().max()), vocabulary_size(model)
    if low < 0 or high >= size:
        theirs = "" if tokenizer_of(model) is None else "; the tokenizer must be the model's own"
        raise InputError(f"Token ids must lie in 0..{size - 1}, and these lie in {low}..{high}{theirs}.")


def check_batch(model: Model, batch: Any) -> None:
    """Make sure that there is a model, and a batch of prompts that it can read.

    Raises:
        InputError: something else in the place of either, or prompts of another model: token ids or a length that this
            one does not have.
    """
    check_model(model)
    if not isinstance(batch, PromptBatch):
        raise InputError(f"prompts must be a PromptBatch (see sinklens.prompts), not of type {type(batch).__name__}")
    check_ids(model, batch.tokens)
    check_size(model, length=batch.length)


def warn_of_groups(batch: PromptBatch) -> None:
    """Say so where prompts are of so few texts that intervals over texts mean little."""
    if batch.is_grouped and batch.n_groups < FEW_GROUPS:
        little = "mean little" if batch.n_groups > 1 else "cannot be had"
        warnings.warn(
            f"{batch.source}: the {batch.n} prompts are passages of {batch.n_groups} texts, and intervals over so few "
            f"{little}.",
            stacklevel=3,
        )


NO_PADDING = "which would be attended to like text: give prompts of equal length, or use from_texts, which cuts them"


def check_padding(model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
    """Refuse a padding token at an end of a row; where it has another use too, say that it may be padding.

    A token with another use (end of text, unknown) stands alone, or in front of every row; padding comes in runs, and
    in runs of different lengths.
    """
    tokenizer = tokenizer_of(model)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return
    ends = [(tokens == pad).long().cumprod(1).sum(1), (tokens == pad).flip(1).long().cumprod(1).sum(1)]
    n_rows = int(((ends[0] + ends[1]) > 0).sum())
    if not n_rows:
        return
    name = f"the padding token {tokenizer.convert_ids_to_tokens(pad)!r}"  # pyright: ignore[reportOptionalMemberAccess]
    where = f"{n_rows} of {len(tokens)} rows begin or end with {name}"
    others = {getattr(tokenizer, f"{use}_token_id", None) for use in ("eos", "bos", "unk")}
    if pad not in others:
        raise InputError(f"{where}, {NO_PADDING}.")
    if any(int(run.max()) > 1 or int(run.min()) != int(run.max()) for run in ends):
        warnings.warn(f"{where}; if that is padding, it is attended to like text: cut the rows instead.", stacklevel=3)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that stand for something other than text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added


def warn_of_special(model: Model, tokens: Int[Tensor, "batch pos"], source: str) -> None:
    """Say how many special tokens are written in texts: the model takes them as what they stand for."""
    tokenizer: Any = tokenizer_of(model)
    special = special_ids(tokenizer)
    unknown = tokenizer.unk_token_id
    # An unknown word is no special token that somebody wrote, unless that token has another use as well.
    special -= {unknown} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    found = tokens[torch.isin(tokens, torch.tensor(sorted(special), dtype=tokens.dtype, device="cpu"))]
    if len(found):
        names = ", ".join(str(name) for name in tokenizer.convert_ids_to_tokens(sorted(set(found.tolist()))))
        warnings.warn(
            f"{source}: {len(found)} special tokens are written in the texts ({names}), and are taken as such.",
            stacklevel=3,
        )


def warn_of_bos(model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
    """Say where BOS is missing that the tokenizer itself would put in front, stands twice, or only before some."""
    bos = bos_token(model)
    if bos is None:
        return
    led = tokens[:, 0] == bos
    said = ""
    if bool((led & (tokens[:, 1] == bos)).any()):
        said = "some prompts begin with the beginning-of-sequence token twice; ask for it, or write it, but not both."
    elif bool(led.any()) and not bool(led.all()):
        said = f"{int(led.sum())} of {len(led)} prompts begin with the beginning-of-sequence token, and the others not."
    elif not bool(led.any()) and prepends_bos(model):
        said = (
            "this tokenizer puts a beginning-of-sequence token in front of every text, and these prompts have none: "
            'the model may not know such input; prepend_bos="auto" puts it there.'
        )
    if said:
        warnings.warn(said, stacklevel=3)


def check_size(model: Model, length: int, n: int | None = None) -> None:
    """Raises InputError unless `n` and `length` are integers in range and `length` fits the model's context."""
    for name, value, least in (("n", 1 if n is None else n, 1), ("length", length, 2)):
        try:
            too_small = operator.index(value) < least
        except TypeError:
            raise InputError(f"{name} must be an integer, and it is {value!r}.") from None
        if too_small:
            raise InputError(f"{name} must be at least {least}, and it is {value}.")
    longest = context_length(model)
    if longest is not None and length > longest:
        raise InputError(f"The model reads at most {longest} tokens; use a length no greater, not {length}.")
