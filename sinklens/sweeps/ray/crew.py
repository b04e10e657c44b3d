"""The engine ``ray``: the tasks of a sweep on several copies of the model, each in a process of its own.

A worker loads the model once, is given one task after the other, and writes each task's rows itself; only numbers of
tasks go between it and this process. A worker that dies is replaced and its task is run again. Tasks are those of the
engine ``local``, with the same names, so either engine can finish what the other one has begun.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any

from sinklens.engine.run import Progress
from sinklens.errors import EngineError, InputError
from sinklens.models.load import REGISTRY
from sinklens.models.view import Model, bytes_of, device_of, devices_of, moved_to
from sinklens.sweeps.local import Interrupted, interrupts
from sinklens.sweeps.plan import Plan
from sinklens.sweeps.ray.cluster import Cluster, connected
from sinklens.sweeps.ray.remote import Actor, Orders
from sinklens.sweeps.reading import read_shard
from sinklens.sweeps.store import SHARDS, FolderSink, Sink

TRIES = 3
"""Workers that may die of one task, or while they load the model, before the sweep gives up on it."""
POLL = 0.2
"""Seconds after which Ctrl-C is heard."""

logger = logging.getLogger(__name__)


def run_ray(
    model: Model,
    plan: Plan,
    sink: Sink,
    pending: Sequence[int],
    *,
    cluster: Cluster,
    memory_budget: int | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the pending tasks on the workers of a cluster.

    After the first Ctrl-C the running tasks are finished and no other is begun; a second one drops them.

    Args:
        model: the model that the plan was made for.
        plan: the plan; workers load what its ``model_spec`` says, or are sent the model where it says nothing.
        sink: where rows go.
        pending: numbers of the tasks to run, ascending.
        cluster: workers, and where they run.
        memory_budget: bytes that the activations of one forward pass may take, in each worker.
        max_rows: rows per forward pass, in place of the memory budget.
        progress: called with (rows done, rows in all), rows being patches times prompts.

    Raises:
        InputError: the cluster is not there or too small, or model or plan cannot be sent to other processes.
        EngineError: a task failed, or workers kept dying.
        Interrupted: by Ctrl-C.
    """
    cluster = cluster.for_model(model)
    plan = replace(plan, model_spec=_anywhere(plan))
    sent = _on_cpu(model) if plan.model_spec is None else None
    limits = {"memory_budget": memory_budget, "max_rows": max_rows}
    with interrupts() as asked, _folder(sink) as folder, connected(cluster, _size(sent)) as ray:
        orders = Orders(_put(ray, plan), None if sent is None else _put(ray, sent), folder, cluster, limits)
        crew = Crew(ray, orders, plan, sink, TaskQueue(plan, pending), asked)
        try:
            crew.run(pending, progress)
        finally:
            crew.dismiss()


@contextlib.contextmanager
def _folder(sink: Sink) -> Iterator[Path]:
    """Where workers write: the sweep's folder, or one for a while if the sweep stays in memory."""
    if isinstance(sink, FolderSink):
        yield sink.folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="sinklens-") as folder:
        (Path(folder) / SHARDS).mkdir()
        yield Path(folder)


def _anywhere(plan: Plan) -> Any:
    """The plan's ``model_spec``, for a worker that may be started in another folder."""
    spec = plan.model_spec
    if not isinstance(spec, Mapping):
        return spec
    name = spec.get("model", "")
    if isinstance(name, (str, Path)) and name not in REGISTRY and Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().resolve())
    return {"dtype": plan.choices.origin["dtype"], **spec, **({"model": name} if name else {})}


def _on_cpu(model: Model) -> Model:
    """The model, or a copy, that can be unpacked where there is no GPU or another one.

    Raises:
        InputError: it is spread over several GPUs.
    """
    if len(devices_of(model)) > 1:
        raise InputError("a model on several GPUs cannot be sent to workers: give model_spec, arguments of load_model")
    return model if device_of(model).type == "cpu" else moved_to(copy.deepcopy(model), "cpu")


def _size(model: Model | None) -> int:
    """Bytes of a model in the object store, from above."""
    if model is None:
        return 0
    return 2 * bytes_of(model)


def _put(ray: ModuleType, value: Plan | Model) -> Any:
    """Ray's reference to what workers are to have.

    Raises:
        InputError: it cannot be pickled.
    """
    try:
        return ray.put(value)
    except Exception as error:  # whatever some object's own way of being pickled raises
        reason = " ".join(str(error).split())[:200]
        if isinstance(value, Plan):
            what, how = "a readout, an edit or model_spec", "give names, or functions and objects that can be pickled"
        else:
            what, how = "the model", "give model_spec, arguments of load_model or a function that returns the model"
        raise InputError(f"{what} cannot be sent to other processes ({reason}): {how}") from error


class TaskQueue:
    """Pending tasks by group of prompts: a worker keeps to its group, as another has to be captured first."""

    def __init__(self, plan: Plan, pending: Sequence[int]) -> None:
        self._tasks = plan.tasks
        self._groups: dict[int, deque[int]] = {}
        for index in pending:
            self._groups.setdefault(self.group(index), deque()).append(index)

    def group(self, index: int) -> int:
        """First prompt of a task's group."""
        return self._tasks[index].first_prompt

    def __bool__(self) -> bool:
        return any(self._groups.values())

    def take(self, mine: int | None, others: Collection[int | None]) -> int:
        """The next task: of the group ``mine``, else of one that nobody else has, else of the longest."""
        left = {group: tasks for group, tasks in self._groups.items() if tasks}
        if mine is None or mine not in left:
            free = [group for group in left if group not in others]
            mine = max(free or left, key=lambda group: len(left[group]))
        return left[mine].popleft()

    def put_back(self, index: int) -> None:
        """A task whose worker died is the last one of its group: if it always kills, the others are finished first."""
        self._groups[self.group(index)].append(index)


