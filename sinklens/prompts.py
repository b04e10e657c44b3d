"""Prompts: equal-length batches of tokens, with the token strings that figures show.

Every row of a `PromptBatch` has the same number of tokens and none of them is padding: a text is cut to its first
`length` tokens, and a text with fewer is left out and counted.

Why: a sink sits at an absolute position and is read from the rows of the attention pattern, so padding would move the
positions and add rows that nobody wants to average. With equal lengths the question never comes up.

Pitfall: `prepend_bos` decides what stands at position 0. It is False here, so the first token is the text's own. A
model trained with a beginning-of-sequence token may form a stronger sink on that token: pass `prepend_bos=True`.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.errors import InputError
from sinklens.models.state import in_usual_state
from sinklens.models.view import Model, bos_token, context_length, tokenizer_of, vocabulary_size

__all__ = ["PromptBatch", "from_dataset", "from_file", "from_texts", "from_tokens", "natural", "random_tokens"]

N_PASSAGES = 32
DATASETS = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1")}


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """A batch of equally long prompts, without padding."""

    tokens: Int[Tensor, "batch pos"]
    """Token ids, on the CPU."""
    labels: tuple[tuple[str, ...], ...]
    """The string of each token for display, as [batch][pos]."""
    source: str
    """Where the prompts come from: "passages", "random_tokens(seed=0)", "file:texts.txt"."""
    n_skipped: int = 0
    """How many prompts were passed over because they had too few tokens."""

    def __post_init__(self) -> None:
        """Raises InputError unless `tokens` is a non-empty 2-D integer tensor that `labels` matches."""
        _check_tokens(self.tokens)
        if [len(row) for row in self.labels] != [self.length] * self.n:
            raise InputError(f"labels must hold one string for each token, {self.n} rows of {self.length}.")
        object.__setattr__(self, "tokens", self.tokens.cpu())

    @property
    def n(self) -> int:
        """The number of prompts."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """The number of tokens in each prompt."""
        return self.tokens.shape[1]

    def digest(self) -> str:
        """The SHA-256 of the tokens (shape and ids), which tells whether two runs saw the same prompts."""
        ids = self.tokens.numpy().astype("<i8")
        return hashlib.sha256(f"{self.n}x{self.length}:".encode() + ids.tobytes()).hexdigest()

    def subset(self, indices: Any) -> PromptBatch:
        """The prompts at `indices`: integers in any order, or one boolean for each prompt.

        Raises:
            InputError: an index is out of range, or nothing is selected.
        """
        chosen = np.asarray(indices)
        if chosen.dtype == bool and chosen.shape == (self.n,):
            chosen = np.flatnonzero(chosen)
        if chosen.ndim != 1 or chosen.size == 0 or chosen.dtype.kind not in "iu":
            raise InputError(f"Select prompts by integers, or by {self.n} booleans of which at least one is true.")
        if chosen.min() < -self.n or chosen.max() >= self.n:
            raise InputError(f"Prompts are numbered 0..{self.n - 1}, and {chosen.tolist()} goes beyond that.")
        rows = tuple(self.labels[i] for i in chosen)
        return PromptBatch(self.tokens[chosen.tolist()], rows, self.source, self.n_skipped)


@in_usual_state
def natural(
    model: Model, n: int = 16, length: int = 64, *, prepend_bos: bool = False, seed: int | None = None
) -> PromptBatch:
    """The first `n` of the 32 passages that come with the package, or with a `seed` a random choice of `n`.

    Each has at least 260 tokens with SmolLM2's tokenizer; one with fewer than `length` is passed over for the next.

    Raises:
        InputError: more than 32 passages are asked for, none is long enough, or as for `from_texts`.
    """
    _check_size(model, length, n)
    if n > N_PASSAGES:
        raise InputError(
            f"There are {N_PASSAGES} built-in passages and {n} were asked for; use n={N_PASSAGES} or fewer, "
            "or bring more prompts with from_file or random_tokens."
        )
    lines = resources.files("sinklens").joinpath("data/passages.jsonl").read_text(encoding="utf-8").splitlines()
    texts, source = [json.loads(line)["text"] for line in lines], "passages"
    if seed is not None:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        texts, source = [texts[i] for i in order.tolist()], f"passages(seed={seed})"
    return from_texts(model, texts, length=length, n=n, prepend_bos=prepend_bos, source=source)


@in_usual_state
def random_tokens(
    model: Model, n: int = 16, length: int = 64, *, seed: int = 0, prepend_bos: bool = False
) -> PromptBatch:
    """Tokens drawn uniformly from the vocabulary, special tokens left out when the model has a tokenizer.

    Torch's global random state is neither read nor changed. A model without a tokenizer will do: then every id below
    `d_vocab` may be drawn, and the labels are the ids.

    Raises:
        InputError: `n` or `length` is out of range, or `prepend_bos` is asked of a model that has no such token.
    """
    _check_size(model, length, n)
    allowed = torch.arange(vocabulary_size(model))
    tokenizer = tokenizer_of(model)
    if tokenizer is not None:
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        allowed = torch.tensor(sorted(i for i in set(tokenizer.get_vocab().values()) - special if i < len(allowed)))
    if len(allowed) == 0:
        raise InputError("The model's vocabulary has no token to draw from besides the special ones.")
    draws = torch.randint(len(allowed), (n, length), generator=torch.Generator().manual_seed(seed))
    tokens = allowed[draws]
    if prepend_bos:
        tokens[:, 0] = _bos(model)
    return PromptBatch(tokens, _labels(model, tokens), f"random_tokens(seed={seed})")


def from_file(
    model: Model, path: str | os.PathLike[str], *, length: int = 64, n: int | None = None, prepend_bos: bool = False
) -> PromptBatch:
    """Prompts from a UTF-8 text file, one a line, or from a .jsonl file whose objects have a "text" field.

    Blank lines are ignored. Lines with fewer than `length` tokens are skipped and counted in `n_skipped`.

    Raises:
        InputError: the file is missing, unreadable, empty, not text or not JSON lines, or as for `from_texts`.
    """
    path = Path(path).expanduser()
    lines = _read(path).split("\n")
    rows = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix.lower() == ".jsonl":
        texts = [_json_text(path, number, line) for number, line in rows]
    else:
        texts = [line for _, line in rows]
    return from_texts(model, texts, length=length, n=n, prepend_bos=prepend_bos, source=f"file:{path.name}")


def from_dataset(
    model: Model,
    name: str = "wikitext",
    config: str | None = None,
    *,
    split: str = "test",
    column: str = "text",
    n: int = 16,
    length: int = 64,
    prepend_bos: bool = False,
) -> PromptBatch:
    """The first `n` long enough rows of a Hugging Face data set; "wikitext" is the raw WikiText-2.

    Raises:
        InputError: `datasets` is not installed, the data set cannot be loaded, or as for `from_texts`.
    """
    _check_size(model, length, n)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError("Data sets need one more package: pip install 'sinklens[datasets]'.") from error
    repo, default_config = DATASETS.get(name, (name, None))
    try:
        rows = load_dataset(repo, config or default_config, split=split)
        texts = rows[column]
    except Exception as error:  # offline, unknown name, missing column: the hub's clients share no base class
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"The data set {name!r} could not be loaded ({type(error).__name__}: {reason}); check its name and the "
            "network, or use the built-in passages or a file instead."
        ) from error
    return from_texts(model, texts, length=length, n=n, prepend_bos=prepend_bos, source=f"dataset:{name}[{split}]")


@in_usual_state
def from_texts(
    model: Model,
    texts: Iterable[str],
    *,
    length: int = 64,
    n: int | None = None,
    prepend_bos: bool = False,
    source: str = "texts",
) -> PromptBatch:
    """The first `length` tokens of each text, up to `n` prompts; shorter texts are skipped and counted.

    Blank texts are ignored. A warning says so when fewer than `n` prompts are long enough. With `prepend_bos` the
    beginning-of-sequence token counts as one of the `length` tokens.

    Raises:
        InputError: no tokenizer, `n` or `length` out of range, a text that is no string, or no text long enough.
    """
    if isinstance(texts, str):
        raise InputError("texts must be a list of strings, and it is a single string; put it in a list.")
    _check_size(model, length, n)
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise InputError("This model has no tokenizer, so it cannot read text; use random_tokens or from_tokens.")
    first = [_bos(model)] if prepend_bos else []
    kept, short = list[list[int]](), list[int]()
    for text in _texts(texts):
        ids = first + list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) < length:
            short.append(len(ids))
            continue
        kept.append(ids[:length])
        if len(kept) == n:
            break
    if not kept:
        raise InputError(_none_left(source, length, short))
    if n is not None and len(kept) < n:
        warnings.warn(f"{source}: {len(kept)} of {n} prompts have {length} tokens or more.", stacklevel=2)
    tokens = torch.tensor(kept)
    return PromptBatch(tokens, _labels(model, tokens), source, len(short))


@in_usual_state
def from_tokens(
    model: Model, tokens: Int[Tensor, "batch pos"] | Sequence[Sequence[int]], *, source: str = "tokens"
) -> PromptBatch:
    """A batch of your own token ids, copied to the CPU.

    Raises:
        InputError: the ids are not a [batch, pos] array of integers, do not fit the vocabulary, or the prompts do not
            fit the model's context.
    """
    try:
        ids = torch.as_tensor(tokens).detach().to("cpu", copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError("tokens must be integers in equally long rows, of shape [batch, pos].") from error
    _check_tokens(ids)
    ids = ids.long()
    _check_size(model, length=ids.shape[1])
    low, high, size = int(ids.min()), int(ids.max()), vocabulary_size(model)
    if low < 0 or high >= size:
        raise InputError(f"Token ids must lie in 0..{size - 1}, and these lie in {low}..{high}.")
    return PromptBatch(ids, _labels(model, ids), source)


def _check_size(model: Model, length: int, n: int | None = None) -> None:
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


def _check_tokens(tokens: Any) -> None:
    """Raises InputError unless `tokens` is a non-empty 2-D integer tensor."""
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens must be a tensor, not of type {type(tokens).__name__}.")
    integer = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.ndim != 2 or tokens.numel() == 0 or not integer:
        shape = list(tokens.shape)
        raise InputError(
            f"tokens must be non-empty integers of shape [batch, pos], not {tokens.dtype} of shape {shape}."
        )


def _bos(model: Model) -> int:
    bos = bos_token(model)
    if bos is None:
        raise InputError("This model has no beginning-of-sequence token; leave prepend_bos off.")
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


def _texts(texts: Iterable[str]) -> Iterator[str]:
    """The texts that are not blank; raises InputError for one that a tokenizer cannot read."""
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"Text {number} must be a string, and it is of type {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"Text {number} is not valid Unicode (half a surrogate pair); correct it.") from None
        if text.strip():
            yield text


def _none_left(source: str, length: int, short: list[int]) -> str:
    if not short:
        return f"There is no text in {source}; give at least one line of {length} tokens."
    longest = max(short)
    shorter = f"use a length of {longest} or less, or longer texts" if longest > 1 else "use longer texts"
    return f"No text in {source} has {length} tokens: the longest has {longest}; {shorter}."


def _read(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a text file in it.")
    if not path.is_file():
        raise InputError(f"There is no file {path}; check the path.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{path} is not a UTF-8 text file; save it as plain text in UTF-8.")
    if not text.strip():
        raise InputError(f"{path} is empty; write one prompt on each line.")
    return text


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path}, line {number} is not JSON; write one {{"text": "..."}} on it.') from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{path}, line {number} has no "text" that is a string; write {{"text": "..."}}.')
    return row["text"]
