"""Many processes as one: torchrun starts them, each computes its share of the same global batch.

Where one process runs alone, every function here does nothing and costs nothing.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nanogpt.errors import ConfigError
from nanogpt.model import GPT


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0  # over all machines
    local_rank: int = 0  # on this machine
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, total: int, what: str) -> range:
        """This process's consecutive part of `total` equal pieces. Raises `ConfigError` if they can't be dealt out."""
        if total % self.size:
            below = total - total % self.size
            nearest = f"{below} or {below + self.size}" if below else f"{self.size}"
            raise ConfigError(f"{what}={total} can't be shared by {self.size} processes; {what}={nearest} can")
        count = total // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over all processes, the same number in each."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in at least one process; all must ask at the same point. No GPU has to wait."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))  # on the CPU, so through gloo
        dist.all_reduce(flags)
        return bool(flags > 0)

    def any_tensor(self, flag: Tensor) -> Tensor:
        """The same for a flag () on the device, which nobody waits for."""
        if self.size == 1:
            return flag
        flags = flag.float()
        dist.all_reduce(flags)
        return flags > 0

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.size > 1:
            dist.barrier()


def this_process() -> World:
    """The place that torchrun has given to this process."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return World(*(int(os.environ[name]) for name in names)) if all(name in os.environ for name in names) else World()


@contextmanager
def joined(world: World, backend: str, device_type: str) -> Iterator[None]:
    """Within the block the processes can talk. Only the main one prints to standard output."""
    if world.size == 1:
        yield
        return
    if backend == "nccl" and device_type != "cuda":
        raise ConfigError(
            f"--backend=nccl connects CUDA GPUs, but this run computes on {device_type}; use --backend=gloo"
        )
    through_nccl = device_type == "cuda" and backend != "gloo"
    dist.init_process_group("cpu:gloo,cuda:nccl" if through_nccl else "gloo")
    stdout = sys.stdout
    if not world.is_main:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
    finally:
        sys.stdout = stdout
        gc.collect()  # what still refers to the group would keep its threads running into the end of the process
        dist.destroy_process_group()


def parallel(model: GPT, world: World) -> Any:
    """`model` as training must call it: its gradients become the mean over all processes."""
    return DistributedDataParallel(model) if world.size > 1 else model


def no_gradient_exchange(network: Any, is_last: bool) -> AbstractContextManager[None]:
    """Gradients travel once per update, with the last micro-batch."""
    if isinstance(network, DistributedDataParallel) and not is_last:
        exchange: AbstractContextManager[None] = network.no_sync()
        return exchange
    return nullcontext()