@dataclass(eq=False)
class Hand:
    """A worker as this process sees it."""

    actor: Any
    """Ray's handle."""
    index: int | None = None
    """The task that it runs; ``None`` while it loads the model."""
    group: int | None = None
    """The group of prompts that it has captured."""


class Crew:
    """The workers, and what each is busy with."""

    def __init__(self, ray: ModuleType, orders: Orders, plan: Plan, sink: Sink, queue: TaskQueue, asked: Event) -> None:
        self.ray, self.orders, self.plan, self.sink, self.queue, self.asked = ray, orders, plan, sink, queue, asked
        self.shards = FolderSink(orders.folder)
        options = {"num_cpus": orders.cluster.threads, "num_gpus": orders.cluster.gpus or 0, "max_restarts": 0}
        self._actor = ray.remote(**options)(Actor)
        self._busy: dict[Any, Hand] = {}
        self._deaths: Counter[int | None] = Counter()

    def run(self, pending: Sequence[int], progress: Progress | None) -> None:
        """Run all tasks of the queue.

        Raises:
            EngineError: a task failed, or workers kept dying.
            Interrupted: by Ctrl-C.
        """
        finished = rows = 0
        total = sum(self.plan.tasks[index].n_rows for index in pending)
        for _ in range(min(self.orders.cluster.workers, len(pending))):
            self._hire()
        while self._more():
            for reference in self.ray.wait(list(self._busy), timeout=POLL)[0]:
                index = self._settle(self._busy.pop(reference), reference)
                if index is None:
                    continue
                finished, rows = finished + 1, rows + self.plan.tasks[index].n_rows
                if progress is not None:
                    progress(rows, total)
        if finished < len(pending) or self.asked.is_set():
            raise Interrupted.after(finished, len(pending) - finished)

    def _more(self) -> bool:
        """Whether there is anything to wait for: after Ctrl-C, what runs; never a worker that only loads its model."""
        running = any(hand.index is not None for hand in self._busy.values())
        return running or (bool(self.queue) and not self.asked.is_set())

    def _hire(self) -> None:
        actor = self._actor.remote(self.orders)
        self._busy[actor.load.remote()] = Hand(actor)

    def _settle(self, hand: Hand, reference: Any) -> int | None:
        """What comes of a worker that is no longer busy; the number of its task if that is finished now."""
        index = hand.index
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            self.ray.kill(hand.actor)
            raise _told(error, index) from error
        except self.ray.exceptions.RayError:
            self.ray.kill(hand.actor)
            return self._replace(index)
        if index is not None:
            self._keep(index)
        self._next(hand)
        return index

    def _next(self, hand: Hand) -> None:
        """Give a worker that has nothing to do a task, or let it go."""
        if not self.queue or self.asked.is_set():
            self.ray.kill(hand.actor)
            return
        hand.index = self.queue.take(hand.group, [other.group for other in self._busy.values()])
        hand.group = self.queue.group(hand.index)
        self._busy[hand.actor.run.remote(hand.index)] = hand

    def _keep(self, index: int) -> None:
        """Rows of a sweep in memory are taken over; others are where they belong."""
        if not isinstance(self.sink, FolderSink):
            task = self.plan.task_id(index)
            self.sink.write(task, read_shard(self.shards.path(task)))
            self.shards.path(task).unlink()

    def _replace(self, index: int | None) -> int | None:
        """A worker has died: run its task again, unless its rows were written already.

        Raises:
            EngineError: that has happened too often.
        """
        done = index is not None and self.shards.path(self.plan.task_id(index)).exists()
        if index is not None and done:
            self._keep(index)
        elif index is not None:
            self.queue.put_back(index)
        self._deaths[index] += not done
        if self._deaths[index] == TRIES and index is not None:
            raise EngineError(
                f"task {index} ({self.plan.task_id(index)}) has ended {TRIES} workers, killed or out of memory: give "
                "them a smaller budget (memory_budget=), or ask for fewer workers; what is finished is kept"
            )
        if index is None and self._deaths[None] >= TRIES:
            self._go_on_with_fewer()
        elif self.queue and not self.asked.is_set():
            self._hire()
        return index if done else None

    def _go_on_with_fewer(self) -> None:
        if not self._busy:
            raise EngineError(
                f"{TRIES} workers have died while they loaded the model, killed or out of memory: ask for fewer workers"
            )
        logger.warning("workers die while they load the model: going on with %d", len(self._busy))

    def dismiss(self) -> None:
        """End all workers; what they were busy with is dropped."""
        for hand in self._busy.values():
            self.ray.kill(hand.actor)
        self._busy.clear()


def _told(error: Any, index: int | None) -> Exception:
    """An exception of a worker as it would have come from the engine ``local``."""
    cause = error.cause
    if isinstance(cause, (InputError, EngineError)):
        return cause
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
    where = "while it loaded the model" if index is None else f"on task {index}"
    return EngineError(f"a worker failed {where} ({reason})")
