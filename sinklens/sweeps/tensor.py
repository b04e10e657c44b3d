"""A tensor whose axes have names and coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from torch import Tensor

from sinklens.errors import InputError
from sinklens.records.summaries import html, summary

SHOWN_COLUMNS = 40
"""Columns that a notebook shows."""


@dataclass(frozen=True, eq=False)
class LabelledTensor:
    """Values with a name for every axis and a coordinate for every place along it."""

    values: Tensor
    """The values; NaN where there is none."""
    axes: tuple[str, ...]
    """Names of the axes, in order."""
    coords: Mapping[str, tuple[Any, ...]]
    """For every axis, what each place along it is."""
    name: str = "value"
    """What the values are."""
    at: Mapping[str, Any] = field(default_factory=dict)
    """What it was cut from: the place on every axis that was selected and is gone; the readout, where it is known."""
    over: Mapping[str, int] = field(default_factory=dict)
    """Axes that a mean was taken over, and of how many places."""

    def __post_init__(self) -> None:
        sizes = tuple(len(self.coords[axis]) for axis in self.axes)
        if sizes != tuple(self.values.shape):
            raise ValueError(f"axes {self.axes} of sizes {sizes} do not fit a tensor of {tuple(self.values.shape)}")

    def __repr__(self) -> str:
        cut = [f"at {axis} {place}" for axis, place in self.at.items() if place is not None]
        means = [f"mean over {n} of {axis}" for axis, n in self.over.items()]
        return summary(self, self.name, *(f"{axis} {len(self.coords[axis])}" for axis in self.axes), *cut, *means)

    def _repr_html_(self) -> str:
        flat = self.squeeze()
        if len(flat.axes) != 2:
            return html(repr(self))
        frame = flat.to_frame()
        return html(repr(self), frame.reset_index().iloc[:, : 1 + SHOWN_COLUMNS])

    def mean(self, *axes: str) -> LabelledTensor:
        """The mean along some axes, NaN left out."""
        self._check(axes)
        dims = tuple(self.axes.index(axis) for axis in axes)
        left = tuple(axis for axis in self.axes if axis not in axes)
        values = self.values.nanmean(dims) if dims else self.values
        over = {**self.over, **{axis: len(self.coords[axis]) for axis in axes}}
        return replace(self, values=values, axes=left, coords={axis: self.coords[axis] for axis in left}, over=over)

    def select(self, **where: Any) -> LabelledTensor:
        """The places at which some axes have a given coordinate; these axes go."""
        self._check(tuple(where))
        values, left = self.values, list(self.axes)
        for axis, wanted in where.items():
            if wanted not in self.coords[axis]:
                raise InputError(
                    f"{axis} {wanted!r} is not there: it has {', '.join(map(str, self.coords[axis][:12]))}"
                )
            values = values.select(left.index(axis), self.coords[axis].index(wanted))
            left.remove(axis)
        coords, at = {axis: self.coords[axis] for axis in left}, {**self.at, **where}
        return replace(self, values=values, axes=tuple(left), coords=coords, at=at)

    def squeeze(self) -> LabelledTensor:
        """Without the axes that have one place alone."""
        alone = {axis: self.coords[axis][0] for axis in self.axes if len(self.coords[axis]) == 1}
        return self.select(**alone)

    def to_frame(self) -> pd.DataFrame:
        """A table of two axes: the first downwards.

        Raises:
            InputError: there are more or fewer.
        """
        if len(self.axes) != 2:
            raise InputError(f"a table has two axes, and these are {', '.join(self.axes)}: select or take the mean")
        index, columns = (pd.Index(self.coords[axis], name=axis, dtype=object) for axis in self.axes)
        return pd.DataFrame(self.values.numpy(), index=index, columns=columns)

    def _check(self, axes: tuple[str, ...]) -> None:
        for axis in axes:
            if axis not in self.axes:
                raise InputError(f"there is no axis {axis!r}: the axes are {', '.join(self.axes)}")
