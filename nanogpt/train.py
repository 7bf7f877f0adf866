"""The training program, from the first line to the last: set up, loop, evaluate, save."""

import dataclasses
import logging
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from nanogpt import data, distributed
from nanogpt.checkpoint import Checkpoint, Checkpoints, TrainState, checkpoints_of, load_latest, load_model, use_out_dir
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.device import Device, choose_device
from nanogpt.distributed import Distributed, init_distributed
from nanogpt.errors import ConfigError, DivergedError
from nanogpt.lora import adapt
from nanogpt.metrics import Metrics, log_sizes, show_log_lines, with_progress
from nanogpt.model import GPT
from nanogpt.optim import learning_rate_at, make_optimizer, step_if_finite
from nanogpt.plot import draw_if_possible
from nanogpt.prepare import prepare_missing
from nanogpt.sample import short_sample

log = logging.getLogger(__name__)

STOPPED = 75  # exit code of a run that a signal has stopped and that can be resumed
ADVICE = "try a lower learning_rate (with muon, muon_lr), grad_clip=1 or dtype=float32"


@dataclass(frozen=True)
class Run:
    """What stays the same while a run trains."""

    config: TrainConfig
    device: Device
    dist: Distributed
    dataset: data.Dataset
    model: GPT
    is_sharded: bool = False  # FSDP has given each process a shard of the model


