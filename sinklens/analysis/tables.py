"""Tidy tables, one observation a row: of a tensor, of what patches do, and the summary of one that a figure shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sinklens.engine.run import PatchResult
from sinklens.pairs.effects import MIN_GAP, effect
from sinklens.patches import Patch
from sinklens.readouts.build import attention_received
from sinklens.stages.base import Setting


def tidy(values: Tensor, axes: Mapping[str, Sequence[Any]], **columns: Any) -> pd.DataFrame:
    """A tidy table of a tensor: one entry a row, its number under ``value``; an entry that is NaN has no row.

    Args:
        values: the tensor.
        axes: for every axis in order its name, which becomes a column, and its labels.
        columns: further columns, the same in every row.
    """
    places = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
    table = pd.DataFrame({"value": values.detach().cpu().double().flatten().numpy()}, index=places)
    return table.dropna().reset_index().assign(**columns)


def patch_table(
    result: PatchResult, patches: Sequence[Mapping[str, Any]], runs: Mapping[str, Mapping[str, Any]]
) -> pd.DataFrame:
    """A tidy table of what patches do: a row for each prompt of each run and each patch, a column for each readout.

    Args:
        result: what :meth:`sinklens.Study.run` gave.
        patches: for every patch in order, further columns: which one it is.
        runs: the same for those runs that are to be in the table.
    """
    entries = [(columns, result.runs[run]) for run, columns in runs.items()]
    for i, columns in enumerate(patches):
        entries.append((columns, {name: values[i] for name, values in result.values.items()}))
    tables = []
    for columns, readings in entries:
        numbers = {name: values.numpy() for name, values in readings.items()}
        n = len(next(iter(numbers.values())))
        tables.append(pd.DataFrame({"prompt": range(n), **columns, **numbers}))
    return pd.concat(tables, ignore_index=True)


def effect_table(setting: Setting, patches: Sequence[Patch], labels: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A :func:`patch_table` of patches in the run without the sink, with what each does of the sink as ``effect``.

    Args:
        setting: the pair, and the blocks in which attention to the target is read.
        patches: the patches, of the direction ``denoise``.
        labels: for every patch in order, further columns.

    Returns:
        ``prompt``, the labels, ``attention`` (received by the target) and ``effect``: 0 is no sink and 1 that of the
        run with it; NaN in prompts in which the runs differ by less than :data:`MIN_GAP`.
    """
    pair = setting.pair
    metric = attention_received("attention", setting.readout_layers, pair.target, setting.batch.n)
    result = setting.study.run(patches, [metric], pair.runs)
    table = patch_table(result, labels, {})
    start, end = (
        result.runs[source.run]["attention"].numpy()[table.prompt] for source in (pair.without, pair.with_sink)
    )
    return table.assign(effect=effect(table.attention.to_numpy(), start, end, MIN_GAP))


def base_reading(result: PatchResult, table: pd.DataFrame, readout: str) -> Float[np.ndarray, " row"]:
    """For every row of a :func:`patch_table`, what its prompt's ``readout`` is in the run ``base``."""
    return result.runs["base"][readout].numpy()[table.prompt]


def mean_and_range(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """``value`` by the columns ``by``: its ``mean``, and ``low`` and ``high``, between which 95% of the rows lie."""
    values = table.groupby(list(by), sort=False)["value"]
    ends = {"mean": values.mean(), "low": values.quantile(0.025), "high": values.quantile(0.975)}
    return pd.DataFrame(ends).reset_index()
