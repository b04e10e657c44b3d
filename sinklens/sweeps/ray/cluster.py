"""Where the engine ``ray`` finds its processes: on this machine, or in a Ray cluster that is there already.

Nothing of Ray is imported before a sweep asks for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from sinklens.errors import EngineError, InputError, need
from sinklens.models.view import Model, devices_of

LOCAL = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment of a Ray of our own. The second is how its processes are told, on any system, to listen on the loopback
alone."""
ANSWER = 5.0
"""Seconds in which a cluster has to answer."""
STORE = 128 << 20
"""Bytes of Ray's object store besides a model in it: it holds the plan, and rows never go through it."""


@dataclass(frozen=True)
class Cluster:
    """How many workers, with what each, and where."""

    workers: int
    """Copies of the model that run tasks at the same time."""
    gpus: float | None = None
    """GPUs of each; 0 for the CPU, a part of 1 where several share a GPU, ``None`` for as many as the model is on."""
    threads: int = 1
    """CPU threads of each."""
    address: str | None = None
    """Of a Ray cluster, such as ``HOST:6379`` or ``auto``; ``None``: processes of this machine."""

    def for_model(self, model: Model) -> Cluster:
        """With as many GPUs for each as the model is on, where no number was given."""
        if self.gpus is not None:
            return self
        return replace(self, gpus=len([device for device in devices_of(model) if device.type == "cuda"]))


def cluster_of(
    engine: str,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    threads_per_worker: int | None = None,
    ray_address: str | None = None,
    *,
    folder: bool = True,
) -> Cluster | None:
    """What the engine ``ray`` is to run on; ``None`` for other engines.

    Raises:
        InputError: an option of another engine or out of range, no such GPUs, or Ray is not installed.
    """
    if engine != "ray":
        given = {
            "workers": workers,
            "gpus_per_worker": gpus_per_worker,
            "threads_per_worker": threads_per_worker,
            "ray_address": ray_address,
        }
        for name, value in given.items():
            if value is not None:
                raise InputError(f"{name} is for engine ray, and this is {engine}: leave it out, or choose engine ray")
        return None
    if workers is None:
        raise InputError("engine ray needs workers: how many copies of the model run tasks at the same time")
    _check_numbers(workers, gpus_per_worker, threads_per_worker)
    _check_address(ray_address, folder)
    with _environment({} if ray_address else LOCAL):  # some of it is read when Ray is imported
        need("ray", extra="ray")
    cluster = Cluster(workers, gpus_per_worker, threads_per_worker or 1, ray_address)
    if ray_address is None and gpus_per_worker:
        check_gpus(cluster, torch.cuda.device_count() if torch.cuda.is_available() else 0, "this machine")
    return cluster


def _check_numbers(workers: int, gpus: float | None, threads: int | None) -> None:
    for name, value in (("workers", workers), ("threads_per_worker", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and float(gpus).is_integer())):
        raise InputError(f"gpus_per_worker {gpus:g} must be from 0 to 1, or a whole number for a model on several GPUs")


def _check_address(address: str | None, folder: bool) -> None:
    if address is None:
        return
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdecimal() and "://" not in address):
        raise InputError(
            f"ray_address {address!r} must be HOST:PORT or auto: run the sweep on a machine of the cluster"
        )
    if not folder:
        raise InputError("ray_address needs a folder (out=) that all machines of the cluster share")
    if address != "auto":
        _check_reachable(address, host, int(port))


def _check_reachable(address: str, host: str, port: int) -> None:
    """Ray itself would try for minutes."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=ANSWER).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): check the address, or start Ray there"
        ) from error


def check_gpus(cluster: Cluster, there: float, where: str) -> None:
    """Refuse more GPUs than there are.

    Raises:
        InputError: there are fewer.
    """
    each = cluster.gpus or 0.0
    fit = cluster.workers if not each else int(there // each) if each >= 1 else int(there) * int(1 / each + 1e-9)
    if fit < cluster.workers:
        told = f"{cluster.workers} workers with gpus_per_worker={each:g} do not fit on the {there:g} GPUs of {where}"
        raise InputError(f"{told}: choose {f'at most {fit} workers' if fit else 'gpus_per_worker=0'}")


@contextlib.contextmanager
def connected(cluster: Cluster, store: int = 0) -> Iterator[ModuleType]:
    """Ray, connected to the cluster or with processes of its own, which are gone afterwards.

    A Ray that this process has started already is used as it is and stays.

    Args:
        cluster: what is to run there.
        store: bytes of what is to be kept in the object store.

    Raises:
        InputError: nothing answers at the address, or the cluster is too small.
        EngineError: Ray cannot start here.
    """
    with _environment({} if cluster.address else LOCAL):
        ray = need("ray", extra="ray")
        ours = not ray.is_initialized()
        try:
            if ours:
                with _silent(ray), _on_loopback(ray) if cluster.address is None else contextlib.nullcontext():
                    _start(ray, cluster, store)
            _check_size(ray.cluster_resources(), cluster)
            yield ray
        finally:
            if ours:
                ray.shutdown()


def _start(ray: ModuleType, cluster: Cluster, store: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if cluster.address is not None:
        try:
            ray.init(address=cluster.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            told = f"Ray cannot join the cluster {cluster.address} ({_first_line(error)})"
            raise InputError(f"{told}: if it asks for a token, set RAY_AUTH_MODE=token here too") from error
        return
    try:
        ray.init(
            "local",
            num_cpus=cluster.workers * cluster.threads,
            include_dashboard=False,
            num_gpus=torch.cuda.device_count() if cluster.gpus else 0,
            object_store_memory=STORE + store,
            **quiet,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise EngineError(f"Ray cannot start on this machine ({_first_line(error)})") from error


@contextlib.contextmanager
def _on_loopback(ray: ModuleType) -> Iterator[None]:
    """Tell this process to listen on the loopback alone: Ray may have been imported, and ``LOCAL`` not read, before."""
    inside = ray._private.ray_constants
    before = getattr(inside, "ENABLE_RAY_CLUSTER", None)
    inside.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        inside.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _silent(ray: ModuleType) -> Iterator[None]:
    """Begin no thread that prints Ray's remarks on dead workers to stdout, where results go; it knows no option."""
    inside = ray._private.worker
    before = getattr(inside, "listen_error_messages", None)
    inside.listen_error_messages = lambda *_: None
    try:
        yield
    finally:
        if before is not None:
            inside.listen_error_messages = before


def _check_size(there: dict[str, float], cluster: Cluster) -> None:
    check_gpus(cluster, there.get("GPU", 0.0), "the Ray cluster")
    fit = int(there.get("CPU", 0.0)) // cluster.threads
    if fit < cluster.workers:
        raise InputError(f"the Ray cluster has CPUs for {fit} workers, not for {cluster.workers}: ask for fewer")


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while; processes that are started meanwhile keep them."""
    before = {name: os.environ.get(name) for name in (*changes, "RAY_AUTH_MODE")}  # Ray itself sets the last one
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(". ")[:200]
