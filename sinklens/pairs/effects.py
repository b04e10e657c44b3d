"""Effects: how far a patch goes from the run that it is in to the pair's other run, and when that cannot be said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

MIN_GAP = 0.01
"""Prompts in which a pair moves a share of attention by less are left out: there is nothing to divide by."""


def effect(patched: np.ndarray, start: np.ndarray, end: np.ndarray | float, min_gap: np.ndarray | float) -> np.ndarray:
    """``(patched - start) / (end - start)``; NaN where ``|end - start| < min_gap``. Arrays broadcast."""
    gap = np.asarray(end - start, dtype=float)
    safe = np.where(np.abs(gap) >= np.maximum(min_gap, np.finfo(float).tiny), gap, np.nan)
    return (patched - start) / safe


def gaps(
    shares: Sequence[bool],
    base: Float[np.ndarray, "readout prompt"],
    anchored: Float[np.ndarray, "readout prompt"],
    min_gap: float,
) -> Float[np.ndarray, "readout prompt"]:
    """The least difference between the runs that an effect is divided by.

    ``min_gap`` itself for ``shares`` (between 0 and 1); for other readouts that part of the larger of the two values.
    """
    scale = np.maximum(np.abs(base), np.abs(anchored))
    return np.where(np.array(shares)[:, None], min_gap, min_gap * scale)
