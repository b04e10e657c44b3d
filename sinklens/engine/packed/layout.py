"""Where the tokens of packed rows lie.

A row is one patch on one prompt: positions ``start`` to ``stop - 1`` of that prompt, from block ``entry`` on. Rows are
ordered by their entry block, so that the rows that are under way in a block are the first ``n_rows(block)``, and their
tokens the first ``n_tokens(block)``.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

IntArray = np.ndarray


class Layout:
    """Index tensors of a batch of rows."""

    def __init__(
        self,
        *,
        prompts: IntArray,
        contexts: IntArray,
        starts: IntArray,
        stops: IntArray,
        entries: IntArray,
        length: int,
        device: torch.device,
    ) -> None:
        lengths = stops - starts
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.length, self.device, self.entries = length, device, entries
        self.starts, self.offsets = starts, offsets
        table = np.stack([prompts, contexts, starts, offsets[:-1], lengths]).astype(np.int64)
        moved = to_device(table, device)
        self.prompts: Int[Tensor, " row"] = moved[0]
        """Prompt of every row."""
        self.contexts: Int[Tensor, " row"] = moved[1]
        """Run and prompt of every row, as one index into what was captured."""
        self.start: Int[Tensor, " row"] = moved[2]
        """First position of every row."""
        self.lengths: Int[Tensor, " row"] = moved[4]
        """Tokens of every row."""
        total = int(offsets[-1])
        self.row: Int[Tensor, " token"] = torch.repeat_interleave(
            torch.arange(len(starts), device=device), self.lengths, output_size=total
        )
        """Row of every token."""
        within = torch.arange(total, device=device) - moved[3][self.row]
        self.position: Int[Tensor, " token"] = within + self.start[self.row]
        """Position of every token in its prompt."""
        self.slot: Int[Tensor, " token"] = self.row * length + self.position
        """Place of every token in a padded ``[row * length]`` tensor."""
        self.prompt: Int[Tensor, " token"] = self.prompts[self.row]
        """Prompt of every token."""
        self.origin: Int[Tensor, " token"] = self.contexts[self.row] * length + self.position
        """Place of every token in a captured ``[context * length]`` tensor."""
        self.padded = total < len(starts) * length
        """Whether rows have fewer than ``length`` tokens."""
        self.own: Int[Tensor, " slot"] | None = None
        """Token of every place in a padded tensor, -1 where there is none; None without padding."""
        if self.padded:
            self.own = torch.full((len(starts) * length,), -1, device=device)
            self.own[self.slot] = torch.arange(total, device=device)
        self._prefixed: Tensor | None = None
        self._copies: dict[torch.device, Layout] = {}

    def n_rows(self, layer: int) -> int:
        """Rows that are under way in block ``layer``."""
        return int(np.searchsorted(self.entries, layer, side="right"))

    def n_tokens(self, layer: int) -> int:
        """Tokens of these rows."""
        return int(self.offsets[self.n_rows(layer)])

    def queries(self, n_rows: int) -> Int[Tensor, " slot"]:
        """Token to put in every place of a padded tensor of queries; any will do where there is none."""
        assert self.own is not None
        return self.own[: n_rows * self.length].clamp(min=0)

    def prefixed(self, n_rows: int, n_contexts: int) -> Int[Tensor, " slot"]:
        """Index into captured activations ``[context * length]`` followed by tokens, for every place."""
        assert self.own is not None
        if self._prefixed is None:
            captured = (self.contexts[:, None] * self.length + torch.arange(self.length, device=self.device)).flatten()
            self._prefixed = torch.where(self.own < 0, captured, self.own + n_contexts * self.length)
        return self._prefixed[: n_rows * self.length]

    def on(self, device: torch.device) -> Layout:
        """The same with its indices on ``device``: the blocks of one model may lie on several."""
        if self.device == device:
            return self
        if device not in self._copies:
            there: Layout = copy.copy(self)
            back: dict[torch.device, Layout] = {self.device: self}
            there.device, there._copies = device, back
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(there, name, value.to(device))
            self._copies[device] = there
        return self._copies[device]

    def tokens_of(self, rows: IntArray, positions: IntArray) -> IntArray:
        """Packed index of (row, position) pairs; the positions must lie in their rows."""
        return self.offsets[rows] + positions - self.starts[rows]


def to_device(array: IntArray, device: torch.device) -> Tensor:
    """A host array on the device, without waiting for it on a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
