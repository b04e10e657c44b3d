"""Fingerprints of code: whatever can change what a function does changes them."""

from __future__ import annotations

import builtins
import colorsys
import fractions
import functools
import json
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sinklens.records.fingerprint import fingerprint_of, unstable_in
from tests.helpers.cells import run_cells

CASES = {
    "a value that a property has kept, overwritten": """
import functools
class A:
    @functools.cached_property
    def t(self): return 5
x=A(); x.__dict__['t']=VALUE
def f(l): return x.t*l
""",
    "a default of a data class with slots": """
from dataclasses import dataclass
@dataclass(slots=True)
class A:
    k: int = VALUE
def f(l): return A().k*l
""",
    "what makes a default of a data class": """
from dataclasses import dataclass, field
@dataclass
class A:
    k: list = field(default_factory=lambda: [VALUE])
def f(l): return A().k[0]*l
""",
    "a default of a base of a data class": """
from dataclasses import dataclass, field
@dataclass(slots=True, frozen=True)
class B:
    k: int = VALUE
@dataclass(slots=True, frozen=True)
class A(B):
    j: int = 3
def f(l): return A().k*l
""",
    "a method of an enumeration": """
from enum import Enum
class C(Enum):
    R=1
    def go(self): return VALUE
def f(l): return C.R.go()*l
""",
    "a method of a member of one": """
from enum import Enum
class C(Enum):
    R=1
    def go(self): return VALUE
f=C.R
""",
    "the value of a member": """
from enum import Enum
class C(Enum):
    R=VALUE
f=C.R
""",
    "what a member has besides its value": """
from enum import Enum
class C(Enum):
    R=1
    def __init__(self, x): self.mass = 3
C.R.mass=VALUE
def f(l): return C.R.mass*l
""",
    "a property of an enumeration": """
from enum import IntEnum
class C(IntEnum):
    R=1
    @property
    def go(self): return VALUE
def f(l): return C.R.go*l
""",
    "what an enumeration makes of a value that it does not have": """
from enum import Enum
class C(Enum):
    R=1
    @classmethod
    def _missing_(cls, v): return VALUE
def f(l): return C(7)
""",
    "a method of flags": """
from enum import Flag
class C(Flag):
    R=1
    S=2
    K=VALUE*4
    def go(self): return VALUE
f=C.R|C.S
""",
    "a method of a metaclass": """
class M(type):
    def __call__(cls,*a): return VALUE
class A(metaclass=M): pass
def f(l): return A()*l
""",
    "what a metaclass finds": """
class M(type):
    def __getattr__(cls,n): return VALUE
class A(metaclass=M): pass
def f(l): return A.anything*l
""",
    "a method of a class made by exec": r"""
ns={}
exec('class A:\n  K=VALUE\n  def go(self): return VALUE', ns)
A=ns['A']
def f(l): return A().go()
""",
    "a value in a class made by exec": r"""
ns={}
exec('class A:\n  K=VALUE', ns)
A=ns['A']
def f(l): return A.K
""",
    "a function made by exec": """
ns={}
exec('def g(x): return x*VALUE', ns)
g=ns['g']
def f(l): return g(l)
""",
    "a method of a data class made by exec": """
exec('''
from dataclasses import dataclass
@dataclass
class A:
    k: int = 1
    def __call__(self, l): return l*VALUE
    def __post_init__(self): self.k = VALUE
''', globals())
f=A()
""",
    "a data class's own __init__": """
exec('''
from dataclasses import dataclass
@dataclass(init=False)
class A:
    k: int = 1
    def __init__(self): self.k = VALUE
def f(l): return A().k
''', globals())
""",
    "a value in a class made by type": """
A=type('A',(),{'k':VALUE,'go':lambda self: 3})
def f(l): return A().go()*A.k
""",
    "a method in a class made by type": """
A=type('A',(),{'go':lambda self: VALUE})
def f(l): return A().go()
""",
    "a data class made by a call": """
from dataclasses import make_dataclass, field
A=make_dataclass('A',[('k',int,VALUE)], slots=True)
def f(l): return A().k
""",
    "a default of a named tuple": """
from typing import NamedTuple
class A(NamedTuple):
    k: int = VALUE
def f(l): return A().k
""",
    "a method of a named tuple": """
from typing import NamedTuple
class A(NamedTuple):
    k: int = 1
    def go(self): return VALUE
def f(l): return A().go()
""",
    "a module as an argument": """
import types
S=types.ModuleType('settings'); S.A=VALUE
def helper(m): return m.A
def f(l): return helper(S)
""",
    "a module in a closure": """
import types
S=types.ModuleType('settings'); S.A=VALUE
def make(m): return lambda l: m.A
f=make(S)
""",
    "a module as a default": """
import types
S=types.ModuleType('settings'); S.A=VALUE
def f(l, m=S): return m.A
""",
    "a module in a list": """
import types
S=types.ModuleType('settings'); S.A=VALUE
L=[S]
def f(l): return L[0].A
""",
    "a module by a local name": """
import types
S=types.ModuleType('settings'); S.A=VALUE
def g(m): return m.A
def f(l):
    s=S
    return g(s)
""",
    "a module in a module as an argument": """
import types
S=types.ModuleType('settings'); S.sub=types.ModuleType('settings.sub'); S.sub.A=VALUE
def g(m): return m.A
def f(l): return g(S.sub)
""",
    "a name in a module in a module": """
import types
S=types.ModuleType('settings'); S.sub=types.ModuleType('settings.sub'); S.sub.A=VALUE
def f(l): return S.sub.A
""",
    "a module or another": """
import types
S=types.ModuleType('settings'); S.A=VALUE
def g(m): return m.A
def f(l, k=None): return g(k or S)
""",
    "a name that a module makes": """
import types
S=types.ModuleType('settings'); S.__getattr__=lambda n: VALUE
def f(l): return S.A
""",
    "a name in a module by getattr": """
import types
S=types.ModuleType('settings'); S.A=VALUE
def f(l, n='A'): return getattr(S,n)
""",
    "a name in a module by vars": """
import types
S=types.ModuleType('settings'); S.A=VALUE
def f(l): return vars(S)['A']
""",
    "a name in a module's __dict__": """
import types
S=types.ModuleType('settings'); S.A=VALUE
def f(l): return S.__dict__['A']
""",
    "a name in a module by a getter": """
import types, operator
S=types.ModuleType('settings'); S.A=VALUE
get=operator.attrgetter('A')
def f(l): return get(S)
""",
    "a getter of attributes": """
import operator
f=operator.attrgetter('aVALUE')
""",
    "a getter of items": """
import operator
f=operator.itemgetter(VALUE)
""",
    "a caller of a method": """
import operator
f=operator.methodcaller('mean',VALUE)
""",
    "a caller with a keyword": """
import operator
f=operator.methodcaller('mean',dim=VALUE)
""",
    "a partial getter": """
import operator,functools
f=functools.partial(operator.attrgetter('a'),VALUE)
""",
    "an attribute by getattr": """
class A: pass
x=A(); x.k=VALUE
def get(o,n): return getattr(o,n)
def f(l): return get(x,'k')
""",
    "a property by getattr": """
class A:
    @property
    def k(self): return VALUE
x=A()
def get(o,n): return getattr(o,n)
def f(l): return get(x,'k')
""",
    "a function with the name of a package's": """
import functools, torch
@functools.wraps(torch.nn.functional.softmax)
def sm(x): return x*VALUE
def f(l): return sm(l)
""",
    "a method for each type": """
import functools
class A:
    @functools.singledispatchmethod
    def g(self,x): return 1
    @g.register
    def _(self,x: int): return VALUE
def f(l): return A().g(3)
""",
    "a context": """
import contextlib
@contextlib.contextmanager
def c(): yield VALUE
def f(l):
    with c() as k: return k
""",
    "a keyword of a class": """
class B:
    def __init_subclass__(cls, k=0): cls.k=k
class A(B, k=VALUE): pass
def f(l): return A.k
""",
    "a descriptor": """
class D:
    def __init__(self,k): self.k=k
    def __get__(self,o,t): return self.k
class A: d=D(VALUE)
def f(l): return A.d
""",
    "a generic class": """
from typing import Generic, TypeVar
T=TypeVar('T')
class A(Generic[T]):
    k=VALUE
def f(l): return A.k
""",
    "a method of an abstract class's": """
from abc import ABC, abstractmethod
class B(ABC):
    @abstractmethod
    def go(self): ...
class A(B):
    def go(self): return VALUE
def f(l): return A().go()
""",
    "a name that is known everywhere": """
import builtins
builtins.MINE=VALUE
def f(l): return MINE
""",
    "a function in a dict": """
D={'a': lambda x: x*VALUE}
def f(l): return D['a'](l)
""",
    "a value put into a package's module": """
import math
math.MINE=VALUE
def f(l): return math.MINE
""",
    "a function in place of a package's": """
import colorsys
colorsys.rgb_to_hsv = lambda *a: VALUE
def f(l): return colorsys.rgb_to_hsv()
""",
    "a method in place of a package's": """
import fractions
fractions.Fraction.limit_denominator = lambda self: VALUE
def f(l): return fractions.Fraction(1).limit_denominator()
""",
    "a private slot that is not copied": """
class A:
    __slots__=('__k',)
    def __init__(self): self.__k=VALUE
    def __reduce__(self): return (A,())
f=A()
""",
    "what a property keeps": """
import functools
class A:
    def __init__(self): self.k=VALUE
    @functools.cached_property
    def t(self): return self.k
f=A(); f.t
""",
}
"""Cells with a function, an object or a class ``f`` that VALUE has to do with."""


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Some cells put something into Python's own modules and classes."""
    changed = ((builtins, "MINE"), (math, "MINE"), (colorsys, "rgb_to_hsv"), (fractions.Fraction, "limit_denominator"))
    before = [(place, name, getattr(place, name, None)) for place, name in changed]
    yield
    for place, name, item in before:
        if item is not None:
            setattr(place, name, item)
        elif hasattr(place, name):
            delattr(place, name)


