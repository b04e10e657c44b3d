"""Fingerprints: whether two things, in one process or in two, are the same by what they consist of and do.

Tensors, arrays and tables count by their contents; a function by its code, defaults, closed-over values and the globals
that it reads, followed as far as the user's own functions, classes and modules go; any other object by its class and
its state. What comes with a package is known by its name: it changes with the version alone. Addresses, hash seeds, the
order of sets and dictionaries, and where something is written down do not count.

Pitfall: some things have nothing that tells whether they are the same (a generator of random numbers, an open file).
:func:`fingerprint_of` gives them a value of their own in every process; :func:`unstable_in` names them.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import io
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cached_property, singledispatch
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinklens.records.callables import LOOKED_UP, ModuleNames, is_library, outside_of, read_by, resolves

_PROCESS = os.urandom(16)
"""Of what has no stable fingerprint, no other process has the same one."""
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
_NO_STATE = frozenset({"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__match_args__"})
"""What of a class says nothing of what it does."""


_OF_MODULES = frozenset(vars(torch.nn.Module())) - {"training"}
"""Tables of parameters, parts and hooks that every module has; whether it drops out what it is given counts."""


class Unstable(Exception):
    """Nothing tells whether this is the same in another process; the message says what it is."""


@dataclass(frozen=True)
class Parts:
    """What a value consists of."""

    tag: str
    """Its kind, so that values of two kinds never run together."""
    children: Sequence[tuple[str, object]] = ()
    """What it is made of, each with what it is called there."""
    data: bytes | memoryview = b""
    """Its own contents."""
    ordered: bool = True
    """Whether the order of :attr:`children` counts."""


def fingerprint_of(value: object) -> str:
    """SHA-256 of what a value consists of: equal for equal values, in every process.

    What has no stable contents (see :func:`unstable_in`) is equal to itself alone, in this process alone.
    """
    return _Walk().of(value, "").hex()


def unstable_in(value: object) -> list[str]:
    """What in ``value`` has no fingerprint that holds in another process, such as ``rng, a Generator``."""
    walk = _Walk()
    walk.of(value, "")
    return list(dict.fromkeys(walk.unstable))


class _Walk:
    """One pass over a value and all that it consists of."""

    def __init__(self) -> None:
        self.unstable: list[str] = []
        self._done: dict[int, tuple[object, bytes]] = {}  # the objects too, so that no address is used twice
        self._above: dict[int, int] = {}

    def of(self, value: object, name: str) -> bytes:
        plain = _plain(value)
        if plain is not None:
            return hashlib.sha256(plain).digest()
        key = id(value)
        if key in self._done:
            return self._done[key][1]
        if key in self._above:  # a circle: how many steps back it goes
            return hashlib.sha256(f"circle {len(self._above) - self._above[key]}".encode()).digest()
        self._above[key] = len(self._above)
        try:
            found = self._walk(value, name)
        except (Unstable, RecursionError) as error:
            what = "too deeply nested to be gone through" if isinstance(error, RecursionError) else str(error)
            self.unstable.append(f"{name}, {what}" if name else what)
            itself = id(value.module) if isinstance(value, ModuleNames) else key
            found = hashlib.sha256(_PROCESS + str(itself).encode()).digest()
        finally:
            del self._above[key]
        self._done[key] = (value, found)
        return found

    def _walk(self, value: object, name: str) -> bytes:
        parts = parts_of(value)
        digest = hashlib.sha256(f"{parts.tag} {len(parts.children)} ".encode())
        digest.update(parts.data)
        each = [self.of(child, inner or name) for inner, child in parts.children]
        for child in each if parts.ordered else sorted(each):
            digest.update(child)
        return digest.digest()


def _plain(value: object) -> bytes | None:
    """The bytes of a plain value, its type in front; ``None`` for any other."""
    kind = type(value)
    if value is None or value is Ellipsis or value is NotImplemented or kind is bool:
        return repr(value).encode()
    if kind is int:
        return f"int {value:x}".encode()
    if kind is float:
        return f"float {value.hex()}".encode()  # type: ignore[attr-defined]  # -0.0 and nan too
    if kind is complex:
        return f"complex {value.real.hex()} {value.imag.hex()}".encode()  # type: ignore[attr-defined]
    if kind is str:
        return b"str " + str(value).encode("utf-8", "surrogatepass")
    return b"bytes " + value if kind is bytes else None  # type: ignore[operator]


@singledispatch
def parts_of(value: object) -> Parts:
    """What a value consists of: of an object of any other kind, its class and its state as a copy would have them.

    Raises:
        Unstable: it has no contents that would be the same in another process.
    """
    if isinstance(value, _RANDOM):
        raise Unstable(f"a {type(value).__name__} of random numbers")
    if isinstance(value, (Iterator, io.IOBase)):
        raise Unstable(f"a {type(value).__name__}")
    if type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "to_numpy"):
        return _of_table(value)
    wrapped = getattr(value, "__wrapped__", None)
    if callable(wrapped) and not _named(value) and is_library(type(value).__module__):  # such as functools.cache makes
        return Parts("wrapped", (("", type(value)), ("", wrapped)))
    return _of_object(value)


def _of_object(value: object) -> Parts:
    if isinstance(value, (torch.layout, torch.memory_format, torch.qscheme)):
        return Parts("name", data=repr(value).encode())
    try:
        own = copyreg.dispatch_table.get(type(value))
        reduced = value.__reduce_ex__(2) if own is None else own(value)
    except Exception as error:  # whatever some class's own way of being copied raises
        raise Unstable(f"a {type(value).__name__}") from error
    if isinstance(reduced, str):
        owners = (getattr(value, "__module__", None) or type(value).__module__, "scipy.special")
        owner = next((owner for owner in owners if resolves(owner, reduced, value)), None)
        if owner is None:
            raise Unstable(f"a {type(value).__name__}")
        return Parts("name", data=f"{owner}.{reduced}".encode())
    parts: Any = (*reduced, None, None, None)
    make, args, state, items, pairs = parts[:5]
    children = [
        ("", make if make is not copyreg.__newobj__ else "new"),  # type: ignore[attr-defined]
        *((_name_of(arg), arg) for arg in args),
        *_state(value, state),
        ("", None if items is None else list(items)),
        ("", None if pairs is None else dict(pairs)),
        *_unsaid(value),
    ]
    return Parts("object", children)


def _unsaid(value: object) -> list[tuple[str, object]]:
    """The attributes of an object whose class, of the user's own, says itself what of it is copied: it may leave some
    out that it computes with.
    """
    cls = type(value)
    own = [
        name
        for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__")
        for base in cls.__mro__
        if base is not object and name in vars(base)
    ]
    if not own or is_library(cls.__module__):
        return []
    slots = {name for base in cls.__mro__ for name in _slots_of(base) if hasattr(value, name)}
    return _state(value, {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}})


def _slots_of(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _beside(value: Any) -> list[tuple[str, object]]:
    """What a tensor or an array has besides its numbers: attributes, and a class of the user's own."""
    cls = type(value)
    attributes = {name: item for name, item in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    own = [] if is_library(cls.__module__) else [("", cls)]
    return [*own, *_state(value, attributes)]


def _state(value: object, state: object) -> list[tuple[str, object]]:
    """An object's attributes, but for what was only kept to save time."""
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    found: list[tuple[str, object]] = []
    for part in parts:
        if isinstance(part, dict):
            kept = {name: item for name, item in part.items() if not _is_cached(type(value), name)}
            found += [(str(name), (name, item)) for name, item in sorted(kept.items(), key=lambda pair: str(pair[0]))]
        else:
            found.append(("", part))
    return found


def _is_cached(cls: type, name: object) -> bool:
    return isinstance(name, str) and isinstance(getattr(cls, name, None), cached_property)


def _named(value: object) -> bool:
    """Whether a package has this very thing under its name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return isinstance(module, str) and isinstance(name, str) and is_library(module) and resolves(module, name, value)


def _name_of(value: object) -> str:
    return getattr(value, "__name__", "") if isinstance(value, (type, FunctionType)) else ""


# --- Contents --------------------------------------------------------------------------------------------------------


@parts_of.register
def _(value: Tensor) -> Parts:
    if value.is_meta:
        raise Unstable("a tensor without values, on the device meta")
    kind = "" if type(value) in (Tensor, torch.nn.Parameter) else type(value).__qualname__
    tag, beside = f"tensor {kind} {tuple(value.shape)} {value.dtype} {value.layout}", _beside(value)
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    flat = value.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return Parts(tag, beside, data=flat.view(torch.uint8).numpy().data if flat.numel() else b"")


@parts_of.register
def _(value: np.ndarray) -> Parts:
    tag = f"array {type(value).__name__} {value.shape} {value.dtype.descr if value.dtype.names else value.dtype.str}"
    if isinstance(value, np.ma.MaskedArray):
        return Parts(tag, (("", value.filled(0)), ("", np.ma.getmaskarray(value))))
    beside = _beside(value)
    if value.dtype.hasobject:
        return Parts(tag, (("", value.tolist()), *beside))
    return Parts(tag, beside, data=np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b"")


@parts_of.register
def _(value: np.generic) -> Parts:
    if value.dtype.hasobject:
        return Parts(f"scalar {value.dtype.str}", (("", value.item()),))
    return Parts(f"scalar {value.dtype.str}", data=value.tobytes())


def _of_table(value: Any) -> Parts:
    """A table, a column or an index of pandas."""
    kind = type(value).__name__
    if hasattr(value, "columns"):
        columns = [(str(name), value.iloc[:, number]) for number, name in enumerate(value.columns)]
        return Parts(f"table {kind} {value.shape}", (("columns", value.columns), ("index", value.index), *columns))
    children: list[tuple[str, object]] = [("names", list(getattr(value, "names", [getattr(value, "name", None)])))]
    if hasattr(value, "index") and not callable(value.index):
        children.append(("index", value.index))
    return Parts(f"column {kind} {getattr(value, 'dtype', '')}", (*children, ("values", value.to_numpy())))


@parts_of.register(list)
@parts_of.register(tuple)
def _(value: list[Any] | tuple[Any, ...]) -> Parts:
    if type(value) in (list, tuple):
        return Parts(type(value).__name__, [("", item) for item in value])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return Parts("named tuple", [("", type(value)), *(("", item) for item in value)])
    return _of_object(value)


@parts_of.register(set)
@parts_of.register(frozenset)
def _(value: set[Any] | frozenset[Any]) -> Parts:
    if type(value) not in (set, frozenset):
        return _of_object(value)
    return Parts(type(value).__name__, [("", item) for item in value], ordered=False)


@parts_of.register(dict)
@parts_of.register(MappingProxyType)
def _(value: Any) -> Parts:
    if type(value) not in (dict, MappingProxyType):
        return _of_object(value)
    return Parts("mapping", [(str(key)[:40], (key, item)) for key, item in value.items()], ordered=False)


@parts_of.register
def _(value: Enum) -> Parts:
    return Parts(f"enum {type(value).__qualname__} {value.name}", ((value.name or "", value.value),))


@parts_of.register
def _(value: torch.nn.Module) -> Parts:
    """Of a module of a package its weights, plain settings and the user's hooks; of one of the user's own, all."""
    inside = vars(value)
    hooks = [hook for name in ("_forward_hooks", "_forward_pre_hooks") for hook in inside.get(name, {}).values()]
    inner = [inside.get(name) or {} for name in ("_parameters", "_buffers", "_modules")]
    settings = {name: item for name, item in inside.items() if name not in _OF_MODULES}
    if is_library(type(value).__module__):
        settings = {name: item for name, item in settings.items() if not name.startswith("_") and _is_setting(item)}
    return Parts("module", (("", type(value)), *(("", dict(part)) for part in inner), ("", settings), ("hooks", hooks)))


def _is_setting(value: object) -> bool:
    """Whether an attribute of a package's module is one that it is set up by, as a window of ``(3,)`` is."""
    if isinstance(value, (list, tuple)):
        return all(_is_setting(item) for item in value)
    if isinstance(value, dict):
        return all(_is_setting(item) for pair in value.items() for item in pair)
    kept = (bool, int, float, str, Tensor, np.ndarray, FunctionType, MethodType, BuiltinFunctionType, torch.dtype)
    return value is None or isinstance(value, (*kept, functools.partial))


# --- What is called --------------------------------------------------------------------------------------------------


@parts_of.register
def _(value: CodeType) -> Parts:
    shape = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags & 0xFF)
    names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
    handlers = getattr(value, "co_exceptiontable", b"")
    return Parts("code", (("", (shape, names, value.co_code, handlers)), ("", value.co_consts)))


