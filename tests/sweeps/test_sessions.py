"""Sweeps in a session: stopped by Ctrl-C at any task, in notebooks that go on, many of them one after the other."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import sinklens as sl
from sinklens.edits import Function
from sinklens.models.families import random_model
from sinklens.models.load import load_model
from sinklens.sweeps import Interrupted, SweepResult, Worker
from tests.helpers.sweeps import FORMATION, TARGET, run, tiny_batch

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"stages": "z", "layers": "0-1", "positions": "4"}


def pressing_at(row: int) -> Callable[[int, int], None]:
    """A ``progress`` that presses Ctrl-C when so many rows are done, once."""
    pressed: list[int] = []

    def press(done: int, _total: int) -> None:
        if not pressed and done >= row:
            pressed.append(done)
            signal.raise_signal(signal.SIGINT)

    return press


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("row", [1, 20, 48])
def test_ctrl_c_in_any_task_stops_what_comes_after(tiny_llama: Any, tmp_path: Path, out: bool, row: int) -> None:
    """In the last task too; what is finished is on the exception."""
    folder = tmp_path if out else None
    whole = run(tiny_llama, **SMALL)
    with pytest.raises(Interrupted) as caught:
        run(tiny_llama, folder, progress=pressing_at(row), **SMALL)
    result = caught.value.result
    assert isinstance(result, SweepResult) and caught.value.table is not None
    left = len(result.missing)
    assert f"{left} {'is' if left == 1 else 'are'} left" in str(caught.value) and (left == 0) == (row == 48)
    assert ("exception's result" in str(caught.value)) == (not out)
    tasks = caught.value.table.task.astype(str).unique().tolist()
    mine = pd.DataFrame(whole.table[whole.table.task.astype(str).isin(tasks)]).reset_index(drop=True)
    pd.testing.assert_frame_equal(caught.value.table, mine, check_categorical=False)
    assert len(result.summary()) > 0 and caught.value.__context__ is None
    if out:
        pd.testing.assert_frame_equal(run(tiny_llama, folder, **SMALL).table, whole.table)


def test_one_task_alone(tiny_llama: Any) -> None:
    with pytest.raises(KeyboardInterrupt, match="interrupted: 1 task finished now, 0 are left"):
        run(tiny_llama, progress=pressing_at(1), **{**SMALL, "task_size": None, "group_size": 3})


def test_while_the_exact_rows_of_a_screened_sweep_are_run(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    options: dict[str, Any] = {**SMALL, "method": "screen", "top": 3, "sample": 3}
    monkeypatch.setattr("sinklens.sweeps.run.verify", press)
    with pytest.raises(Interrupted, match="all estimates are there, and no exact rows") as caught:
        run(tiny_llama, **options)
    assert caught.value.result is not None and caught.value.result.missing == []
    assert caught.value.result.verified is None


def test_a_handler_that_python_does_not_know(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs that embed Python hear signals themselves: ``signal.signal`` gives None for these."""
    usual = signal.signal
    calls: list[Any] = []

    def of_another_program(number: int, handler: Any) -> Any:
        calls.append(handler)
        found = usual(number, handler)
        return None if len(calls) == 1 else found

    monkeypatch.setattr(signal, "signal", of_another_program)
    assert len(run(tiny_llama, **SMALL)) > 0
    assert calls[-1] is signal.default_int_handler


def mix(x: Any, source: Any, a: float) -> Any:
    return (1 - a) * x + a * source


def test_partials_and_lambdas_are_taken_up(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew, as by a cell that is run again."""

    def options() -> dict[str, Any]:
        return {
            **SMALL,
            "edits": (
                Function("mixed", partial(mix, a=0.5)),
                Function("half", lambda x, source: (x + source) / 2),
            ),
            "readouts": partial(lambda logits, _rows, at: logits[:, -1, at], at=3),
        }

    first = run(tiny_llama, tmp_path, **options())
    keep_alive = [object() for _ in range(9)]
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("a finished task was run again"))
    assert run(tiny_llama, tmp_path, **options()).table.equals(first.table) and keep_alive


def tensors() -> int:
    """Bytes of all tensors that are alive; those of a compiler, which other tests may have left, hold none."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not (issubclass(type(thing), FakeTensor) or thing.is_sparse):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("method", ["exact", "attribution"])
def test_memory_is_flat_over_many_sweeps(backend: Any, method: str) -> None:
    """And after ``del model`` it is what it was, whatever became of the sweeps, and with their results kept."""
    start = tensors()
    model = load_model(random_model("llama"), device="cpu", backend=backend)
    batch, level, kept = tiny_batch(model), [], []
    options: dict[str, Any] = {"target": TARGET, "formation": FORMATION, "min_gap": 0.0, "layers": "1", "max_rows": 4}
    options["positions"] = "4-5"
    for _ in range(4):
        kept.append(sl.sweep(model, batch, stages="z", method=method, **options))
        with pytest.raises(KeyboardInterrupt):
            sl.sweep(model, batch, stages="z", method=method, **options, progress=pressing_at(1))
        with pytest.raises(sl.InputError):
            sl.sweep(model, batch, stages="nowhere", **options)
        level.append(tensors())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert level[1] == level[3]
    assert tensors() - start < 10_000 and len(kept) == 4
