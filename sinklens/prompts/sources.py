"""Where prompts come from: passages, random tokens, files, data sets, texts and token ids."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.errors import InputError
from sinklens.models.state import in_usual_state
from sinklens.models.view import (
    Model,
    bos_token,
    prepends_bos,
    tokenizer_of,
    vocabulary_size,
)
from sinklens.prompts.batch import PromptBatch, check_tokens
from sinklens.prompts.checks import (
    check_ids,
    check_padding,
    check_size,
    special_ids,
    warn_of_bos,
    warn_of_groups,
    warn_of_special,
)
from sinklens.prompts.datasets import rows_of
from sinklens.prompts.files import groups_of, json_row, lines_of
from sinklens.prompts.given import integers, unpadded
from sinklens.records.ranges import check_seed

N_PASSAGES = 32


MOST_TOKENS = 2**27
"""The most random tokens that are drawn at once (their labels take a gigabyte)."""


Bos: TypeAlias = bool | Literal["auto", "always", "never"]
"""Whether prompts begin with the tokenizer's BOS: what it does itself, always (True), or never (False)."""


BOS_WORDS = {True: "always", False: "never"}


@in_usual_state
def natural(
    model: Model, n: int = 16, length: int = 64, *, prepend_bos: Bos = "auto", seed: int | None = None
) -> PromptBatch:
    """The first `n` of the 32 passages that come with the package, or with a `seed` a random choice of `n`.

    Each has at least 260 tokens with SmolLM2's tokenizer; one with fewer than `length` is passed over for the next.

    Raises:
        InputError: more than 32 passages are asked for, none is long enough, or as for `from_texts`.
    """
    check_size(model, length, n)
    if n > N_PASSAGES:
        raise InputError(
            f"There are {N_PASSAGES} built-in passages and {n} were asked for; use n={N_PASSAGES} or fewer, "
            "or bring more prompts with from_file or random_tokens."
        )
    lines = resources.files("sinklens").joinpath("data/passages.jsonl").read_text(encoding="utf-8").splitlines()
    passages, source = [json.loads(line) for line in lines], "passages"
    if seed is not None:
        order = torch.randperm(len(passages), generator=_generator(seed), device="cpu")
        passages, source = [passages[i] for i in order.tolist()], f"passages(seed={seed})"
    texts, titles = ([passage[name] for passage in passages] for name in ("text", "title"))
    return from_texts(model, texts, length=length, n=n, prepend_bos=prepend_bos, source=source, groups=titles)


@in_usual_state
def random_tokens(
    model: Model, n: int = 16, length: int = 64, *, seed: int = 0, prepend_bos: Bos = "auto"
) -> PromptBatch:
    """Tokens drawn uniformly from the vocabulary, special tokens left out when the model has a tokenizer.

    Torch's global random state is neither read nor changed. A model without a tokenizer will do: then every id below
    `d_vocab` may be drawn, and the labels are the ids.

    Raises:
        InputError: `n` or `length` is out of range, or a BOS is asked of a model that has no such token.
    """
    asked, first = _leading(model, prepend_bos)
    check_size(model, length, n)
    if n * length > MOST_TOKENS:
        raise InputError(f"{n} prompts of {length} tokens are more than can be held; ask for fewer.")
    size, tokenizer = vocabulary_size(model), tokenizer_of(model)
    allowed = list(range(size))
    if tokenizer is not None:
        allowed = sorted(i for i in set(tokenizer.get_vocab().values()) - special_ids(tokenizer) if i < size)
    if not allowed:
        raise InputError("The model's vocabulary has no token to draw from besides the special ones.")
    draws = torch.randint(len(allowed), (n, length), generator=_generator(seed), device="cpu")
    tokens = torch.tensor(allowed, device="cpu")[draws]
    if first:
        tokens[:, 0] = first[0]
    warn_of_bos(model, tokens)
    return _batch(model, tokens, f"random_tokens(seed={seed})", bos=asked)


