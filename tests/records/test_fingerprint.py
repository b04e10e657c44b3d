"""Fingerprints: equal for what does the same, wherever and whenever it was made; different for everything else."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sinklens.records.fingerprint import fingerprint_of, unstable_in
from tests.helpers.cells import CELLS, prints

EDITS = [  # what is edited in the cells, and what that changes
    ("A = 260", "A = 100", {"a global"}),
    ('"b", "a"', '"b", "d"', {"a set"}),
    ("2.0]", "2.5]", {"a dict"}),
    ("np.arange(5000.0)", "np.arange(5000.0) * (np.arange(5000) != 2500)", {"an array"}),
    ('"RED": 1', '"RED": 2', {"an enum"}),
    (
        "helper(x): return x * 2",
        "helper(x): return x * 5",
        {"a helper", "a helper of a helper", "a decorated function", "an inner function"}
        | {name for name in ("a static method", "a callable object", "a global object", "a method", "a property")},
    ),
    ("return n + 1", "return n + 2", {"a cached helper"}),
    ("x * 3", "x * 4", {"a callable object", "a global object", "a method", "a property"}),
    ("where = 7", "where = 8", {"a callable object", "a global object", "a method", "a property"}),
    ("instance = Callable(2)", "instance = Callable(3)", {"a global object", "a property"}),
    ("k: float = 0.5", "k: float = 0.25", {"a data class"}),
    ("n == 0", "n == 1", {"a circle"}),
    ("fill_(0.5)", "fill_(0.25)", {"a module", "a global module"}),
    ("self.scale = 2.0", "self.scale = 3.0", {"a module", "a global module"}),
    ("closed(0.5)", "closed(0.25)", {"a closure"}),
    ("mix, a=0.5", "mix, a=0.25", {"a partial", "a partial of a partial"}),
    ("(1 - a) * x", "(2 - a) * x", {"a partial", "a partial of a partial"}),
    ("at=3", "at=4", {"a lambda with a default"}),
    ('"p", "q"', '"p", "s"', {"a set in the code"}),
]


@pytest.mark.parametrize("before, after, changed", EDITS)
def test_what_is_edited_in_a_cell_changes_what_uses_it(before: str, after: str, changed: set[str]) -> None:
    found, edited = prints(CELLS), prints(CELLS.replace(before, after))
    assert before in CELLS
    assert {name for name in found if found[name] != edited[name]} == changed


def test_where_it_is_written_does_not_count() -> None:
    """Other lines, other addresses, other names of the cells' file, and everything defined twice."""
    assert prints(CELLS) == prints("# a comment\n\n" + CELLS + "\n" + CELLS)


def test_another_process_finds_the_same() -> None:
    """With another hash seed, so that sets are in another order."""
    expected = repr(sorted(prints(CELLS).items()))
    code = "from tests.helpers.cells import CELLS, prints; print(sorted(prints(CELLS).items()))"
    path = os.pathsep.join([*filter(None, sys.path), "."])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == expected


class Kind(Enum):
    ONE = 1
    TWO = 2


Pair = namedtuple("Pair", "a b")


@dataclass(frozen=True)
class Lazy:
    k: int = 1

    @cached_property
    def slow(self) -> int:
        return self.k + 1


BIG = np.arange(3000.0)
CHANGED = BIG.copy()
CHANGED[1500] = -1
FRAME = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", None], "c": pd.Categorical(["u", "v"])}, index=[3, 5])
DIFFERENT: list[Any] = [
    *(None, True, 1, 1.0, 1j, "1", b"1", ..., 0.0, -0.0, float("nan"), 10**5000),
    *((1, 2), [1, 2], {1, 2}, frozenset({1, 2}), (1, (2,)), ((1, 2),), Pair(1, 2), deque([1, 2]), range(1, 2)),
    *({1: 2}, {2: 1}, {"1": 2}, OrderedDict({1: 2}), defaultdict(list, {1: 2})),
    *(BIG, CHANGED, BIG.astype("float32"), BIG[None], torch.from_numpy(BIG), torch.from_numpy(CHANGED)),
    *(torch.zeros(4), torch.zeros(4).half(), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(0)),
    *(torch.eye(3).to_sparse(), torch.eye(3), torch.ones(3) * 1j),
    *(np.float32(1), np.float64(1), np.int64(1), np.array(["a"]), np.array(["b"]), np.array([None, 1], object)),
    *(torch.float32, torch.float64, torch.device("cpu"), torch.device("cuda:1"), np.dtype("f4"), torch.strided),
    *(FRAME, FRAME.set_index("a"), FRAME.a, FRAME.b, FRAME.rename(columns={"a": "z"}), FRAME.assign(a=[1.0, 3.0])),
    *(Kind.ONE, Kind.TWO, Kind, Lazy(), Lazy(2), Lazy, Path("a"), slice(1, 2), torch.Size([1])),
    *(torch.sin, torch.cos, np.sin, np.cos, torch.Tensor.mean, torch.nn.functional.softmax, len, "a".join, "b".join),
    *(partial(len), partial(sum), cache(lambda x: x), cache(lambda x: x + 1), np.vectorize(len)),
]


def test_no_two_of_many_kinds_are_the_same() -> None:
    found = [fingerprint_of(value) for value in DIFFERENT]
    alike = [(a, b) for i, a in enumerate(DIFFERENT) for j, b in enumerate(DIFFERENT) if i < j and found[i] == found[j]]
    assert alike == []
    assert [value for value in DIFFERENT if unstable_in(value)] == []


