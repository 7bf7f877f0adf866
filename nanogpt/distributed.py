"""Many processes as one: torchrun starts them, each computes its part of the same global batch.

Where one process runs alone, every function here does nothing and costs nothing.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from nanogpt.config import TrainConfig
from nanogpt.device import Device
from nanogpt.errors import ConfigError, UserError
from nanogpt.model import GPT

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Distributed:
    """Which of how many processes this is, and what they decide together."""

    rank: int = 0  # over all machines
    local_rank: int = 0  # on this machine
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def my_rows(self, config: TrainConfig) -> range:
        """Return this process's rows of the global batch. Raises `ConfigError` if something can't be divided evenly."""
        n, group, rows = self.world_size, config.shard_group, config.global_batch_size
        if rows % n:
            what = f"batch_size={config.batch_size} x gradient_accumulation_steps={config.gradient_accumulation_steps}"
            how = f"a multiple of {n} accumulation steps can"
            raise ConfigError(f"{what} rows can't be divided evenly among {n} processes; {how}")
        if n > 1 and config.parallel != "ddp" and group and n % group:
            raise ConfigError(f"shard_group={group}: expected a divisor of {n}, the number of processes")
        return range(self.rank * rows // n, (self.rank + 1) * rows // n)

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        """Return the mean of `value` over all processes, the same number in each."""
        if self.world_size > 1:
            value = value.clone()
            c10d.all_reduce(value)
            value /= self.world_size
        return value

    def all(self, flag: Tensor) -> Tensor:
        """Return whether the boolean `flag` () is set in every process; stays on the device, so no GPU waits."""
        return flag if self.world_size == 1 else self.all_reduce_mean(flag.float()) > 1 - 0.5 / self.world_size

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in at least one process; goes through the CPU, so no GPU waits."""
        return flag if self.world_size == 1 else bool(self.all_reduce_mean(torch.tensor(float(flag))))

    def broadcast_from_main(self, function: Callable[[], T]) -> T:
        """Return what `function` returns in the main process; its `UserError` is raised in all."""
        if self.world_size == 1:
            return function()
        try:
            outcome: list[Any] = [function() if self.is_main else None]
        except UserError as error:
            outcome = [error]
        c10d.broadcast_object_list(outcome)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]  # type: ignore[no-any-return]

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raise `ConfigError` in all processes if one was started with other settings than the main one."""
        main = self.broadcast_from_main(lambda: settings)
        differing = [f"{key} is {settings[key]!r}, not {main[key]!r}" for key in main if settings[key] != main[key]]
        if self.any(bool(differing)):  # All end, so that none waits for another.
            raise ConfigError(f"start all processes with the same command; what differs here: {differing}")


def this_process() -> Distributed:
    """Return this process's rank, local rank and world size, as set by torchrun."""
    rank, local_rank, world_size = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return Distributed(int(rank or 0), int(local_rank or 0), int(world_size or 1))


@contextmanager
def init_distributed(backend: str, device: Device, minutes: float) -> Iterator[Distributed]:
    """Connect the processes within the block; one that waits longer than `minutes` for the others gives up."""
    dist = this_process()
    if dist.world_size == 1:
        yield dist
        return
    # NCCL for tensors on GPUs, gloo for objects and flags on CPUs.
    has_nccl = backend == "nccl" or (backend == "auto" and device.type == "cuda")
    backends = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    store = store_of_this_attempt(dist, max(minutes, 1.0))  # some machines take long to start Python and torch
    timeout = timedelta(minutes=minutes)
    c10d.init_process_group(backends, store=store, rank=dist.rank, world_size=dist.world_size, timeout=timeout)
    yield dist
    # Only after success, since NCCL could wait here for processes that are gone. They leave together, because torchrun
    # ends all when one leaves with an exit code. Without the pause, a thread of gloo that still needs Python's lock can
    # meet the process that holds it and waits for the thread: 7 of 200 runs of DDP hung, with it 0 of 150.
    c10d.barrier()
    time.sleep(0.2)
    c10d.destroy_process_group()