def from_file(
    model: Model, path: str | os.PathLike[str], *, length: int = 64, n: int | None = None, prepend_bos: Bos = "auto"
) -> PromptBatch:
    r"""Prompts from a text file, one a line, or from a .jsonl file whose objects have a "text" field.

    The file is in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. Lines end at `\n`, `\r\n` or `\r`, and at
    nothing else (U+2028 and form feeds are characters of a text): a passage of several lines is a prompt of its own
    for each, unless it is written as JSON. Blank lines are ignored. Lines with fewer than `length` tokens are skipped
    and counted in `n_skipped`.

    Where JSON lines have a "group" (or else a "source") field, it says which text a passage is of: prompts with the
    same one are not taken for independent. A line without one is a text of its own; a "source" that is the same in all
    lines is the name of a corpus, and says nothing.

    Raises:
        InputError: the file is missing, unreadable, empty, not text or not JSON lines, or as for `from_texts`.
    """
    path = Path(os.path.expanduser(path))
    rows = [(number, line) for number, line in enumerate(lines_of(path), 1) if line.strip()]
    groups = None
    if path.suffix.lower() == ".jsonl":
        read = [json_row(path, number, line) for number, line in rows]
        texts, groups = [row["text"] for row in read], groups_of(read)
    else:
        texts = [line for _, line in rows]
    source = f"file:{path.name}"
    return from_texts(model, texts, length=length, n=n, prepend_bos=prepend_bos, source=source, groups=groups)


def from_dataset(
    model: Model,
    name: Any = "wikitext",
    config: str | None = None,
    *,
    split: str | None = None,
    column: str | None = None,
    group: str | None = None,
    n: int | None = 16,
    length: int = 64,
    prepend_bos: Bos = "auto",
) -> PromptBatch:
    """The first `n` long enough rows of a Hugging Face data set (all of them with `None`).

    Args:
        model: the model that will read them.
        name: of a data set on the hub ("wikitext" is the raw WikiText-2); a folder on this machine, with files of data
            or saved by `save_to_disk`; or a `Dataset`, `IterableDataset` or `DatasetDict` that is loaded already.
        config: the configuration of a name.
        split: which part: by default `test` of a name, and else the first of `test`, `validation` and `train`.
        column: with the texts: by default `text`, or the only one with strings.
        group: a column that says which document a row is of; rows of one document are not taken for independent. The
            articles of WikiText are known by their titles.
        n: how many prompts.
        length: of each, in tokens.
        prepend_bos: see `Bos`.

    Raises:
        InputError: `datasets` is not installed, the data set cannot be loaded, or as for `from_texts`.
    """
    check_size(model, length, n)
    rows = rows_of(name, config, split, column, group)
    return from_texts(
        model, rows.texts, length=length, n=n, prepend_bos=prepend_bos, source=rows.source, groups=rows.groups
    )


@in_usual_state
def from_texts(
    model: Model,
    texts: Iterable[str],
    *,
    length: int = 64,
    n: int | None = None,
    prepend_bos: Bos = "auto",
    source: str = "texts",
    groups: Iterable[object] | None = None,
) -> PromptBatch:
    """The first `length` tokens of each text, up to `n` prompts; shorter texts are skipped and counted.

    Blank texts are ignored. A beginning-of-sequence token in front counts as one of the `length` tokens. `groups` has
    an entry for each text: texts with the same one belong together and are not taken for independent (`None`: a text
    of its own).
    Warnings say when fewer than `n` prompts are long enough, when special tokens are written in the texts (they are
    taken as such), and when a beginning-of-sequence token is missing that the tokenizer would put there, or is there
    twice.

    Raises:
        InputError: no tokenizer, `n` or `length` out of range, a text that is no string, no text long enough, groups
            of another number than the texts, or a tokenizer that does not fit the model's vocabulary.
    """
    if isinstance(texts, str):
        raise InputError("texts must be a list of strings, and it is a single string; put it in a list.")
    if not isinstance(texts, Iterable):
        raise InputError(f"texts must be a list of strings, not of type {type(texts).__name__}.")
    check_size(model, length, n)
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise InputError("This model has no tokenizer, so it cannot read text; use random_tokens or from_tokens.")
    asked, first = _leading(model, prepend_bos)
    kept, short, of = list[list[int]](), list[int](), list[str]()
    for text, group in _texts(texts, groups):
        ids = first + _encode(tokenizer, text)
        if len(ids) < length:
            short.append(len(ids))
            continue
        kept.append(ids[:length])
        of.append(group)
        if len(kept) == n:
            break
    if not kept:
        raise InputError(_none_left(source, length, short))
    if n is not None and len(kept) < n:
        warnings.warn(f"{source}: {len(kept)} of {n} prompts have {length} tokens or more.", stacklevel=2)
    tokens = torch.tensor(kept, device="cpu")
    batch = _batch(model, tokens, source, len(short), bos=asked, groups=tuple(of))
    warn_of_groups(batch)
    warn_of_special(model, tokens[:, len(first) :], source)
    warn_of_bos(model, tokens)
    return batch


