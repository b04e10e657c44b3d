"""Prompts: equal-length batches of tokens, with the token strings that figures show.

Every row of a `PromptBatch` has the same number of tokens and none of them is padding: a text is cut to its first
`length` tokens, and a text with fewer is left out and counted.

Why: a sink sits at an absolute position and is read from the rows of the attention pattern, so padding would move the
positions and add rows that nobody wants to average. With equal lengths the question never comes up.

Pitfall: `prepend_bos` decides what stands at position 0. "auto" does what the model's own tokenizer does when it
encodes a text, "always" (or True) puts its beginning-of-sequence token there, "never" (or False) leaves the text's own
first token. What was done is in the batch, and in every result. Behind a BOS the first token is the same in every
prompt, so a variance over prompts cannot be measured there.

Passages of one text are alike, so they are not as many independent prompts: `groups` says which belong together, and
intervals then draw groups instead of prompts.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    check_model,
    context_length,
    prepends_bos,
    tokenizer_of,
    vocabulary_size,
)
from sinklens.records.ranges import check_seed
from sinklens.records.summaries import html, summary

__all__ = [
    "Bos",
    "PromptBatch",
    "bos_text",
    "check_ids",
    "from_dataset",
    "from_file",
    "from_texts",
    "from_tokens",
    "natural",
    "prompts_text",
    "random_tokens",
]

N_PASSAGES = 32
FEW_GROUPS = 5
"""Fewer texts than this are too few to draw again."""
MOST_TOKENS = 2**27
"""The most random tokens that are drawn at once (their labels take a gigabyte)."""
DATASETS = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1")}
WIKITEXT_TITLE = re.compile(r" = [^=].* = \n?")
"""A row of WikiText that begins an article; further `=` mark its sections."""
GROUP_FIELDS = ("group", "source")
"""Fields of a JSON line that say which text a passage is of; the first that is there counts."""

Bos: TypeAlias = bool | Literal["auto", "always", "never"]
"""Whether prompts begin with the tokenizer's BOS: what it does itself, always (True), or never (False)."""
BOS_WORDS = {True: "always", False: "never"}


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
    groups: tuple[str, ...] = ()
    """For each prompt, the text that it is a passage of; by default each is a text of its own."""
    bos: Literal["auto", "always", "never", "given"] = "given"
    """Who decided whether a BOS stands in front: see `Bos`; "given" where the token ids were."""
    has_bos: bool = False
    """Whether the tokenizer's BOS stands in front of every prompt."""

    def __post_init__(self) -> None:
        """Raises InputError unless `tokens` is a non-empty 2-D integer tensor that `labels` matches."""
        _check_tokens(self.tokens)
        if [len(row) for row in self.labels] != [self.length] * self.n:
            raise InputError(f"labels must hold one string for each token, {self.n} rows of {self.length}.")
        object.__setattr__(self, "tokens", self.tokens.cpu().long())
        groups = tuple(map(str, self.groups if len(self.groups) else range(self.n)))
        if len(groups) != self.n:
            raise InputError(f"groups must name one text for each of the {self.n} prompts, not {len(groups)}.")
        object.__setattr__(self, "groups", groups)

    def __repr__(self) -> str:
        skipped = f"{self.n_skipped} passed over" if self.n_skipped else ""
        size = f"{self.n:,} prompts of {self.length:,} tokens"
        grouped = f"of {self.n_groups:,} texts" if self.is_grouped else ""
        return summary(self, size, grouped, self.source, bos_text(self.record()), skipped)

    def _repr_html_(self) -> str:
        rows = [{"prompt": number, "text": "".join(row[:40])} for number, row in enumerate(self.labels)]
        return html(repr(self), rows)

    @property
    def n(self) -> int:
        """The number of prompts."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """The number of tokens in each prompt."""
        return self.tokens.shape[1]

    @property
    def n_groups(self) -> int:
        """The number of texts that the prompts are passages of."""
        return len(set(self.groups))

    @property
    def is_grouped(self) -> bool:
        """Whether some prompts are passages of one text."""
        return self.n_groups < self.n

    def record(self) -> dict[str, Any]:
        """What results say of their prompts."""
        return {
            "prompts": self.source,
            "n_prompts": self.n,
            "length": self.length,
            "n_skipped": self.n_skipped,
            "bos": self.bos,
            "has_bos": self.has_bos,
            **({"n_groups": self.n_groups} if self.is_grouped else {}),
        }

    def digest(self) -> str:
        """The SHA-256 of the tokens (shape and ids), which tells whether two runs saw the same prompts; where some are
        passages of one text, of the groups too, since intervals depend on them.
        """
        ids = self.tokens.numpy().astype("<i8")
        groups = json.dumps([self.groups.index(group) for group in self.groups]) if self.is_grouped else ""
        return hashlib.sha256(f"{self.n}x{self.length}:".encode() + ids.tobytes() + groups.encode()).hexdigest()

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
        rows, groups = (tuple(each[i] for i in chosen) for each in (self.labels, self.groups))
        return replace(self, tokens=self.tokens[chosen.tolist()], labels=rows, groups=groups)

    def disjoint(self, sets: int, n: int | None = None) -> list[PromptBatch]:
        """So many sets of `n` of these prompts, of which no two share a prompt or a text.

        Prompts are taken in their order; of texts with several passages, all that are in a set are in the same one.

        Args:
            sets: how many sets.
            n: prompts in each; as many as there are for all by default.

        Raises:
            InputError: there are too few prompts.
        """
        size = self.n // sets if n is None else n
        members: dict[str, list[int]] = {}
        for number, group in enumerate(self.groups):
            members.setdefault(group, []).append(number)
        texts = iter(members.values())
        chosen: list[list[int]] = [[]]
        for text in texts:
            if len(chosen[-1]) >= size:
                chosen.append([])
            if len(chosen) > sets:
                break
            chosen[-1] += text[: size - len(chosen[-1])]
        if size < 1 or len(chosen) < sets or len(chosen[sets - 1]) < size:
            of = f" of {self.n_groups} texts, no text in two sets," if self.is_grouped else ""
            raise InputError(
                f"{sets} disjoint sets of {size} prompts need {sets * size}, and {self.source} has {self.n}{of} that "
                f"are long enough: ask for fewer sets, for fewer prompts in each, or bring more"
            )
        return [self.subset(numbers) for numbers in chosen[:sets]]


@in_usual_state
def natural(
    model: Model, n: int = 16, length: int = 64, *, prepend_bos: Bos = "auto", seed: int | None = None
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
    _check_size(model, length, n)
    if n * length > MOST_TOKENS:
        raise InputError(f"{n} prompts of {length} tokens are more than can be held; ask for fewer.")
    size, tokenizer = vocabulary_size(model), tokenizer_of(model)
    allowed = list(range(size))
    if tokenizer is not None:
        allowed = sorted(i for i in set(tokenizer.get_vocab().values()) - _special_ids(tokenizer) if i < size)
    if not allowed:
        raise InputError("The model's vocabulary has no token to draw from besides the special ones.")
    draws = torch.randint(len(allowed), (n, length), generator=_generator(seed), device="cpu")
    tokens = torch.tensor(allowed, device="cpu")[draws]
    if first:
        tokens[:, 0] = first[0]
    _warn_of_bos(model, tokens)
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
    rows = [(number, line) for number, line in enumerate(_read(path), 1) if line.strip()]
    groups = None
    if path.suffix.lower() == ".jsonl":
        read = [_json_row(path, number, line) for number, line in rows]
        texts, groups = [row["text"] for row in read], _groups_of(read)
    else:
        texts = [line for _, line in rows]
    source = f"file:{path.name}"
    return from_texts(model, texts, length=length, n=n, prepend_bos=prepend_bos, source=source, groups=groups)


def from_dataset(
    model: Model,
    name: str = "wikitext",
    config: str | None = None,
    *,
    split: str = "test",
    column: str = "text",
    group: str | None = None,
    n: int = 16,
    length: int = 64,
    prepend_bos: Bos = "auto",
) -> PromptBatch:
    """The first `n` long enough rows of a Hugging Face data set; "wikitext" is the raw WikiText-2.

    `group` is a column that says which document a row is of; rows of one document are not taken for independent. The
    articles of WikiText are known by their titles.

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
        groups = None if group is None else rows[group]
    except Exception as error:  # offline, unknown name, missing column: the hub's clients share no base class
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"The data set {name!r} could not be loaded ({type(error).__name__}: {reason}); check its name and the "
            "network, or use the built-in passages or a file instead."
        ) from error
    if groups is None and repo == DATASETS["wikitext"][0]:
        groups = _articles(texts)
    source = f"dataset:{name}[{split}]"
    return from_texts(model, texts, length=length, n=n, prepend_bos=prepend_bos, source=source, groups=groups)


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
    _check_size(model, length, n)
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
    _warn_of_groups(batch)
    _warn_of_special(model, tokens[:, len(first) :], source)
    _warn_of_bos(model, tokens)
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
    ids = _integers(_unpadded(tokens))
    _check_tokens(ids)
    ids = ids.long()
    _check_size(model, length=ids.shape[1])
    if isinstance(tokens, PromptBatch):
        groups = groups or tokens.groups
    batch = _batch(model, ids, source, groups=tuple(map(str, groups)))
    _check_padding(model, ids)
    _warn_of_bos(model, ids)
    return batch