def store_of_this_attempt(dist: Distributed, minutes: float) -> Any:
    """Return the store through which the processes find each other, empty even after torchrun has restarted them.

    torchrun's own store holds addresses of processes that are gone (https://github.com/pytorch/pytorch/issues/135712):
    so the main process draws a name for this attempt and sends it to each process that registers with a fresh nonce.
    """
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=minutes))))
    mine, deadline = uuid.uuid4().hex, time.monotonic() + 60 * minutes
    if not dist.is_main:
        store.set(f"hello/{dist.rank}", mine)
        attempt = store.get(f"welcome/{mine}").decode()
        store.add(f"joined/{attempt}", 1)
        return PrefixStore(attempt, store)
    while store.add(f"joined/{mine}", 0) < dist.world_size - 1:
        for rank in range(1, dist.world_size):
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", mine)
        if time.monotonic() > deadline:
            raise UserError(f"not all of {dist.world_size} processes started within {minutes:g} minutes")
        time.sleep(0.02)
    return PrefixStore(mine, store)


# ---------------------------------------------------------------------------------------------------
# The model, as several processes train it


def choose_parallel(parallel: str, n_params: int, gpu_memory: float, dtype: torch.dtype) -> str:
    """Resolve auto: ddp where weights, gradients and AdamW's moments, in float32, fill at most half a GPU's memory."""
    if parallel == "auto":
        return "ddp" if not gpu_memory or 16 * n_params <= gpu_memory / 2 or dtype == torch.float16 else "fsdp"
    return parallel


def parallelize(model: GPT, config: TrainConfig, device: Device, dist: Distributed) -> Any:
    """Move `model` from the CPU to its device and return it as training must call it: itself, or wrapped in DDP.

    ddp: every process holds all of it. fsdp: each holds a shard of every parameter and all-gathers a block's others
    while it computes that block; a model of meta tensors comes out with memory, but without values.
    """
    model.transformer.gradient_checkpointing = config.gradient_checkpointing
    model.transformer.low_precision_residual = config.low_precision_residual
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    parallel = choose_parallel(config.parallel, model.get_num_params(), device.total_memory(), device.dtype)
    parallel = "fsdp" if is_meta else parallel
    if dist.world_size > 1:
        log.info(f"{dist.world_size} processes, {parallel}")
    if device.compile:
        # Block by block on a CPU, where the rest gains nothing, and in several processes: all blocks share one graph,
        # FSDP all-gathers them one by one, and DDP would cut the graph of a whole GPT-2 into 14.
        by_block = dist.world_size > 1 or device.type == "cpu"
        for module in model.transformer.h if by_block else [model]:
            module.compile(dynamic=False)
        model.transformer.is_compiled = True
        torch._dynamo.config.optimize_ddp = False
        # torch has no public setting for it; two blocks of 256 channels keep 25 MB with 0.5, and 38 with 1.
        torch._functorch.config.activation_memory_budget = config.activation_memory_budget
        if by_block and device.type != "cpu":  # compiled, the loss of 12 x 1,024 tokens moves 6 in place of 25 GB
            model.head_loss = torch.compile(model.head_loss, dynamic=False)
    if dist.world_size == 1 or parallel == "ddp":
        model.to(device.name)
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.world_size > 1 else model
    if device.dtype == torch.float16:
        raise ConfigError("--parallel=fsdp computes in bfloat16 or float32, not in float16; use --parallel=ddp")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = config.shard_group or dist.world_size
    shape = (dist.world_size // size, size) if size < dist.world_size else (size,)  # groups, and processes in each
    mesh = c10d.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])  # type: ignore[attr-defined]
    # Blocks are all-gathered in the dtype they compute in; gradients are reduced in float32.
    policy = MixedPrecisionPolicy(param_dtype=device.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not config.gather_once)
    fully_shard(model, mesh=mesh)
    if is_meta:
        model.to_empty(device=device.name)
        model.tie_weights()
    return model


def gradient_sync(network: Any, is_last: bool, config: TrainConfig) -> AbstractContextManager[None]:
    """Return a context for a micro-batch: DDP, and FSDP with `gather_once`, exchange gradients in the last one only."""
    if isinstance(network, DistributedDataParallel) and not is_last:
        return network.no_sync()
    if hasattr(network, "set_requires_all_reduce"):  # FSDP
        network.set_requires_gradient_sync(is_last or not config.gather_once)
        network.set_reshard_after_backward(is_last or not config.gather_once)
        network.set_requires_all_reduce(is_last)  # between groups of processes
    return nullcontext()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds a shard of `tensor` only (a DTensor, whose import takes half a second)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a full one; all processes must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a full tensor that belongs to a parameter, such as a moment of Adam, sharded as the parameter is."""
    if not is_sharded(parameter) or is_sharded(value) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
