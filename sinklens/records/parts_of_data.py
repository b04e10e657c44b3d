"""What data consists of: containers, tensors, arrays, tables, sparse matrices, torch's modules."""

from __future__ import annotations

import functools
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinklens.records.callables import is_library
from sinklens.records.parts import OF_PACKAGES, Parts, Unstable, attributes, held_by, of_object, parts_of

_OF_MODULES = frozenset(vars(torch.nn.Module())) - {"training"}
"""Tables of parameters, parts and hooks that every module has; whether it drops out what it is given counts."""
_ASIDE = ("_is_hf_initialized", "_dynamo_", "_flat_weight", "_all_weights")
"""How attributes begin in which torch and transformers keep what they have done, or views of weights."""


@parts_of.register(list)
@parts_of.register(tuple)
def _(value: list[Any] | tuple[Any, ...]) -> Parts:
    if type(value) in (list, tuple):
        return Parts(type(value).__name__, [("", item) for item in value])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        held = attributes(value, held_by(value))
        return Parts("named tuple", [("", type(value)), *(("", item) for item in value), *held])
    return of_object(value)


@parts_of.register(set)
@parts_of.register(frozenset)
def _(value: set[Any] | frozenset[Any]) -> Parts:
    if type(value) not in (set, frozenset):
        return of_object(value)
    return Parts(type(value).__name__, [("", item) for item in value], ordered=False)


@parts_of.register(dict)
@parts_of.register(MappingProxyType)
def _(value: Any) -> Parts:
    if type(value) not in (dict, MappingProxyType):
        return of_object(value)
    return Parts("mapping", [(str(key)[:40], (key, item)) for key, item in value.items()], ordered=False)


# --- Tensors and arrays ----------------------------------------------------------------------------------------------


def _beside(value: Any, own: frozenset[str] = frozenset()) -> list[tuple[str, object]]:
    """What a tensor, an array or a table has besides its numbers: attributes, and a class of the user's own.

    Args:
        value: the tensor, array or table.
        own: attributes that its package keeps there.
    """
    cls = type(value)
    held = held_by(value) if not is_library(cls.__module__) else getattr(value, "__dict__", {})
    kept = {name: item for name, item in held.items() if name not in own and not name.startswith(_ASIDE)}
    return [*([] if is_library(cls.__module__) else [("", cls)]), *attributes(value, kept)]


@parts_of.register
def _(value: Tensor) -> Parts:
    if value.is_meta:
        raise Unstable("a tensor without values, on the device meta")
    kind = "" if type(value) in (Tensor, torch.nn.Parameter) else type(value).__qualname__
    if value.is_nested:
        inside = [("", each) for each in value.unbind()]
        return Parts(f"nested tensor {kind} {value.layout}", [*inside, *_beside(value)])
    tag, beside = f"tensor {kind} {tuple(value.shape)} {value.dtype} {value.layout}", _beside(value)
    value = value.detach()
    if value.is_quantized:
        beside.append(("", value.int_repr()))
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    flat = value.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return Parts(tag, beside, data=flat.view(torch.uint8).numpy().data if flat.numel() else b"")


_OF_MASKED = frozenset(
    {"_mask", "_fill_value", "_hardmask", "_sharedmask", "_isfield", "_baseclass", "_optinfo", "_basedict"}
)


@parts_of.register
def _(value: np.ndarray) -> Parts:
    kind = value.dtype
    tag = f"array {type(value).__name__} {value.shape} {kind if kind.names else kind.str}"
    beside = _beside(value, _OF_MASKED if isinstance(value, np.ma.MaskedArray) else frozenset())
    if kind.metadata is not None:
        beside.append(("metadata", dict(kind.metadata)))
    if isinstance(value, np.ma.MaskedArray):
        if value is np.ma.masked:
            return Parts("masked")
        mask, extra = (
            np.ma.getmaskarray(value),
            (value.fill_value, bool(value.hardmask), getattr(value, "_optinfo", {})),
        )
        return Parts(tag, (("", np.asarray(value.data)), ("", mask), ("", extra), *beside))
    if kind.names is not None:  # field by field: between them may lie anything
        plain = value.view(np.ndarray)
        return Parts(tag, (*((name, plain[name]) for name in kind.names), *beside))
    if kind.hasobject or kind.kind == "T":
        return Parts(tag, (("", value.tolist()), *beside))
    return Parts(tag, beside, data=np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b"")


@parts_of.register
def _(value: np.generic) -> Parts:
    if value.dtype.names is not None or value.dtype.hasobject:
        return Parts("scalar", (("", np.array(value)),))
    return Parts(f"scalar {value.dtype.str}", data=value.tobytes())


# --- Tables and sparse matrices --------------------------------------------------------------------------------------


