"""Screened sweeps: every cell is estimated; the strongest, and a random sample of all, are then run exactly.

The sweep's own table holds the estimates. What was run exactly is a table of its own beside it, with both numbers in
each row. How far estimates can be trusted is judged by the random sample alone, never by the strongest
(:meth:`sinklens.SweepResult.judged`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int

from sinklens.attribution.screening import KINDS, Chosen, choose
from sinklens.engine.run import Progress
from sinklens.errors import InputError
from sinklens.models.view import Model
from sinklens.sweeps.grid import Cells, Grid, Task
from sinklens.sweeps.plan import Plan
from sinklens.sweeps.worker import Worker

if TYPE_CHECKING:
    from sinklens.sweeps.result import SweepResult

VERIFIED = ("patch", "kind", "sampled", "estimate")
"""Columns of the verified rows besides those of the sweep: the patch's number in the grid; ``top`` or ``sample``;
whether it was drawn (those of the top can be, too); the estimated effect. ``effect`` is the exact one."""


def verify(
    model: Model,
    plan: Plan,
    result: SweepResult,
    *,
    memory_budget: int | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> pa.Table:
    """Exact rows of the cells with the largest mean estimated effects on the first readout, and of a random sample.

    Raises:
        InputError: no cell has an estimated effect.
    """
    means, choices = mean_estimates(plan, result), plan.choices
    if not np.isfinite(means).any():
        raise InputError("no cell has an effect to screen by: the pair moves the first readout too little")
    sizes = torch.from_numpy(np.nan_to_num(means))[:, None]
    chosen = choose(sizes, choices.top, choices.sample, choices.seed)
    patches = chosen.verified.numpy()
    exact = replace(plan, choices=replace(choices, method="exact"))
    worker = Worker(model, exact, memory_budget=memory_budget, max_rows=max_rows)
    cells = cells_of(plan.grid, patches)
    parts, done, total = [], 0, len(patches) * plan.batch.n
    for group in range(plan.tasks.n_groups):
        task = plan.tasks[group * plan.tasks.per_group]
        rows = worker.run_cells(task, cells)
        parts.append(_beside(rows, estimates_of(plan, result, task, patches), chosen))
        done += len(patches) * (task.last_prompt - task.first_prompt)
        if progress is not None:
            progress(done, total)
    return pa.concat_tables(parts)


def cells_of(grid: Grid, patches: Sequence[int] | Int[np.ndarray, " patch"]) -> Cells:
    """Where some patches lie in the grid."""
    each = [grid.cells(int(patch), int(patch) + 1) for patch in patches]
    return Cells(*(np.concatenate([getattr(cell, field.name) for cell in each]) for field in fields(Cells)))


def mean_estimates(plan: Plan, result: SweepResult) -> Float[np.ndarray, " patch"]:
    """Every patch's estimated effect on the first readout, mean over the prompts that have one; NaN without any."""
    total, count = np.zeros(plan.grid.n_patches), np.zeros(plan.grid.n_patches)
    for index in range(len(plan.tasks)):
        task = plan.tasks[index]
        effects = _task_effects(plan, result, task)[:, 0]
        total[task.start : task.stop] += np.nansum(effects, -1)
        count[task.start : task.stop] += np.isfinite(effects).sum(-1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def estimates_of(
    plan: Plan, result: SweepResult, group: Task, patches: Int[np.ndarray, " patch"]
) -> Float[np.ndarray, "patch readout prompt"]:
    """Estimated effects of some patches, in ascending order, on a task's group of prompts."""
    parts = []
    for part in range(plan.tasks.per_group):
        task = plan.tasks[group.index + part]
        mine = patches[(patches >= task.start) & (patches < task.stop)]
        if len(mine):
            parts.append(_task_effects(plan, result, task)[mine - task.start])
    return np.concatenate(parts)


def _task_effects(plan: Plan, result: SweepResult, task: Task) -> Float[np.ndarray, "patch readout prompt"]:
    column = result.shards.read([plan.task_id(task.index)], ["effect"])["effect"]
    return column.to_numpy().reshape(
        task.stop - task.start, len(plan.choices.readouts), task.last_prompt - task.first_prompt
    )


def _beside(rows: pa.Table, estimates: Float[np.ndarray, "patch readout prompt"], chosen: Chosen) -> pa.Table:
    """The exact rows, with what was estimated and why the patch was run."""
    patches = chosen.verified
    each = len(rows) // len(patches)
    columns = (
        pa.array(np.repeat(patches.numpy(), each), pa.int64()),
        pa.array(np.repeat(np.asarray(KINDS)[chosen.kinds(patches)], each)),
        pa.array(np.repeat(chosen.sampled(patches), each)),
        pa.array(estimates.reshape(-1)),
    )
    for name, column in zip(VERIFIED, columns, strict=True):
        rows = rows.append_column(name, column)
    return rows
