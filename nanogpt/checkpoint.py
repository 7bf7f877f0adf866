"""A run on disk, and how it comes back.

A checkpoint is the original nanoGPT's dictionary with everything of ours under one more key, `nanogpt`: it is the whole
run. ckpt.pt is the newest, ckpt.prev.pt, ckpt.prev2.pt, … are those before it; best.pt, without the optimizer, has the
lowest validation loss. FSDP runs write folders ckpt.dcp/STEP/: one file per process in the format of
torch.distributed.checkpoint and, written last, run.json with everything that is no tensor.
"""

import errno
import io
import itertools
import logging
import math
import operator
import os
import pickle
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from nanogpt.config import GPTConfig, TrainConfig, steps_and_seconds
from nanogpt.data import tokenizer_of_original
from nanogpt.device import Device
from nanogpt.distributed import Distributed, full_tensor, shard_like
from nanogpt.errors import CheckpointError, ConfigError, DamagedError, UserError
from nanogpt.files import atomic_write, locked, read_json, sync_folder, write_json
from nanogpt.gguf import load_gguf
from nanogpt.huggingface import load_pretrained
from nanogpt.lora import Adapter, add_adapters, digest, grow_vocab, merge_adapters
from nanogpt.model import GPT
from nanogpt.settings import SourceConfig
from nanogpt.tokenizer import Tokenizer, from_description

log = logging.getLogger(__name__)

FORMAT = 1  # of what lies under `nanogpt`
# What torch's .metadata consists of, beside dtypes: classes of torch and pathlib.
METADATA_NAMES = """Metadata MetadataIndex StorageMeta TensorStorageMetadata ChunkStorageMetadata TensorProperties
    _MEM_FORMAT_ENCODING _StorageInfo _get_layout Size PosixPath""".split()
RUN_FILES = "ckpt*.pt best.pt ckpt.dcp metrics.jsonl config.json wandb_id wandb tensorboard loss.png".split()


@dataclass
class TrainState:
    """How far a run has come."""

    step: int = 0  # steps done
    best_val_loss: float = math.inf
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # spent on steps so far, without evaluating and saving
    evaluated: int = -1  # step of the last evaluation
    skipped: int = 0  # steps that were skipped because loss or gradient was not finite


