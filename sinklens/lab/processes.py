"""One process, or several that torchrun started: which rows are whose, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sinklens.errors import InputError


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of several, each has a GPU of its own."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        index = int(os.environ["LOCAL_RANK"])
        if index >= torch.cuda.device_count():
            raise InputError(f"there are {torch.cuda.device_count()} GPUs for process {index}: start fewer of them.")
        return torch.device("cuda", index)
    return device


class Processes:
    """The processes of a run; by the variables that torchrun sets."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this is the one that measures and writes."""
        return self.rank == 0

    def described(self) -> dict[str, Any]:
        """For the record."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {"device": name, "processes": self.count, "threads": torch.get_num_threads()}

    def rows(self, first: int, n: int) -> tuple[int, int]:
        """Which of ``n`` rows from ``first`` on are this process's: the first, and how many.

        Raises:
            InputError: they cannot be split equally.
        """
        if n % self.count:
            raise InputError(f"a batch of {n} rows cannot be split equally over {self.count} processes.")
        own = n // self.count
        return first + self.rank * own, own

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, such that gradients are the mean over processes."""
        if self.count == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def alone(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Within it, gradients stay this process's own."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values / self.count

    def any(self, here: bool) -> bool:
        """Whether it is so in any of them."""
        if self.count == 1:
            return here
        flag = torch.tensor(float(here), device=self.device)
        dist.all_reduce(flag)
        return bool(flag)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes in before the others: it writes what they read."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()
