"""A worker: the model and a plan. It runs any task of the plan and gives the task's rows.

What a group of prompts needs (its runs' activations, readouts, edits) is built when the first of its tasks comes, and
kept until a task of another group does: give a worker the tasks of one group together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sinklens.attribution import AttributionRunner
from sinklens.edits import Edit
from sinklens.engine.clean import clean_log_probabilities
from sinklens.engine.memory import row_budget
from sinklens.engine.run import PatchResult, PatchRunner, Progress, run_patches
from sinklens.models.identities import is_unnormalised
from sinklens.models.view import Model, model_shape
from sinklens.pairs import Direction, SinkPair, make_pair, pair_for_prompts
from sinklens.pairs.ablations import EditContext, EditLike, make_edit, told_direction
from sinklens.pairs.subset import edit_for_prompts
from sinklens.patches import Patch, Positions
from sinklens.readouts.named import Context, baseline, build, readout_name
from sinklens.sweeps.grid import Cells, StageAxis, Task
from sinklens.sweeps.plan import Plan
from sinklens.sweeps.rows import Numbers, tabulate


@dataclass(frozen=True, eq=False)
class Group:
    """What is kept for a group of prompts."""

    first: int
    """Its first prompt."""
    pair: SinkPair
    """The runs, on these prompts."""
    ordinary: Mapping[str, np.ndarray]
    """For the natural sink, readouts at ordinary positions of every prompt, by the name of the readout."""
    runner: PatchRunner | AttributionRunner
    """Runs patches on these prompts, or estimates them."""


class Worker:
    """Runs tasks of a plan on a model.

    Args:
        model: the model that the plan was made for.
        plan: the plan.
        memory_budget: bytes that the activations of one forward pass may take.
        max_rows: rows per forward pass, in place of the memory budget.
    """

    def __init__(
        self, model: Model, plan: Plan, *, memory_budget: int | None = None, max_rows: int | None = None
    ) -> None:
        self.model, self.plan = model, plan
        self._limits: dict[str, Any] = {"memory_budget": memory_budget, "max_rows": max_rows}
        self._group: Group | None = None
        self._edits: dict[tuple[str, int, int, Direction | None], Edit] = {}

    @property
    def _method(self) -> str:
        return "exact" if self.plan.choices.method == "exact" else "attribution"

    @cached_property
    def _rows(self) -> int:
        budget = row_budget(self.model, self.plan.batch.length, self._limits["memory_budget"])
        return self._limits["max_rows"] or budget

    @cached_property
    def _pair(self) -> SinkPair:
        if self.plan.pair is not None:
            return self.plan.pair
        plan, choices = self.plan, self.plan.choices
        return make_pair(
            choices.pair_choice,
            self.model,
            plan.batch,
            plan.found.formation,
            seed=choices.seed,
            max_rows=self._rows,
        )

    def run(self, index: int, progress: Progress | None = None) -> pa.Table:
        """The rows of task ``index``: patches in the grid's order, and for each its readouts and prompts.

        Raises:
            EngineError: as :func:`sinklens.run_patches` does.
        """
        task = self.plan.tasks[index]
        return self.run_cells(task, self.plan.grid.cells(task.start, task.stop), progress)

    def run_cells(self, task: Task, cells: Cells, progress: Progress | None = None) -> pa.Table:
        """The rows of any cells, on the prompts of ``task``."""
        group = self._prepare(task)
        result = group.runner.run(self.patches(cells, group), progress)
        numbers = Numbers(
            np.stack([result.values[name].numpy() for name in self._names], 1), *self._run_values(group, result)
        )
        target = None if self.plan.grid.positions is not None else group.pair.target
        return tabulate(self.plan, task, cells, numbers, target, self._method)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(readout_name(readout) for readout in self.plan.choices.readouts)

    def _run_values(self, group: Group, result: PatchResult) -> tuple[np.ndarray, np.ndarray]:
        """``[readout, prompt]`` in the runs without and with the sink; NaN where the natural sink has none without."""
        pair = group.pair
        anchored = np.stack([result.runs[pair.with_sink.run][name].numpy() for name in self._names])
        if not pair.is_natural:
            return np.stack([result.runs[pair.without.run][name].numpy() for name in self._names]), anchored
        missing = np.full(anchored.shape[1], np.nan)
        return np.stack([group.ordinary.get(name, missing) for name in self._names]), anchored

    def _prepare(self, task: Task) -> Group:
        if self._group is None or self._group.first != task.first_prompt:
            self._group = None  # what it holds must go before the next one's is captured
            self._group = self._build_group(task)
        return self._group

    def _build_group(self, task: Task) -> Group:
        pair = pair_for_prompts(self._pair, task.first_prompt, task.last_prompt)
        context = self._context(pair, task)
        plan = self.plan
        readouts = [build(readout, context) for readout in plan.choices.readouts]
        if self._method == "exact":
            runner = PatchRunner(
                self.model, context.tokens, readouts, runs=pair.runs, **self._limits, allow_nonfinite=True
            )
        else:
            runner = AttributionRunner(self.model, context.tokens, readouts, runs=pair.runs, **self._limits)
        return Group(task.first_prompt, pair, self._ordinary(pair, context), runner)

    def _ordinary(self, pair: SinkPair, context: Context) -> dict[str, np.ndarray]:
        if not pair.is_natural:
            return {}
        found = {readout_name(readout): baseline(readout, context) for readout in self.plan.choices.readouts}
        some = [readout for readout in found.values() if readout is not None]
        if not some:
            return {}
        result = run_patches(self.model, context.tokens, [], some, runs=pair.runs, **self._limits)
        runs = result.runs[pair.with_sink.run]
        return {name: runs[readout.name].numpy() for name, readout in found.items() if readout is not None}

    def _context(self, pair: SinkPair, task: Task) -> Context:
        plan, chosen = self.plan, slice(task.first_prompt, task.last_prompt)
        answers = plan.found.answers
        return Context(
            tokens=plan.batch.tokens[chosen],
            target=pair.target,
            ordinary=pair.ordinary,
            layers=plan.found.readout_layers,
            n_layers=model_shape(self.model).n_layers,
            answers=None if answers is None else (torch.tensor(answers[0][chosen]), torch.tensor(answers[1][chosen])),
            eps=plan.choices.eps,
            offset=task.first_prompt,
            shares=is_unnormalised(self.model),
            clean=partial(clean_log_probabilities, self.model, plan.batch.tokens[chosen]),
        )

    def patches(self, cells: Cells, group: Group) -> list[Patch]:
        """The patches of some cells. Nothing is checked or formatted here: this is the hot path."""
        grid, pair = self.plan.grid, group.pair
        sites = [axis.site for axis in grid.stages]
        windows, units = self._windows, self._units
        places = [pair.target] if grid.positions is None else [Positions.of((p,)) for p in grid.positions]
        directions: list[Direction] = [_direction(name) for name in grid.directions]
        told = [[told_direction(edit, direction) for edit in self.plan.choices.edits] for direction in directions]
        present = {*zip(cells.stage.tolist(), cells.direction.tolist(), cells.edit.tolist(), strict=True)}
        edits = {key: self._edit(*key, group.first) for key in {(s, e, told[d][e]) for s, d, e in present}}
        ends = [pair.ends(direction) for direction in directions]
        held = [self._companions(direction, group) for direction in directions]
        columns = (cells.stage, cells.direction, cells.edit, cells.layer, cells.position, cells.unit)
        built = []
        for s, d, e, layer, p, u in zip(*(column.tolist() for column in columns), strict=True):
            edit, (run, source) = edits[s, e, told[d][e]], ends[d]
            built.append(
                Patch(
                    site=sites[s],
                    layers=windows[s][layer],
                    positions=places[p],
                    edit=edit,
                    units=units[s][u],
                    run=run,
                    source=source if edit.uses_source else None,
                    # Before the pair's runs part, a transplant puts back what is there: an effect of 0, and no mistake.
                    allow_unchanged=True,
                    also=held[d],
                )
            )
        return built

    def _companions(self, direction: Direction, group: Group) -> tuple[Patch, ...]:
        """What is held fixed in every row of a direction."""
        run, source = group.pair.ends(direction)
        held = []
        for number, axis in enumerate(self.plan.companions):
            wanted = self.plan.choices.companions[number].edit
            told = told_direction(wanted, direction)
            edit = self._kept(("companion", number, 0), wanted, axis, axis.layers, told)
            held.append(
                Patch(
                    site=axis.site,
                    layers=axis.layers,
                    positions=group.pair.target,
                    edit=edit_for_prompts(edit, group.first),
                    units=axis.together,
                    run=run,
                    source=source if edit.uses_source else None,
                    allow_unchanged=True,
                )
            )
        return tuple(held)

    @cached_property
    def _windows(self) -> list[list[tuple[int, ...]]]:
        window = self.plan.grid.window
        return [[tuple(range(first, first + window)) for first in axis.layers] for axis in self.plan.grid.stages]

    @cached_property
    def _units(self) -> list[list[tuple[int, ...] | None]]:
        axes = self.plan.grid.stages
        return [[axis.together] if axis.units is None else [(unit,) for unit in axis.units] for axis in axes]

    def _edit(self, stage: int, number: int, direction: Direction | None, first: int) -> Edit:
        axis, window = self.plan.grid.stages[stage], self.plan.grid.window
        layers = tuple(sorted({start + step for start in axis.layers for step in range(window)}))
        wanted = self.plan.choices.edits[number]
        return edit_for_prompts(self._kept(("swept", stage, number), wanted, axis, layers, direction), first)

    def _kept(
        self,
        which: tuple[str, int, int],
        wanted: EditLike,
        axis: StageAxis,
        layers: tuple[int, ...],
        direction: Direction | None,
    ) -> Edit:
        """One object for all patches of a kind, which the engine then runs as one kernel."""
        key = (*which, direction)
        if key not in self._edits:
            self._edits[key] = make_edit(wanted, self._edit_context(axis, layers, direction))
        return self._edits[key]

    def _edit_context(self, axis: StageAxis, layers: tuple[int, ...], direction: Direction | None) -> EditContext:
        return EditContext(
            model=self.model,
            batch=self.plan.batch,
            pair=self._pair,
            site=axis.site,
            layers=layers,
            seed=self.plan.choices.seed,
            max_rows=self._rows,
            direction=direction,
        )


def _direction(name: str) -> Direction:
    return "denoise" if name == "denoise" else "noise"
