"""The training program. Reads from top to bottom: `train` is the story, the functions below it are its steps."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nanogpt import checkpoint
from nanogpt.checkpoint import Progress
from nanogpt.config import GPT2_SIZES, GPTConfig, TrainConfig
from nanogpt.data.batches import EVALUATION, TRAINING, check_length, gather, window_starts
from nanogpt.data.prepare import DATASETS, NEEDS_NO_NETWORK
from nanogpt.data.tokenizer import GPT2Tokenizer
from nanogpt.data.tokens import Dataset, is_prepared, open_dataset
from nanogpt.device import Device, choose
from nanogpt.distributed import World, joined, no_gradient_exchange, parallel, this_process
from nanogpt.errors import ConfigError, DataError, DivergedError
from nanogpt.interop.huggingface import gpt2_shape, load_gpt2
from nanogpt.model import GPT
from nanogpt.optim import adamw, learning_rate_at
from nanogpt.report.metrics import Metrics
from nanogpt.report.progress import Console

STOPPED = 75  # exit code of a run that a signal has stopped and that can be resumed


@dataclass
class Run:
    """A training run: what it was asked for, and what training changes."""

    config: TrainConfig
    device: Device
    world: World
    dataset: Dataset
    model: GPT
    network: Any  # the model as training calls it: itself, or wrapped for several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress


def train(config: TrainConfig) -> int:
    """Train as `config` says. Returns the exit code: 0 done, 75 stopped by a signal and resumable."""
    world = this_process()
    device = choose(config.device, config.dtype, config.compile, world.local_rank if world.size > 1 else None)
    world.share(config.gradient_accumulation_steps, "gradient_accumulation_steps")  # each takes whole micro-batches
    if config.dry_run:
        return dry_run(config) if world.is_main else 0
    with joined(world, config.backend, device.type):
        run = start(config, device, world)
        print(derived_values(run.config, run.model.config, run.model.get_num_params(), len(run.dataset.train)))
        if not config.eval_only:
            return train_until_done(run)
        losses = estimate_losses(run, stopping=lambda: False)
        assert losses
        print(f"step {run.progress.step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        return 0


def train_until_done(run: Run) -> int:
    """The loop: batch, update, now and then an evaluation and a checkpoint. Returns the exit code."""
    config, device, world, model, progress = run.config, run.device, run.world, run.model, run.progress
    if world.is_main:
        if config.init_from != "resume":
            checkpoint.set_previous_run_aside(config.out_dir)
        checkpoint.save_config(config)
    model.train()
    with (
        stop_signals(run) as stopping,
        Metrics(config, progress.step if config.init_from == "resume" else None, is_main=world.is_main) as metrics,
        Console(total=config.max_iters, done=progress.step, is_main=world.is_main) as console,
    ):
        seconds, updates = 0.0, 0  # since the last line
        stopped = False
        while not stopped:
            step = progress.step
            is_last = step >= config.max_iters
            if (step % config.eval_interval == 0 or is_last) and progress.evaluated != step:
                stopped = not evaluate_and_save(run, metrics, console, stopping)
            if is_last or stopped:
                break

            began = time.perf_counter()
            learning_rate = learning_rate_at(step, config)
            x, y = next_batch(run, step)
            loss, grad_norm = update(run, x, y, learning_rate)
            stopped = stopping()
            is_due = step % config.log_interval == 0 or step + 1 == config.max_iters
            if is_due or (step + 1) % config.eval_interval == 0:
                device.synchronize()  # what comes next is not training and must not be in its time
            elapsed = time.perf_counter() - began
            seconds, updates = seconds + elapsed, updates + 1
            progress.step += 1
            progress.tokens += config.rows * model.config.block_size
            progress.seconds += elapsed

            if is_due:
                values = {
                    "train/loss": world.mean(loss).item(),
                    "lr": learning_rate,
                    "grad_norm": grad_norm.item(),
                    "tokens_per_second": config.rows * model.config.block_size * updates / seconds,
                }
                line = f"iter {step}: loss {values['train/loss']:.4f}, time {seconds / updates * 1000:.2f}ms"
                if peak := device.peak_flops():
                    values["mfu"] = model.flops_per_token() * values["tokens_per_second"] / (peak * world.size)
                    line += f", mfu {values['mfu'] * 100:.2f}%"
                console.line(f"{line}, {values['tokens_per_second']:,.0f} tokens/s")
                metrics.write(progress, values)
                seconds, updates = 0.0, 0
            console.advance()

        if stopped:
            save(run, "ckpt.pt")
            world.wait()  # a process that leaves early makes torchrun end the others
            console.line(
                f"stopped after {progress.step} updates and saved; the same command with --init_from=resume goes on"
            )
            return STOPPED
    print(
        f"done: {progress.step} updates, {progress.seconds:.1f} s of training, best validation loss "
        f"{progress.best_val_loss:.4f}; to see text: python sample.py --out_dir={config.out_dir}"
    )
    return 0


# ---------------------------------------------------------------------------------------------------
# Before the first step


def start(config: TrainConfig, device: Device, world: World) -> Run:
    """Everything in place for the next update: of a new run, or of the one in `out_dir`.

    Raises `DataError` and `CheckpointError` for what can only be seen now.
    """
    dataset = open_or_prepare(config, world)
    torch.manual_seed(config.seed)
    loaded = None
    if config.init_from == "resume":
        loaded = checkpoint.load(checkpoint.find(config.out_dir, "last"), config.data_dir)
        dataset.check_tokenizer(loaded.tokenizer, str(loaded.path))
        model = loaded.model(device, dropout=config.dropout)
        if config.block_size < model.config.block_size and not config.eval_only:
            raise ConfigError(  # the optimizer's state would not fit a shorter context
                f"block_size={config.block_size}, but {loaded.path} has {model.config.block_size}, and a run is "
                f"resumed with its own context length; set --block_size={model.config.block_size}"
            )
        model.crop_block_size(min(config.block_size, model.config.block_size))
        print(f"resuming {loaded.path} after {loaded.progress.step} updates")
    elif config.init_from == "scratch":
        model = GPT(config.model_config(dataset.tokenizer.padded_vocab_size)).to(device.name)
    else:
        dataset.check_tokenizer(GPT2Tokenizer(), config.init_from)
        model = load_gpt2(config.init_from, device.name, dropout=config.dropout)
        model.crop_block_size(config.block_size)
    config = with_shape_of(model, config)
    if loaded:
        print_changes(config, loaded)
    check_length(dataset.train, model.config.block_size, f"the training split of {config.dataset}")
    check_length(dataset.val, model.config.block_size, f"the validation split of {config.dataset}")
    model.transformer.gradient_checkpointing = config.gradient_checkpointing
    optimizer = adamw(model, config.learning_rate, (config.beta1, config.beta2), config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=device.dtype == torch.float16)
    if loaded and not config.eval_only:
        loaded.restore(optimizer, scaler, device)
    progress = loaded.progress if loaded else Progress()
    if world.rank:  # every process drops out other values; a checkpoint has the main one's random state
        torch.manual_seed(config.seed + world.rank + world.size * progress.step)
    if device.compile:
        print("compiling the model: takes a minute or so (--compile=False starts at once)")
        model.compile()
    return Run(config, device, world, dataset, model, parallel(model, world), optimizer, scaler, progress)


def with_shape_of(model: GPT, config: TrainConfig) -> TrainConfig:
    """`config` with the shape that `model` came with; what was asked for otherwise does not apply, and is named."""
    shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    ignored = [f"{name}={value}" for name, value in shape.items() if getattr(config, name) != value]
    if ignored:
        print(f"the shape of the loaded model counts: {', '.join(ignored)}")
    return dataclasses.replace(config, **shape)


def print_changes(config: TrainConfig, loaded: checkpoint.Checkpoint) -> None:
    """Name the settings that differ from those that the resumed run had."""
    for name, value in dataclasses.asdict(config).items():
        before = loaded.config.get(name, value)
        if before != value and name not in ("init_from", "out_dir", "eval_only"):
            print(f"changed since the checkpoint: {name} = {value!r}, was {before!r}")
    if loaded.progress.step >= config.max_iters:
        print(f"nothing to train: max_iters={config.max_iters} is reached; a larger one goes on")


def open_or_prepare(config: TrainConfig, world: World) -> Dataset:
    """The data set of the run; one that needs no network is prepared if it is not there."""
    folder = Path(config.data_dir) / config.dataset
    if config.dataset in NEEDS_NO_NETWORK:
        if world.is_main and not is_prepared(folder):
            print(f"preparing the data set {config.dataset} in {folder}")
            DATASETS[config.dataset](folder)
        world.wait()
    elif not is_prepared(folder):
        script = Path("data", config.dataset, "prepare.py")
        if script.exists() and script.parent == folder:
            advice = f"prepare it with: python {script}"
        elif config.dataset in DATASETS:
            advice = f"prepare it with: python -m nanogpt prepare {config.dataset} --data_dir={config.data_dir}"
        else:
            advice = f"put them there (GPT-2 tokens as uint16), or take one of the known: {', '.join(DATASETS)}"
        missing = " and ".join(name for name in ("train.bin", "val.bin") if not (folder / name).exists())
        raise DataError(f"data set {config.dataset!r}: {folder} has no {missing}; {advice}")
    return open_dataset(folder)


def dry_run(config: TrainConfig) -> int:
    """Print the resolved config and what follows from it; allocate and write nothing."""
    for name, value in dataclasses.asdict(config).items():
        print(f"{name} = {value!r}")
    folder = Path(config.data_dir) / config.dataset
    dataset = open_dataset(folder) if is_prepared(folder) else None
    if config.init_from == "resume":
        shape = checkpoint.load(checkpoint.find(config.out_dir, "last"), config.data_dir).model_config
    elif config.init_from in GPT2_SIZES:
        n_layer, n_head, n_embd = GPT2_SIZES[config.init_from]
        shape = GPTConfig(config.block_size, 50257, n_layer, n_head, n_embd)
    elif config.init_from != "scratch":
        shape = dataclasses.replace(gpt2_shape(Path(config.init_from)), block_size=config.block_size)
    else:
        shape = config.model_config(dataset.tokenizer.padded_vocab_size if dataset else GPTConfig.vocab_size)
    with torch.device("meta"):
        parameters = GPT(shape).get_num_params()
    print(derived_values(config, shape, parameters, len(dataset.train) if dataset else None))
    return 0


def derived_values(config: TrainConfig, shape: GPTConfig, parameters: int, train_tokens: int | None) -> str:
    """What follows from the config, in two lines."""
    tokens = config.rows * shape.block_size
    epochs = f"{tokens * config.max_iters / train_tokens:.3g} epochs over" if train_tokens else "epochs unknown:"
    data = f"{train_tokens:,} training tokens" if train_tokens else f"data set {config.dataset} is not prepared"
    return (
        f"model: {parameters / 1e6:.2f}M parameters, {shape.n_layer} layers, {shape.n_embd} channels, "
        f"vocabulary {shape.vocab_size}, context {shape.block_size}\n"
        f"tokens per iteration will be: {tokens:,} ({config.gradient_accumulation_steps} micro-batches of "
        f"{config.batch_size} x {shape.block_size}); {config.max_iters:,} iterations make "
        f"{tokens * config.max_iters:,}: {epochs} {data}"
    )


@contextmanager
def stop_signals(run: Run) -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C, SIGTERM and SIGHUP only ask to stop; a second one interrupts at once.

    Yields a function that tells whether one has come to any process.
    """
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # the terminal has gone; nohup ignores it
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()
        os.write(2, b"\nstopping after this step (once more to leave at once)\n")  # print is not safe in a handler

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: run.world.any(bool(received))
    finally:
        restore()