@dataclass
class Checkpoint:
    """A checkpoint in memory, on the CPU; what is on `meta` is still on disk, until `restore`."""

    path: Path
    weights: dict[str, Tensor]
    model_config: GPTConfig
    config: dict[str, Any]  # of the training run
    state: TrainState
    tokenizer: Tokenizer
    optimizer: dict[str, Any] | None  # None in best.pt
    scaler: dict[str, Any]
    adapter: Adapter | None  # then `weights` are only what is trained beside its base
    is_sharded: bool  # the weights are still on disk: `restore` brings each process its shard of them

    def build_model(self, device: str = "cpu", dropout: float = 0.0, merge: bool = True) -> GPT:
        """Return the model in evaluation mode, on `device`; on `meta` if `is_sharded`. `merge`: without adapters."""
        if self.adapter:
            model = self.build_adapted(self.adapter, dropout)
            model = merge_adapters(model) if merge else model
        else:
            model = GPT.from_weights(replace(self.model_config, dropout=dropout), self.weights)
        return (model if self.is_sharded else model.to(device)).eval()

    def build_adapted(self, adapter: Adapter, dropout: float) -> GPT:
        """Return the base with its adapters. Raises `CheckpointError` if it is not the base of the training."""
        model = load_model(adapter.base, dropout=dropout, data_dir=self.config.get("data_dir", "data")).model
        model.crop_block_size(self.model_config.block_size)
        if digest(model) != adapter.sha256:
            raise CheckpointError(f"{self.path} holds adapters for {adapter.base}, whose weights have changed since")
        if self.model_config.vocab_size > model.config.vocab_size:
            grow_vocab(model, self.model_config.vocab_size)
        add_adapters(model, adapter, has_new_tokens="lm_head.weight" in self.weights)
        if not self.is_sharded:
            model.load_state_dict(self.weights, strict=False)
        return model

    def restore(self, model: GPT, optimizer: Optimizer, scaler: GradScaler) -> None:
        """Bring back optimizer state, loss scale, and weights that are still on disk. All processes must call.

        Settings of the optimizer stay as they are. Raises `CheckpointError` if the state is another optimizer's.
        """
        if self.optimizer is None:
            raise CheckpointError(f"{self.path} has no optimizer state: it can be sampled, but not resumed")
        saved = self.config.get("optimizer", "adamw")  # The original has no other.
        if type(optimizer).__name__.lower() != saved:
            raise CheckpointError(f"{self.path} is of a run with optimizer={saved}; --init_from=FILE starts a new run")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states: dict[int, dict[str, Any]] = {}
        for number, values in self.optimizer["state"].items():
            parameter, states[number] = parameters[number], {}
            for name, value in values.items():
                # Early versions of the original ordered parameters by name. AdamW's kernel does not compare sizes: it
                # would write beyond the end of a moment that is too small.
                if name.startswith("exp_avg") and value.shape != parameter.shape:
                    raise CheckpointError(f"{self.path}: {name} of parameter {number} is not of the parameter's shape")
                if value.is_meta:  # to be read below
                    value = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty(value.shape)
                states[number][name] = shard_like(parameter, value)
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        if self.path.is_dir():
            load_shards(self.path, run_tensors(model, optimizer))
        if self.scaler and scaler.is_enabled():
            scaler.load_state_dict(self.scaler)
        self.weights, self.optimizer = {}, None  # model and optimizer own them now


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """Writes the checkpoints of one run in the background, one at a time, and never over the last good one.

    The main process writes whole files. In a sharded run every process writes its shard, and all must call.
    """

    def __init__(self, config: TrainConfig, dist: Distributed, is_sharded: bool) -> None:
        self.config, self.dist, self.is_sharded, self.folder = config, dist, is_sharded, Path(config.out_dir)
        self.steps, self.seconds = steps_and_seconds(config.checkpoint_interval) or (0, 0.0)
        self.last = time.monotonic()
        self.executor, self.written = ThreadPoolExecutor(1), Future[None]()
        self.written.set_result(None)
        # The threads that write talk to each other while the training does: they need a group of their own.
        timeout = timedelta(minutes=config.dist_timeout)
        self.group = torch.distributed.new_group(backend="gloo", timeout=timeout) if is_sharded else None

    def is_due(self, step: int) -> bool:
        """Return whether `checkpoint_interval` asks for a checkpoint after `step` steps."""
        is_due = step % self.steps == 0 if self.steps else 0 < self.seconds < time.monotonic() - self.last
        return self.dist.any(is_due) if self.is_sharded else is_due

    def save(
        self, model: GPT, optimizer: Optimizer, scaler: GradScaler, state: TrainState, tokenizer: Tokenizer,
        *, is_best: bool = False,
    ) -> None:  # fmt: skip
        """Copy the run as it is now, and write it while training continues. A failure is a warning.

        Waits until the checkpoint before it is written: there is one copy at a time.
        """
        self.written.exception()  # waits
        self.last = time.monotonic()
        if not self.is_sharded and not self.dist.is_main:
            return
        content: dict[str, Any] = {
            "model_args": original_arguments(model.config), "iter_num": state.step,
            "best_val_loss": state.best_val_loss, "config": asdict(self.config),
            "nanogpt": {"format": FORMAT, "model_config": asdict(model.config), "tokenizer": tokenizer.describe(),
                        "adapter": asdict(model.adapter) if model.adapter else None,
                        "scaler": scaler.state_dict(), **asdict(state)},
        }  # fmt: skip
        weights, shards = {}, None
        if is_best or not self.is_sharded:
            for name, weight in trained_weights(model).items():
                full = full_tensor(weight)  # an all-gather, for which all processes are needed
                if self.dist.is_main:
                    weights[name] = on_cpu(full)
            if model.config.tied_head and "transformer.wte.weight" in weights:
                weights["lm_head.weight"] = weights["transformer.wte.weight"]
        if self.is_sharded:
            folder = self.folder / "ckpt.dcp" / str(state.step)
            # A resumed run that evaluates and then saves again writes run.json only: the shards are those that it read.
            if not self.dist.broadcast_from_main((folder / "run.json").exists):
                from torch.distributed.checkpoint.filesystem import FileSystemWriter
                from torch.distributed.checkpoint.state_dict_saver import async_save

                # Copying ahead would open a CUDA context on GPU 0 in the writing thread of every process.
                writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
                shards = async_save(run_tensors(model, optimizer), storage_writer=writer, process_group=self.group)
        else:
            content["optimizer"] = on_cpu(optimizer.state_dict())
        self.written = self.executor.submit(self.write, content, weights, shards, is_best)

    def write(self, content: dict[str, Any], weights: dict[str, Tensor], shards: Any, is_best: bool) -> None:
        """Write best.pt, then ckpt.pt: a run that is killed in between repeats the evaluation and writes both again."""
        keep, newest = self.config.keep_checkpoints, self.folder / "ckpt.pt"
        try:
            if shards:
                shards.result()  # all processes have written theirs
            if not self.dist.is_main:
                return
            if is_best:
                write_file(self.folder / "best.pt", {**content, "model": weights, "optimizer": None})
            if self.is_sharded:
                newest = self.folder / "ckpt.dcp" / str(content["iter_num"])
                write_json(newest / "run.json", content)
                sync_folder(newest.parent)
            else:
                write_file(newest, {"model": weights, **content}, keep)
            for path in [path for path in checkpoints_of(self.folder) if path != newest][keep - 1 :]:
                remove(path)
        except BaseException as error:  # torch's CheckpointException is a BaseException
            failure = error if isinstance(error, UserError) else UserError(f"cannot write a checkpoint: {error}")
            log.warning(f"{failure}; training continues, and earlier checkpoints stay")
            raise failure from None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Wait until the last checkpoint is written. Raises `UserError` if that failed and nothing else did."""
        if (failure := self.written.exception()) and error is None:
            raise failure


def trained_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights that a checkpoint holds: those that are trained, with a tied head once."""
    weights = model.state_dict(keep_vars=True)  # keep_vars: FSDP still holds some full after an evaluation
    if model.config.tied_head:
        del weights["lm_head.weight"]
    return {name: weight for name, weight in weights.items() if weight.requires_grad}


