"""Before the first step: a run with everything in place for the next update, and what can be said about it."""

import dataclasses
import itertools
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import checkpoint, sharded
from nanogpt.checkpoint import Progress
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data import Dataset, Prefetcher, get_batch, is_prepared, open_dataset
from nanogpt.device import Device
from nanogpt.distributed import World, choose_parallel, compile_model, keep_log, wrap
from nanogpt.errors import CheckpointError, ConfigError, DataError
from nanogpt.files import atomic_write, locked, read_json, remove_unfinished, write_json
from nanogpt.interop.huggingface import folder_of, shape_of
from nanogpt.model import GPT
from nanogpt.optim import optimizer_for
from nanogpt.prepare import DATASETS, NEEDS_NO_NETWORK, prepare
from nanogpt.programs import PrepareConfig
from nanogpt.shape import GPT2_NAMES
from nanogpt.trained import checkpoint_of, load_model

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A training run: what it was asked for, and what training changes."""

    config: TrainConfig
    device: Device
    world: World
    dataset: Dataset
    model: GPT
    rows_of: Callable[[int], Tensor]  # step -> this process's rows of its batch: ids (micro-batches * B, T + 1)
    network: Any  # the model as training calls it: itself, or wrapped for several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    resumed_from: Path | None = None  # the checkpoint that it goes on from
    shards: Any = None  # the group of processes that write checkpoints together, if the state is spread over them


def start(config: TrainConfig, device: Device, world: World) -> Run:
    """Everything in place for the next update: of a new run, or of the one in `out_dir`.

    Raises `DataError` and `CheckpointError` for what can only be seen now.
    """
    dataset = open_or_prepare(config, world)
    torch.manual_seed(config.seed)
    cpu = dataclasses.replace(device, name="cpu")  # from where the model, or a share of it, goes to its device
    loaded = None
    if config.init_from == "resume":
        loaded = load_last(config, world)
        dataset.check_tokenizer(loaded.tokenizer, str(loaded.path))
        model = loaded.model(cpu, dropout=config.dropout)
        if config.eval_only and not loaded.is_unread:
            model.crop_block_size(min(config.block_size, model.config.block_size))
        else:
            check_agreement(config, loaded)
        log.info(f"resuming {loaded.path} after {loaded.progress.step} updates")
    elif config.init_from == "scratch":
        model = GPT(config.model_config(dataset.tokenizer.padded_vocab_size), config.zero_init)
    else:
        pretrained = load_model(config.init_from, cpu, dropout=config.dropout, data_dir=config.data_dir)
        dataset.check_tokenizer(pretrained.tokenizer, config.init_from)
        model = pretrained.model
        model.crop_block_size(config.block_size)
    config = with_shape_of(model, config).with_derived_rates()
    if loaded:
        print_changes(config, loaded)
        config = dataclasses.replace(config, init_from=loaded.config.get("init_from", "resume"))
    dataset.check_length(model.config.block_size)
    if config.mask_documents and dataset.tokenizer.end_of_text is None:
        raise ConfigError(
            f"mask_documents: the {dataset.tokenizer} of data set {config.dataset} has no token that ends a document"
        )
    return assemble(config, device, world, dataset, model, loaded)


def assemble(
    config: TrainConfig,
    device: Device,
    world: World,
    dataset: Dataset,
    model: GPT,
    loaded: checkpoint.Checkpoint | None = None,
) -> Run:
    """A run that trains `model`, which is still on the CPU; it goes on where `loaded` stopped, if given."""
    model.transformer.gradient_checkpointing = config.gradient_checkpointing
    is_unread = loaded is not None and loaded.is_unread  # and stays spread
    parallel = choose_parallel("fsdp" if is_unread else config.parallel, model.get_num_params(), device, world)
    if device.compile:
        log.info("compiling the model: takes a minute or so (--compile=False starts at once)")
        compile_model(model, parallel, device)
    network = wrap(model, parallel, device, world)
    optimizer = optimizer_for(model, config, device.dtype)
    for group in optimizer.param_groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        log.debug(f"optimizer: {len(sizes)} tensors, {sum(sizes):,} numbers, weight decay {group['weight_decay']:g}")
    scaler = torch.amp.GradScaler(device.type, enabled=device.dtype == torch.float16)
    if loaded and (is_unread or not config.eval_only):
        loaded.restore(model, optimizer, scaler)
    patience = timedelta(minutes=config.dist_timeout)
    return Run(
        config=config,
        device=device,
        world=world,
        dataset=dataset,
        model=model,
        rows_of=loader(config, dataset, model.config, device, world),
        network=network,
        optimizer=optimizer,
        scaler=scaler,
        progress=loaded.progress if loaded else Progress(),
        resumed_from=loaded.path if loaded else None,
        shards=torch.distributed.new_group(backend="gloo", timeout=patience) if parallel == "fsdp" else None,
    )


def load_last(config: TrainConfig, world: World) -> checkpoint.Checkpoint:
    """The newest whole checkpoint of the run in `out_dir`; which one that is, the main process finds out for all."""
    mine: list[checkpoint.Checkpoint] = []
    spread = world.size > 1 and config.parallel != "ddp"

    def load() -> Path:
        mine.append(checkpoint.load_last(config.out_dir, config.data_dir, spread=spread))
        return mine[0].path

    path = world.first(load)
    return mine[0] if mine else checkpoint.load(path, config.data_dir, spread=spread, is_checked=True)


def loader(
    config: TrainConfig, dataset: Dataset, shape: GPTConfig, device: Device, world: World
) -> Callable[[int], Tensor]:
    """A function from a step to this process's rows of its batch; made ahead and in pinned memory for a GPU."""
    rows = world.share(config.batch_size, config.gradient_accumulation_steps)

    def make(step: int) -> Tensor:
        x, y = get_batch(dataset.train, step, config, rows)
        return device.pin(torch.cat([x, y[:, -1:]], dim=1))

    return Prefetcher(make) if device.type == "cuda" else make


