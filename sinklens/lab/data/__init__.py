"""Training data: the synthetic task that comes with the package, text files, data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sinklens.lab.data.base import Data
from sinklens.lab.data.bigram_backcopy import BigramBackcopy
from sinklens.lab.data.text import Text, prepare

__all__ = ["BIGRAM_BACKCOPY", "BigramBackcopy", "Data", "Text", "open_data"]

BIGRAM_BACKCOPY = "bigram_backcopy"
"""Name of the task that needs no file."""
DATASET = "dataset:"
"""What stands in front of a data set's name."""


def open_data(
    data: str | Path,
    length: int,
    *,
    tokenizer: str | Path | None = None,
    vocab: int = 2048,
    most_tokens: int | None = None,
    step: Callable[[str], None] = lambda _text: None,
) -> Data:
    """Training data.

    Args:
        data: ``bigram_backcopy``, a text file, a folder of text files, or ``dataset:NAME`` (``dataset:NAME:CONFIG``).
        length: tokens of a row.
        tokenizer: a folder or a Hugging Face id; None makes one of the text.
        vocab: number of tokens of that one.
        most_tokens: as many tokens of a data set are taken.
        step: is told what is being done.

    Raises:
        InputError: the data are missing or too short, or the tokenizer does not fit.
    """
    from sinklens.errors import InputError
    from sinklens.lab.data.sources import of_dataset, of_files
    from sinklens.models.smollm2 import cache_dir

    if str(data) == BIGRAM_BACKCOPY:
        if tokenizer is not None:
            raise InputError("bigram_backcopy has a tokenizer of its own, of single letters: leave tokenizer= out.")
        return BigramBackcopy(length)
    if str(data).startswith(DATASET):
        name = str(data).removeprefix(DATASET)
        key, texts = of_dataset(name, most_tokens)
    else:
        name = str(data)
        step("reading the text")
        key, texts = of_files(Path(data).expanduser())
    folder, tool = prepare(name, key, texts, cache_dir() / "lab", tokenizer=tokenizer, vocab=vocab, step=step)
    return Text(folder, length, tool)
