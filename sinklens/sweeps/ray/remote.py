"""What runs in the processes of the engine ``ray``: a worker with a model of its own and a folder to write to."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sinklens.engine.memory import default_budget
from sinklens.errors import InputError
from sinklens.models.digest import weight_digest
from sinklens.models.load import load_model
from sinklens.models.view import Model, devices_of, moved_to
from sinklens.sweeps.plan import Plan
from sinklens.sweeps.ray.cluster import Cluster
from sinklens.sweeps.store import FolderSink, read_record
from sinklens.sweeps.worker import Worker


@dataclass(frozen=True, eq=False)
class Orders:
    """What a worker is started with."""

    plan: Any
    """Ray's reference to the plan."""
    model: Any
    """Ray's reference to the model; ``None`` where the plan says how to load it."""
    folder: Path
    """Where it writes."""
    cluster: Cluster
    """What it may use."""
    limits: Mapping[str, int | None]
    """Memory budget and rows per forward pass."""


class Actor:
    """A worker in a process of its own. Nothing can fail before :meth:`load`, so that what does has a message."""

    def __init__(self, orders: Orders) -> None:
        self.orders, self.sink = orders, FolderSink(orders.folder)
        self.worker: Worker | None = None

    def load(self) -> None:
        """Get the plan and the model.

        Raises:
            InputError: the model cannot be loaded or is another one, or the folder is not the driver's.
        """
        import ray

        orders = self.orders
        torch.set_num_threads(orders.cluster.threads)
        device = torch.device("cuda" if orders.cluster.gpus else "cpu")
        plan: Plan = ray.get(orders.plan)
        if orders.cluster.address is not None:
            check_shared(orders.folder, plan)
        model: Any = load_as_planned(plan, device) if orders.model is None else ray.get(orders.model)
        self.worker = Worker(placed(model, device), plan, **limits_of(orders, device))

    def run(self, index: int) -> None:
        """Run a task and write its rows."""
        assert self.worker is not None
        self.sink.write(self.worker.plan.task_id(index), self.worker.run(index))


def limits_of(orders: Orders, device: torch.device) -> dict[str, Any]:
    """Memory budget and rows; on a shared GPU the budget is that part of what a worker alone would take."""
    share = orders.cluster.gpus or 1.0
    if share >= 1 or orders.limits["memory_budget"] is not None:
        return dict(orders.limits)
    return {**orders.limits, "memory_budget": int(default_budget(device) * share)}


def placed(model: Model, device: torch.device) -> Model:
    """The model on ``device``; one that is spread over several stays so."""
    return moved_to(model, device) if len(devices_of(model)) == 1 else model


def load_as_planned(plan: Plan, device: torch.device) -> Model:
    """The model that the plan's ``model_spec`` gives.

    Raises:
        InputError: it cannot be loaded, or is not the one that the plan was made for.
    """
    spec = plan.model_spec
    assert spec is not None
    model = load_model(**{**spec, "device": device}) if isinstance(spec, Mapping) else spec()
    if weight_digest(model) != plan.choices.origin["weight_digest"]:
        raise InputError(
            f"model_spec gives other weights on {platform.node()} than the model of this sweep has: it must give the "
            "same model on every machine"
        )
    return model


def check_shared(folder: Path, plan: Plan) -> None:
    """Make sure that a folder is the one that the sweep was begun in, and not one of the same name.

    Raises:
        InputError: it is not.
    """
    record = read_record(folder, missing_ok=True) if folder.is_dir() else None
    if record is None or record["identity"] != plan.identity:
        raise InputError(
            f"{folder} is not the sweep's folder on {platform.node()}: give out, a folder that all machines of the "
            "cluster share"
        )
