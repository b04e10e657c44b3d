"""Fingerprints of data: contents, names and attributes count; how it is kept does not."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from sinklens.records.fingerprint import fingerprint_of, unstable_in


def with_(thing: Any, **attributes: Any) -> Any:
    """The thing, with attributes put on it."""
    for name, value in attributes.items():
        object.__setattr__(thing, name, value) if isinstance(thing, pd.DataFrame) else setattr(thing, name, value)
    return thing


def told(thing: Any, **attrs: Any) -> Any:
    """A table or column that is told something about itself."""
    thing.attrs.update(attrs)
    return thing


def masked(values: Any, mask: Any, **options: Any) -> Any:
    return np.ma.array(values, mask=mask, **options)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make()


FIELDS = [("a", "i1"), ("b", "f8")]
FRAME = {"a": [1.0]}
CASES: dict[str, Callable[[int], Any]] = {
    "an attribute of a tensor": lambda v: with_(torch.zeros(3), scale=v),
    "a private one": lambda v: with_(torch.zeros(3), _scale=v),
    "one of a parameter": lambda v: with_(torch.nn.Parameter(torch.zeros(3)), _scale=v),
    "a quantised tensor": lambda v: torch.quantize_per_tensor(torch.zeros(3), 0.1, v, torch.qint8),
    "a nested tensor": lambda v: torch.nested.nested_tensor([torch.ones(2) * v, torch.ones(3)]),
    "a sparse tensor": lambda v: (torch.eye(3) * v).to_sparse_csr(),
    "an attribute of a module of torch": lambda v: with_(torch.nn.ReLU(), scale=v),
    "a private one of a module": lambda v: with_(torch.nn.ReLU(), _scale=v),
    "an object on a module": lambda v: with_(torch.nn.ReLU(), _scale=SimpleNamespace(k=v)),
    "a set on a module": lambda v: with_(torch.nn.ReLU(), chosen={v}),
    "a list of objects on a module": lambda v: with_(torch.nn.ReLU(), chosen=[SimpleNamespace(k=v)]),
    "a forward on a module": lambda v: with_(torch.nn.ReLU(), forward=lambda x: x * v),
    "a recurrent module": lambda v: seeded(lambda: torch.nn.LSTM(2, 2), v),
    "an attention": lambda v: seeded(lambda: torch.nn.MultiheadAttention(4, v)),
    "a layer": lambda v: seeded(lambda: torch.nn.TransformerEncoderLayer(4, 2, 8, norm_first=v == 1)),
    "a normed weight": lambda v: seeded(lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)), v),
    "what a table is told": lambda v: told(pd.DataFrame(FRAME), k=v),
    "an attribute of a table": lambda v: with_(pd.DataFrame(FRAME), _extra=v),
    "the name of columns": lambda v: pd.DataFrame(FRAME).rename_axis(columns=f"n{v}"),
    "the name of a column": lambda v: pd.Series([1.0], name=f"n{v}"),
    "what a column is told": lambda v: told(pd.Series([1.0]), k=v),
    "an index": lambda v: pd.Series([1.0], index=[v]),
    "the name of an index": lambda v: pd.Series([1.0], index=pd.Index([1], name=f"i{v}")),
    "the names of an index": lambda v: pd.MultiIndex.from_tuples([(1, 2)], names=["a", f"b{v}"]),
    "categories": lambda v: pd.Series(pd.Categorical(["u"], categories=["u", f"v{v}"])),
    "whether they have an order": lambda v: pd.Categorical(["u"], ordered=v == 1),
    "categories in a table": lambda v: pd.DataFrame({"a": pd.Categorical(["u"], categories=["u", f"v{v}"])}),
    "a time zone": lambda v: pd.Timestamp("2020-01-01", tz="UTC" if v == 1 else "Asia/Tokyo"),
    "missing numbers": lambda v: pd.array([v, None], dtype="Int64"),
    "a mask": lambda v: masked([1.0, 2.0], mask=[0, v == 1]),
    "what fills a mask": lambda v: masked([1.0, 2.0], mask=[0, 1], fill_value=v),
    "what lies under a mask": lambda v: masked([1.0, v], mask=[0, 1]),
    "a masked field": lambda v: masked([(1, 2.0)], mask=[(0, v == 1)], dtype=FIELDS),
    "fields": lambda v: np.array([(1, v)], dtype=FIELDS),
    "fields apart": lambda v: np.array([(1, v)], dtype=np.dtype(FIELDS, align=True)),
    "fields of objects": lambda v: np.array([(1, [v])], dtype=[("a", "i1"), ("b", "O")]),
    "names of fields": lambda v: np.array([(1, 2)], dtype=[("a", "i4"), (f"b{v}", "f8")]),
    "fields in fields": lambda v: np.array([((1, v),)], dtype=[("a", FIELDS)]),
    "one of fields": lambda v: np.array([(1, v)], dtype=np.dtype(FIELDS, align=True))[0],
    "records": lambda v: np.rec.array([(1, v)], dtype=FIELDS),
    "what a dtype is told": lambda v: np.zeros(2, np.dtype("f4", metadata={"k": v})),
    "texts": lambda v: np.array([f"abc{v}"], dtype=np.dtypes.StringDType()),
    "the most of a queue": lambda v: collections.deque([1], maxlen=v),
}
CASES |= {
    f"a sparse {kind} matrix": lambda v, kind=kind: sp.csr_matrix(np.eye(4) * v).asformat(kind)
    for kind in ("csr", "csc", "coo", "lil", "dok", "dia", "bsr")
}
NOT_PICKLED = ("a forward on a module", "an attribute of a table", "a normed weight")
"""What pickle cannot take, or leaves something out of."""
CASES |= {
    "a sparse array": lambda v: sp.csr_array(np.eye(3) * v),
    "an attribute of a sparse matrix": lambda v: with_(sp.csr_matrix(np.eye(3)), scale=v),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_change_is_seen_and_nothing_else(make: Callable[[int], Any]) -> None:
    one, same, other = make(1), make(1), make(2)
    assert fingerprint_of(one) == fingerprint_of(same) != fingerprint_of(other)
    assert unstable_in(one) == []


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_PICKLED])
def test_pickled_and_back_it_is_the_same(name: str) -> None:
    thing = CASES[name](1)
    assert fingerprint_of(pickle.loads(pickle.dumps(thing))) == fingerprint_of(thing)  # noqa: S301


def test_what_lies_between_fields_does_not_count() -> None:
    kind = np.dtype(FIELDS, align=True)
    one, other = np.zeros(3, kind), np.zeros(3, kind)
    other.view(np.uint8).reshape(3, -1)[:, 1:8] = 7  # between a byte and a number of eight
    assert one.tobytes() != other.tobytes() and (one == other).all()
    assert fingerprint_of(one) == fingerprint_of(other)
    assert fingerprint_of(one[0]) == fingerprint_of(other[0])


def test_how_a_sparse_matrix_is_kept_does_not_count() -> None:
    one = sp.csr_matrix((np.array([1.0, 2.0]), np.array([2, 0]), np.array([0, 2])), shape=(1, 3))
    before = fingerprint_of(one)
    one.sort_indices()
    assert one.has_sorted_indices and fingerprint_of(one) == before
    assert fingerprint_of(one.tocsc()) != before


def test_fields_of_other_types_with_the_same_bytes_differ() -> None:
    one = np.array([(1,)], dtype=[("a", "i4")])
    assert fingerprint_of(one) != fingerprint_of(one.view([("a", "u4")]))
    assert fingerprint_of(np.ma.masked) == fingerprint_of(np.ma.masked) != fingerprint_of(masked(0.0, False))