def test_what_is_the_same() -> None:
    """Order where there is none, layout, and what was only kept to save time."""
    kept = Lazy()
    assert kept.slow == 2 and fingerprint_of(kept) == fingerprint_of(Lazy())
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    square = torch.arange(6.0).reshape(2, 3)
    assert fingerprint_of(square.T.contiguous().T) == fingerprint_of(square)
    assert fingerprint_of(np.asfortranarray(square.numpy())) == fingerprint_of(square.numpy())
    assert fingerprint_of(torch.nn.Parameter(square)) == fingerprint_of(square)
    shared = [1]
    assert fingerprint_of((shared, shared)) == fingerprint_of(([1], [1]))


class Hides:
    """An object that leaves out of a copy what it computes with."""

    __slots__ = ("a", "b")

    def __init__(self, a: int) -> None:
        self.a = a

    def __reduce__(self) -> Any:
        return (Hides, (1,))


class Scaled(np.ndarray):
    """An array of the user's own kind."""


def test_what_an_object_does_not_say_of_itself() -> None:
    """What its class leaves out of a copy, and what was put beside the numbers of a tensor or an array."""
    assert fingerprint_of(Hides(1)) == fingerprint_of(Hides(1)) != fingerprint_of(Hides(2))
    for make in (lambda: torch.zeros(3), lambda: np.zeros(3).view(Scaled)):
        values: list[Any] = [make(), make(), make()]
        values[1].scale, values[2].scale = 1, 2
        assert len({fingerprint_of(value) for value in values}) == 3


def asks(_logits: Any, _rows: Any) -> Any:
    return eval("A")  # noqa: S307


def imports(_logits: Any, _rows: Any) -> Any:
    from tests.helpers import sweeps

    return sweeps


OUTSIDE: dict[str, Any] = {
    "modules": lambda logits, _: logits[:, -1, sys.modules["settings"].A],
    "environ": lambda logits, _: logits[:, -1, int(os.environ["A"])],
    "load": lambda logits, _: logits @ torch.load("direction.pt"),
    "read_text": lambda logits, _: logits[:, -1, int(Path("token.txt").read_text())],
    "read_csv": lambda logits, _: logits @ pd.read_csv("direction.csv").to_numpy(),
}
GENERATOR = np.random.default_rng(0)
LOCK = threading.Lock()
UNSTABLE: list[tuple[str, Any]] = [
    ("GENERATOR, a Generator of random numbers", lambda _l, _r: GENERATOR.normal()),
    ("LOCK, a lock", partial(lambda _l, _r: LOCK)),
    ("a Generator of random numbers", torch.Generator()),
    ("a generator", (x for x in ())),
    ("a list_iterator", iter([1])),
    ("a call of eval", asks),
    ("an import of tests.helpers", imports),
    ("a ufunc", np.frompyfunc(lambda x: x, 1, 1)),
    ("a tensor without values", torch.zeros(2, device="meta")),
    *((f"{name} in a function", thing) for name, thing in OUTSIDE.items()),
    ("the environment of the process", os.environ),
]


@pytest.mark.parametrize("told, thing", UNSTABLE)
def test_what_cannot_be_told_again_is_named(told: str, thing: Any) -> None:
    assert told in unstable_in({"k": [thing]})[0]
    assert fingerprint_of(thing) == fingerprint_of(thing)  # in this process it is itself


def test_an_open_file_and_what_goes_too_deep(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with open(tmp_path / "a") as file:
        assert unstable_in([file]) == ["a TextIOWrapper"]
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    assert "too deeply nested" in unstable_in(deep)[0]


class Shy:
    """An object that does not want to be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise ValueError(name)


def test_what_cannot_be_looked_at_is_named() -> None:
    assert unstable_in([Shy()]) == ["a Shy"]
    nameless = type("Nameless", (), {"__module__": None, "k": 1})
    assert fingerprint_of(nameless) != fingerprint_of(type("Nameless", (), {"__module__": None, "k": 2}))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_module_is_named() -> None:
    """What it does is nowhere to be read."""
    assert unstable_in(torch.jit.script(torch.nn.ReLU())) == ["a scripted module"]


def test_a_large_array_takes_no_time() -> None:
    """Hashed as bytes, and once for each thing however often it is used."""
    large = torch.zeros(4_000_000)
    assert fingerprint_of([large] * 1000) != fingerprint_of([large] * 1001)


class Times:
    """A decorator with a setting of its own."""

    def __init__(self, function: Any, by: float) -> None:
        itself: Any = self
        functools.update_wrapper(itself, function)
        self.by = by


class Private(torch.nn.Module):
    """A module of a user's, whose setting has an underscore in front."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self._alpha = alpha


def identity(x: Any) -> Any:
    return x


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda width: torch.nn.AvgPool1d(width, stride=1), (3, 5)),
        (lambda apart: torch.nn.MaxPool2d(3, dilation=(apart, 1)), (1, 2)),
        (Private, (1.0, 2.0)),
        (lambda by: Times(identity, by), (1.0, 2.0)),
        (lambda mode: torch.nn.Dropout(0.5).train(mode), (True, False)),
        (lambda mode: Private(1.0).train(mode), (True, False)),
    ],
)
def test_what_a_thing_is_set_up_by_counts(make: Any, values: tuple[Any, Any]) -> None:
    one, same, other = (make(value) for value in (values[0], *values))
    assert fingerprint_of(one) == fingerprint_of(same) != fingerprint_of(other)
    assert unstable_in(other) == []