def on_cpu(value: Any) -> Any:
    """Return a copy of nested dictionaries with their tensors on the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def write_file(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Write a whole checkpoint atomically. With `keep` above 1, the ckpt.pt before it becomes ckpt.prev.pt, and so on.

    If the run is killed between two renames, one of these names is missing, but no checkpoint is lost.
    """
    with atomic_write(path) as file:
        try:
            torch.save(content, file.name)
        except RuntimeError as error:  # torch does not say why
            raise OSError(f"the disk is full or fails ({str(error).splitlines()[0]})") from error
        names = file_names(path.parent, keep)
        free = next((n for n, name in enumerate(names) if not name.exists()), keep - 1)
        for n in range(free, 0, -1):
            os.replace(names[n - 1], names[n])


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------
# The run folder


def file_names(folder: Path, count: int) -> list[Path]:
    """Return the names of the newest `count` whole checkpoints, the newest first."""
    return [folder / f"ckpt{age}.pt" for age in ["", ".prev", *(f".prev{n}" for n in range(2, count))][:count]]


def checkpoints_of(out_dir: str | Path) -> list[Path]:
    """Return the checkpoints that the run in `out_dir` can resume from, the newest first."""
    files = [path for path in file_names(Path(out_dir), 100) if path.exists()]
    folders = [file.parent for file in Path(out_dir).glob("ckpt.dcp/[0-9]*/run.json")]  # it is written last
    # Names tell the age of files, steps that of folders, and of both in a run that was sharded for a time.
    return sorted(files + folders, key=step_of, reverse=True) if folders else files


