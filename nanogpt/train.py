"""The training program. Reads from top to bottom: `train` is the story, the functions below it are its steps."""

import dataclasses
import logging
import math
import os
import shlex
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import checkpoint, sharded
from nanogpt.config import TrainConfig
from nanogpt.data import document_ids_of, dropout_seed, evaluation_batch
from nanogpt.device import Device, choose
from nanogpt.distributed import World, contact, joined, no_gradient_exchange, this_process
from nanogpt.errors import ConfigError, DivergedError
from nanogpt.guards import Guard, is_spike, ways_out
from nanogpt.health import Checkup
from nanogpt.infer.text import short_sample
from nanogpt.optim import learning_rate_at
from nanogpt.report.log import show_log_lines
from nanogpt.report.metrics import Metrics
from nanogpt.report.plots import draw_if_possible
from nanogpt.report.progress import Console
from nanogpt.saver import Saver
from nanogpt.signals import stop_signals
from nanogpt.spread import whole
from nanogpt.start import Run, derived_values, dry_run, owned, start

log = logging.getLogger(__name__)

STOPPED = 75  # exit code of a run that a signal has stopped and that can be resumed


def train(config: TrainConfig) -> int:
    """Train as `config` says. Returns the exit code: 0 done, 75 stopped by a signal and resumable."""
    show_log_lines(config.verbosity, must_go_on=True)
    world = this_process()
    local_rank = world.local_rank if world.size > 1 else None
    if (
        world.size > 1
        and config.device.startswith("cuda:")
        and os.environ.get("LOCAL_WORLD_SIZE", f"{torch.cuda.device_count()}") != "1"
    ):
        raise ConfigError(f"--device={config.device} is one GPU for all; with --device=cuda each process takes its own")
    device = choose(config.device, config.dtype, config.compile, local_rank, training=config)
    world.share(config.batch_size, config.gradient_accumulation_steps)  # or refuse
    if config.dry_run:
        return dry_run(resumed_if_there(config, World())) if world.is_main else 0
    with joined(world, config.backend, device, config.dist_timeout) as world:
        return start_and_train(config, device, world)


def resumed_if_there(config: TrainConfig, world: World) -> TrainConfig:
    """What `resume=auto` stands for: going on with the run in `out_dir` if the main process finds one."""
    if config.resume == "auto" and world.first(lambda: bool(checkpoint.kept(config.out_dir))):
        return dataclasses.replace(config, init_from="resume")
    return config


