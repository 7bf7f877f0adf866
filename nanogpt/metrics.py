"""What a run reports: log lines, metrics.jsonl, and Weights & Biases or TensorBoard where asked for."""

import dataclasses
import json
import logging
import math
import os
import secrets
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanogpt.config import TrainConfig
from nanogpt.files import atomic_write

if TYPE_CHECKING:
    from nanogpt.checkpoint import TrainState

log = logging.getLogger(__name__)

T = TypeVar("T")


class LogLines(logging.Handler):
    """Prints log lines to standard output, and warnings to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        with suppress(OSError):  # A run whose terminal is gone still saves before it stops.
            text = "warning: " * is_warning + self.format(record)
            print(text, file=sys.stderr if is_warning else sys.stdout, flush=True)


def show_log_lines(verbosity: str = "normal") -> None:
    """Print log lines from now on; `debug` also says when and where from."""
    handler, logger = LogLines(), logging.getLogger("nanogpt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if verbosity == "debug" else None))
    logger.handlers = [*(other for other in logger.handlers if not isinstance(other, LogLines)), handler]
    logger.setLevel({"quiet": "WARNING", "normal": "INFO", "debug": "DEBUG"}[verbosity])
    logger.propagate = False


def log_sizes(config: TrainConfig, model: Any, optimizer: Any, train_tokens: int) -> None:
    """Print the size of model, batch and run, and what is decayed; train_tokens: 0 if there is no data set yet."""
    tokens = config.global_batch_size * config.block_size
    log.info(f"model: {model.get_num_params() / 1e6:.2f}M parameters, vocabulary {model.config.vocab_size}")
    epochs = f", {tokens * config.max_iters / train_tokens:.3g} epochs of {train_tokens:,}" if train_tokens else ""
    log.info(
        f"tokens per iteration will be: {tokens:,} ({config.gradient_accumulation_steps} micro-batches of "
        f"{config.batch_size} x {config.block_size}); in all {tokens * config.max_iters:,}{epochs}"
    )
    if config.decay_lr and config.warmup_iters > config.max_iters:
        log.warning(f"the learning rate never peaks: warmup_iters={config.warmup_iters}, max_iters={config.max_iters}")
    if config.decay_lr and not config.min_lr and config.max_iters > config.lr_decay_iters:
        log.warning(f"the learning rate is 0 from step {config.lr_decay_iters} on: set lr_decay_iters or min_lr, too")
    for group in optimizer.param_groups if optimizer else []:
        sizes = [parameter.numel() for parameter in group["params"]]
        log.info(f"{len(sizes)} tensors with {sum(sizes):,} parameters, weight decay {group['weight_decay']:g}")


class Metrics(AbstractContextManager["Metrics"]):
    """The records of a run: the console, one JSON object a line in metrics.jsonl, and the trackers of `config`.

    A resumed run continues the same file, without the rows of steps that it will do again. Only the main process
    writes. peak_speed: tokens/s of which MFU is the share; 0: unknown.
    """

    def __init__(
        self, config: TrainConfig, resumed: "TrainState | None" = None, is_main: bool = True,
        tokens_per_epoch: int = 1, peak_speed: float = 0.0,
    ) -> None:  # fmt: skip
        for name, value in vars(config).items():
            if value != getattr(TrainConfig, name):
                log.info(f"{name} = {value!r}")
        self.config, self.tokens_per_epoch, self.peak_speed = config, tokens_per_epoch, peak_speed
        # Steps and seconds at the last log line.
        self.step, self.seconds = (resumed.step, resumed.seconds) if resumed else (0, 0.0)
        self.trackers, self.unwritten = list[Any](), b""  # rows for which there was no room
        self.path = Path(config.out_dir) / "metrics.jsonl" if is_main else None
        if self.path is None:
            return
        rows = read_metrics(self.path) if resumed else []
        if resumed:  # What came after the checkpoint is done, and recorded, again.
            rows = [row for row in rows if row["step"] <= resumed.step]
            if resumed.evaluated != resumed.step:
                rows = [row for row in rows if row["step"] < resumed.step or "val/loss" not in row]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        self.file = open(self.path, "ab", buffering=0)
        for kind in [WandB] * config.wandb_log + [TensorBoard] * config.tensorboard_log:
            try:
                self.trackers.append(kind(config, resumed))
            except Exception as error:  # not installed, not logged in, no network: each has its own exceptions
                log.warning(f"{kind.__name__} could not start ({error}); training without it")

    def log_step(self, state: "TrainState", loss: float, grad_norm: float, learning_rate: float) -> None:
        """Print and record the step before `state.step`; its time is the mean since the last log line."""
        seconds = (state.seconds - self.seconds) / (state.step - self.step)
        self.step, self.seconds = state.step, state.seconds
        speed = self.config.global_batch_size * self.config.block_size / seconds
        values = {"train/loss": loss, "lr": learning_rate, "grad_norm": grad_norm, "tokens_per_second": speed}
        values["epoch"] = state.tokens / self.tokens_per_epoch
        line = f"iter {state.step - 1}: loss {loss:.4f}, time {seconds * 1000:.2f}ms"
        if self.peak_speed:
            values["mfu"] = speed / self.peak_speed
            line += f", mfu {values['mfu']:.2%}"
        left = duration((self.config.max_iters - state.step) * seconds)
        log.info(f"{line}, {speed:,.0f} tokens/s, {left} left")
        self.log(state, values)

    def log_evaluation(self, state: "TrainState", losses: dict[str, float], sample: str = "") -> None:
        """Print and record an evaluation and, if there is one, a sample of text."""
        log.info(f"step {state.step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        values: dict[str, Any] = {"train/eval_loss": losses["train"], "val/loss": losses["val"]}
        if sample:
            values["sample"] = sample
            log.info(textwrap.indent(sample, "  | ", lambda line: True))
        self.log(state, values)

    def log(self, state: "TrainState", values: dict[str, Any]) -> None:
        """Record `values` after `state.step` steps; a number that is not finite becomes null."""
        if self.path is None:
            return
        row = {"v": 1, "step": state.step, "seconds": round(state.seconds, 3), "tokens": state.tokens, **values}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.unwritten += json.dumps(finite).encode() + b"\n"
        try:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:  # such as a full disk; the next row tries again
            log.warning(f"cannot write {self.path}: {error}; training continues")
        for tracker in list(self.trackers):
            try:
                tracker.log(state, values)
            except Exception as error:  # such as a network that is gone: it costs the tracker, not the run
                log.warning(f"{type(tracker).__name__} failed ({error}); training continues without it")
                self.trackers.remove(tracker)

    def sync(self) -> None:
        """Bring all rows to the disk: a checkpoint must not be ahead of them, even after a power cut."""
        if self.path is not None:
            with suppress(OSError):  # a disk may be full
                os.fsync(self.file.fileno())

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self.path is not None:
            self.file.close()
        for tracker in self.trackers:
            tracker.close(has_failed=error is not None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, none if there is no file. A line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class WandB:
    """Weights & Biases. A resumed run continues the one that it began there."""

    def __init__(self, config: TrainConfig, resumed: "TrainState | None") -> None:
        import wandb

        path = Path(config.out_dir) / "wandb_id"
        run_id = path.read_text() if resumed and path.exists() else secrets.token_hex(4)
        path.write_text(run_id)
        self.run = wandb.init(
            project=config.wandb_project, name=config.wandb_run_name, dir=config.out_dir, id=run_id, resume="allow",
            config=dataclasses.asdict(config),
        )  # fmt: skip

    def log(self, state: "TrainState", values: dict[str, Any]) -> None:
        self.run.log({**values, "iter": state.step, "tokens": state.tokens}, step=state.step)

    def close(self, has_failed: bool) -> None:
        self.run.finish(exit_code=int(has_failed))


class TensorBoard:
    """Event files for TensorBoard in `out_dir`/tensorboard."""

    def __init__(self, config: TrainConfig, resumed: "TrainState | None") -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(Path(config.out_dir) / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=resumed.step + 1 if resumed else None)

    def log(self, state: "TrainState", values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, f"```\n{value}\n```", state.step)
            else:
                self.writer.add_scalar(name, float(value), state.step)

    def close(self, has_failed: bool) -> None:
        self.writer.close()


def with_progress(batches: Sequence[T], if_slow: str = "") -> Iterator[T]:
    """Yield `batches`; every 10 seconds log how many of them are done and how long the others will take.

    if_slow: what to try where all of them take more than 10 minutes, logged once.
    """
    began = told = time.monotonic()
    for done, batch in enumerate(batches):
        if done and (now := time.monotonic()) - told > 10:
            left = (len(batches) - done) * (now - began) / done
            log.info(f"evaluating: {done} of {len(batches)} batches, {duration(left)} left")
            if if_slow and told == began and left > 600:
                log.warning(f"this model is slow on this machine; {if_slow}")
            told = now
        yield batch


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: 40 s, 3 min, 5 h, 2 days."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
