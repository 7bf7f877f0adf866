"""Many processes as one: torchrun starts them, each computes its share of the same global batch.

Where one process runs alone, every function here does nothing and costs nothing.
"""

import gc
import hashlib
import io
import logging
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nanogpt.device import Device
from nanogpt.errors import ConfigError, UserError
from nanogpt.model import GPT

log = logging.getLogger(__name__)

T = TypeVar("T")
_SIGNS = ("closed by peer", "reset by peer", "timed out", "timeout", "gloo", "nccl", "broken pipe", "no route to host")
_BYTES_OF_STATE = 16  # per parameter: weight, gradient and AdamW's two averages, in float32


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0  # over all machines
    local_rank: int = 0  # on this machine
    size: int = 1
    store: Any = None  # where they can leave words for each other, once they have joined

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, batch_size: int, accumulation: int) -> range:
        """This process's consecutive rows of the global batch. Raises `ConfigError` if they can't be dealt out evenly.

        Where every process can have whole micro-batches it gets them; else micro-batches become smaller.
        """
        rows = batch_size * accumulation
        if rows % self.size:
            ways = [("gradient_accumulation_steps", accumulation, batch_size), ("batch_size", batch_size, accumulation)]
            advice = " or ".join(f"--{name}={_nearest(value, self.size // math.gcd(self.size, other))}"
                                 for name, value, other in ways)  # fmt: skip
            raise ConfigError(
                f"batch_size={batch_size} x gradient_accumulation_steps={accumulation} makes {rows} rows, which can't "
                f"be shared by {self.size} processes; {advice} can"
            )
        count = rows // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over all processes, the same number in each."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in at least one process; all must ask at the same point. No GPU has to wait."""
        return flag if self.size == 1 else bool(self.any_tensor(torch.tensor(flag)))  # on the CPU, so through gloo

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

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns in the main process, made known to all; its `UserError` is raised in all."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [function()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        result: T = outcome[0]
        return result

    def after_main(self, function: Callable[[], None]) -> None:
        """Call `function`, once in a run, in the main process; the others wait, however long that takes."""
        if self.is_main:
            try:
                function()
            finally:
                self.store.set("main is done", "")
        else:
            while not self.store.check(["main is done"]):
                time.sleep(0.05)

    def check_same(self, settings: dict[str, Any]) -> None:
        """Raise `ConfigError` if processes were started with other settings, or run other code, than the main one."""
        if self.size == 1:
            return
        mine = {**settings, "torch": torch.__version__, "code": _fingerprint()}
        everyone: list[dict[str, Any]] = [{}] * self.size
        dist.all_gather_object(everyone, mine)
        differing = [
            f"{name} is {theirs.get(name)!r} in process {rank}, {mine!r} in process 0"
            for rank, theirs in enumerate(everyone)
            for name, mine in everyone[0].items()
            if theirs.get(name) != mine
        ]
        if differing:
            raise ConfigError(
                f"the processes do not agree: {'; '.join(differing[:8])}; start all with the same command"
            )


def _nearest(value: int, step: int) -> str:
    """The multiples of `step` on either side of `value`, for a message."""
    below = value - value % step
    return f"{below} or {below + step}" if below else str(step)


def _fingerprint() -> str:
    """Which code this is: a hash over the package's files."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:12]


def this_process() -> World:
    """The place that torchrun has given to this process."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return World(*(int(os.environ[name]) for name in names)) if all(name in os.environ for name in names) else World()


@contextmanager
def joined(world: World, backend: str, device: Device, minutes: float) -> Iterator[World]:
    """Within the block the processes can talk; one that waits longer than `minutes` for the others gives up.

    Only the main one prints to standard output; see `keep_log` for the others. Yields `world` with its store.
    """
    if world.size == 1:
        yield world
        return
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError(
            f"--backend=nccl connects CUDA GPUs, but this run computes on {device.type}; use --backend=gloo"
        )
    through_nccl = device.type == "cuda" and backend != "gloo"
    # some machines take their time to start Python and torch: here nobody's patience is shorter than a minute
    store, patience = _store_of_this_attempt(world, max(minutes, 1.0)), timedelta(minutes=minutes)
    names = "cpu:gloo,cuda:nccl" if through_nccl else "gloo"
    dist.init_process_group(names, store=store, rank=world.rank, world_size=world.size, timeout=patience)
    stdout = sys.stdout
    if not world.is_main:
        sys.stdout = io.StringIO()
    try:
        yield replace(world, store=store)
    except Exception as error:
        _tell_torchrun(error)
        raise
    finally:
        sys.stdout = stdout
        gc.collect()  # what still refers to the group would keep its threads running into the end of the process
        dist.destroy_process_group()