def step_of(path: Path) -> float:
    """Return the step of a checkpoint; infinity if it cannot be read."""
    try:
        return int(path.name if path.is_dir() else torch.load(path, "cpu", weights_only=True, mmap=True)["iter_num"])
    except Exception:  # torch and pickle raise many kinds
        return math.inf


def find_checkpoint(out_dir: str | Path, which: str) -> Path:
    """Return the checkpoint `which` (auto, best, last or a file) of the run in `out_dir`; auto: the best model.

    Raises `CheckpointError` if there is none.
    """
    best, kept = list(Path(out_dir).glob("best.pt")), checkpoints_of(out_dir)
    found = {"auto": best + kept, "best": best, "last": kept}.get(which, [Path(which)])
    if not found:
        raise CheckpointError(f"{out_dir} holds no trained model; train one first, or name another folder")
    return found[0]


@contextmanager
def use_out_dir(config: TrainConfig, dist: Distributed, resumed_from: Path | None) -> Iterator[None]:
    """Keep other runs out of `out_dir` during the block. A new run first moves an earlier one to previous-N/."""
    folder, lock = Path(config.out_dir), ExitStack()

    def prepare() -> None:
        if (path := folder / "config.json").exists() and "out_dir" not in read_json(path) and resumed_from is None:
            raise ConfigError(f"out_dir={folder} holds files of another program; choose another folder")
        lock.enter_context(locked(folder / "lock", f"a run in {folder}"))
        for path in [*folder.glob("*.[0-9]*.tmp"), *folder.glob("ckpt.dcp/[0-9]*")]:
            if not (path / "run.json").exists():  # left by a process that was killed
                remove(path)
        earlier = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
        if earlier and resumed_from is None:
            aside = next(path for n in itertools.count(1) if not (path := folder / f"previous-{n}").exists())
            aside.mkdir()
            for path in earlier:
                os.replace(path, aside / path.name)
            log.info(f"{folder} held an earlier run: moved to {aside}")
        kept = checkpoints_of(folder)
        if resumed_from in kept:
            # Newer ones are damaged, and would take the place of good ones.
            for path in kept[: kept.index(resumed_from)]:
                remove(path)
        write_json(folder / "config.json", asdict(config))

    with lock:
        dist.broadcast_from_main(prepare)
        yield


# ---------------------------------------------------------------------------------------------------
# Reading


def load_latest(
    out_dir: str | Path, data_dir: str = "data", dist: Distributed | None = None, *, sharded: bool = False
) -> Checkpoint:
    """Return the newest checkpoint in `out_dir` that is not damaged; the processes verify it together."""
    dist = dist or Distributed()
    for path in dist.broadcast_from_main(lambda: checkpoints_of(out_dir) or [find_checkpoint(out_dir, "last")]):
        is_damaged = False
        try:
            verify_checksums(path, dist.rank, dist.world_size)
        except DamagedError as error:
            log.warning(f"{error}; trying the one before it")
            is_damaged = True
        if not dist.any(is_damaged):
            break
    else:
        raise DamagedError(f"all checkpoints in {out_dir} are damaged; to use its best model: --init_from={out_dir}")
    loaded = load_checkpoint(path, data_dir, sharded=sharded, verify=False)
    if not Path(out_dir, "best.pt").exists():
        loaded.state.best_val_loss = math.inf  # so that the next evaluation writes it
    return loaded


