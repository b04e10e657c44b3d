"""The table of a sweep: its columns, and how a task's numbers become rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

COLUMNS = (
    "stage",
    "site",
    "layer",
    "window",
    "position",
    "unit",
    "edit",
    "direction",
    "prompt",
    "readout",
    "value",
    "base",
    "anchored",
    "effect",
    "method",
    "task",
)
"""Columns, in order: ``window`` is the last block that is edited; ``unit`` is null where units are edited at once;
``base`` and ``anchored`` are the readout in the unpatched runs without and with the sink; ``method`` is ``exact``, or
``attribution`` where ``value`` and ``effect`` are estimates."""

_TEXT = pa.dictionary(pa.int32(), pa.string())
_TYPES = {name: pa.int32() for name in ("layer", "window", "position", "unit", "prompt")}
_TYPES |= {name: pa.float64() for name in ("value", "base", "anchored", "effect")}
SCHEMA = pa.schema([(name, _TYPES.get(name, _TEXT)) for name in COLUMNS])
"""Arrow types of the columns."""

CELL = ["stage", "site", "layer", "window", "position", "unit", "edit", "direction", "readout"]
"""Columns that tell one cell of the grid from another."""


def text_column(index: NDArray[np.integer], names: tuple[str, ...]) -> pa.DictionaryArray:
    """A column of names, given as indices."""
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(names, pa.string()))


PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": [name for name in COLUMNS if name not in ("value", "effect")],
}
"""How shards are written: no dictionaries of numbers that do not repeat."""
