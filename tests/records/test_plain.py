"""Values as JSON can hold them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np

from sinklens.records.plain import to_plain

NAN = math.nan


def test_to_plain() -> None:
    value = {
        "nan": NAN,
        "inf": -math.inf,
        "np_nan": np.float32("nan"),
        3: np.int64(4),
        "tuple": (1, (2.5,)),
        "array": np.array([[1.0, NAN]]),
        "scalar": np.array(2),
        "bool": np.bool_(True),
        "none": None,
        "path": Path("a") / "b",
        "text": "é",
        "true": True,
    }
    plain = to_plain(value)
    assert plain == {
        "nan": None,
        "inf": None,
        "np_nan": None,
        "3": 4,
        "tuple": [1, [2.5]],
        "array": [[1.0, None]],
        "scalar": 2,
        "bool": True,
        "none": None,
        "path": os.path.join("a", "b"),
        "text": "é",
        "true": True,
    }
    assert type(plain["3"]) is int and plain["bool"] is True
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
