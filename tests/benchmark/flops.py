"""The arithmetic that a sweep needs, and what the device can do.

A patch at block ``l`` and position ``p`` of ``T`` tokens leaves everything before ``p`` and before ``l`` as it was.
With ``n = T - p`` positions that may change, ``d = d_model``, ``h`` heads and ``g`` key/value heads of ``e = d_head``
dimensions, a gated MLP of ``m = d_mlp`` neurons, and ``S`` (query, key) pairs, needed are, at 2 FLOPs for each
multiply-add,

* in each block from ``l`` up to the last readout block, that one left out:
  ``2 n d (h e + 2 g e) + 2 n h e d`` (q, k, v, o) ``+ 4 h e S`` (scores, and their sum of values) ``+ 6 n d m`` (MLP);
* in the last readout block only what its attention pattern needs: ``2 n d (h e + g e)`` (q, k) ``+ 2 h e S`` (scores).

``S = sum over i from p to T - 1 of (i + 1)``, each query's own keys; computed without use of the causal mask it would
be ``n T``. Norms, softmax, rotations and the embedding are left out: they are less than a hundredth.

Pitfall: this is what a sweep over ``resid_pre`` needs of matrix products, not the least possible: in block ``l`` itself
queries after ``p`` have not changed yet.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

from tests.benchmark.workload import Cell, Workload


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama-like model."""

    n_layers: int
    """Blocks."""
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Query heads."""
    n_kv_heads: int
    """Key and value heads."""
    d_head: int
    """Dimensions of a head."""
    d_mlp: int
    """Neurons of the gated MLP."""
    d_vocab: int
    """Tokens in the vocabulary."""


def patch_flops(sizes: Sizes, length: int, cell: Cell, last_readout: int, *, causal: bool = True) -> int:
    """FLOPs that one patch needs, up to the attention pattern of block ``last_readout``."""
    layer, position = cell
    if layer > last_readout:
        return 0
    n = length - position
    pairs = (length * (length + 1) - position * (position + 1)) // 2 if causal else n * length
    d, q, kv = sizes.d_model, sizes.n_heads * sizes.d_head, sizes.n_kv_heads * sizes.d_head
    block = 2 * n * d * (q + 2 * kv) + 2 * n * q * d + 4 * q * pairs + 6 * n * d * sizes.d_mlp
    readout = 2 * n * d * (q + kv) + 2 * q * pairs
    return (last_readout - layer) * block + readout


def needed_flops(sizes: Sizes, work: Workload) -> float:
    """FLOPs that a patch of the sweep needs on average."""
    last = max(work.readouts)
    return sum(patch_flops(sizes, work.length, cell, last) for cell in work.cells) / len(work.cells)


def matmul_ceiling(device: torch.device, dtype: torch.dtype, *, size: int | None = None, repeats: int = 10) -> float:
    """FLOP/s of one large square matrix product of random numbers: the median after three warm-ups."""
    size = size or (8192 if device.type == "cuda" else 1024)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(3 + repeats):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / median(seconds[3:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
