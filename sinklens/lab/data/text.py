"""Text as training data: documents, cut into tokens once, kept in a file that is mapped into memory.

    documents -> tokens of each, a separator behind it -> one file
    training stream = the documents that are not held out, one behind the other, cut into rows of ``length``

An epoch goes through all rows in an order drawn by seed and epoch. Row r has tokens ``r length .. (r + 1) length``
inclusive: its last token is the first of the next row, and is predicted here.

What is held out is whole documents, those with the smallest digests: about 2 in 100 tokens, at least one row and about
half at most; the rows that are measured are drawn from all of them. A text of more than 2^16 characters is cut into
documents at line ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sinklens.errors import InputError
from sinklens.lab.data.base import Tokens
from sinklens.lab.data.tokenizer import digest_of, load_tokenizer, separator, train_bpe
from sinklens.records.files import remove_leftovers, replaced, write_json, writing

PIECE = 2**16
"""Characters above which a text is cut into several documents."""
BPE_CHARACTERS = 2**26
"""Characters that a tokenizer of one's own is trained on: the first so many."""
HELD_OUT_SHARE = 0.02
"""Share of the tokens that is held out."""
MOST_UNKNOWN = 0.01
"""Share of unknown tokens above which a tokenizer does not fit a text."""


def documents(texts: Iterable[str]) -> Iterator[str]:
    """Texts that are not empty, long ones in pieces."""
    for text in texts:
        piece: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True) if len(text) > PIECE else [text]:
            for part in (line[i : i + PIECE] for i in range(0, len(line), PIECE)):
                if size + len(part) > PIECE:
                    yield "".join(piece)
                    piece, size = [], 0
                piece.append(part)
                size += len(part)
        if "".join(piece).strip():
            yield "".join(piece)


