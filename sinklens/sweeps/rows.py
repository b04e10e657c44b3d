"""The numbers of a task as rows of the table: which cell each belongs to, and the effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from sinklens.pairs.effects import effect, gaps
from sinklens.patches import Positions
from sinklens.readouts.named import is_share, readout_name
from sinklens.sweeps.grid import Cells, Task
from sinklens.sweeps.plan import Plan
from sinklens.sweeps.schema import SCHEMA, text_column


@dataclass(frozen=True, eq=False)
class Numbers:
    """What was measured in a task."""

    value: Float[np.ndarray, "patch readout prompt"]
    """Readouts of the patched runs."""
    base: Float[np.ndarray, "readout prompt"]
    """Readouts of the run without the sink."""
    anchored: Float[np.ndarray, "readout prompt"]
    """Readouts of the run with the sink."""


def tabulate(plan: Plan, task: Task, cells: Cells, numbers: Numbers, target: Positions | None, method: str) -> pa.Table:
    """Rows in the order patch, readout, prompt.

    Args:
        plan: the plan.
        task: which prompts these are, and the task's name.
        cells: where the patches lie in the grid.
        numbers: what was measured.
        target: the sink's position in every prompt, where that is what was patched.
        method: how it was measured.
    """
    grid, value = plan.grid, numbers.value
    n_patches, n_readouts, n_prompts = value.shape
    names = tuple(readout_name(readout) for readout in plan.choices.readouts)
    shares = [is_share(readout) for readout in plan.choices.readouts]
    gap = gaps(shares, numbers.base, numbers.anchored, plan.choices.min_gap)

    def each_patch(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, n_readouts * n_prompts)

    def each_prompt(values: np.ndarray) -> np.ndarray:
        return np.tile(values, n_patches * n_readouts)

    def each_reading(values: np.ndarray) -> np.ndarray:
        return np.tile(values.reshape(-1), n_patches)

    layer = _by_stage(cells, cells.layer, [axis.layers for axis in grid.stages])
    unit = each_patch(_by_stage(cells, cells.unit, [axis.units or (-1,) for axis in grid.stages]))
    if target is None:
        position = each_patch(np.asarray(grid.positions)[cells.position])
    else:
        position = each_prompt(target.single(n_prompts).numpy())
    one = np.zeros(value.size, dtype=np.int32)
    columns = {
        "stage": text_column(each_patch(cells.stage), tuple(axis.name for axis in grid.stages)),
        "site": text_column(each_patch(cells.stage), tuple(axis.site_name for axis in grid.stages)),
        "layer": each_patch(layer),
        "window": each_patch(layer + grid.window - 1),
        "position": position,
        "unit": pa.array(unit, pa.int32(), mask=unit < 0),
        "edit": text_column(each_patch(cells.edit), grid.edits),
        "direction": text_column(each_patch(cells.direction), grid.directions),
        "prompt": each_prompt(np.arange(task.first_prompt, task.last_prompt)),
        "readout": text_column(np.tile(np.repeat(np.arange(n_readouts), n_prompts), n_patches), names),
        "value": value.reshape(-1),
        "base": each_reading(numbers.base),
        "anchored": each_reading(numbers.anchored),
        "effect": effects(numbers, cells.direction, grid.directions, gap).reshape(-1),
        "method": text_column(one, (method,)),
        "task": text_column(one, (plan.task_id(task.index),)),
    }
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, SCHEMA.field(name).type)
        for name, column in columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def effects(
    numbers: Numbers,
    direction: Int[np.ndarray, " patch"],
    names: Sequence[str],
    gap: Float[np.ndarray, "readout prompt"],
) -> Float[np.ndarray, "patch readout prompt"]:
    """How far each patch goes from the run that it is in to the other one."""
    value, base, anchored = numbers.value, numbers.base, numbers.anchored
    kept = np.abs(anchored - base) >= gap
    found = np.full(value.shape, np.nan)
    for number, name in enumerate(names):
        here = direction == number
        start, end = (base, anchored) if name == "denoise" else (anchored, base)
        found[here] = np.where(kept, effect(value[here], start, end, 0.0), np.nan)
    return found


def _by_stage(
    cells: Cells, index: Int[np.ndarray, " patch"], values: Sequence[Sequence[int]]
) -> Int[np.ndarray, " patch"]:
    """The value at ``index`` of each patch's own stage."""
    found = np.empty(len(cells), dtype=np.int64)
    for stage in np.unique(cells.stage):
        here = cells.stage == stage
        found[here] = np.asarray(values[stage])[index[here]]
    return found
