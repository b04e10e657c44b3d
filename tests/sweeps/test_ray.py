"""The engine ``ray``: the same rows as in one process, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sinklens.errors import EngineError, InputError
from sinklens.models.load import load_model
from sinklens.models.view import Model
from sinklens.sweeps import Interrupted, Worker
from sinklens.sweeps.grid import Tasks
from sinklens.sweeps.ray.cluster import Cluster, check_gpus, cluster_of, connected
from sinklens.sweeps.ray.crew import TaskQueue
from tests.helpers.sweeps import N_TASKS, run, until, written

pytestmark = pytest.mark.slow
RAY: dict[str, Any] = {"engine": "ray", "workers": 2}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray with room for two workers, started once; the engine uses it as it is."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with connected(Cluster(2)) as found:
        yield found


@pytest.fixture(scope="module")
def whole(tiny_folder: Path) -> pd.DataFrame:
    """The table of the same sweep in this process."""
    return run(load_model(tiny_folder, device="cpu")).table


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return load_model(tiny_folder, device="cpu")


def loads(folder: Path, before: Callable[[int], None], log: Path | None = None) -> Callable[[], Model]:
    """A ``model_spec``: loads the model, and has the worker do something before each task; ``log`` is of workers."""

    def load() -> Model:
        run_task = Worker.run
        if log is not None:
            (log / str(os.getpid())).touch()

        def patched(self: Worker, index: int, progress: Any = None) -> Any:
            before(index)
            return run_task(self, index, progress)

        Worker.run = patched
        return load_model(folder, device="cpu")

    return load


def close(table: pd.DataFrame, expected: pd.DataFrame) -> bool:
    pd.testing.assert_frame_equal(table, expected, check_exact=False, rtol=0, atol=1e-5, check_categorical=False)
    return True


# -- The same rows ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray")
def test_the_same_rows_as_in_one_process(model: Any, tmp_path: Path, whole: pd.DataFrame) -> None:
    """Begun here and finished by two workers that are sent the model; what was there is left alone."""
    run(model, tmp_path / "run", shard=(1, 3))
    before = written(tmp_path / "run")
    told: list[tuple[int, int]] = []
    result = run(model, tmp_path / "run", progress=lambda *rows: told.append(rows), **RAY)
    assert close(result.table, whole) and len(written(tmp_path / "run")) == N_TASKS
    assert before.items() <= written(tmp_path / "run").items() and 0 < len(before) < N_TASKS
    assert len(told) == N_TASKS - len(before) and told[-1][0] == told[-1][1] and told == sorted(told)


@pytest.mark.usefixtures("ray")
def test_begun_by_ray_and_finished_here(
    model: Any,
    tiny_folder: Path,
    tmp_path: Path,
    whole: pd.DataFrame,
) -> None:
    """Ctrl-C: what runs is finished, what is left is said, and one process goes on."""
    spec = {"model": os.path.relpath(tiny_folder)}
    asked: list[None] = []

    def progress(*_: int) -> None:
        if not asked:  # a second one would be heard at once
            asked.append(signal.raise_signal(signal.SIGINT))

    with pytest.raises(Interrupted, match=r"interrupted: \d+ tasks? finished now, \d+ are left; call it again"):
        run(model, tmp_path, progress=progress, model_spec=spec, **RAY)
    before = written(tmp_path)
    assert 1 <= len(before) <= 3  # the first, and what the two workers had begun meanwhile
    assert close(run(model, tmp_path).table, whole)
    assert before.items() <= written(tmp_path).items()


@pytest.mark.usefixtures("ray")
def test_without_a_folder(model: Any, whole: pd.DataFrame) -> None:
    result = run(model, layers="1", **{**RAY, "workers": 1})
    assert close(result.table, run(model, layers="1").table) and 0 < len(result) < len(whole)


def test_nothing_listens_but_on_the_loopback(ray: Any) -> None:
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_nor_where_ray_was_imported_before() -> None:
    """Ray reads what says so when it is imported, and a notebook may have done that."""
    code = (
        "import ray\nfrom sinklens.sweeps.ray.cluster import Cluster, connected\nwith connected(Cluster(1)) as found:\n"
    )
    code += "    print([node['NodeManagerAddress'] for node in found.nodes()])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "['127.0.0.1']", ran.stderr


# -- Workers that die or fail -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray")
def test_a_killed_worker_is_replaced(
    capfd: pytest.CaptureFixture[str],
    model: Any,
    tiny_folder: Path,
    tmp_path: Path,
    whole: pd.DataFrame,
) -> None:
    """Killed while it holds a task; its task is run again, and nobody else's."""
    mark, log = tmp_path / "mark", tmp_path / "log"
    mark.mkdir()
    log.mkdir()

    def before(index: int) -> None:
        with open(mark / str(index), "a") as file:
            file.write(f"{os.getpid()}\n")
        if index == 5 and len((mark / "5").read_text().split()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if (mark / "5").exists():
            until(lambda: len(list(log.iterdir())) == 3)  # the other one must not finish all before the third is there

    result = run(model, tmp_path / "run", model_spec=loads(tiny_folder, before, log), **RAY)
    assert close(result.table, whole)
    assert len(written(tmp_path / "run")) == N_TASKS
    runs = {int(path.name): path.read_text().split() for path in mark.iterdir()}
    assert {index: len(pids) for index, pids in runs.items() if len(pids) != 1} == {5: 2}
    killed, second = runs[5]
    assert killed != second
    assert {pid for pids in runs.values() for pid in pids} <= {path.name for path in log.iterdir()} - {str(os.getpid())}
    assert capfd.readouterr().out == ""  # Ray's remarks are not among the results


@pytest.mark.usefixtures("ray")
def test_a_task_that_always_kills(model: Any, tiny_folder: Path, tmp_path: Path) -> None:
    def before(index: int) -> None:
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(EngineError, match=r"^task 1 \(0000001-\w{16}\) has ended 3 workers, killed or out of memory"):
        run(model, tmp_path, model_spec=loads(tiny_folder, before), **{**RAY, "workers": 1})
    done = sorted(path.stem[:7] for path in (tmp_path / "shards").glob("*.parquet"))
    assert done == [f"{index:07d}" for index in range(N_TASKS) if index != 1]  # all others come before it


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    "raised, told, kind",
    [
        (InputError("the disk is full: make room"), "^the disk is full: make room$", InputError),
        (ZeroDivisionError("by zero"), r"^a worker failed on task 2 \(ZeroDivisionError: by zero\)$", EngineError),
    ],
    ids=["ours", "other"],
)
def test_an_error_in_a_task_is_its_sentence(
    model: Any,
    tiny_folder: Path,
    tmp_path: Path,
    raised: Exception,
    told: str,
    kind: type[Exception],
) -> None:
    def before(index: int) -> None:
        if index == 2:
            raise raised

    with pytest.raises(kind, match=told):
        run(model, tmp_path, model_spec=loads(tiny_folder, before), **{**RAY, "workers": 1})
    assert len(written(tmp_path)) == 2