@in_usual_state
def from_tokens(
    model: Model,
    tokens: Int[Tensor, "batch pos"] | Sequence[Sequence[int]] | np.ndarray | Mapping[str, Any] | PromptBatch,
    *,
    source: str = "tokens",
    groups: Sequence[object] = (),
) -> PromptBatch:
    """A batch of your own token ids, copied to the CPU.

    Args:
        model: the model that will read them.
        tokens: integers [batch pos] as a tensor on any device, an array, nested lists, or rows of either; or what a
            tokenizer returns, with `input_ids` and an `attention_mask` that is 1 everywhere.
        source: what the batch is called in reports.
        groups: for each prompt the text that it is a passage of, where several are of one; those of a batch stay.

    Raises:
        InputError: the ids are not a [batch, pos] array of integers, are padded, do not fit the vocabulary, or the
            prompts do not fit the model's context.
    """
    ids = integers(unpadded(tokens))
    check_tokens(ids)
    ids = ids.long()
    check_size(model, length=ids.shape[1])
    if isinstance(tokens, PromptBatch):
        groups = groups or tokens.groups
    batch = _batch(model, ids, source, groups=tuple(map(str, groups)))
    check_padding(model, ids)
    warn_of_bos(model, ids)
    return batch


def _leading(model: Model, prepend_bos: Bos) -> tuple[Any, list[int]]:
    """Who decides of a BOS, and the token ids that stand in front of a text.

    Raises:
        InputError: it is none of the words, or asked of a model that has no such token.
    """
    asked = BOS_WORDS.get(prepend_bos, prepend_bos) if isinstance(prepend_bos, bool) else prepend_bos
    if asked not in ("auto", "always", "never"):
        raise InputError(f"prepend_bos must be auto, always (True) or never (False), and it is {prepend_bos!r}.")
    if asked == "auto":
        return asked, [_bos(model)] if prepends_bos(model) and bos_token(model) is not None else []
    return asked, [_bos(model)] if asked == "always" else []


def _batch(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    source: str,
    n_skipped: int = 0,
    *,
    bos: Any = "given",
    groups: tuple[str, ...] = (),
) -> PromptBatch:
    """The batch, of tokens that the model has."""
    check_ids(model, tokens)
    token = bos_token(model)
    led = token is not None and bool((tokens[:, 0] == token).all())
    return PromptBatch(tokens, _labels(model, tokens), source, n_skipped, groups, bos, led)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _generator(seed: int) -> torch.Generator:
    """A generator on the CPU, whatever the default device is."""
    return torch.Generator("cpu").manual_seed(check_seed(seed))


def _bos(model: Model) -> int:
    bos = bos_token(model)
    if bos is None:
        raise InputError('This model has no beginning-of-sequence token; leave prepend_bos at "auto" or "never".')
    return bos


def _labels(model: Model, tokens: Int[Tensor, "batch pos"]) -> tuple[tuple[str, ...], ...]:
    """Each token decoded on its own; a fragment of a character, which cannot be, by its name in the vocabulary."""
    tokenizer = tokenizer_of(model)
    strings = {i: str(i) for i in set(chain.from_iterable(tokens.tolist()))}
    if tokenizer is not None:
        for i in strings:
            decoded = str(tokenizer.decode([i], clean_up_tokenization_spaces=False))
            readable = decoded and "\ufffd" not in decoded
            strings[i] = decoded if readable else str(tokenizer.convert_ids_to_tokens(i) or i)
    return tuple(tuple(strings[i] for i in row) for row in tokens.tolist())


def _texts(texts: Iterable[str], groups: Iterable[object] | None) -> Iterator[tuple[str, str]]:
    """The texts that are not blank, each with its group; raises InputError for one that a tokenizer cannot read."""
    own = object()
    of = repeat(None) if groups is None else chain(groups, repeat(own))
    for number, (text, group) in enumerate(zip(texts, of, strict=False), 1):
        if group is own:
            raise InputError(f"groups must have one entry for each text, and there is none for text {number}.")
        if not isinstance(text, str):
            raise InputError(f"Text {number} must be a string, and it is of type {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"Text {number} is not valid Unicode (half a surrogate pair); correct it.") from None
        if text.strip():
            yield text, f"text {number}" if group is None else str(group)


def _none_left(source: str, length: int, short: list[int]) -> str:
    if not short:
        return f"There is no text in {source}; give at least one line of {length} tokens."
    longest = max(short)
    shorter = f"use a length of {longest} or less, or longer texts" if longest > 1 else "use longer texts"
    return f"No text in {source} has {length} tokens: the longest has {longest}; {shorter}."
