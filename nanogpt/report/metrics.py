"""What a run records: one JSON object a line in metrics.jsonl; Weights & Biases and TensorBoard when asked for."""

import dataclasses
import json
import logging
import math
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nanogpt.checkpoint import Progress
from nanogpt.config import TrainConfig
from nanogpt.files import atomic_write, parse_json

log = logging.getLogger(__name__)

_PAUSE = 0.2  # seconds between two times of writing: at hundreds of updates per second, each would be felt


class Metrics:
    """The records of a run, open for writing. A resumed run goes on in the same file, with no step twice."""

    def __init__(self, config: TrainConfig, resumed: Progress | None = None, is_main: bool = True) -> None:
        self._trackers: list[Any] = []
        self._file: IO[bytes] | None = None
        self._rows: list[dict[str, Any]] = []  # since the last writing
        self._next = 0.0  # when to write again
        self._pending, self._has_warned = b"", False  # what could not be written yet
        if not is_main:
            return  # one process of a run writes
        self._path = Path(config.out_dir) / "metrics.jsonl"
        with atomic_write(self._path) as file:
            rows = (row for row in read_metrics(self._path) if resumed and _is_before(row, resumed))
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        self._file = open(self._path, "ab", buffering=0)  # what is written is not lost in a crash
        for kind in [WandB] * config.wandb_log + [TensorBoard] * config.tensorboard_log:
            try:
                self._trackers.append(kind(config, resumed))
            except ImportError:
                log.warning(f"{kind.label} needs a package (pip install {kind.package}); going on without it")
            except Exception as error:  # not logged in, no network, …: there are many ways
                log.warning(f"{kind.label} could not start ({error}); going on without it")

    def write(self, progress: Progress, values: dict[str, Any]) -> None:
        """Record `values` after `progress.step` updates; a number that is not finite becomes null."""
        if self._file is None:
            return
        row: dict[str, Any] = {"v": 1, "step": progress.step, "seconds": round(progress.seconds, 3)}
        row |= {"tokens": progress.tokens, **values}
        self._rows.append(row)
        if time.monotonic() >= self._next:
            self._flush()
            self._next = time.monotonic() + _PAUSE
        for tracker in list(self._trackers):
            try:
                tracker.write(progress, values)
            except Exception as error:  # it must not end the training
                log.warning(f"{tracker.label} failed ({error}); going on without it")
                self._trackers.remove(tracker)

    def _flush(self) -> None:
        """Write the pending rows, or keep them for later."""
        for row in self._rows:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._pending += json.dumps(finite).encode() + b"\n"
        self._rows = []
        if self._file is None or not self._pending:
            return
        try:
            if not self._path.exists():  # somebody has cleared up
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file.close()
                self._file = open(self._path, "ab", buffering=0)
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            self._has_warned = False
        except (OSError, ValueError) as error:  # a full disk, a file that could not be opened again
            if not self._has_warned:
                log.warning(f"cannot write {self._path}: {error}; training goes on, and it is tried again")
            self._has_warned = True

    def sync(self) -> None:
        """Bring all rows to the disk: a checkpoint must not be ahead of them, even after a power cut."""
        self._flush()
        with suppress(OSError, ValueError):
            if self._file:
                os.fsync(self._file.fileno())

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file:
            self._flush()
            self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close(error is not None)
            except Exception as problem:
                log.warning(f"{tracker.label} could not finish ({problem})")


def _is_before(row: dict[str, Any], resumed: Progress) -> bool:
    """Whether a row is of what the resumed run has behind it; all else it will do, and record, again."""
    is_ahead = row["step"] > resumed.step or (row["step"] == resumed.step and "val/loss" in row)
    return not is_ahead or row["step"] <= resumed.evaluated


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order; none if there is no file. A line cut off by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class WandB:
    """Weights & Biases. A resumed run goes on in the one that it began."""

    label, package = "Weights & Biases", "wandb"

    def __init__(self, config: TrainConfig, resumed: Progress | None) -> None:
        import wandb

        path = Path(config.out_dir) / "wandb_id"
        name = path.read_text() if resumed and path.exists() else secrets.token_hex(4)
        with atomic_write(path) as file:
            file.write(name.encode())
        self.run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name,
            dir=config.out_dir,
            config=dataclasses.asdict(config),
            id=name,
            resume="allow",
        )

    def write(self, progress: Progress, values: dict[str, Any]) -> None:
        """Send `values`."""
        self.run.log(values | {"iter": progress.step, "tokens": progress.tokens}, step=progress.step)

    def close(self, has_failed: bool) -> None:
        """Send what is left."""
        self.run.finish(exit_code=int(has_failed))


class TensorBoard:
    """Files for TensorBoard, in `out_dir`/tensorboard. Of what is repeated after resuming, the repetition counts."""

    label, package = "TensorBoard", "tensorboard"

    def __init__(self, config: TrainConfig, resumed: Progress | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(Path(config.out_dir) / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=resumed.step + 1 if resumed else None)

    def write(self, progress: Progress, values: dict[str, Any]) -> None:
        """Write `values`, texts among them."""
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, f"```\n{value}\n```", progress.step)
            else:
                self.writer.add_scalar(name, float(value), progress.step)

    def close(self, has_failed: bool) -> None:
        """Write what is left."""
        self.writer.close()
