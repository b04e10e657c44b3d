"""What is called, and what it consists of: functions, methods, classes, the modules that they are written in.

What comes with a package is known by its name; what somebody has put into a package's class or module counts.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import operator
import os
import re
from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from sinklens.records.callables import is_library, is_packages_own, read_by, resolves, users_entries
from sinklens.records.outside import may_read, outside_of, reads_outside
from sinklens.records.parts import Parts, Unstable, by_name, held_by, of_object, parts_of

_NO_STATE = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__match_args__", "__qualname__"}
    | {"__dataclass_fields__", "__dataclass_params__", "__static_attributes__", "__firstlineno__", "_abc_impl"}
    | {"__annotate__", "__annotate_func__", "__annotations_cache__"}
)
"""What of a class says nothing of what it does, or is told otherwise."""
_OF_ENUMS = frozenset(
    {"_member_names_", "_member_map_", "_value2member_map_", "_hashable_values_", "_unhashable_values_"}
    | {"_unhashable_values_map_", "_inverted_", "_sort_order_", "_value_", "_name_", "__objclass__"}
)
"""What Python keeps in a class of names for values, and in each of its members."""
_OF_FILES = frozenset(
    {"__name__", "__doc__", "__loader__", "__spec__", "__package__", "__builtins__", "__cached__", "__path__"}
    | {"__file__", "__annotations__", "__warningregistry__", "__conditional_annotations__", "__annotate__"}
)
"""What Python keeps in a module."""
_COMPILED = "_torchdynamo_orig_callable"
"""Where torch keeps the function that it has compiled."""


_TOLD: tuple[type, ...] = (
    *(bool, int, float, complex, str, bytes, list, tuple, dict, set, Tensor, np.ndarray),
    *(type, FunctionType, BuiltinFunctionType, MethodType, ModuleType),
)
"""What counts where it is found in a module of a package."""


# --- Functions -------------------------------------------------------------------------------------------------------


@parts_of.register
def _(value: CodeType) -> Parts:
    shape = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags & 0xFF)
    names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
    handlers = getattr(value, "co_exceptiontable", b"")
    return Parts("code", (("", (shape, names, value.co_code, handlers)), ("", value.co_consts)))


@parts_of.register
def _(value: FunctionType) -> Parts:
    if is_packages_own(value):
        return by_name(value.__module__, value.__qualname__)
    if _COMPILED in vars(value):
        return Parts("compiled", (("", vars(value)[_COMPILED]),))
    written_in = str(value.__globals__.get("__name__"))
    if is_library(written_in) and reads_outside(written_in, value.__code__.co_name):
        raise _taken_in(value.__name__)
    children: list[tuple[str, object]] = [("", value.__code__), ("", value.__defaults__), ("", value.__kwdefaults__)]
    children += _closed_over(value).items()
    if not is_library(written_in):
        children += _outside(value)
    return Parts("function", (*children, *([("", dict(vars(value)))] if vars(value) else [])))


def _closed_over(function: FunctionType) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            found[name] = "empty"
    return found


def _outside(function: FunctionType) -> Iterator[tuple[str, object]]:
    """The globals that a function of the user's reads."""
    read, scope = read_by(function.__code__), function.__globals__
    for module in read.imports:
        if module.startswith(".") or not is_library(module):
            raise Unstable(f"an import of {module} inside a function (import it above)")
    found: list[tuple[str, object]] = []
    for path in read.paths:
        if path[0] in scope:
            found.append(_at(path, scope[path[0]]))
        elif reads_outside("builtins", path[0]):
            raise Unstable(f"a call of {path[0]} in a function")
        elif not _is_pythons(path[0], item := getattr(builtins, path[0], None)):
            found.append((path[0], item))
    held = [*(item for _, item in found), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += _closed_over(function).values()
    packages = [item.__name__ for item in held if isinstance(item, ModuleType) and is_library(item.__name__)]
    if (outside := outside_of(read, (*read.imports, *packages))) is not None:
        raise _taken_in(outside)
    for name, item in found:
        yield name, (name, item)


def _at(path: tuple[str, ...], item: object) -> tuple[str, object]:
    """What a function finds where it looks up a path, as far as it leads through modules, and where that is."""
    for at, name in enumerate(path[1:], 1):
        if isinstance(item, ModuleType):
            of_package, where = is_library(item.__name__), item.__name__
        elif isinstance(item, type):  # as AutoModel.from_pretrained
            of_package, where = is_library(item.__module__), item.__module__
        else:
            return ".".join(path[:at]), item
        if of_package and reads_outside(where, name):
            raise _taken_in(name)
        if isinstance(item, type) or name not in vars(item):
            return ".".join(path[:at]), item
        item = vars(item)[name]
        if of_package and _goes_without_saying(item):
            return ".".join(path[: at + 1]), None
    return ".".join(path), item


def _taken_in(name: str) -> Unstable:
    return Unstable(f"{name} in a function (read what it needs before, and give it that)")


def _goes_without_saying(item: object) -> bool:
    """Whether something in a package is an object that it keeps for itself, such as a stream that it prints to."""
    return is_library(type(item).__module__) and not isinstance(item, _TOLD)


def _is_pythons(name: str, item: object) -> bool:
    """Whether something that is known everywhere is Python's own, and not put there by the user."""
    own = isinstance(item, BuiltinFunctionType) or (isinstance(item, type) and not _on_the_heap(item))
    return item is None or (own and getattr(item, "__name__", "") == name)


@parts_of.register
def _(value: ModuleType) -> Parts:
    """A module of a package by its name, one of the user's by all that it holds."""
    if is_library(value.__name__):
        return by_name("", value.__name__)
    held = sorted((name, (name, item)) for name, item in vars(value).items() if name not in _OF_FILES)
    return Parts(f"module {value.__name__}", held)


@parts_of.register
def _(value: MethodType) -> Parts:
    return Parts("method", (("", value.__func__), ("", value.__self__)))


@parts_of.register(BuiltinFunctionType)
@parts_of.register(MethodWrapperType)
def _(value: Any) -> Parts:
    owner = value.__self__
    if owner is None or isinstance(owner, ModuleType):
        return by_name(str(value.__module__), value.__qualname__)
    return Parts("method", (("", value.__name__), ("", owner)))


@parts_of.register(MethodDescriptorType)
@parts_of.register(WrapperDescriptorType)
def _(value: Any) -> Parts:
    return Parts("descriptor", (("", value.__name__), ("", value.__objclass__)))


# --- Classes ---------------------------------------------------------------------------------------------------------


@parts_of.register
def _(value: type) -> Parts:
    """A class of a package by its name and what somebody has put into it, one of the user's by its bases, its class and
    what stands in it.
    """
    if is_library(value.__module__) and reads_outside(value.__module__, value.__name__):
        raise _taken_in(value.__name__)
    if _is_packages(value):
        return by_name(value.__module__, value.__qualname__, [*users_entries(value.__mro__).items()])
    children: list[tuple[str, object]] = [(base.__name__, base) for base in value.__bases__]
    if type(value) is not type:
        children.append(("metaclass", type(value)))
    if "__dataclass_fields__" in vars(value):
        children += _fields(value)
    aside = _NO_STATE
    if issubclass(value, Enum):
        aside |= _OF_ENUMS | value.__members__.keys()
        children += [(name, (name, member.value, _beside(member))) for name, member in value.__members__.items()]
    for name, item in sorted(vars(value).items()):
        if name not in aside and not _is_written(item):
            children.append((name, (name, _of_class(item))))
    return Parts(f"class {value.__qualname__}", children)


def _is_packages(cls: type) -> bool:
    """Whether a class is a package's, and found there; one that is made while Python runs may only say so (what
    ``exec`` makes that it comes with Python).
    """
    if not is_library(cls.__module__):
        return False
    return resolves(cls.__module__, cls.__qualname__, cls) or not _on_the_heap(cls)


def _on_the_heap(cls: type) -> bool:
    """Whether a class was made while Python runs, by a statement or by a call."""
    return bool(cls.__flags__ & (1 << 9))


def _fields(cls: Any) -> list[tuple[str, object]]:
    """The fields of a data class, whose defaults need not stand in it, and how it was made."""
    made = cls.__dataclass_params__
    flags = [getattr(made, name) for name in ("init", "eq", "order", "unsafe_hash", "frozen")]
    found: list[tuple[str, object]] = [("", flags)]
    for each in cls.__dataclass_fields__.values():
        default = [] if each.default is dataclasses.MISSING else [each.default]
        factory = [] if each.default_factory is dataclasses.MISSING else [each.default_factory]
        told = (each.init, each.compare, each.hash, each.kw_only, dict(each.metadata), each._field_type.name)
        found.append((each.name, (each.name, default, factory, told)))
    return found


def _is_written(item: Any) -> bool:
    """Whether Python has written an entry of a class itself: slots, and what ``dataclass`` puts there."""
    if type(item).__name__ in ("getset_descriptor", "member_descriptor"):
        return True
    code = getattr(getattr(item, "__wrapped__", item), "__code__", None)
    return code is not None and code.co_qualname.startswith("__create_fn__.")


def _beside(member: Enum) -> dict[str, object]:
    """What a member of an enumeration has besides its value."""
    return {name: item for name, item in held_by(member).items() if name not in _OF_ENUMS}


def _of_class(item: Any) -> object:
    """An entry of a class without its wrapping."""
    if isinstance(item, (staticmethod, classmethod)):
        return (type(item).__name__, item.__func__)
    if isinstance(item, property):
        return (type(item).__name__, type(item), item.fget, item.fset, item.fdel)
    if isinstance(item, (cached_property, functools.partialmethod)):
        return (type(item).__name__, item.func, getattr(item, "args", ()), getattr(item, "keywords", {}))
    if isinstance(item, functools.singledispatchmethod):
        return ("singledispatchmethod", item.func, dict(item.dispatcher.registry))
    return item


@parts_of.register
def _(value: Enum) -> Parts:
    return Parts("enum", (("", type(value)), (value.name or "", (value.name, value.value))))


@parts_of.register(operator.attrgetter)
@parts_of.register(operator.methodcaller)
def _(value: Any) -> Parts:
    """What looks a name up in whatever it is given."""
    for name in re.findall(r"\w+", repr(value.__reduce__())):
        if may_read(name) or reads_outside("operator", name):
            raise _taken_in(name)
    return of_object(value)


@parts_of.register(type(os.environ))
def _(_: Any) -> Parts:
    raise Unstable("the environment of the process")


@parts_of.register
def _(value: TypeVar) -> Parts:
    return Parts("type variable", (("", (value.__name__, value.__bound__, value.__constraints__)),))