# ---------------------------------------------------------------------------------------------------
# The steps of the loop


def next_batch(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """This process's rows of the global batch of `step`: inputs and targets, each (micro-batches * B, T)."""
    config, tokens, T = run.config, run.dataset.train, run.model.config.block_size
    starts = window_starts(len(tokens), T, seed=config.seed, stream=TRAINING, step=step, rows=config.rows)
    rows = run.world.share(config.rows, "rows")
    x, y = gather(tokens, starts[rows.start : rows.stop], T, run.model.config.vocab_size)
    return run.device.put(x), run.device.put(y)


def update(run: Run, x: Tensor, y: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
    """One update of the weights from this process's rows x, y (micro-batches * B, T) of the global batch.

    Returns the mean loss over these rows and the gradient norm (of all rows) before clipping, on the device.
    """
    config, model, optimizer, scaler = run.config, run.model, run.optimizer, run.scaler
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    total = torch.zeros((), device=x.device)
    shape = (-1, config.batch_size, x.shape[1])
    micro_batches = list(zip(x.view(shape), y.view(shape), strict=True))
    for n, (inputs, targets) in enumerate(micro_batches, start=1):
        with no_gradient_exchange(run.network, is_last=n == len(micro_batches)):
            with run.device.autocast():
                _, loss = run.network(inputs, targets, return_logits=False)
                loss = loss / len(micro_batches)  # gradients add up over the micro-batches
            total += loss.detach()
            scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


@torch.no_grad()
def estimate_losses(run: Run, stopping: Callable[[], bool]) -> dict[str, float] | None:
    """Mean loss of `eval_iters` batches of each split: the same batches at every evaluation of every run.

    None as soon as `stopping` says so: an evaluation that was broken off says nothing.
    """
    config, model, T = run.config, run.model, run.model.config.block_size
    losses = {}
    model.eval()
    for split in ("train", "val"):
        tokens = run.dataset.split(split)
        total = torch.zeros((), device=run.device.name)
        for k in range(config.eval_iters):
            if stopping():
                return None
            if k % run.world.size != run.world.rank:
                continue  # another process's
            starts = window_starts(len(tokens), T, seed=0, stream=EVALUATION, step=k, rows=config.batch_size)
            x, y = gather(tokens, starts, T, model.config.vocab_size)
            with run.device.autocast():
                _, loss = model(run.device.put(x), run.device.put(y), return_logits=False)
            total += loss
        losses[split] = run.world.mean(total).item() * run.world.size / config.eval_iters
    model.train()
    return losses


def evaluate_and_save(run: Run, metrics: Metrics, console: Console, stopping: Callable[[], bool]) -> bool:
    """Evaluate, report, and write the checkpoints that are due; False if a signal has broken it off."""
    config, progress = run.config, run.progress
    losses = estimate_losses(run, stopping)
    if losses is None:
        return False
    console.line(f"step {progress.step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    metrics.write(progress, {"train/eval_loss": losses["train"], "val/loss": losses["val"]})
    if not math.isfinite(losses["val"]):
        raise DivergedError(
            f"the loss is {losses['val']} after {progress.step} updates; nothing was saved over the checkpoints in "
            f"{config.out_dir}. Try a lower learning_rate (now {config.learning_rate:g}), grad_clip=1 (now "
            f"{config.grad_clip:g}), or dtype=float32"
        )
    is_best = losses["val"] < progress.best_val_loss
    is_last = progress.step >= config.max_iters
    progress.best_val_loss = min(progress.best_val_loss, losses["val"])
    progress.evaluated = progress.step
    if progress.step == 0 and not is_last:
        return True  # nothing learned yet, nothing to lose
    if is_best:
        save(run, "best.pt")
    if is_best or is_last or config.always_save_checkpoint:
        console.line(f"saving checkpoint to {config.out_dir}")
        save(run, "ckpt.pt")
    return True


def save(run: Run, name: str) -> None:
    """Write `ckpt.pt`, or `best.pt`, which goes without the optimizer's state: two thirds of the bytes."""
    if not run.world.is_main:
        return
    checkpoint.save(
        Path(run.config.out_dir) / name,
        model=run.model,
        optimizer=None if name == "best.pt" else run.optimizer,
        scaler=run.scaler,
        config=run.config,
        progress=run.progress,
        tokenizer=run.dataset.tokenizer,
        device=run.device,
    )
