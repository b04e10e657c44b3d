"""The arithmetic of grids and ranges: against plain loops, and at a size that no list could have."""

from __future__ import annotations

import resource
import time
import tracemalloc
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sinklens as sl
from sinklens.sites import MLP_POST, RESID_PRE, Z
from sinklens.sweeps import Grid, Plan, StageAxis, Tasks
from sinklens.sweeps.run import ENGINES
from sinklens.sweeps.worker import Worker
from tests.helpers.sweeps import FORMATION, tiny_batch

ranges = st.sets(st.integers(0, 40), min_size=1, max_size=5).map(lambda found: tuple(sorted(found)))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    stages = [
        StageAxis(name, site, name, draw(ranges), draw(st.none() | ranges))
        for name, site in (("z", Z), ("resid_pre", RESID_PRE), ("mlp_post", MLP_POST))[: draw(st.integers(1, 3))]
    ]
    directions = draw(st.sampled_from([("noise",), ("denoise", "noise")]))
    return Grid(tuple(stages), directions, draw(st.sampled_from([("zero",), ("transplant", "zero")])), draw(ranges))


def by_loops(grid: Grid) -> list[tuple]:
    """Stage, direction, edit, layer, position, unit of every patch, as nested loops give them."""
    found = []
    for s, stage in enumerate(grid.stages):
        assert grid.positions is not None
        names = (range(len(grid.directions)), range(len(grid.edits)))
        found += [(s, *place) for place in product(*names, stage.layers, grid.positions, stage.units or (-1,))]
    return found


@pytest.mark.slow
@settings(deadline=None, max_examples=40, derandomize=True)
@given(grid=grids(), data=st.data())
def test_patches_are_numbered_as_nested_loops_do(grid: Grid, data: st.DataObject) -> None:
    expected = by_loops(grid)
    assert grid.n_patches == len(expected)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    cells = grid.cells(start, stop)
    found = []
    for i in range(len(cells)):
        stage = grid.stages[cells.stage[i]]
        unit = -1 if stage.units is None else stage.units[cells.unit[i]]
        assert grid.positions is not None
        place = (stage.layers[cells.layer[i]], grid.positions[cells.position[i]], unit)
        found.append((cells.stage[i], cells.direction[i], cells.edit[i], *place))
    assert found == expected[start:stop]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70))
def test_tasks_cover_every_patch_on_every_prompt_once(patches: int, prompts: int, group: int, size: int) -> None:
    tasks = Tasks(patches, prompts, group, size)
    seen = np.zeros((patches, prompts), dtype=int)
    for index in range(len(tasks)):
        task = tasks[index]
        assert task.index == index and task.n_rows > 0
        assert task.stop - task.start <= size and task.last_prompt - task.first_prompt <= group
        seen[task.start : task.stop, task.first_prompt : task.last_prompt] += 1
    assert (seen == 1).all()
    with pytest.raises(IndexError):
        tasks[len(tasks)]


def test_names_of_tasks_depend_on_what_is_computed() -> None:
    tasks = Tasks(100, 8, 4, 30)
    names = [tasks.id(index, "a") for index in range(len(tasks))]
    assert len(set(names)) == len(names) == 8
    assert names == sorted(names) == [Tasks(100, 8, 4, 30).id(index, "a") for index in range(8)]
    assert not set(names) & {tasks.id(index, "b") for index in range(8)}
    assert not set(names) & {Tasks(100, 8, 4, 31).id(index, "a") for index in range(8)}


# -- Ten million cells ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_million_cells_begin_at_once_in_little_memory(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    batch, on_two = tiny_batch(tiny_llama, n=2, length=16), replace(FORMATION, sink_positions=(0, 2))
    ran: list[tuple[int, float]] = []

    class Stop(Exception):
        pass

    def engine(_model: Any, plan: Plan, _sink: Any, pending: Any, **_: Any) -> None:
        assert plan.tasks.n_patches * plan.tasks.n_prompts > 10_000_000
        worker = Worker(tiny_llama, plan)
        for index in (0, len(pending) // 2, len(pending) - 1):
            task = plan.tasks[index]
            cells = plan.grid.cells(task.start, task.stop)
            group = worker._prepare(task)
            ran.append((len(worker.patches(cells, group)), time.perf_counter() - began))
        raise Stop

    monkeypatch.setitem(ENGINES, "mock", engine)
    many = Grid(
        (StageAxis("mlp_post", MLP_POST, "mlp_post", (1, 2), tuple(range(64)) * 3000),),
        ("denoise", "noise"),
        ("zero",),
        tuple(range(16)),
    )
    monkeypatch.setattr("sinklens.sweeps.planning.make_grid", lambda *_: many)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(Stop):
        sl.sweep(
            tiny_llama,
            batch,
            stages="mlp_post",
            units="neurons",
            positions="all",
            target=4,
            formation=on_two,
            engine="mock",
            out=tmp_path / "big",
            task_size=1024,
        )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [n for n, _ in ran] == [1024, 1024, 1024]
    assert ran[0][1] < 20 and peak < 64 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 300 << 10  # KiB