@record  # shows torchrun the traceback of the process that failed first
def train(config: TrainConfig) -> int:
    """Train as `config` says. Returns the exit code: 0 done, 75 stopped by a signal and resumable."""
    process = distributed.this_process()
    show_log_lines(config.verbosity if process.is_main else "quiet")
    device = choose_device(config, process.local_rank if process.world_size > 1 else None)
    my_rows = process.my_rows(config)
    if config.dry_run:
        return dry_run(config) if process.is_main else 0
    with init_distributed(config.backend, device, config.dist_timeout) as dist:
        dist.check_same(dataclasses.asdict(config))

        # What to train, on what, and how far an earlier run came.
        dataset = open_or_prepare(config, dist)
        config, model, resumed = build_or_resume(config, dataset, dist)
        # The model itself, compiled in place where that pays, or DDP around it.
        network = distributed.parallelize(model, config, device, dist)
        run = Run(config, device, dist, dataset, model, any(map(distributed.is_sharded, model.parameters())))
        optimizer = make_optimizer(model, config, device.dtype)
        scaler = torch.amp.GradScaler(device.type, enabled=device.dtype == torch.float16)
        # Unsharded weights are there already, and an evaluation needs no optimizer.
        if resumed and (resumed.is_sharded or not config.eval_only):
            resumed.restore(model, optimizer, scaler)
        state = resumed.state if resumed else TrainState()
        log_sizes(config, model, optimizer, len(dataset.train))
        if config.eval_only:
            losses = estimate_loss(run)
            if dist.is_main and losses:
                print(f"step {state.step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            return 0

        peak_speed = (device.peak_flops() or 0.0) * dist.world_size / model.flops_per_token()
        with (
            use_out_dir(config, dist, resumed.path if resumed else None),
            Metrics(config, state if resumed else None, dist.is_main, len(dataset.train), peak_speed) as metrics,
            Checkpoints(config, dist, run.is_sharded) as checkpoints,
            stop_signals() as stop_requested,
        ):
            n_micro = math.ceil(len(my_rows) / config.batch_size)
            batch_at = partial(data.get_batch, dataset, config=config, rows=my_rows, put=device.put)
            get_batch = data.Prefetcher(batch_at) if device.type == "cuda" else batch_at
            model.train()
            if network is not model:
                warm_up_ddp(run, network, optimizer, *get_batch(state.step))
            # state.step counts the steps done, so it is also the number of the next one.
            saved_step = state.step if resumed else -1  # of the newest checkpoint
            # Counted on the device, since `.item()` makes the CPU wait for a GPU.
            skipped, skipped_in_a_row = torch.tensor([state.skipped, 0], device=device.name)

            while True:
                # Evaluate where that is due, and save the newest and perhaps the best model.
                is_done, is_best = state.step >= config.max_iters, False
                save_is_due = state.step not in (0, saved_step) and checkpoints.is_due(state.step)
                losses = {}
                if (state.step % config.eval_interval == 0 or is_done) and state.evaluated != state.step:
                    losses = estimate_loss(run, stop_requested)
                if losses:
                    state.evaluated = state.step
                    metrics.log_evaluation(state, losses, sample_of_text(run, state))
                    if config.plot and dist.is_main:
                        draw_if_possible(config.out_dir, at_most_every=120)  # seconds, since drawing takes one or two
                    if not math.isfinite(losses["val"]):
                        raise DivergedError(f"validation loss {losses['val']} at step {state.step}; {ADVICE}")
                    # Step 0 does not compete, unless it is all: best.pt is a model that this run has trained.
                    if state.step > 0 or is_done:
                        is_best = losses["val"] < state.best_val_loss
                        state.best_val_loss = min(losses["val"], state.best_val_loss)
                        save_is_due |= is_best or is_done or config.always_save_checkpoint
                # A signal breaks off an evaluation, and ends the run after a step.
                stopped = losses is None or (not is_done and dist.any(stop_requested()))
                if save_is_due or ((is_done or stopped) and state.step != saved_step):
                    state.skipped, saved_step = int(skipped), state.step
                    if stopped and metrics.step != state.step:
                        metrics.log(state, {})  # so that `nanogpt runs` shows this step
                    metrics.sync()  # metrics.jsonl must not lag behind a checkpoint
                    checkpoints.save(model, optimizer, scaler, state, dataset.tokenizer, is_best=is_best)
                if is_done or stopped:
                    break

                began = time.perf_counter()
                learning_rate = learning_rate_at(state.step, config)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * group.get("lr_scale", 1.0)
                if config.dropout:  # a function of (seed, step, rank), so that a resumed run repeats it
                    torch.manual_seed(data.dropout_seed(config.seed, state.step, dist.rank))

                # Forward and backward: this process's rows of the global batch.
                loss = forward_backward(run, network, scaler, get_batch(state.step), n_micro)

                # Clip and step; without grad_clip, only measure the norm. If loss or gradient of any process is not
                # finite, all skip the step: scaler.step would let each decide for itself.
                scaler.unscale_(optimizer)
                grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
                grad_norm = distributed.full_tensor(grad_norm)
                is_finite = dist.all(torch.isfinite(loss + grad_norm))
                step_if_finite(optimizer, is_finite)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                skipped += ~is_finite
                skipped_in_a_row = (skipped_in_a_row + 1) * ~is_finite
                state.step += 1
                state.tokens += config.global_batch_size * config.block_size

                # Log. Wait for the GPU first, so that the clock counts these steps and not the evaluation after them.
                log_is_due = (state.step - 1) % config.log_interval == 0 or state.step == config.max_iters
                if log_is_due or state.step % config.eval_interval == 0:
                    device.synchronize()
                state.seconds += time.perf_counter() - began
                if log_is_due:
                    metrics.log_step(state, dist.all_reduce_mean(loss).item(), grad_norm.item(), learning_rate)
                # Reading the counter waits for the GPU, so that is done with log lines and every max_bad_steps steps.
                count_is_due = log_is_due or state.step % config.max_bad_steps == 0
                if count_is_due and (n_bad := int(skipped_in_a_row)) >= config.max_bad_steps:
                    raise DivergedError(f"{n_bad} steps in a row, up to {state.step}, were not finite; {ADVICE}")
            if dist.any(checkpoints.written.exception() is not None):  # once more: a full disk may have been cleared
                checkpoints.save(model, optimizer, scaler, state, dataset.tokenizer, is_best=is_best)
    if stopped:
        log.info(f"stopped after {state.step} steps and saved; to resume, repeat the command with --init_from=resume")
        return STOPPED
    if config.plot and dist.is_main:
        draw_if_possible(config.out_dir)
    log.info(
        f"done: {state.step} steps, {state.seconds:.1f} s of training, {state.skipped} steps skipped, best validation "
        f"loss {state.best_val_loss:.4f}; to see text: python sample.py --out_dir={shlex.quote(config.out_dir)}"
    )
    return 0


# ---------------------------------------------------------------------------------------------------
# Set-up


def open_or_prepare(config: TrainConfig, dist: Distributed) -> data.Dataset:
    """Open the run's data set; one that needs no download is first prepared if it is missing. Raises `DataError`."""
    dist.broadcast_from_main(lambda: prepare_missing(config))
    dataset = data.open_dataset(Path(config.data_dir, config.dataset))
    if config.mask_documents and dataset.tokenizer.end_of_text is None:
        raise ConfigError(f"mask_documents: no token of the {dataset.tokenizer} ends a document")
    return dataset


def build_or_resume(
    config: TrainConfig, dataset: data.Dataset, dist: Distributed
) -> tuple[TrainConfig, GPT, Checkpoint | None]:
    """Return the config with the model's shape in it, the model on the CPU, and the checkpoint if a run is resumed.

    What only the data can tell (its vocabulary, a context longer than the text) is checked before a model is built.
    """
    torch.manual_seed(config.seed)
    resumed = None
    may_resume = config.resume == "auto" and dist.broadcast_from_main(lambda: bool(checkpoints_of(config.out_dir)))
    if config.init_from == "resume" or may_resume:
        may_shard = dist.world_size > 1 and config.parallel != "ddp"
        resumed = load_latest(config.out_dir, config.data_dir, dist, sharded=may_shard)
        dataset.match_tokenizer(resumed.tokenizer, str(resumed.path))
        dataset.check_length(resumed.model_config.block_size)
        model = resumed.build_model(dropout=config.dropout, merge=False)
        log.info(f"resuming {resumed.path} after {resumed.state.step} steps")
    else:
        dataset.check_length(config.block_size)
        if config.init_from == "scratch":
            model = GPT(config.model_config(dataset.tokenizer.padded_vocab_size), config.zero_init)
        else:
            source = load_model(config.init_from, dropout=config.dropout, data_dir=config.data_dir)
            model = source.model
            dataset.match_tokenizer(source.tokenizer, config.init_from)
            model.crop_block_size(config.block_size)
            adapt(model, config, source.tokenizer, dataset.tokenizer)

    # A loaded model keeps its shape, whatever the settings say.
    shape = {name: value for name, value in vars(model.config).items() if hasattr(config, name)}
    if resumed:
        shape |= {name: resumed.config.get(name, value) for name, value in vars(config).items() if "lora_" in name}
    for name, value in shape.items():
        if (asked := getattr(config, name)) not in (value, getattr(TrainConfig, name)):
            log.warning(f"{name} = {asked!r} is ignored: the model that is loaded has {name} = {value!r}")
    config = dataclasses.replace(config, **shape).with_muon_rates()
    if resumed:
        for name, value in dataclasses.asdict(config).items():
            if resumed.config.get(name, value) != value and name not in ("init_from", "resume", "out_dir"):
                log.info(f"changed since the checkpoint: {name} = {value!r}, was {resumed.config[name]!r}")
        # config.json keeps the init_from with which the run was first started.
        config = dataclasses.replace(config, init_from=resumed.config.get("init_from", "scratch"))
    return config, model, resumed


def dry_run(config: TrainConfig) -> int:
    """Print the resolved config, and of a new model the sizes that follow from it; allocate and write nothing."""
    for name, value in dataclasses.asdict(config.with_muon_rates()).items():
        print(f"{name} = {value!r}")
    if config.init_from == "scratch":
        dataset = data.open_if_prepared(config)
        shape = config.model_config(dataset.tokenizer.padded_vocab_size if dataset else GPTConfig.vocab_size)
        with torch.device("meta"):
            log_sizes(config, GPT(shape), None, len(dataset.train) if dataset else 0)
    else:
        print(f"the shape is that of the model that init_from={config.init_from} loads, whatever is printed above")
    return 0


def warm_up_ddp(run: Run, network: Any, optimizer: torch.optim.Optimizer, *batch: Tensor) -> None:
    """Run one backward pass and drop its gradients.

    After its first one, DDP rebuilds its buckets, which changes the order of summation: without this, a resumed run
    would differ in the last bit.
    """
    compute_loss(run, network, *(rows[: run.config.batch_size] for rows in batch)).backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP within the block only ask to stop; Ctrl-C after it interrupts.

    Yields a function that returns whether that was asked. Clusters announce the end of a job with SIGUSR1.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def on_signal(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError):  # after SIGHUP, the terminal is gone
            os.write(2, b"\nstopping as soon as possible (Ctrl-C once more: at once)\n")  # print is not safe here

    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if number := getattr(signal, name, None):  # Windows lacks some
            before[number] = signal.getsignal(number)
            if number == signal.SIGINT or before[number] != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, on_signal)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------