def check_ids(model: Model, tokens: Any) -> None:
    """Make sure that the model has these tokens: one beyond the embedding would end the process on a GPU.

    Raises:
        InputError: they are not a non-empty tensor [batch pos] of integers, or some are not in the vocabulary.
    """
    _check_tokens(tokens)
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
    _check_size(model, length=batch.length)


def bos_text(record: Mapping[str, Any]) -> str:
    """What a result's record says of the BOS, in words; empty for one of an earlier version."""
    there = "a BOS in front" if record.get("has_bos") else "no BOS"
    why = {
        "auto": ", as the model's tokenizer does",
        "always": ", as asked for",
        "never": ", as asked for",
        "given": " in the given tokens",
    }
    return there + why[record["bos"]] if record.get("bos") in why else ""


def prompts_text(record: Mapping[str, Any]) -> str:
    """``16 prompts of 64 tokens: passages; no BOS, ...`` for a result's record of its prompts."""
    texts = f" from {record['n_groups']} texts" if record.get("n_groups") else ""
    about = "; ".join(filter(None, (str(record.get("prompts")), bos_text(record))))
    return f"{record.get('n_prompts')} prompts of {record.get('length')} tokens{texts}: {about}"


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


def _warn_of_groups(batch: PromptBatch) -> None:
    """Say so where prompts are of so few texts that intervals over texts mean little."""
    if batch.is_grouped and batch.n_groups < FEW_GROUPS:
        little = "mean little" if batch.n_groups > 1 else "cannot be had"
        warnings.warn(
            f"{batch.source}: the {batch.n} prompts are passages of {batch.n_groups} texts, and intervals over so few "
            f"{little}.",
            stacklevel=3,
        )