def made(cells: str, value: int) -> str:
    thing = run_cells(cells.replace("VALUE", str(value)))["f"]
    assert unstable_in(thing) == []
    return fingerprint_of(thing)


@pytest.mark.parametrize("cells", CASES.values(), ids=CASES)
def test_a_change_is_seen_and_nothing_else(cells: str) -> None:
    assert "VALUE" in cells
    assert made(cells, 1) == made(cells, 1) != made(cells, 2)


def test_another_process_finds_the_same() -> None:
    """With another hash seed."""
    cells = {name: text for name, text in CASES.items() if "a package's" not in name}
    code = (
        "import sys, json\n"
        "from tests.helpers.cells import run_cells\n"
        "from sinklens.records.fingerprint import fingerprint_of\n"
        "for text in json.loads(sys.stdin.read()): print(fingerprint_of(run_cells(text.replace('VALUE', '1'))['f']))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), "."])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(list(cells.values())),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.split() == [made(text, 1) for text in cells.values()]


class Kept:
    """Keeps what it has computed."""

    def __init__(self, k: int) -> None:
        self.k = k

    @functools.cached_property
    def double(self) -> int:
        return 2 * self.k


def test_whether_a_value_was_kept_already_does_not_count() -> None:
    used, overwritten = Kept(1), Kept(1)
    assert used.double == 2
    overwritten.__dict__["double"] = 3
    found = [fingerprint_of(thing) for thing in (Kept(1), used, pickle.loads(pickle.dumps(used)), overwritten)]  # noqa: S301
    assert found[0] == found[1] == found[2] != found[3]
    used.k = 2  # what it has kept is not what it would compute now
    assert fingerprint_of(used) != fingerprint_of(Kept(2))


def test_what_is_put_in_place_of_a_packages_code(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, used = torch.nn.ReLU(), (lambda x: torch.nn.functional.gelu(x))
    before = [fingerprint_of(linear), fingerprint_of(used)]
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda _self, x: x)
    monkeypatch.setattr(torch.nn.functional, "gelu", torch.nn.functional.silu)
    assert all(one != other for one, other in zip(before, [fingerprint_of(linear), fingerprint_of(used)], strict=True))
    monkeypatch.undo()
    assert before == [fingerprint_of(linear), fingerprint_of(used)]


def test_a_compiled_function_is_what_it_was_made_of() -> None:
    def double(x: Any) -> Any:
        return 2 * x

    def same(x: Any) -> Any:
        return 2 * x

    def triple(x: Any) -> Any:
        return 3 * x

    found = [fingerprint_of(torch.compile(function)) for function in (double, double, triple)]
    assert found[0] == found[1] != found[2] and fingerprint_of(double) != found[0]
    assert fingerprint_of(torch.compile(torch.nn.ReLU())) == fingerprint_of(torch.compile(torch.nn.ReLU()))


def test_an_ordinary_readout_takes_no_time() -> None:
    cells = (
        "import torch\nK = torch.zeros(64)\ndef h(x): return torch.softmax(x, -1) @ K\ndef f(l, r): return h(l[:, -1])"
    )
    readout, took = run_cells(cells)["f"], []
    for _ in range(20):
        began = time.perf_counter()
        fingerprint_of(readout)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.001