# Loss, evaluation, log lines


def forward_backward(run: Run, network: Any, scaler: Any, batch: data.Batch, n_micro: int) -> Tensor:
    """Add up the gradients of a batch in micro-batches that fit into memory, and return its loss.

    Each micro-batch weighs as much as it has targets: in a text all tokens are targets, in conversations the answers.
    """
    n_targets = run.dist.all_reduce_mean((batch[1] >= 0).sum().float())
    loss = torch.zeros((), device=run.device.name)
    micro_batches = zip(*(tensor.tensor_split(n_micro) for tensor in batch), strict=True)
    for n, (x, y, *document_ids) in enumerate(micro_batches, start=1):
        with distributed.gradient_sync(network, n == n_micro, run.config):
            micro_loss = compute_loss(run, network, x, y, *document_ids) * ((y >= 0).sum() / n_targets)
            scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    return loss


def compute_loss(run: Run, network: Any, x: Tensor, y: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Return the mean loss of rows x, y (B, T); document_ids: of conversations, else they follow from x."""
    end_of_text = run.dataset.tokenizer.end_of_text
    if document_ids is None and run.config.mask_documents and end_of_text is not None:
        document_ids = data.document_ids_of(x, end_of_text)
    with run.device.autocast():
        _, loss = network(x, y, document_ids=document_ids, return_logits=False)
    return loss  # type: ignore[no-any-return]


@torch.no_grad()
def estimate_loss(run: Run, stop_requested: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
    """Return the mean loss of `eval_iters` batches of each split: the same batches at every evaluation of every run.

    None if a signal asks to stop meanwhile: half an evaluation is no estimate.
    """
    config, dist, model = run.config, run.dist, run.model
    rounds = range(math.ceil(config.eval_iters / dist.world_size))  # the same number in every process
    losses = {split: torch.zeros((), device=run.device.name) for split in data.SPLITS}
    model.eval()
    hint = "the README has smaller runs for CPUs, such as config/train_shakespeare_char_fast.py"
    batches = [(split, n) for split in data.SPLITS for n in rounds]
    for split, n in with_progress(batches, hint if run.device.type == "cpu" else ""):
        if dist.any(stop_requested()):
            model.train()
            return None
        k = n * dist.world_size + dist.rank
        batch = data.evaluation_batch(run.dataset, split, k, config.block_size, config.batch_size)
        loss = compute_loss(run, model, *map(run.device.put, batch))
        if k < config.eval_iters:  # batches beyond are computed only since FSDP needs every process in each of them
            losses[split] += loss
    model.train()
    scale = dist.world_size / config.eval_iters
    return {split: dist.all_reduce_mean(total).item() * scale for split, total in losses.items()}


def sample_of_text(run: Run, state: TrainState) -> str:
    """Return what the model writes by now, if that is due; FSDP would need all processes for it."""
    interval = run.config.sample_interval
    is_due = state.step and interval and state.step // run.config.eval_interval % interval == 0
    if not is_due or not run.dist.is_main or run.is_sharded:
        return ""
    # Compiling again for its sizes would take minutes.
    with torch.compiler.set_stance("force_eager") if run.device.compile else nullcontext():
        return short_sample(run.model, run.dataset.tokenizer, tokens=100)