def load_checkpoint(path: Path, data_dir: str = "data", *, sharded: bool = False, verify: bool = True) -> Checkpoint:
    """Read a checkpoint of ours or of the original, without running code that it may contain.

    The original keeps a character vocabulary with the data set, below `data_dir`. With `sharded`, a folder's weights
    are left to `restore`. Raises `CheckpointError`, which is a `DamagedError` if checksums are wrong.
    """
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    if verify:
        verify_checksums(path)
    try:
        if path.is_dir():
            content = read_folder(path, sharded)
        else:  # mapped, processes that take shards of it share its pages
            content = torch.load(path, "cpu", weights_only=True, mmap=sharded)
        ours = content.get("nanogpt", {})
        if ours.get("format", FORMAT) > FORMAT:
            raise CheckpointError(f"{path} was written by a newer version of nanoGPT (format {ours['format']})")
        model_config = GPTConfig(**(ours.get("model_config") or content["model_args"]))
        data = Path(data_dir, str(content["config"].get("dataset")))
        tokenizer = from_description(ours["tokenizer"]) if ours else tokenizer_of_original(data)
        if not ours and tokenizer.vocab_size > model_config.vocab_size:
            n_entries = model_config.vocab_size
            raise CheckpointError(f"{path} has no vocabulary of {n_entries} entries: put its meta.pkl into {data}")
        tokenizer.vocab_size = min(tokenizer.vocab_size, model_config.vocab_size)  # another model's may have more
        # Compiled models and those within DDP have prefixes, the original's oldest ones attention masks.
        weights = {name.replace("_orig_mod.", "").replace("module.", ""): weight
                   for name, weight in content["model"].items() if not name.endswith(".attn.bias")}  # fmt: skip
        more = {name: ours[name] for name in ("tokens", "seconds", "evaluated", "skipped") if name in ours}
        state = TrainState(content["iter_num"], float(content["best_val_loss"]), **more)
        optimizer, scaler = content["optimizer"], ours.get("scaler", {})
        adapter = Adapter(**ours["adapter"]) if ours.get("adapter") else None
        config, is_sharded = content["config"], sharded and path.is_dir()
        return Checkpoint(path, weights, model_config, config, state, tokenizer, optimizer, scaler, adapter, is_sharded)
    except (UserError, OSError):
        raise
    except Exception as error:  # torch, pickle and Python raise many kinds
        raise CheckpointError(f"{path} cannot be read as a checkpoint of a GPT: {error!r}") from error


def verify_checksums(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """Raise `DamagedError` if bytes are not what was written, in this process's share of them."""
    try:
        archives: Any = [path][rank:]
        if path.is_dir():  # each tensor is an archive in the file of the process that had it
            parts = list(shard_reader(path).read_metadata().storage_data.values())[rank::world_size]
            files = {part.relative_path: np.memmap(path / part.relative_path) for part in parts}
            archives = (io.BytesIO(files[p.relative_path][p.offset : p.offset + p.length].tobytes()) for p in parts)
        for archive in archives:
            with zipfile.ZipFile(archive) as file:
                if wrong := file.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")
    except Exception as error:  # zipfile and pickle raise many kinds
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.EINVAL):
            raise  # not the file, but its disk or its permissions
        raise DamagedError(f"{path} is damaged: {error}") from error


# ---------------------------------------------------------------------------------------------------
# Folders of torch.distributed.checkpoint, which is imported where it is needed: that takes half a second


def run_tensors(model: GPT, optimizer: Optimizer) -> dict[str, Any]:
    """Return all tensors of a run; on disk they are model.NAME and optimizer.NUMBER.NAME."""
    return {"model": trained_weights(model), "optimizer": optimizer.state_dict()["state"]}