@contextmanager
def owned(run: Run) -> Iterator[None]:
    """Within the block, no other run can use `out_dir`; an earlier one there is set aside.

    Raises `ConfigError` if the folder is something else, of which files would be overwritten.
    """
    folder = Path(run.config.out_dir)
    run.world.first(lambda: refuse_other_folders(folder))
    with ExitStack() as stack:
        lock = locked(folder / "lock", f"a run in {run.config.out_dir}")
        run.world.first(lambda: stack.enter_context(lock))
        run.world.first(lambda: tidy(run))
        keep_log(run.world, folder / "logs")
        yield


def refuse_other_folders(folder: Path) -> None:
    """Raise `ConfigError` if there is a config.json, as models of other programs have, which is not a run's."""
    path = folder / "config.json"
    is_run = checkpoint.kept(folder) or (folder / "metrics.jsonl").exists()
    if path.exists() and not is_run and "out_dir" not in read_json(path):
        raise ConfigError(
            f"out_dir={folder}: {path} belongs to no run, and would be overwritten; choose another folder"
        )


def tidy(run: Run) -> None:
    """Make `out_dir` ready for this run: nothing half-written, no damaged checkpoints, no earlier run."""
    folder, progress = Path(run.config.out_dir), run.progress
    best = folder / "best.pt"
    remove_unfinished(folder)
    sharded.remove_unfinished(folder)
    if run.resumed_from:  # newer checkpoints were damaged, and must not take the place of good ones
        for path in itertools.takewhile(lambda path: path != run.resumed_from, checkpoint.kept(folder)):
            aside = path.with_name(f"{path.name}.damaged")
            try:
                checkpoint.remove(aside)  # a folder can't take another one's place
                os.replace(path, aside)
            except OSError as error:
                raise CheckpointError(f"cannot move the damaged {path} aside: {error.strerror}") from error
        if not best.exists() and progress.evaluated < 0 and math.isfinite(progress.best_val_loss):
            with atomic_write(best) as file, open(run.resumed_from, "rb") as source:
                shutil.copyfileobj(source, file)  # the original's only file is its best model, too
    else:
        checkpoint.set_previous_run_aside(run.config.out_dir)
    write_json(folder / "config.json", dataclasses.asdict(run.config))


def with_shape_of(model: GPT, config: TrainConfig) -> TrainConfig:
    """`config` with the shape that `model` came with; what was asked for otherwise does not apply, and is named."""
    names = {field.name for field in dataclasses.fields(config)} - {"dropout"}
    shape = {name: value for name, value in vars(model.config).items() if name in names}
    asked = {name: getattr(config, name) for name in shape}
    # a 0 that is no False asks for what follows from the rest
    ignored = [
        f"{name}={value}"
        for name, value in shape.items()
        if asked[name] != value and (asked[name] or type(asked[name]) is bool)
    ]
    if ignored:
        log.info(f"the shape of the loaded model counts: {', '.join(ignored)}")
    return dataclasses.replace(config, **shape)


def check_agreement(config: TrainConfig, loaded: checkpoint.Checkpoint) -> None:
    """Raise `ConfigError` if `config` asks for another run than the one that `loaded` is of.

    Of a model's shape, a setting at its default asks for nothing; nor does any where the run began with another model,
    which had its shape.
    """
    before = {**loaded.config, **vars(loaded.model_config)}
    shape = {field.name for field in dataclasses.fields(GPTConfig)} - {"dropout"}
    defaults = vars(TrainConfig())
    names = ["dataset", "seed", "sampling", "mask_documents", "optimizer"] + (
        ["rows"] if config.sampling == "epoch" else []
    )
    if "batch_size" in before:
        before["rows"] = before["batch_size"] * before.get("gradient_accumulation_steps", 1)
    if before.get("init_from", "scratch") in ("scratch", "resume"):
        names += [name for name in defaults if name in shape and getattr(config, name) != defaults[name]]
    differing = [
        f"{name} is {getattr(config, name)!r}, but was {before[name]!r}"
        for name in names
        if getattr(config, name) != before.get(name, getattr(config, name))
    ]
    if differing:
        raise ConfigError(
            f"{loaded.path} is of another run: {'; '.join(differing)}. To go on with it, give the settings that it was "
            f"started with; for a new run that begins with its weights, --init_from={config.out_dir} and a new out_dir"
        )