def _store_of_this_attempt(world: World, minutes: float) -> Any:
    """The store through which the processes find each other, empty even after torchrun has restarted them.

    The one that torchrun gives still holds the addresses of those that are gone, and counts attempts on each machine
    for itself (https://github.com/pytorch/pytorch/issues/135712). So the main process draws a name for the attempt and
    tells it to everyone who asks, by words that were never said before.
    """
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=minutes))))
    mine, others = uuid.uuid4().hex, [f"hello/{rank}" for rank in range(1, world.size)]
    try:
        if not world.is_main:
            store.set(f"hello/{world.rank}", mine)
            attempt = store.get(f"welcome/{mine}").decode()
            store.add(f"joined/{attempt}", 1)
            return PrefixStore(attempt, store)
        store.wait(others)
        welcomed: set[bytes] = set()
        deadline = time.monotonic() + minutes * 60
        while store.add(f"joined/{mine}", 0) < len(others):
            for word in set(store.multi_get(others)) - welcomed:  # some are those of an earlier attempt
                store.set(f"welcome/{word.decode()}", mine)
                welcomed.add(word)
            if time.monotonic() > deadline:
                raise dist.DistError("they did not come")
            time.sleep(0.01)
    except dist.DistError as error:
        raise UserError(
            f"process {world.rank} of {world.size} waited {minutes:g} minutes for the others to start ({error}); see "
            "whether all machines run the same command and can reach the address that was given to torchrun"
        ) from error
    return PrefixStore(mine, store)


def keep_log(world: World, folder: Path) -> None:
    """Let what a process other than the main one prints, and has printed, go to a file of its own in `folder`."""
    if not world.is_main and isinstance(sys.stdout, io.StringIO):
        printed = sys.stdout.getvalue()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sys.stdout = open(folder / f"rank-{world.rank}.log", "a", buffering=1, encoding="utf-8")
        except OSError:  # a full disk: the run is more important than its logs
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        print(printed, end="")


def _tell_torchrun(error: Exception) -> None:
    """Leave a traceback where torchrun looks for it, so that it shows that of the process which failed first."""
    if isinstance(error, UserError) or "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)


@contextmanager
def contact(world: World, minutes: float, step: Callable[[], int]) -> Iterator[None]:
    """Within the block, the loss of other processes is told apart from a failure of this one: a sentence, exit code 1.

    It is said at once, since torchrun is about to end this process, too.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if world.size == 1 or not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        reason = re.sub(r"^\[\S*\] ", "", str(error).strip().splitlines()[0])[:120]
        if "time" in reason.lower():
            silent = " and ".join(map(str, _silent_processes(world)))
            what = f"waited {minutes:g} minutes for the others (--dist_timeout); "
            what += f"no word from process {silent}" if silent else "all are waiting for one another"
        else:
            what = "another process is gone; its own message says why, or its machine is down"
        print(f"error: process {world.rank} of {world.size}, after {step()} updates: {what} ({reason})",
              file=sys.stderr, flush=True)  # fmt: skip
        raise SystemExit(1) from None


def _silent_processes(world: World, seconds: float = 5.0) -> list[int]:
    """Which processes don't know that something is stuck: those that are stuck."""
    with suppress(Exception):  # the store is gone with its machine; nothing is known then
        world.store.set(f"stuck/{world.rank}", "1")
        time.sleep(seconds)  # until the others have run out of patience, too
        return [rank for rank in range(world.size) if not world.store.check([f"stuck/{rank}"])]
    return []


# ---------------------------------------------------------------------------------------------------
# The model, as several processes train it


def fits_ddp(parameters: int, memory: float) -> bool:
    """Whether each process can hold the whole training state in half of `memory` bytes (0: unknown, so yes)."""
    return not memory or parameters * _BYTES_OF_STATE <= memory / 2


def choose_parallel(parallel: str, parameters: int, device: Device, world: World) -> str:
    """Resolve the setting `parallel` and print the choice: ddp, fsdp, or none for a single process."""
    if world.size == 1:
        return "none"
    fits = fits_ddp(parameters, device.total_memory())
    chosen = parallel if parallel != "auto" else "ddp" if fits else "fsdp"
    if chosen == "fsdp" and device.dtype == torch.float16:
        raise ConfigError("--parallel=fsdp computes in bfloat16 or float32, not in float16; set --dtype or take ddp")
    size = f"{parameters * _BYTES_OF_STATE / 1e9:,.1f} GB of weights, gradients and averages"
    why = f"auto: {size} {'fit' if fits else 'do not fit'} into each process"
    log.info(f"{world.size} processes, {chosen} ({why if parallel == 'auto' else 'as set'})")
    return chosen


def compile_model(model: GPT, parallel: str, device: Device) -> None:
    """Have `model` compiled when it is first called.

    Block by block with fsdp, which collects blocks one by one, and on CPUs, where all blocks are compiled in the time
    of one, and the rest is faster as it is.
    """
    for module in model.transformer.h if parallel == "fsdp" or device.type == "cpu" else [model]:
        module.compile()


def wrap(model: GPT, parallel: str, device: Device, world: World) -> Any:
    """`model`, still on the CPU, as training must call it: on its device, its gradients the mean over all processes.

    With fsdp each process keeps a share of every parameter and collects a block's others while it computes that block;
    a model of meta tensors comes out with memory, but without values.
    """
    if parallel != "fsdp":
        model.to(device.name)
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if parallel == "ddp" else model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    # blocks travel in the format they compute in; the residual stream and what the gradients add up in stay float32
    policy = MixedPrecisionPolicy(param_dtype=device.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device.name)
        model.tie_weights()
    return model


def no_gradient_exchange(network: Any, is_last: bool) -> AbstractContextManager[None]:
    """With ddp, gradients travel once per update, with the last micro-batch; fsdp has no room to keep them."""
    if isinstance(network, DistributedDataParallel) and not is_last:
        exchange: AbstractContextManager[None] = network.no_sync()
        return exchange
    return nullcontext()
