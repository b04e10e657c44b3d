"""Values as JSON can hold them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def check_kinds(values: Mapping[str, tuple[Any, type | tuple[type, ...]]]) -> None:
    """Make sure that what was read from a file is what it should be: ``{name: (value, type)}``.

    Raises:
        TypeError: it is not, with its name.
    """
    for name, (value, kind) in values.items():
        numeric = kind in (int, float, (int, float))
        if not isinstance(value, kind) or (numeric and isinstance(value, bool)):
            raise TypeError(f"{name} is {type(value).__name__}")


def to_plain(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN and infinities become null, tuples lists, numpy scalars Python's own."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