def print_changes(config: TrainConfig, loaded: checkpoint.Checkpoint) -> None:
    """Name the settings that differ from those that the resumed run had."""
    for name, value in dataclasses.asdict(config).items():
        before = loaded.config.get(name, value)
        if before != value and name not in ("init_from", "resume", "out_dir", "eval_only"):
            log.info(f"changed since the checkpoint: {name} = {value!r}, was {before!r}")
    if loaded.progress.step >= config.max_iters:
        log.info(f"nothing to train: max_iters={config.max_iters} is reached; a larger one goes on")


def open_or_prepare(config: TrainConfig, world: World) -> Dataset:
    """The data set of the run; one that needs no network is prepared if it is not there."""
    folder = Path(config.data_dir) / config.dataset
    if config.dataset in NEEDS_NO_NETWORK:
        if not world.first(lambda: is_prepared(folder)):
            log.info(f"preparing the data set {config.dataset} in {folder}")
            world.first(lambda: prepare(PrepareConfig(name=config.dataset, data_dir=config.data_dir)))
    elif not is_prepared(folder):
        script = Path("data", config.dataset, "prepare.py")
        if script.exists() and script.parent == folder:
            advice = f"prepare it with: python {script}"
        elif config.dataset in DATASETS:
            advice = f"prepare it with: python -m nanogpt prepare {config.dataset} --data_dir={config.data_dir}"
        else:
            advice = f"make it from your text with: python -m nanogpt prepare {config.dataset} --input=PATH"
            if config.data_dir != "data":
                advice += f" --data_dir={config.data_dir}"
        missing = " and ".join(name for name in ("train.bin", "val.bin") if not (folder / name).exists())
        raise DataError(f"data set {config.dataset!r}: {folder} has no {missing}; {advice}")
    return open_dataset(folder)


def prepared_dataset(config: TrainConfig) -> Dataset | None:
    """The data set of the run, if it is there."""
    folder = Path(config.data_dir) / config.dataset
    return open_dataset(folder) if is_prepared(folder) else None


def shape_to_train(config: TrainConfig) -> GPTConfig:
    """The shape that a run would have, as far as one can know before its data set is there."""
    if config.init_from == "resume":
        return checkpoint.load(checkpoint.find(config.out_dir, "last"), config.data_dir).model_config
    if path := checkpoint_of(config.init_from):
        return checkpoint.load(path, config.data_dir).model_config
    if config.init_from in GPT2_NAMES:
        return GPTConfig.preset(config.init_from, block_size=config.block_size, vocab_size=50257)
    if config.init_from != "scratch":
        return dataclasses.replace(shape_of(folder_of(config.init_from)), block_size=config.block_size)
    dataset = prepared_dataset(config)
    return config.model_config(dataset.tokenizer.padded_vocab_size if dataset else GPTConfig.vocab_size)


def dry_run(config: TrainConfig) -> int:
    """Print the resolved config and what follows from it; allocate and write nothing."""
    config = config.with_derived_rates()
    for name, value in dataclasses.asdict(config).items():
        print(f"{name} = {value!r}")
    shape, dataset = shape_to_train(config), prepared_dataset(config)
    with torch.device("meta"):
        parameters = GPT(shape).get_num_params()
    print(derived_values(config, shape, parameters, len(dataset.train) if dataset else None))
    return 0


def derived_values(config: TrainConfig, shape: GPTConfig, parameters: int, train_tokens: int | None) -> str:
    """What follows from the config, in two or three lines."""
    tokens = config.rows * shape.block_size
    epochs = f"{tokens * config.max_iters / train_tokens:.3g} epochs over" if train_tokens else "epochs unknown:"
    data = f"{train_tokens:,} training tokens" if train_tokens else f"data set {config.dataset} is not prepared"
    muon = (
        f"\nmuon: rate {config.muon_lr:g}, momentum {config.muon_momentum:g} over {config.lr_decay_iters:,} updates; "
        f"adamw for what is no matrix of a block: rate {config.learning_rate:g} at {shape.n_embd} channels"
    )
    return (
        f"model: {parameters / 1e6:.2f}M parameters, {shape.n_layer} layers, {shape.n_embd} channels, "
        f"vocabulary {shape.vocab_size}, context {shape.block_size}\n"
        f"tokens per iteration will be: {tokens:,} ({config.gradient_accumulation_steps} micro-batches of "
        f"{config.batch_size} x {shape.block_size}); {config.max_iters:,} iterations make "
        f"{tokens * config.max_iters:,}: {epochs} {data}" + (muon if config.optimizer == "muon" else "")
    )
