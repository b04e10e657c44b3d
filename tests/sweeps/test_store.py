"""Sweeps on disk: killed, interrupted, shared, joined, refused, and out of room."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sinklens as sl
from sinklens.errors import InputError
from sinklens.sweeps import Interrupted, Plan, SweepResult, Worker, gather, store
from sinklens.sweeps.run import ENGINES
from sinklens.sweeps.store import FolderSink
from tests.helpers.sweeps import FORMATION, N_TASKS, OPTIONS, run, tiny_batch, until, written

pytestmark = pytest.mark.slow

"""Two groups of prompts, 90 patches in tasks of 7."""


@pytest.fixture(scope="module")
def whole(tiny_llama: Any) -> pd.DataFrame:
    """The table of an uninterrupted sweep in memory."""
    return run(tiny_llama).table


@pytest.fixture(scope="module")
def finished(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep's folder; to be copied."""
    folder = tmp_path_factory.mktemp("sweep") / "finished"
    run(tiny_llama, folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A finished sweep, for one test."""
    return Path(shutil.copytree(finished, tmp_path / "folder"))


def same(table: pd.DataFrame, expected: pd.DataFrame) -> bool:
    pd.testing.assert_frame_equal(table, expected, check_exact=True, check_categorical=False)
    return True


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_the_folder_and_memory_hold_the_same(tiny_llama: Any, tmp_path: Path, whole: pd.DataFrame) -> None:
    result = run(tiny_llama, tmp_path / "a" / "b")
    assert len(written(tmp_path / "a" / "b")) == N_TASKS and not leftovers(tmp_path)
    assert same(result.table, whole)
    assert same(SweepResult.load(tmp_path / "a" / "b").table, whole)
    assert result.dataset.count_rows() == len(result) == len(whole)
    assert result.missing == []
    assert whole.duplicated(["stage", "layer", "position", "unit", "edit", "direction", "prompt"]).sum() == 0


def test_nothing_is_done_twice(tiny_llama: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(folder)
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("a finished task was run again"))
    run(tiny_llama, folder)
    assert written(folder) == before


def test_a_plan_can_be_pickled_and_run_by_another_engine(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, whole: pd.DataFrame
) -> None:
    def backwards(model: Any, plan: Plan, sink: Any, pending: list[int], **_: Any) -> None:
        worker = Worker(model, pickle.loads(pickle.dumps(plan)))
        for index in reversed(pending):
            sink.write(plan.task_id(index), worker.run(index))

    monkeypatch.setitem(ENGINES, "backwards", backwards)
    assert same(run(tiny_llama, engine="backwards").table, whole)


def test_of_an_edit_there_is_one_object_for_both_directions(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the engine then runs as one kernel; of one that exchanges there is one for each."""
    objects: dict[str, set[int]] = {}

    def engine(model: Any, plan: Plan, sink: Any, pending: list[int], **_: Any) -> None:
        worker = Worker(model, plan)
        for index in pending:
            task = plan.tasks[index]
            patches = worker.patches(plan.grid.cells(task.start, task.stop), worker._prepare(task))
            if task.first_prompt:  # where edits are told the numbers of their prompts
                for name in ("resample", "mean_exchanged"):
                    objects[name] = {id(patch.edit) for patch in patches if patch.edit.name == name}
            sink.write(plan.task_id(index), worker.run(index))

    monkeypatch.setitem(ENGINES, "looking", engine)
    edits = ["resample", "mean_exchanged"]
    run(tiny_llama, engine="looking", edits=edits, positions="target", stages="z", units=None, task_size=1000)
    assert {name: len(found) for name, found in objects.items()} == {"resample": 1, "mean_exchanged": 2}


# -- Killed -----------------------------------------------------------------------------------------------------------


def slow_write(rows: pa.Table, file: Any, **options: Any) -> None:
    """Half of a shard, a pause, the other half."""
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer, **options)
    data = buffer.getvalue().to_pybytes()
    file.write(data[: len(data) // 2])
    file.flush()
    time.sleep(0.05)
    file.write(data[len(data) // 2 :])


class _Slow:
    """``pyarrow.parquet`` with a slow ``write_table``."""

    write_table = staticmethod(slow_write)


def in_child(work: Callable[[], Any]) -> Any:
    """Start ``work`` in a process of its own that has the model already."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def test_killed_and_taken_up_again(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: pd.DataFrame
) -> None:
    monkeypatch.setattr(store, "pq", _Slow)
    shards = tmp_path / "shards"
    moments: list[Callable[[], bool]] = [
        lambda: (tmp_path / "sweep.json").exists(),  # before the first task is finished
        lambda: len(written(tmp_path)) > 0 and any(leftovers(shards)),  # in the middle of a shard
        lambda: len(written(tmp_path)) >= 5,
        lambda: len(written(tmp_path)) >= 11 and any(leftovers(shards)),
    ]
    finished: dict[str, int] = {}
    for moment in moments:
        child = in_child(lambda: run(tiny_llama, tmp_path))
        until(moment)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        now = written(tmp_path)
        assert finished.items() <= now.items()  # none is touched again
        assert all(pq.read_metadata(shards / name).num_rows for name in now)  # none is half-written
        finished = now
    assert 11 <= len(finished) < N_TASKS
    part = SweepResult.load(tmp_path)
    assert len(part.missing) == N_TASKS - len(finished)
    with pytest.raises(InputError, match=rf"{len(part.missing)} of {N_TASKS} tasks are missing"):
        gather([tmp_path], tmp_path / "joined.parquet")
    result = run(tiny_llama, tmp_path)
    assert finished.items() <= written(tmp_path).items()
    assert same(result.table, whole)
    assert not leftovers(tmp_path)  # what the killed processes had begun is gone


def test_ctrl_c_finishes_the_task(tiny_llama: Any, tmp_path: Path, whole: pd.DataFrame) -> None:
    before = signal.getsignal(signal.SIGINT)
    asked = []

    def progress(done: int, total: int) -> None:
        if not asked and done > total // 3:
            asked.append(len(written(tmp_path)))
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"interrupted: \d+ tasks finished now, \d+ are left; call it again"):
        run(tiny_llama, tmp_path, progress=progress)
    assert signal.getsignal(signal.SIGINT) is before
    assert asked[0] <= len(written(tmp_path)) <= asked[0] + 1
    assert same(run(tiny_llama, tmp_path).table, whole)


def test_a_second_ctrl_c_is_heard_at_once(tiny_llama: Any, tmp_path: Path) -> None:
    def progress(_done: int, _total: int) -> None:
        signal.raise_signal(signal.SIGINT)
        # Python hears signals between two of its own steps, and two that come before the next step as one.
        began = time.monotonic()
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            assert time.monotonic() - began < 60, "the first one was not heard"
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)  # the second one ends this
        pytest.fail("the second one was not heard")

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt) as caught:
        run(tiny_llama, tmp_path, progress=progress)
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_a_thread_ctrl_c_is_left_alone(tiny_llama: Any, whole: pd.DataFrame) -> None:
    found: list[SweepResult] = []
    thread = threading.Thread(target=lambda: found.append(run(tiny_llama)))
    thread.start()
    thread.join()
    assert same(found[0].table, whole)


# -- Shared -----------------------------------------------------------------------------------------------------------


def test_two_shards_in_one_folder(tiny_llama: Any, tmp_path: Path, whole: pd.DataFrame) -> None:
    first = run(tiny_llama, tmp_path / "one", shard=(1, 2))
    assert len(first.missing) == N_TASKS // 2 == len(written(tmp_path / "one"))
    assert same(run(tiny_llama, tmp_path / "one", shard=(2, 2)).table, whole)


def test_two_folders_are_joined(tiny_llama: Any, tmp_path: Path, whole: pd.DataFrame) -> None:
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "x" / "joined.parquet"
    run(tiny_llama, one, shard=(1, 3))
    run(tiny_llama, two, shard=(2, 3))
    with pytest.raises(InputError, match=r"8 of 26 tasks are missing \(numbers 2, 5, 8, 11"):
        gather([one, two], out)
    assert not out.exists()
    run(tiny_llama, two, shard=(3, 3))
    result = gather([one, two], out)
    assert same(result.table, whole) and same(SweepResult.load(out).table, whole)
    assert same(pd.read_parquet(out).astype(whole.dtypes.to_dict()), whole)
    assert len(result.summary()) == len(whole) // 3
    run(tiny_llama, tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="other holds another sweep .seed was 0, now 1"):
        gather([one, two, tmp_path / "other"], out)
    with pytest.raises(InputError, match="holds no sweep.json"):
        gather([tmp_path / "x"], out)


def test_processes_that_do_the_same_do_no_harm(tiny_llama: Any, tmp_path: Path, whole: pd.DataFrame) -> None:
    """Two that run everything, and two that share: all of them at once in one folder that none has made yet."""
    shards = (None, None, (1, 2), (2, 2))
    children = [in_child(lambda shard=shard: run(tiny_llama, tmp_path / "run", shard=shard)) for shard in shards]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert same(SweepResult.load(tmp_path / "run").table, whole) and not leftovers(tmp_path)


def test_many_begin_at_once(tmp_path: Path) -> None:
    """Whoever comes first says what the sweep is; the others see that, whole."""
    record = {"identity": "", "choices": {}, "tasks": {}, "formation": {}, "filler": "x" * 100_000}
    seen: list[str] = []
    barrier = threading.Barrier(8)

    def begin(name: str) -> None:
        barrier.wait()
        seen.append(FolderSink(tmp_path / "run").create({**record, "identity": name})["identity"])

    threads = [threading.Thread(target=begin, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and len(set(seen)) == 1
    assert json.loads((tmp_path / "run" / "sweep.json").read_text())["identity"] == seen[0]
    assert not leftovers(tmp_path)


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    record = {"identity": "1", "choices": {}, "tasks": {}, "formation": {}}
    assert FolderSink(tmp_path).create(record)["identity"] == "1"
    assert FolderSink(tmp_path).create({**record, "identity": "2"})["identity"] == "1"


def test_leftovers_of_living_processes_and_other_machines_stay(tmp_path: Path) -> None:
    import socket

    (tmp_path / "shards").mkdir()
    mine = tmp_path / "shards" / f".{socket.gethostname()}-{os.getppid()}-aa.tmp"
    dead = tmp_path / "shards" / f".{socket.gethostname()}-{2**22 + 5}-bb.tmp"
    elsewhere = tmp_path / "shards" / f".another-machine-{2**22 + 5}-cc.tmp"
    for path in (mine, dead, elsewhere):
        path.touch()
    FolderSink(tmp_path).check_writable()
    assert mine.exists() and elsewhere.exists() and not dead.exists()


# -- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"layers": "0-1"}, r"layers was \[0, 1, 2\], now \[0, 1\]"),
        pytest.param({"seed": 1}, "seed was 0, now 1", marks=pytest.mark.slow),
        pytest.param({"task_size": 8}, "task_size was 7, now 8", marks=pytest.mark.slow),
        ({"readouts": "alpha"}, r'readouts was \["attention_received"\], now \["alpha"\]'),
        ({"formation": replace(FORMATION, sink_positions=(0, 0, 0))}, "formation was"),
    ],
)
def test_another_sweep_is_refused(tiny_llama: Any, folder: Path, changed: dict[str, Any], told: str) -> None:
    before = written(folder)
    with pytest.raises(InputError, match=f"holds another sweep .*{told}.*force=True"):
        run(tiny_llama, folder, **changed)
    assert written(folder) == before
    result = run(tiny_llama, folder, force=True, **changed)
    assert result.missing == [] and not set(before) & set(written(folder))


def test_another_model_and_other_prompts_are_refused(tiny_llama: Any, tiny_gpt2: Any, folder: Path) -> None:
    with pytest.raises(InputError, match="weight_digest was"):
        run(tiny_gpt2, folder)
    batch = tiny_batch(tiny_llama).subset([1, 0, 2])
    with pytest.raises(InputError, match="prompts_digest was"):
        sl.sweep(tiny_llama, batch, out=folder, **OPTIONS)


def test_sizes_that_are_not_given_are_those_of_the_folder(tiny_llama: Any, folder: Path) -> None:
    before = written(folder)
    run(tiny_llama, folder, task_size=None, group_size=None)
    assert written(folder) == before


def test_folders_that_hold_something_else(tiny_llama: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(InputError, match=r"notes holds no sweep\.json"):
            run(tiny_llama, tmp_path / "notes", force=force)
    with pytest.raises(InputError, match=r"thesis\.txt"):
        run(tiny_llama, tmp_path / "notes" / "thesis.txt")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    run(tiny_llama, tmp_path / "run")
    (tmp_path / "run" / "sweep.json").write_text("{")
    with pytest.raises(InputError, match=r"sweep\.json is damaged .*force=True"):
        run(tiny_llama, tmp_path / "run")
    assert run(tiny_llama, tmp_path / "run", force=True).missing == []


def test_force_keeps_what_is_there_until_the_new_sweep_can_be(tiny_llama: Any, folder: Path) -> None:
    before = written(folder)
    for wrong in ({"layers": "0-9"}, {"units": "0-99"}, {"formation": replace(FORMATION, sink_positions=(0,))}):
        with pytest.raises(InputError):
            run(tiny_llama, folder, force=True, **wrong)
    assert written(folder) == before


def test_other_versions_are_told(tiny_llama: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = json.loads((folder / "sweep.json").read_text())
    record["provenance"]["versions"]["torch"] = "1.0"
    (folder / "sweep.json").write_text(json.dumps(record))
    run(tiny_llama, folder)
    assert "begun with other versions: torch 1.0 then" in caplog.text


def test_a_damaged_shard_is_named(tiny_llama: Any, folder: Path, whole: pd.DataFrame) -> None:
    result = SweepResult.load(folder)
    path = sorted((folder / "shards").iterdir())[3]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{path.name} is damaged .* remove that file and run the sweep again"):
        SweepResult.load(folder).table  # noqa: B018  (it is read here)
    path.unlink()
    assert result.missing == [3]
    assert same(run(tiny_llama, folder).table, whole)


# -- No room ----------------------------------------------------------------------------------------------------------


def test_a_full_disk(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: pd.DataFrame) -> None:
    class Full:
        calls = 0

        @classmethod
        def write_table(cls, rows: pa.Table, file: Any, **options: Any) -> None:
            cls.calls += 1
            if cls.calls > 4:
                file.write(b"PAR1")
                raise OSError(errno.ENOSPC, "No space left on device")
            pq.write_table(rows, file, **options)

    with monkeypatch.context() as patched:
        patched.setattr(store, "pq", Full)
        message = r"cannot be written \(No space left on device\).*; 4 finished tasks are kept"
        with pytest.raises(InputError, match=message):
            run(tiny_llama, tmp_path)
    before = written(tmp_path)
    assert len(before) == 4 and not leftovers(tmp_path)
    assert same(run(tiny_llama, tmp_path).table, whole)
    assert before.items() <= written(tmp_path).items()


def test_a_folder_that_cannot_be_written(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)  # the tests may run as root, whom no mode bit stops
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("work was done for nothing"))
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\)"):
        run(tiny_llama, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_table_too_large_for_memory_needs_a_folder(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinklens.sweeps.run.MOST_ROWS", 100)
    with pytest.raises(InputError, match="the table would have 270 rows: give out, a folder"):
        run(tiny_llama)
