"""What a notebook may have in its cells, run as a notebook runs it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from sinklens.records.fingerprint import fingerprint_of, unstable_in

# What a notebook may have in its cells. It is run with other values in their places, as a cell is that has been edited.
CELLS = """
import functools, math
from dataclasses import dataclass
from enum import Enum
import numpy as np
import torch
A = 260
WORDS = {"b", "a", "c"}
TABLE = {"x": [1, 2.0], "y": ("z", None)}
VECTOR = np.arange(5000.0)
Color = Enum("Color", {"RED": 1})
def helper(x): return x * 2
def twice(x): return helper(helper(x))
@functools.cache
def remembered(n): return n + 1
@torch.no_grad()
def decorated(x): return helper(x)
class Base:
    def scaled(self, x): return x * 3
class Callable(Base):
    where = 7
    def __init__(self, k): self.k = k
    def __call__(self, logits, rows): return self.scaled(logits)[:, self.where] * self.k
    def method(self, logits, rows): return super().scaled(logits) + self.k
    @property
    def half(self): return self.k / 2
    @staticmethod
    def plain(logits, rows): return helper(logits)
@dataclass(frozen=True)
class Data:
    k: float = 0.5
    def __call__(self, logits, rows): return logits * self.k
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2, bias=False)
        self.inner.weight.data.fill_(0.5)
        self.scale = 2.0
    def forward(self, x): return self.inner(x) * self.scale
net = Net()
instance = Callable(2)
def closed(k): return lambda x, rows: x * k
def mix(x, source, a): return (1 - a) * x + a * source
THINGS = {
    "a global": lambda logits, rows: logits[:, -1, A],
    "a set": lambda logits, rows: "a" in WORDS,
    "a dict": lambda logits, rows: TABLE["x"],
    "an array": lambda logits, rows: logits @ VECTOR,
    "an enum": lambda logits, rows: Color.RED.value,
    "a helper": lambda logits, rows: helper(logits),
    "a helper of a helper": lambda logits, rows: twice(logits),
    "a cached helper": lambda logits, rows: remembered(3),
    "a decorated function": decorated,
    "an inner function": lambda logits, rows: [helper(x) for x in logits],
    "a callable object": Callable(2),
    "a global object": lambda logits, rows: instance(logits, rows),
    "a method": Callable(2).method,
    "a static method": Callable.plain,
    "a property": lambda logits, rows: instance.half,
    "a data class": Data(),
    "a circle": even,
    "a module": net,
    "a global module": lambda logits, rows: net(logits),
    "a closure": closed(0.5),
    "a partial": functools.partial(mix, a=0.5),
    "a partial of a partial": functools.partial(functools.partial(mix, a=0.5), source=1),
    "a lambda with a default": lambda logits, rows, at=3: logits[:, at],
    "a set in the code": lambda x, rows: x in {"p", "q", "r"},
}
"""
"""Things of every kind; a test may write another value in some place, as a user edits a cell."""


def run_cells(cells: str, name: str = "a_notebook") -> dict[str, Any]:
    """All names that a notebook has after its cells were run."""
    module = sys.modules[name] = ModuleType(name)
    try:
        exec(compile(cells, "<cell>", "exec"), vars(module))  # noqa: S102  (as a notebook does)
    finally:
        del sys.modules[name]
    return vars(module)


def prints(cells: str) -> dict[str, str]:
    """The fingerprints of what the cells have in ``THINGS``."""
    things = run_cells(cells)["THINGS"]
    assert not any(unstable_in(thing) for thing in things.values())
    return {name: fingerprint_of(thing) for name, thing in things.items()}
