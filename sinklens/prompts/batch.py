"""A batch of equally long prompts, and what results say of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.errors import InputError
from sinklens.records.summaries import html, summary


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
        check_tokens(self.tokens)
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


def check_tokens(tokens: Any) -> None:
    """Raises InputError unless `tokens` is a non-empty 2-D integer tensor."""
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens must be a tensor, not of type {type(tokens).__name__}.")
    integer = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.ndim != 2 or tokens.numel() == 0 or not integer:
        shape = list(tokens.shape)
        raise InputError(
            f"tokens must be non-empty integers of shape [batch, pos], not {tokens.dtype} of shape {shape}."
        )