def _of_pandas(value: Any) -> Parts | None:
    """A table, a column or an index; ``None`` for anything else."""
    import pandas as pd

    kind = type(value).__name__
    beside = [("attrs", dict(value.attrs))] if hasattr(value, "attrs") else []
    if isinstance(value, pd.DataFrame):
        beside += _beside(value, _OF_TABLES)
        columns = [(str(name), value.iloc[:, number]) for number, name in enumerate(value.columns)]
        children = (("columns", value.columns), ("index", value.index), *columns, *beside)
        return Parts(f"table {kind} {value.shape}", children)
    if isinstance(value, pd.MultiIndex):
        levels = [("", value.get_level_values(number)) for number in range(value.nlevels)]
        return Parts(f"index {kind} {len(value)}", levels)
    if not isinstance(value, (pd.Series, pd.Index, pd.api.extensions.ExtensionArray)):
        return None
    names: list[tuple[str, object]] = [(name, getattr(value, name, None)) for name in ("name", "freqstr")]
    if isinstance(value, pd.Series):
        names.append(("index", value.index))
        beside += _beside(value, _OF_TABLES)
    if isinstance(value.dtype, pd.CategoricalDtype):
        names.append(("categories", (value.dtype.categories, value.dtype.ordered)))
    return Parts(f"column {kind} {value.dtype}", (*names, ("values", value.to_numpy()), *beside))


_OF_TABLES = frozenset(
    {"_mgr", "_typ", "_cache", "_item_cache", "_attrs", "_flags", "_is_copy", "_name", "_cacher", "_index"}
)


def _of_scipy(value: Any) -> Parts | None:
    """A sparse matrix, whatever order its entries are kept in; ``None`` for anything else."""
    import scipy.sparse

    if not scipy.sparse.issparse(value):
        return None
    entries = value.tocoo(copy=True)
    entries.sum_duplicates()
    beside = _beside(value, frozenset(name for name in vars(value) if name in _OF_SPARSE))
    children = (("", tuple(entries.coords)), ("", entries.data), *beside)
    return Parts(f"sparse {type(value).__name__} {value.shape} {value.dtype.str}", children)


_OF_SPARSE = frozenset(
    {"_shape", "maxprint", "data", "indices", "indptr", "coords", "row", "col", "offsets", "rows", "_dict", "dtype"}
    | {"_has_sorted_indices", "_has_canonical_format", "has_canonical_format", "has_sorted_indices", "_dtype"}
)

OF_PACKAGES.update(pandas=_of_pandas, scipy=_of_scipy)


# --- Modules of torch ------------------------------------------------------------------------------------------------


@parts_of.register
def _(value: torch.nn.Module) -> Parts:
    """Of one of torch's modules and of one of the user's own, all; of one of another package, which keeps much besides,
    its weights, its settings and what is the user's.
    """
    if isinstance(value, torch.jit.ScriptModule):
        raise Unstable("a scripted module")
    inside = vars(value)
    hooks = [hook for name in ("_forward_hooks", "_forward_pre_hooks") for hook in inside.get(name, {}).values()]
    inner = [inside.get(name) or {} for name in ("_parameters", "_buffers", "_modules")]
    settings = {name: item for name, item in inside.items() if name not in _OF_MODULES and not name.startswith(_ASIDE)}
    place = type(value).__module__
    if place.startswith("torch._dynamo."):  # a compiled module, around the one that it was made of
        settings = {}
    elif is_library(place) and not place.startswith("torch.nn."):
        settings = {name: item for name, item in settings.items() if not name.startswith("_") and _is_setting(item)}
    held = attributes(value, settings)
    return Parts("module", (("", type(value)), *(("", dict(part)) for part in inner), *held, ("hooks", hooks)))


_SETTINGS: tuple[type, ...] = (
    *(bool, int, float, complex, str, bytes, Tensor, np.ndarray, np.generic, torch.dtype, functools.partial),
    *(FunctionType, MethodType, BuiltinFunctionType, type),
)
_MACHINERY = {
    "torch",
    "transformers",
    "tokenizers",
    "transformer_lens",
    "sinklens",
    "weakref",
    "_thread",
    "collections",
}
"""Packages whose objects, kept by modules of packages, are configs, tokenizers, handles and caches."""


def _is_setting(value: object) -> bool:
    """Whether an attribute of a package's module is one that it is set up by, as a window of ``(3,)`` is."""
    if type(value) in (list, tuple, set, frozenset):
        return all(map(_is_setting, value))  # type: ignore[call-overload]
    if isinstance(value, dict):
        return all(_is_setting(item) for pair in value.items() for item in pair)
    place = type(value).__module__.partition(".")[0]
    return value is None or isinstance(value, _SETTINGS) or place not in _MACHINERY
