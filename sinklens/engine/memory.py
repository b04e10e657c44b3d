"""How many rows fit: a budget in bytes, an estimate of bytes per row, and what out-of-memory looks like."""

from __future__ import annotations

import sys

import torch

from sinklens.models.view import Model, ModelShape, device_of, dtype_of, model_shape
from sinklens.records.ranges import Between, check_number

CPU_BUDGET = 1 << 28
"""Default budget for activations on the CPU, bytes. More rows at once are slower there: they fall out of the caches."""
CUDA_SHARE = 0.5
"""Default share of the free device memory that activations may take."""
MAX_ROWS = 4096
"""Larger batches gain nothing and make a failed batch expensive."""


def default_budget(device: torch.device) -> int:
    """Bytes that one forward pass's activations may take on ``device`` when the caller does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved_but_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + reserved_but_unused) * CUDA_SHARE)
    return CPU_BUDGET


def bytes_per_row(shape: ModelShape, length: int, itemsize: int, logits: bool = False, *, pattern: bool = True) -> int:
    """Peak bytes that one row of ``length`` tokens takes in a hooked forward pass, estimated from above.

    The largest block-level set alive at once: residual stream, normalised copies (float32 whatever the dtype), queries,
    keys and values with their rotated copies, scores and pattern with the copies that hooks make, and the MLP's
    hidden activations. Without ``pattern`` scores and pattern are left out, of which :func:`pattern_budget` is then
    taken at a time.
    """
    attention = 4 * shape.n_heads * length * length * itemsize if pattern else 0
    projections = 8 * length * shape.n_heads * shape.d_head * itemsize
    mlp = 4 * length * shape.d_mlp * itemsize
    residual = length * shape.d_model * (6 * itemsize + 4 * 4)
    return residual + max(attention + projections, mlp) + (2 * length * shape.d_vocab * itemsize if logits else 0)


def check_limits(memory_budget: int | None, max_rows: int | None) -> None:
    """Make sure that what a forward pass may take is a number of bytes, and of rows, where it is given.

    Raises:
        InputError: it is not.
    """
    for name, value in (("memory_budget", memory_budget), ("max_rows", max_rows)):
        if value is not None:
            check_number(name, value, Between(1), whole=True)


def row_budget(model: Model, length: int, budget: int | None, logits: bool = False, *, pattern: bool = True) -> int:
    """Rows of ``length`` tokens for one forward pass within ``budget`` bytes: at least 1, at most :data:`MAX_ROWS`.

    Without ``pattern`` that of :func:`pattern_budget` is set aside.

    Raises:
        InputError: the budget is no number of bytes.
    """
    check_limits(budget, None)
    budget = default_budget(device_of(model)) if budget is None else budget
    budget -= 0 if pattern else pattern_budget(model, budget)
    each = bytes_per_row(model_shape(model), length, dtype_of(model).itemsize, logits, pattern=pattern)
    return max(1, min(MAX_ROWS, budget // each))


def pattern_budget(model: Model, budget: int | None) -> int:
    """Bytes of ``budget`` that scores and pattern may take where they are computed for some queries at a time."""
    return (default_budget(device_of(model)) if budget is None else budget) // 4


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether ``error`` says that an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_cached(device: torch.device) -> None:
    """Give cached blocks back to the device, so that a smaller batch finds room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory so far: allocated on a GPU, resident in this process on a CPU; None where that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