def start_and_train(config: TrainConfig, device: Device, world: World) -> int:
    """Train, or only evaluate, among processes that can talk. Returns the exit code."""
    run = None
    with contact(world, config.dist_timeout, step=lambda: run.progress.step if run else 0):
        world.check_same(dataclasses.asdict(config))  # before any question that some might not ask
        run = start(resumed_if_there(config, world), device, world)
        log.info(derived_values(run.config, run.model.config, run.model.get_num_params(), len(run.dataset.train)))
        if not config.eval_only:
            return train_until_done(run)
        losses = estimate_losses(run, stopping=lambda: False)
        assert losses
        print(f"step {run.progress.step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        return 0


def train_until_done(run: Run) -> int:
    """The loop: batch, update, now and then an evaluation and a checkpoint. Returns the exit code."""
    config, device, world, model, progress = run.config, run.device, run.world, run.model, run.progress
    with (
        owned(run),
        stop_signals(world) as stopping,
        Metrics(config, progress if run.resumed_from else None, is_main=world.is_main) as metrics,
        closing(Console(total=config.max_iters, done=progress.step, is_main=world.is_main)) as console,
        saving(run) as saver,
        contact(world, config.dist_timeout, step=lambda: progress.step),  # here, too: it speaks before `saving` waits
    ):
        model.train()
        settle_sums(run)
        guard = Guard(run)
        seconds, updates = 0.0, 0  # since the last line
        stopped = False
        while not stopped:
            step = progress.step
            is_last = step >= config.max_iters
            if (step % config.eval_interval == 0 or is_last) and progress.evaluated != step:
                guard.store()
                console.say("evaluating")
                stopped = not evaluate_and_save(run, metrics, saver, stopping)
            if is_last or stopped:
                break

            began = time.perf_counter()
            learning_rate = learning_rate_at(step, config)
            x, y = next_batch(run, step)
            checkup = Checkup(run) if config.health_interval and (step + 1) % config.health_interval == 0 else None
            loss, grad_norm, is_bad = update(run, x, y, learning_rate, checkup)
            guard.note(grad_norm, is_bad)
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
                values = {"train/loss": world.mean(loss).item(), "lr": learning_rate, "grad_norm": grad_norm.item()}
                record(run, metrics, console, values, seconds / updates)
                guard.check(partial(backward, run, x, y, step), learning_rate)
                seconds, updates = 0.0, 0
            if checkup:
                inputs = x[:1]  # one row tells as much
                values = checkup.values(inputs, document_ids(run, inputs)) | device.vitals()
                metrics.write(progress, {**values, "health/clip_fraction": guard.clip_fraction()})
            evaluation_is_next = progress.step % config.eval_interval == 0 or progress.step >= config.max_iters
            if is_due_everywhere(run, saver) and not evaluation_is_next:
                guard.store()
                metrics.sync()
                saver.save(lambda old: snapshot(run, old))
            console.advance()

        guard.store()
        finish_saving(run, saver, is_saved=not stopped)
        world.wait()  # a process that leaves early makes torchrun end the others
        if stopped:
            log.info(
                f"stopped after {progress.step} updates and saved; the same command with --init_from=resume goes on"
            )
            return STOPPED
        if config.plot and world.is_main:
            draw_if_possible(config.out_dir)
        skipped = f"{progress.skipped} updates skipped, " if progress.skipped else ""
        log.info(
            f"done: {progress.step} updates, {progress.seconds:.1f} s of training, {skipped}best validation loss "
            f"{progress.best_val_loss:.4f}; to see text: python sample.py --out_dir={shlex.quote(config.out_dir)}"
        )
        return 0


@contextmanager
def saving(run: Run) -> Iterator[Saver]:
    """Within the block, checkpoints are written in the background; what is being written is awaited at its end."""
    config, folder = run.config, Path(run.config.out_dir)
    best = math.inf
    if run.resumed_from:  # a best loss whose weights were lost is none
        best = run.world.first(lambda: checkpoint.best_val_loss(folder / "best.pt"))
        run.progress.best_val_loss = max(run.progress.best_val_loss, best)
    saver = Saver(folder, config.checkpoint_interval, config.keep_checkpoints, best, run.world.is_main)
    try:
        yield saver
    except KeyboardInterrupt:
        raise  # a second signal does not wait
    except BaseException:
        saver.wait()
        raise


# ---------------------------------------------------------------------------------------------------
# The steps of the loop


def next_batch(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """This process's rows of the global batch of `step`: inputs and targets, each (micro-batches * B, T)."""
    ids = run.device.put(run.rows_of(step))
    return ids[:, :-1], ids[:, 1:]


def document_ids(run: Run, x: Tensor) -> Tensor | None:
    """Which document of its row each token of x (B, T) belongs to, if the run keeps documents apart."""
    end_of_text = run.dataset.tokenizer.end_of_text
    return document_ids_of(x, end_of_text) if run.config.mask_documents and end_of_text is not None else None


def settle_sums(run: Run) -> None:
    """Have DDP choose now in which buckets, and so in which order, it adds up gradients.

    It chooses anew after its first backward pass: without this one, the first update of a resumed run would add up in
    another order than the same update of an undisturbed run, and differ from it in the last bit.
    """
    if run.network is run.model:
        return
    x, y = next_batch(run, run.progress.step)
    rows = slice(run.config.batch_size)
    backward(run, x[rows], y[rows], run.progress.step)
    run.optimizer.zero_grad(set_to_none=True)


def loss_of(run: Run, network: Any, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss of rows x, y (B, T)."""
    with run.device.autocast():
        _, loss = network(x, y, document_ids=document_ids(run, x), return_logits=False)
    return loss  # type: ignore[no-any-return]


def backward(run: Run, x: Tensor, y: Tensor, step: int) -> Tensor:
    """Add up the gradients of this process's rows x, y (micro-batches * B, T); returns their mean loss."""
    if run.config.dropout:  # what is dropped out is a function of (seed, step), too
        torch.manual_seed(dropout_seed(run.config.seed, step, run.world.rank))
    total = torch.zeros((), device=x.device)
    count = math.ceil(len(x) / run.config.batch_size)
    for n, (inputs, targets) in enumerate(zip(x.tensor_split(count), y.tensor_split(count), strict=True), start=1):
        with no_gradient_exchange(run.network, is_last=n == count):
            loss = loss_of(run, run.network, inputs, targets) * (len(inputs) / len(x))
            total += loss.detach()
            run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    return total


def update(
    run: Run, x: Tensor, y: Tensor, learning_rate: float, checkup: Checkup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of the weights from this process's rows x, y (micro-batches * B, T) of the global batch.

    Returns, on the device: the mean loss over these rows; the gradient norm (of all rows) before clipping; whether the
    update was skipped, in all processes, because one of them is not finite.
    """
    model, optimizer, scaler = run.model, run.optimizer, run.scaler
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
    total = backward(run, x, y, run.progress.step)
    scaler.unscale_(optimizer)
    if checkup:
        checkup.before_step()
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), run.config.grad_clip or math.inf))
    is_bad = run.world.any_tensor(~torch.isfinite(total + grad_norm))
    optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]  # then it changes nothing
    optimizer.step()  # not scaler.step, which knows the gradients of this process only
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, grad_norm, is_bad


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
        rounds = math.ceil(config.eval_iters / run.world.size)  # as many in every process: they compute them together
        for k in range(run.world.rank, rounds * run.world.size, run.world.size):
            if stopping():
                return None
            x, y = (run.device.put(ids) for ids in evaluation_batch(tokens, k, T, config.batch_size))
            loss = loss_of(run, model, x, y)
            if k < config.eval_iters:
                total += loss
        losses[split] = run.world.mean(total).item() * run.world.size / config.eval_iters
    model.train()
    return losses


def record(run: Run, metrics: Metrics, console: Console, values: dict[str, float], seconds: float) -> None:
    """Print and write down what an update has come to; `seconds` is what one takes."""
    config, progress, shape = run.config, run.progress, run.model.config
    values["tokens_per_second"] = config.rows * shape.block_size / seconds
    values["epoch"] = progress.tokens / len(run.dataset.train)
    step, loss = progress.step - 1, values["train/loss"]
    speed = f"{values['tokens_per_second']:,.0f} tokens/s"
    if peak := run.device.peak_flops():
        values["mfu"] = run.model.flops_per_token() * values["tokens_per_second"] / (peak * run.world.size)
        speed = f"mfu {values['mfu'] * 100:.2f}%, {speed}"
    to_evaluation = min(config.max_iters, (step // config.eval_interval + 1) * config.eval_interval) - step - 1
    console.report(
        loss,
        f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, {speed}",
        f"{speed}, {run.device.peak_memory() / 1e9:.1f} GB, evaluation in {to_evaluation:,}",
    )
    average = progress.loss_average
    if is_spike(progress, loss):
        log.info(f"iter {step}: this loss stands out, the average before was {average:.4f}")
        values["spike"] = True
    metrics.write(progress, values)


def evaluate_and_save(run: Run, metrics: Metrics, saver: Saver, stopping: Callable[[], bool]) -> bool:
    """Evaluate, report, and write the checkpoints that are due; False if a signal has broken it off."""
    config, progress = run.config, run.progress
    began = time.perf_counter()
    losses = estimate_losses(run, stopping)
    if losses is None:
        return False
    log.debug(f"evaluation took {time.perf_counter() - began:.2f} s")
    log.info(f"step {progress.step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    values: dict[str, Any] = {"train/eval_loss": losses["train"], "val/loss": losses["val"]}
    if text := sample_text(run):
        log.info(textwrap.indent(text, "  | ", lambda line: True))
        values["sample"] = text
    metrics.write(progress, values)
    if not math.isfinite(losses["val"]):
        raise DivergedError(
            f"the loss is {losses['val']} after {progress.step} updates; nothing was saved over the checkpoints in "
            f"{config.out_dir}. Try {ways_out(run)}"
        )
    is_best = losses["val"] < progress.best_val_loss
    is_last = progress.step >= config.max_iters
    progress.evaluated = progress.step
    if progress.step == 0 and not is_last:
        return True  # nothing learned yet, nothing to lose, nor is it the best of what is
    progress.best_val_loss = min(progress.best_val_loss, losses["val"])
    if is_best or is_last or config.always_save_checkpoint or is_due_everywhere(run, saver):
        log.info(f"saving checkpoint to {config.out_dir}")
        metrics.sync()
        if run.shards or run.world.is_main:
            saver.save(lambda old: snapshot(run, old, is_best), best=is_best)
    return True


def sample_text(run: Run) -> str:
    """A few words of the model as it is now, if it is time for that; random states are not touched."""
    config, progress = run.config, run.progress
    is_due = config.sample_interval and progress.step // config.eval_interval % config.sample_interval == 0
    if progress.step == 0 or not is_due or run.shards or not run.world.is_main:
        return ""
    return short_sample(run.model, run.dataset.tokenizer, tokens=100)


def is_due_everywhere(run: Run, saver: Saver) -> bool:
    """Whether this process is to take part in a checkpoint now, evaluation or not."""
    is_due = saver.is_due(run.progress.step)
    return run.world.any(is_due) if run.shards else is_due and run.world.is_main


def finish_saving(run: Run, saver: Saver, is_saved: bool) -> None:
    """Wait for the last checkpoint, and write one of this state if there is none; also as one file if it is spread."""
    if run.shards:
        is_saved = not run.world.any(saver.has_failed or not is_saved)
    if run.shards or run.world.is_main:
        saver.finish(lambda old: snapshot(run, old), is_saved)
    if run.shards and run.progress.step >= run.config.max_iters:
        folder = Path(run.config.out_dir)  # the shares stay, so that there are older ones
        run.world.after_main(lambda: checkpoint.write(folder / "ckpt.pt", sharded.read(sharded.finished(folder)[0])))


def snapshot(run: Run, into: Any = None, is_best: bool = False) -> dict[str, Any]:
    """The run as it is now, as the content of a checkpoint; in the memory of an earlier one, if given.

    Of a run that is spread over the processes: what is no tensor, how to finish the rest, and the whole weights in the
    main process if they are the best.
    """
    described = checkpoint.description(run.model.config, run.scaler, run.config, run.progress, run.dataset.tokenizer)
    if not run.shards:
        return checkpoint.snapshot(run.model, run.optimizer, described, into)
    path = Path(run.config.out_dir, sharded.FOLDER, str(run.progress.step))
    begun = sharded.begin_write(path, run.model, run.optimizer, run.shards)
    groups = run.optimizer.state_dict()["param_groups"]
    mine = {**described, "param_groups": groups} if run.world.is_main else None
    weights = sharded.whole_weights(run.model) if is_best else {}
    return {**described, "model": weights, "finish_shards": lambda: sharded.finish_write(path, begun, mine)}