@parts_of.register
def _(value: FunctionType) -> Parts:
    if _named(value):
        return Parts("name", data=f"{value.__module__}.{value.__qualname__}".encode())
    children: list[tuple[str, object]] = [("", value.__code__), ("", value.__defaults__), ("", value.__kwdefaults__)]
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            children.append((name, cell.cell_contents))
        except ValueError:  # not filled yet
            children.append((name, "empty"))
    if not is_library(str(value.__globals__.get("__name__"))):
        children += _outside(value)
    attributes = {name: item for name, item in vars(value).items() if name != "__wrapped__"}
    return Parts("function", (*children, *([("", attributes)] if attributes else [])))


def _outside(function: FunctionType) -> Iterable[tuple[str, object]]:
    """The globals that a function of the user's reads."""
    read = read_by(function.__code__)
    for module in read.imports:
        if not is_library(module):
            raise Unstable(f"an import of {module} inside a function (import it above)")
    found = [function.__globals__.get(name) for name in read.globals]
    modules = [*read.imports, *(item.__name__ for item in found if isinstance(item, ModuleType))]
    if (outside := outside_of(read, modules)) is not None:
        raise Unstable(f"{outside} in a function (read what it needs before, and give it that)")
    for name in read.globals:
        if name in function.__globals__:
            item = function.__globals__[name]
            yield name, (name, ModuleNames(item, read.names) if isinstance(item, ModuleType) else item)
        elif name in ("eval", "exec", "globals", "open", "input", "__import__"):
            raise Unstable(f"a call of {name} in a function")


