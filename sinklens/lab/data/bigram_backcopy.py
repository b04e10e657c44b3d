"""Bigram-backcopy: a task whose sink is understood (Guo, Pai, Bai, Jiao, Jordan, Mei, arXiv 2410.13835).

A row is a beginning-of-sequence token and then a chain of symbols: after symbol ``a`` comes ``b`` with probability
``P[a, b]``, but after a *trigger* comes the symbol in front of it once more:

    x[0] = BOS,   x[1] ~ first,   x[i+1] = x[i-1] if x[i] is a trigger, else x[i+1] ~ P[x[i]]

A head that copies has something to do at triggers alone. At all others softmax still makes it attend to something, and
what it learns is to attend to BOS, whose value it learns to make small: a head that is active at triggers and dormant
elsewhere, with the sink as its resting place.

As published: characters of English text as symbols, their counted pairs as ``P``, the triggers ``t``, ``e`` and the
space. Chosen here, where the description leaves it open: the text is the package's own passages, in lower case, with
everything but letters and spaces left out; one count is added to every pair (``P`` has no zeros); ``first`` is the
symbols' frequency among those that are no trigger, so that what is copied is never BOS, and no trigger follows another.
With ``matrix="seed"`` the rows of P are drawn from a Dirichlet distribution (concentration 0.3) instead.

Pitfall: after a trigger the optimum is 0, and the mean loss is over both kinds of positions.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from sinklens.errors import InputError
from sinklens.lab.data.base import Tokens
from sinklens.lab.data.tokenizer import of_characters

SYMBOLS = " abcdefghijklmnopqrstuvwxyz"
"""What the chain runs over; token 0 is BOS, and the symbols follow it."""
TRIGGERS = "te "
"""After these the symbol before them is copied."""
HELD_OUT, TRAINED = 1, 0
"""Streams of random numbers."""
BLOCK = 64
"""Rows that are drawn together; which rows those are does not depend on the batch."""


class BigramBackcopy:
    """The task.

    Args:
        length: tokens of a row that a model is given.
        matrix: where P comes from: pairs counted in the package's passages, or drawn.
        matrix_seed: of the draw.
        triggers: symbols after which the one before is copied.

    Raises:
        InputError: a row is too short, or a trigger is no symbol.
    """

    def __init__(
        self,
        length: int,
        *,
        matrix: Literal["passages", "seed"] = "passages",
        matrix_seed: int = 0,
        triggers: str = TRIGGERS,
    ) -> None:
        if length < 4:
            raise InputError(f"bigram-backcopy needs rows of 4 tokens or more, not {length}.")
        if not set(triggers) < set(SYMBOLS):
            raise InputError(f"triggers {triggers!r} must be some of {SYMBOLS!r}, but not all of them.")
        if matrix not in ("passages", "seed"):
            raise InputError(f'matrix {matrix!r} must be "passages" or "seed".')
        self.length, self.matrix, self.matrix_seed = length, matrix, matrix_seed
        self.is_trigger = np.array([symbol in triggers for symbol in SYMBOLS])
        self.triggers = triggers
        self.tokenizer: PreTrainedTokenizerBase = of_characters(SYMBOLS)
        if matrix == "passages":
            self.transition, frequency = _counted()
        else:
            draw = np.random.default_rng([matrix_seed])
            self.transition = draw.dirichlet(np.full(len(SYMBOLS), 0.3), len(SYMBOLS))
            frequency = np.full(len(SYMBOLS), 1 / len(SYMBOLS))
        self.first = np.where(self.is_trigger, 0, frequency)
        self.first = self.first / self.first.sum()
        self._blocks: dict[tuple[int, ...], Tokens] = {}

    prepends_bos = True

    @property
    def n_vocab(self) -> int:
        """BOS and the symbols."""
        return len(SYMBOLS) + 1

    @property
    def optimum(self) -> float:
        """The entropy of the next token, mean over the positions of a row, in nats.

        Computed along the chain: how often symbol ``a`` stands at position i (no trigger), and how often a trigger that
        has ``a`` in front of it.
        """
        open_ = ~self.is_trigger
        entropy = -(self.transition * np.log(np.maximum(self.transition, 1e-300))).sum(1)
        ordinary, copying = self.first, np.zeros(len(SYMBOLS))
        total = -(self.first[open_] * np.log(self.first[open_])).sum()  # at BOS
        for _ in range(self.length - 1):
            total += (ordinary * entropy).sum()
            after = ordinary @ self.transition
            ordinary, copying = (
                np.where(open_, after, 0) + copying,
                ordinary * self.transition[:, self.is_trigger].sum(1),
            )
        return float(total / self.length)

    def rows(self, seed: int, first: int, n: int) -> Tokens:
        """See :class:`~sinklens.lab.data.base.Data`."""
        blocks = range(first // BLOCK, (first + n - 1) // BLOCK + 1)
        drawn = np.concatenate([self._block(TRAINED, seed, block) for block in blocks])
        start = first - blocks[0] * BLOCK
        return drawn[start : start + n]

    def held_out(self, n: int) -> Tokens:
        """See :class:`~sinklens.lab.data.base.Data`."""
        blocks = [self._block(HELD_OUT, 0, block) for block in range(-(-n // BLOCK))]
        return np.concatenate(blocks)[:n]

    def described(self) -> dict[str, Any]:
        """See :class:`~sinklens.lab.data.base.Data`."""
        drawn = {"matrix_seed": self.matrix_seed} if self.matrix == "seed" else {}
        return {
            "name": "bigram_backcopy",
            "length": self.length,
            "matrix": self.matrix,
            **drawn,
            "triggers": self.triggers,
            "optimum": self.optimum,
        }

    def _block(self, *key: int) -> Tokens:
        """A block of rows; the last few are kept, as a batch may end within one."""
        if key not in self._blocks:
            if len(self._blocks) > 8:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[key] = self._drawn(np.random.default_rng(key).random((BLOCK, self.length)))
        return self._blocks[key]

    def _drawn(self, chance: Float[np.ndarray, "row token"]) -> Tokens:
        """Rows from uniform random numbers."""
        bounds = self.transition.cumsum(1)[:, :-1]
        symbols = np.zeros(chance.shape, dtype=np.int64)
        symbols[:, 0] = (chance[:, :1] > self.first.cumsum()[:-1]).sum(1)
        for i in range(1, chance.shape[1]):
            last = symbols[:, i - 1]
            symbols[:, i] = (chance[:, i, None] > bounds[last]).sum(1)
            if i > 1:
                symbols[:, i] = np.where(self.is_trigger[last], symbols[:, i - 2], symbols[:, i])
        return np.pad(symbols + 1, ((0, 0), (1, 0)))

    def at_triggers(self, rows: Tokens) -> np.ndarray:
        """Which tokens are triggers, ``[row, token]``."""
        return np.concatenate([[False], self.is_trigger])[rows]


def _counted() -> tuple[Float[np.ndarray, "symbol next"], Float[np.ndarray, " symbol"]]:
    """Pairs and single symbols counted in the passages, as probabilities."""
    lines = resources.files("sinklens").joinpath("data/passages.jsonl").read_text(encoding="utf-8").splitlines()
    text = " ".join(json.loads(line)["text"] for line in lines).lower()
    text = " ".join("".join(letter if letter in SYMBOLS else " " for letter in text).split())
    place = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    pairs = np.ones((len(SYMBOLS), len(SYMBOLS)))
    for (a, b), times in Counter(zip(text, text[1:], strict=False)).items():
        pairs[place[a], place[b]] += times
    single = np.array([text.count(symbol) for symbol in SYMBOLS], dtype=float)
    return pairs / pairs.sum(1, keepdims=True), single / single.sum()