def _groups_of(rows: Sequence[Mapping[str, Any]]) -> list[object] | None:
    """Which text each JSON line is a passage of, where the lines say so."""
    found = [next((f"{f} {row[f]}" for f in GROUP_FIELDS if row.get(f) is not None), None) for row in rows]
    corpus = len(set(found)) == 1 and str(found[0]).startswith("source ")
    return None if corpus else list(found)


def _articles(rows: Iterable[str]) -> list[int]:
    """The number of the article that each row of WikiText is of."""
    numbers, number = [], 0
    for row in rows:
        number += bool(WIKITEXT_TITLE.fullmatch(row))
        numbers.append(number)
    return numbers


def _unpadded(tokens: Any) -> Any:
    """The ids in what was given; raises InputError where its attention mask marks padding."""
    if isinstance(tokens, PromptBatch):
        return tokens.tokens
    if not isinstance(tokens, Mapping):
        return tokens
    if "input_ids" not in tokens:
        raise InputError('tokens has no "input_ids"; give what a tokenizer returns, or the ids themselves.')
    ids, mask = _integers(tokens["input_ids"]), tokens.get("attention_mask")
    if mask is None:
        return ids
    marked = _integers(mask)
    if marked.shape != ids.shape:
        raise InputError(f"The attention mask has the shape {list(marked.shape)}, and the ids {list(ids.shape)}.")
    if not bool((marked == 1).all()):
        raise InputError(f"The attention mask marks padding, {_NO_PADDING}.")
    return ids


def _integers(rows: Any) -> Tensor:
    """A tensor of what was given, on the CPU, which shares nothing with it."""
    try:
        if isinstance(rows, (list, tuple)) and any(isinstance(row, (Tensor, np.ndarray)) for row in rows):
            rows = torch.stack([_integers(row) for row in rows])
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


_NO_PADDING = "which would be attended to like text: give prompts of equal length, or use from_texts, which cuts them"


def _check_padding(model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
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
        raise InputError(f"{where}, {_NO_PADDING}.")
    if any(int(run.max()) > 1 or int(run.min()) != int(run.max()) for run in ends):
        warnings.warn(f"{where}; if that is padding, it is attended to like text: cut the rows instead.", stacklevel=3)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _special_ids(tokenizer: Any) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added


def _warn_of_special(model: Model, tokens: Int[Tensor, "batch pos"], source: str) -> None:
    """Say how many special tokens are written in texts: the model takes them as what they stand for."""
    tokenizer: Any = tokenizer_of(model)
    special = _special_ids(tokenizer)
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


def _warn_of_bos(model: Model, tokens: Int[Tensor, "batch pos"]) -> None:
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
            'the model may not know such input; prepend_bos="auto" (--bos auto) puts it there.'
        )
    if said:
        warnings.warn(said, stacklevel=3)


def _generator(seed: int) -> torch.Generator:
    """A generator on the CPU, whatever the default device is."""
    return torch.Generator("cpu").manual_seed(check_seed(seed))


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


_MARKS = (  # UTF-32's marks begin like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _read(path: Path) -> list[str]:
    """The lines of a text file, whichever of the three ways they end."""
    # os.path and not Path: it says no to a name that is too long instead of raising.
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name a text file in it.")
    if not os.path.isfile(path):
        raise InputError(f"There is no file {path}; check the path.")
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8-sig")
        text = content.decode(encoding)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except UnicodeDecodeError as error:
        line = len(re.split(rb"\r\n|\r|\n", error.object[: error.start]))
        where = f" (line {line} is not)" if error.encoding.startswith("utf-8") else ""
        raise InputError(f"{path} is not a UTF-8 text file; save it as plain text in UTF-8{where}.") from error
    lines = re.split(r"\r\n|\r|\n", text)
    damaged = next((number for number, line in enumerate(lines, 1) if "\0" in line), None)
    if damaged is not None:
        raise InputError(f"{path}, line {damaged} has a NUL character; remove it, or save the file as text in UTF-8.")
    if not text.strip():
        raise InputError(f"{path} is empty; write one prompt on each line.")
    return lines


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path}, line {number} is not JSON; write one {{"text": "..."}} on it.') from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{path}, line {number} has no "text" that is a string; write {{"text": "..."}}.')
    return row
