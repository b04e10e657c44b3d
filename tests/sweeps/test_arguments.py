"""Arguments of a sweep from Python: what no command line lets through is one sentence, too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sinklens.engine.run import PatchRunner
from sinklens.errors import InputError
from sinklens.readouts import attention_received
from tests.helpers.sweeps import run
from tests.helpers.tiny import tiny_tokens

SMALL: dict[str, Any] = {"stages": "resid_pre", "layers": "1", "positions": "4", "units": None}
WRONG: dict[str, tuple[Any, ...]] = {
    "memory_budget": (math.nan, math.inf, -1, 0, 1e300, 2.5, "x", "", [], True, object()),
    "max_rows": (math.nan, -1, 0, 1.5, "5", (), True, {1}),
    "seed": (-1, 1.5, math.nan, "x", None, True, 2**63, [1]),
    "window": (None, 1.5, "x", True),
    "top": (0, 1.5, math.nan, "x", True),
    "sample": (2, math.inf, None),
    "task_size": (0, math.nan, "x", 1.5),
    "group_size": (0, 1e300, []),
    "eps": (math.nan, math.inf, "x", None, [1]),
    "min_gap": (-1, math.nan, math.inf, "x", None, False),
    "strength": (math.nan, "5", None, True),
    "shard": (5, "1/2", (0, 1), (2, 1), (1,), (1, 2, 3), ("1", "2"), (1.5, 2), (True, 1)),
    "stages": (None, 5, object(), [None], ["resid_pre", 3]),
    "companions": (None, True, 5),
    "pair_layers": ("x", 1.5, [True, 1]),
    "formation": (5, "x", {}),
    "answers": (5, "ab", ([1], [2], [3]), ([1.5], [2]), (1, 2)),
    "method": (5, [], None, "near"),
    "engine": ([], {}, None),
    "out": (5, True, [], "", "  ", "a\0b", b"a"),
    "layers": ([True, 3], True),
    "readouts": (lambda logits: logits, lambda a, b, c: a + b + c, {"loss": print}),
    "force": (1, "yes", None),
    "progress": (5, "x"),
    "planned": (True, []),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_sentence(tiny_llama: Any, name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(InputError) as raised:
            run(tiny_llama, **{**SMALL, name: value})
        assert "\n" not in str(raised.value), value


def test_numbers_of_numpy_and_torch_are_numbers(tiny_llama: Any, tmp_path: Path) -> None:
    names = ("window", "top", "sample", "task_size", "group_size", "seed", "max_rows", "memory_budget")
    plain = run(tiny_llama, tmp_path / "plain", **SMALL, **dict.fromkeys(names, 3), min_gap=0.5, eps=0.5)
    others: dict[str, Any] = {name: np.int64(3) if at % 2 else torch.tensor(3) for at, name in enumerate(names)}
    others |= {"min_gap": np.float32(0.5), "eps": torch.tensor(0.5)}
    found = run(tiny_llama, tmp_path / "plain", **SMALL, **others)  # the same sweep, so it is taken up
    assert found.record["identity"] == plain.record["identity"] and found.table.equals(plain.table)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in ("memory_budget", "max_rows") for v in WRONG[n]])
def test_limits_of_a_forward_pass(tiny_llama: Any, name: str, value: Any) -> None:
    readouts = [attention_received("received", (3,), (5,), 2)]
    with pytest.raises(InputError, match=f"{name} .* must be a whole number, 1 or more"):
        PatchRunner(tiny_llama, tiny_tokens(2, 12), readouts, **{name: value})