@pytest.mark.usefixtures("ray")
def test_a_loader_of_another_model_is_refused(model: Any) -> None:
    from tests.helpers.tiny import tiny_model

    with pytest.raises(InputError, match="model_spec gives other weights .* than the model of this sweep has"):
        run(model, model_spec=lambda: tiny_model("llama", seed=1), **{**RAY, "workers": 1})


# -- Who runs what ----------------------------------------------------------------------------------------------------


def test_a_worker_keeps_to_its_group() -> None:
    """Three groups of four tasks: each worker stays in its own until that is done, then helps with the longest."""

    class Two:
        tasks = Tasks(n_patches=4, n_prompts=6, group_size=2, task_size=1)

    queue = TaskQueue(Two(), range(12))  # pyright: ignore[reportArgumentType]: the tasks are all that it looks at
    one = queue.take(None, [])
    two = queue.take(None, [queue.group(one)])
    assert (one, two) == (0, 4)
    assert [queue.take(0, [2]) for _ in range(3)] == [1, 2, 3]
    assert queue.take(0, [2]) == 8  # a group that nobody has
    queue.put_back(8)
    assert [queue.take(4, [2]) for _ in range(4)] == [9, 10, 11, 8]
    assert [queue.take(4, [2]) for _ in range(3)] == [5, 6, 7] and not queue


# -- Refused ----------------------------------------------------------------------------------------------------------


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="2 workers with gpus_per_worker=1 do not fit on the 0 GPUs of this machine"):
        cluster_of("ray", 2, 1.0)
    check_gpus(Cluster(4, 0.5), 2, "here")
    check_gpus(Cluster(10, 0.1), 1, "here")
    check_gpus(Cluster(2, 4), 8, "here")
    with pytest.raises(InputError, match="choose at most 2 workers"):
        check_gpus(Cluster(3, 3), 8, "here")
    with pytest.raises(InputError, match="choose at most 2 workers"):  # 0.6 of a GPU twice is more than one GPU
        check_gpus(Cluster(3, 0.6), 2, "here")
    with pytest.raises(InputError, match="ray_address needs a folder"):
        cluster_of("ray", 2, ray_address="auto", folder=False)


@pytest.mark.usefixtures("ray")
def test_a_cluster_that_is_too_small(model: Any) -> None:
    with pytest.raises(InputError, match="the Ray cluster has CPUs for 2 workers, not for 3"):
        run(model, **{**RAY, "workers": 3})