@parts_of.register
def _(value: ModuleNames) -> Parts:
    """A module as far as the names go that a function reads; one of a package by its name."""
    looked_up = LOOKED_UP & set(value.names)
    if looked_up and not is_library(value.module.__name__):
        raise Unstable(f"the module {value.module.__name__} through {min(looked_up)}")
    inside = {} if is_library(value.module.__name__) else vars(value.module)
    children = [
        (name, (name, ModuleNames(inside[name], value.names) if isinstance(inside[name], ModuleType) else inside[name]))
        for name in value.names
        if name in inside
    ]
    return Parts(f"module {value.module.__name__}", children)


@parts_of.register
def _(value: ModuleType) -> Parts:
    if not is_library(value.__name__):
        raise Unstable(f"the module {value.__name__} as a whole")
    return Parts("name", data=value.__name__.encode())


@parts_of.register
def _(value: MethodType) -> Parts:
    return Parts("method", (("", value.__func__), ("", value.__self__)))


@parts_of.register(BuiltinFunctionType)
@parts_of.register(MethodWrapperType)
def _(value: Any) -> Parts:
    owner = value.__self__
    if owner is None or isinstance(owner, ModuleType):
        return Parts("name", data=f"{value.__module__}.{value.__qualname__}".encode())
    return Parts("method", (("", value.__name__), ("", owner)))