def load_shards(folder: Path, tensors: dict[str, Any], no_dist: bool = False) -> None:
    """Read a folder into tensors that are there, full or sharded. All processes must call, but with `no_dist`."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns if there is only one process
            load(tensors, storage_reader=shard_reader(folder), no_dist=no_dist)
    except CheckpointException as error:  # a BaseException
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def read_folder(folder: Path, sharded: bool) -> dict[str, Any]:
    """Return what ckpt.pt would hold, with the optimizer state on `meta`, and with `sharded` the weights as well."""
    content = read_json(folder / "run.json")
    weights: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for name, saved in shard_reader(folder).read_metadata().state_dict_metadata.items():
        kind, number, *rest = name.split(".", 2)
        if kind == "optimizer":
            states.setdefault(int(number), {})[rest[0]] = torch.empty(saved.size, device="meta")
        else:
            dtype, device = saved.properties.dtype, "meta" if sharded else "cpu"
            weights[name.removeprefix("model.")] = torch.empty(saved.size, dtype=dtype, device=device)
    if not sharded:
        load_shards(folder, {"model": weights}, no_dist=True)
    if content["nanogpt"]["model_config"]["tied_head"] and "transformer.wte.weight" in weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {"model": weights, "optimizer": {"state": states}, **content}


def shard_reader(folder: Path) -> Any:
    """Return torch's reader of a folder, whose pickled .metadata it reads without running what may be hidden in it."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    reader: Any = FileSystemReader(folder)
    metadata = MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    reader.read_metadata = lambda *_, **__: metadata
    return reader


class MetadataUnpickler(pickle.Unpickler):
    """Makes the objects that torch's .metadata consists of, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class of that name if it is known. Raises `UnpicklingError`."""
        if (module, name) == ("builtins", "getattr"):  # Python 3.11's way to name a member of an enumeration
            return operator.getitem
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module.partition(".")[0] in ("torch", "pathlib") and name in METADATA_NAMES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


# ---------------------------------------------------------------------------------------------------
# Models for use, and for the original


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, and what is known of its training."""

    model: GPT
    tokenizer: Tokenizer
    name: str  # for messages
    config: dict[str, Any] = field(default_factory=dict)  # empty if unknown
    state: TrainState = field(default_factory=TrainState)


def load_trained(config: SourceConfig, device: Device, merge: bool = True) -> TrainedModel:
    """Return the model that `init_from`, `out_dir` and `checkpoint` name. merge: add its adapters to the weights."""
    data_dir = getattr(config, "data_dir", "") or "data"
    is_run = config.init_from == "resume"
    source = str(find_checkpoint(config.out_dir, config.checkpoint)) if is_run else config.init_from
    trained = load_model(source, device.name, data_dir=data_dir, which=config.checkpoint, merge=merge)
    if config.add_bos != "auto":
        if config.add_bos and trained.tokenizer.bos is None:
            raise ConfigError(f"add_bos=True: the {trained.tokenizer} has no start token")
        trained.tokenizer.adds_bos = config.add_bos
    return trained


def load_model(
    init_from: str, device: str = "cpu", *, dropout: float = 0.0, data_dir: str = "data", which: str = "auto",
    merge: bool = True,
) -> TrainedModel:  # fmt: skip
    """Return a model: of a run folder or a checkpoint, ours or the original's, Hugging Face's format or a GGUF file.

    which: of a run folder's checkpoints, see `find_checkpoint`. merge: add a run's adapters to the weights.
    """
    path = Path(init_from)
    if path.is_dir() and (checkpoints_of(path) or (path / "best.pt").exists()):
        path = find_checkpoint(path, which)
    if path.suffix == ".gguf":
        return TrainedModel(*load_gguf(path, device, dropout=dropout), init_from)
    if path.suffix != ".pt" and not path.is_file() and not (path / "run.json").exists():
        return TrainedModel(*load_pretrained(init_from, device, dropout=dropout), init_from)
    log.info(f"loading {path}")
    loaded = load_checkpoint(path, data_dir)
    model, name = loaded.build_model(device, dropout, merge), f"{path}, {loaded.state.step} steps"
    return TrainedModel(model, loaded.tokenizer, name, loaded.config, loaded.state)


def original_arguments(config: GPTConfig) -> dict[str, Any]:
    """Return the seven arguments of the original's GPTConfig, or all of ours for a network that it has not."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    arguments = {name: getattr(config, name) for name in names}
    known = vars(GPTConfig(**arguments, rope_theta=config.rope_theta))
    # OpenAI's weights expect the tanh form of GELU; the original computes the exact one, which differs by 0.1 %.
    is_known = all(value in (known[name], "gelu_tanh") for name, value in vars(config).items())
    return arguments if is_known else asdict(config)
