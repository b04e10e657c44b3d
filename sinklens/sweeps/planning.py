"""From choices to a plan: what has to be found in the model is found, and the pair and the grid are made, once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from sinklens.engine.run import run_patches
from sinklens.errors import InputError
from sinklens.formation import Formation, find_formation, formation_from_json
from sinklens.formation.result import READOUT_BLOCKS
from sinklens.models.view import Model, ModelShape, model_shape
from sinklens.pairs import make_pair
from sinklens.prompts import PromptBatch
from sinklens.readouts.base import Readout
from sinklens.readouts.named import needs_answers
from sinklens.records.ranges import Numbers
from sinklens.sites import LOGITS
from sinklens.stages.base import Setting
from sinklens.study import Study
from sinklens.sweeps.axes import make_grid
from sinklens.sweeps.choices import Choices, resolve
from sinklens.sweeps.companions import companion_axis
from sinklens.sweeps.execution import Execution
from sinklens.sweeps.grid import Tasks
from sinklens.sweeps.plan import Found, Plan, check_same, identity_of
from sinklens.sweeps.request import Request
from sinklens.sweeps.store import FolderSink, MemorySink

logger = logging.getLogger(__name__)


class Planner:
    """Makes the plan of a sweep, new or of one that a folder holds.

    Args:
        model: the model.
        batch: the prompts.
        request: what is swept.
        execution: how.
    """

    def __init__(self, model: Model, batch: PromptBatch, request: Request, execution: Execution) -> None:
        self.model, self.batch, self.request, self.execution = model, batch, request, execution
        self.choices = resolve(request, model, batch)

    def begin(self, sink: MemorySink | FolderSink) -> tuple[Plan, dict[str, Any]]:
        """The plan, and the record in the sink: the one that is there, if it is of the same sweep; else a new one.

        Raises:
            InputError: the choices do not fit the model, or the sink holds another sweep.
        """
        there = None if self.execution.force else sink.record()
        if there is not None:
            _compare_versions(there["provenance"]["versions"], self.choices.origin["versions"])
            return self._resumed(there, sink), there
        plan = self._plan(self.choices, self._find())
        if self.execution.force and isinstance(sink, FolderSink):
            sink.clear()  # not before it is known that the new sweep can be
        there = sink.create(plan.record())
        if there["identity"] != plan.identity:  # another process was first, and asked for or found something else
            plan = self._resumed(there, sink)
        return plan, there

    def _resumed(self, there: Mapping[str, Any], sink: MemorySink | FolderSink) -> Plan:
        # How the grid is cut is taken from the folder where the caller does not say.
        sizes = [name for name in ("task_size", "group_size") if getattr(self.request, name) is None]
        choices = replace(self.choices, **{name: there["tasks"][name] for name in sizes})
        check_same(there["choices"], choices.as_json, getattr(sink, "folder", "memory"))
        plan = self._plan(choices, _found_in(there))
        if plan.identity != there["identity"]:
            raise InputError(
                f"{getattr(sink, 'folder', 'memory')} holds another sweep (its places are others, or another sinklens "
                "made it): choose another folder, or replace it with force=True"
            )
        return plan

    def _plan(self, choices: Choices, found: Found) -> Plan:
        model, batch, rows = self.model, self.batch, self.execution.rows(self.model, self.batch.length)
        pair = make_pair(choices.pair_choice, model, batch, found.formation, seed=choices.seed, max_rows=rows)
        study = Study.of(model, batch, found.formation, rows=rows, seed=choices.seed)
        setting = Setting(study, pair, found.readout_layers)
        grid = make_grid(choices, setting)
        return Plan(
            choices=choices,
            found=found,
            grid=grid,
            companions=tuple(companion_axis(companion, setting) for companion in choices.companions),
            tasks=Tasks(grid.n_patches, batch.n, choices.group_size, choices.task_size),
            batch=batch,
            identity=identity_of(choices, found, grid),
            pair=pair,
            model_spec=self.execution.model_spec,
        )

    def _find(self) -> Found:
        """What is not chosen and has to be found.

        Raises:
            InputError: a formation that was found on other prompts.
            NoSinkError: there is no sink.
        """
        choices, batch, budget = self.choices, self.batch, self.execution.memory_budget
        formation = choices.formation or find_formation(self.model, batch, memory_budget=budget)
        formation.check_prompts(batch.n, batch.length)
        answers = choices.answers
        if answers is None and any(needs_answers(readout) for readout in choices.readouts):
            answers = top_two(self.model, batch, budget)
        return Found(formation, layers_read(choices.readout_layers, model_shape(self.model), formation), answers)


def _found_in(record: Mapping[str, Any]) -> Found:
    answers = record["answers"]
    return Found(
        formation=formation_from_json(record["formation"]),
        readout_layers=tuple(record["readout_layers"]),
        answers=None if answers is None else (tuple(answers[0]), tuple(answers[1])),
    )


def _compare_versions(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Say so when other versions of the packages go on with a sweep: its numbers may differ in the last digits."""
    differ = [f"{name} {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]]
    if differ:
        logger.warning("this sweep was begun with other versions: %s", "; ".join(differ))


def layers_read(chosen: Numbers, shape: ModelShape, formation: Formation) -> tuple[int, ...]:
    """Blocks that the readouts read.

    Raises:
        NotApplicableError: the sink forms in the last block, and no other blocks were given.
    """
    if not isinstance(chosen, str):
        return chosen
    if chosen == "last":
        return tuple(range(max(0, shape.n_layers - READOUT_BLOCKS), shape.n_layers))
    return formation.after(shape.n_layers, READOUT_BLOCKS)


def top_two(model: Model, batch: PromptBatch, memory_budget: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The clean model's two most probable next tokens after every prompt: the answer and the alternative."""
    n_layers = model_shape(model).n_layers

    def rank(place: Literal[0, 1]) -> Readout:
        return Readout(
            f"top{place}",
            LOGITS,
            (n_layers,),
            lambda x, _: x[:, -1].float().topk(2, -1).indices[:, place],
            lambda stack: stack[0].double(),
        )

    found = run_patches(model, batch, [], [rank(0), rank(1)], memory_budget=memory_budget)
    first, second = (found.runs["base"][f"top{place}"] for place in (0, 1))
    return tuple(int(token) for token in first), tuple(int(token) for token in second)