@parts_of.register(MethodDescriptorType)
@parts_of.register(WrapperDescriptorType)
def _(value: Any) -> Parts:
    return Parts("descriptor", (("", value.__name__), ("", value.__objclass__)))


@parts_of.register
def _(value: type) -> Parts:
    """A class of a package by its name, one of the user's by its bases and its methods."""
    if is_library(value.__module__) and (_named(value) or "<locals>" not in value.__qualname__):
        return Parts("name", data=f"{value.__module__}.{value.__qualname__}".encode())
    if issubclass(value, Enum):
        members = [(name, (name, member.value)) for name, member in value.__members__.items()]
        return Parts(
            f"enum class {value.__qualname__}", [*((base.__name__, base) for base in value.__bases__), *members]
        )
    inside = [
        (name, (name, _of_class(item))) for name, item in sorted(vars(value).items()) if _counts(value, name, item)
    ]
    return Parts(f"class {value.__qualname__}", [*((base.__name__, base) for base in value.__bases__), *inside])


def _counts(cls: type, name: str, item: object) -> bool:
    """Whether an entry of a class says what it does: not what Python and ``dataclass`` write there themselves."""
    if name in _NO_STATE or name.startswith(("__dataclass_", "__static_", "__firstlineno", "_abc_", "__annotate")):
        return False
    written = isinstance(item, FunctionType) and item.__code__.co_filename == "<string>"
    if is_dataclass(cls) and name.startswith("__") and (written or not callable(item)):
        return False
    return type(item).__name__ not in ("getset_descriptor", "member_descriptor")


def _of_class(item: Any) -> object:
    """An entry of a class without its wrapping."""
    if isinstance(item, (staticmethod, classmethod)):
        return (type(item).__name__, item.__func__)
    if isinstance(item, property):
        return ("property", item.fget, item.fset, item.fdel)
    if isinstance(item, (cached_property, functools.partialmethod)):
        return (type(item).__name__, item.func, getattr(item, "args", ()), getattr(item, "keywords", {}))
    return item
