"""A digest of a model's weights, computed on the device where each of them lies.

    row sum_j = sum_i key[i, j] * word_i        for 6 lanes j, over 8,192 words of 16 bits

Every row's sums stand in place of its words, again and again until 8,192 words or fewer are left of a parameter.
SHA-256 over those of all parameters, which come to the host together, is the digest. Words lie within 2^15 and keys
within 2^23, so that all sums are whole numbers within 2^51: float64 holds them exactly, in any order, on every device.

Two parameters of one shape and dtype differ in some word. Whatever the other words are, its lane is the same for one
of the 2^24 values of its key at most, so that all six agree once in 2^144: the keys are fixed, but nothing that is
done to weights knows them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from sinklens.models.replaced import replaced_code
from sinklens.models.view import Model, config_text, held_tensors_of, named_parameters_of, settings_text
from sinklens.records.fingerprint import fingerprint_of

_WORDS = 1 << 13
"""Words that have keys of their own."""
_LANES = 6
_ROWS = {"cpu": 16}
"""Rows that are taken at once: on a CPU what its caches hold, else 16 MiB."""


@torch.no_grad()
def weight_digest(model: Model) -> str:
    """A digest over the config, and the name, shape, dtype and bits of every parameter and of every other tensor that a
    module holds, in the order of the names; and over code in place of its own (:mod:`sinklens.models.replaced`).

    The same weights compute something else with another window, rotary base or activation function, so the config
    counts, and what modules have kept of it. The two backends name their parameters differently, so the same weights
    have one digest on each; they have the same one on every device. Nothing is remembered from one call to the next,
    as a write through ``.data`` or a NumPy view leaves no trace.
    """
    tensors = sorted([*named_parameters_of(model), *held_tensors_of(model)], key=lambda pair: pair[0])
    digest = hashlib.sha256(f"weights by sums of rows\n{config_text(model)}\n{settings_text(model)}".encode())
    for where, code in replaced_code(model):
        digest.update(f"{where} {fingerprint_of(code)}\n".encode())
    for (name, tensor), bits in zip(tensors, _on_host(_shorts([tensor for _, tensor in tensors])), strict=True):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(bits.numpy().data)
    return digest.hexdigest()


def _shorts(tensors: Sequence[Tensor]) -> list[Integer[Tensor, " byte"]]:
    """:func:`short_of` each; blocks may share a table, which is looked at once."""
    known: dict[tuple[object, ...], Tensor] = {}
    shorts = []
    for tensor in tensors:
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in known:
            known[key] = short_of(tensor)
        shorts.append(known[key])
    return shorts


def short_of(weight: Shaped[Tensor, "..."]) -> Integer[Tensor, " byte"]:
    """What stands for the bits of a weight: 16 KiB of bytes at most, on its device."""
    left = weight.detach()
    while (short := left.numel() * _words_each(left)) > _WORDS:
        left = _row_sums(left)
    return _piece(left, 0, left.numel()).view(torch.uint8) if short else left.new_empty(0, dtype=torch.uint8)


def _words_each(values: Tensor) -> int:
    """Words of one entry."""
    return max(1, values.element_size() // 2)


def _row_sums(values: Shaped[Tensor, "..."]) -> Integer[Tensor, "row lane"]:
    """The sums of every row of words; the last row may be shorter."""
    keys = _keys(values.device)
    rows = _ROWS.get(values.device.type, 256)
    step = rows * _WORDS // _words_each(values)
    room = torch.empty(rows, _WORDS, dtype=torch.float64, device=values.device)  # once: to ask for it is slow
    sums = []
    for start in range(0, values.numel(), step):
        piece = _piece(values, start, min(start + step, values.numel()))
        words = piece.view(torch.uint8 if piece.element_size() == 1 else torch.int16)
        whole = len(words) - len(words) % _WORDS
        sums.append(room[: whole // _WORDS].copy_(words[:whole].view(-1, _WORDS)) @ keys)
        if whole < len(words):
            sums.append(words[None, whole:].double() @ keys[: len(words) - whole])
    return torch.cat(sums).long()  # of whole numbers: -0.0 and 0.0 are one


def _piece(values: Shaped[Tensor, "..."], start: int, stop: int) -> Shaped[Tensor, " entry"]:
    """Entries of a tensor in the order in which it is read, copied where it does not lie so in memory."""
    if values.is_contiguous():
        return values.view(-1)[start:stop]
    return values.take(torch.arange(start, stop, device=values.device))


@cache
def _keys(device: torch.device) -> Float[Tensor, "word lane"]:
    """Whole numbers within 2^23, the same ones every time."""
    bits = hashlib.shake_128(b"sinklens").digest(4 * _WORDS * _LANES)
    numbers = (np.frombuffer(bits, "<i4") >> 8).astype(np.float64).reshape(_WORDS, _LANES)
    return torch.from_numpy(numbers).to(device)


def _on_host(parts: Sequence[Integer[Tensor, " byte"]]) -> list[Integer[Tensor, " byte"]]:
    """The same tensors on the CPU, with one transfer for all of a device."""
    came: dict[int, Tensor] = {}
    for device in {part.device for part in parts}:
        here = [i for i, part in enumerate(parts) if part.device == device]
        together = torch.cat([parts[i] for i in here]).cpu()
        came |= dict(zip(here, together.split([len(parts[i]) for i in here]), strict=True))
    return [came[i] for i in range(len(parts))]