class Text:
    """Rows of a text.

    Args:
        folder: what :func:`prepare` wrote.
        length: tokens of a row that a model is given.

    Raises:
        InputError: there is too little for a row to train on and one to hold out.
    """

    def __init__(self, folder: Path, length: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.length, self.folder = tokenizer, length, folder
        self.record = json.loads((folder / "text.json").read_text(encoding="utf-8"))
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        table = np.load(folder / "documents.npy")
        starts, sizes, digests = table["start"], table["size"], table["digest"]
        held = _held_out(sizes, digests, length + 1)
        self._held = _Stream(self._tokens, starts[held], sizes[held])
        self._trained = _Stream(self._tokens, starts[~held], sizes[~held])
        self.n_rows = (len(self._trained) - 1) // length
        if self.n_rows < 1 or len(self._held) <= length:
            raise InputError(
                f"{self.record['source']} has {len(self._tokens):,} tokens in {len(sizes)} documents, too few for "
                f"rows of {length} to train on and others to hold out: give more text, or a smaller length."
            )
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    prepends_bos = False
    optimum = None

    @property
    def n_vocab(self) -> int:
        """Tokens of the tokenizer."""
        return len(self.tokenizer)  # type: ignore[arg-type]

    def rows(self, seed: int, first: int, n: int) -> Tokens:
        """See :class:`~sinklens.lab.data.base.Data`."""
        numbers = [self._row(seed, *divmod(number, self.n_rows)) for number in range(first, first + n)]
        return self._trained.rows(np.array(numbers), self.length)

    def held_out(self, n: int) -> Tokens:
        """See :class:`~sinklens.lab.data.base.Data`."""
        # Drawn from all documents: the first of them may be of one kind.
        drawn = np.random.default_rng(0).permutation((len(self._held) - 1) // self.length)
        return self._held.rows(drawn[:n], self.length)

    def described(self) -> dict[str, Any]:
        """See :class:`~sinklens.lab.data.base.Data`."""
        return {
            "name": "text",
            "length": self.length,
            **self.record,
            "tokens_trained": len(self._trained),
            "tokens_held_out": len(self._held),
            "held_out": "rows drawn from all of it",
        }

    def _row(self, seed: int, epoch: int, place: int) -> int:
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(self.n_rows)
        return int(self._order[1][place])


class _Stream:
    """Some documents, one behind the other."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
        self.tokens, self.starts, self.ends = tokens, starts, sizes.cumsum()
        self.firsts = self.ends - sizes

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def rows(self, numbers: np.ndarray, length: int) -> Tokens:
        """Rows of ``length + 1`` tokens."""
        places = numbers[:, None] * length + np.arange(length + 1)
        document = np.searchsorted(self.ends, places, side="right")
        return self.tokens[self.starts[document] + places - self.firsts[document]].astype(np.int64)


def _held_out(sizes: np.ndarray, digests: np.ndarray, least: int) -> np.ndarray:
    """Which documents are held out: by their digests, until there are enough tokens of them."""
    wanted = max(least, int(sizes.sum() * HELD_OUT_SHARE))
    order = np.argsort(digests, kind="stable")
    reached = np.concatenate([[0], sizes[order].cumsum()[:-1]])
    held = np.zeros(len(sizes), dtype=bool)
    held[order[(reached < wanted) & (reached < sizes.sum() / 2)]] = True
    return held


# --- Cutting text into tokens ----------------------------------------------------------------------------------------


def prepare(
    source: str,
    key: str,
    texts: Callable[[], Iterable[str]],
    cache: Path,
    *,
    tokenizer: str | Path | None,
    vocab: int,
    step: Callable[[str], None] = lambda _text: None,
) -> tuple[Path, PreTrainedTokenizerBase]:
    """The folder with a text's tokens, written where it is not there yet, and the tokenizer.

    Args:
        source: what the text is called.
        key: digest of its contents.
        texts: gives the texts, from the beginning each time.
        cache: where such folders are.
        tokenizer: one of Hugging Face's; None for one of ``vocab`` tokens, made of the text.
        vocab: size of that one.
        step: is told what is being done.
    """
    with writing(cache, "set SINKLENS_CACHE to another folder"):
        cache.mkdir(parents=True, exist_ok=True)
        remove_leftovers(cache)
    if tokenizer is None:
        place = cache / f"bpe-{key}-{vocab}"
        if not (place / "tokenizer.json").is_file():
            step(f"making a tokenizer of {vocab} tokens")
            made = train_bpe(_first(texts(), BPE_CHARACTERS), vocab)
            with writing(place, "set SINKLENS_CACHE to another folder"), replaced(place) as folder:
                folder.mkdir()
                made.save_pretrained(folder)
        tokenizer = place
    tool = load_tokenizer(tokenizer)
    place = cache / f"tokens-{key}-{digest_of(tool)}"
    if not (place / "text.json").is_file():
        step("cutting the text into tokens")
        with writing(place, "set SINKLENS_CACHE to another folder"), replaced(place) as folder:
            folder.mkdir()
            _write_tokens(folder, source, key, documents(texts()), tool)
    return place, tool


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in documents(texts):
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _write_tokens(
    folder: Path, source: str, key: str, texts: Iterator[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """``tokens.npy``, ``documents.npy`` and ``text.json``."""
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32  # type: ignore[arg-type]
    end, unknown = separator(tokenizer), tokenizer.unk_token_id
    table: list[tuple[int, int, int]] = []
    total = strange = 0
    with (folder / "tokens.bin").open("wb") as file:
        while batch := list(islice(texts, 256)):
            for text, ids in zip(batch, tokenizer(batch, add_special_tokens=False)["input_ids"], strict=True):  # type: ignore[arg-type]
                cut = np.array([*ids, end], dtype=kind)
                file.write(cut.tobytes())
                digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
                table.append((total, len(cut), digest))
                total += len(cut)
                strange += int((cut[:-1] == unknown).sum()) if unknown is not None and unknown != end else 0
    if not table:
        raise InputError(f"{source} holds no text: give files with some.")
    if strange > MOST_UNKNOWN * total:
        raise InputError(
            f"the tokenizer does not fit {source}: {100 * strange / total:.0f}% of its tokens are unknown to it; give "
            "another, or none to make one of the text."
        )
    _to_npy(folder, kind, total)
    np.save(folder / "documents.npy", np.array(table, dtype=[("start", "i8"), ("size", "i8"), ("digest", "i8")]))
    known = {"source": source, "content": key, "tokenizer": digest_of(tokenizer), "documents": len(table)}
    write_json(folder / "text.json", {**known, "tokens": total})


def _to_npy(folder: Path, kind: type, total: int) -> None:
    """The bytes as an array that numpy can map."""
    raw = np.memmap(folder / "tokens.bin", dtype=kind, mode="r", shape=(total,))
    array = np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=kind, shape=(total,))
    for start in range(0, total, 2**24):
        array[start : start + 2**24] = raw[start : start + 2**24]
    array.flush()
    del array, raw
    (folder / "tokens.bin").unlink()
