"""What a run records: one JSON object a line in metrics.jsonl, and Weights & Biases when asked for."""

import json
import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nanogpt.checkpoint import Progress
from nanogpt.config import TrainConfig
from nanogpt.files import atomic_write, parse_json
from nanogpt.report.progress import warn
from nanogpt.settings import as_json


class Metrics:
    """The records of a run, open for writing. A resumed run goes on in the same file, with no step twice."""

    def __init__(self, config: TrainConfig, resumed: Progress | None = None, is_main: bool = True) -> None:
        self._wandb: Any = None
        self._file: IO[bytes] | None = None
        if not is_main:
            return  # one process of a run writes
        self._pending, self._has_warned = b"", False  # rows that could not be written yet
        self._path = Path(config.out_dir) / "metrics.jsonl"
        with atomic_write(self._path) as file:
            rows = (row for row in read_metrics(self._path) if resumed and _is_before(row, resumed))
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        self._file = open(self._path, "ab", buffering=0)  # row by row: nothing is lost in a crash
        if config.wandb_log:
            self._wandb = _start_wandb(config, is_resumed=resumed is not None)

    def write(self, progress: Progress, values: dict[str, float]) -> None:
        """Record `values` after `progress.step` updates; a number that is not finite becomes null."""
        if self._file is None:
            return
        row: dict[str, Any] = {"v": 1, "step": progress.step, "seconds": round(progress.seconds, 3)}
        row |= {"tokens": progress.tokens, **values}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._pending += json.dumps(finite).encode() + b"\n"
        self._flush()
        if self._wandb:
            self._wandb.log(values | {"iter": progress.step, "tokens": progress.tokens}, step=progress.step)

    def _flush(self) -> None:
        """Write the pending rows, or keep them for later."""
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
                warn(f"cannot write {self._path}: {error}; training goes on, and it is tried again")
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
        if self._wandb:
            self._wandb.finish(exit_code=int(error is not None))


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


def _start_wandb(config: TrainConfig, is_resumed: bool) -> Any:
    """A Weights & Biases run, or None with a warning: a tracker that fails must not end the training.

    A resumed run goes on in the one that it began.
    """
    try:
        import wandb

        path = Path(config.out_dir) / "wandb_id"
        name = path.read_text() if is_resumed and path.exists() else secrets.token_hex(4)
        path.write_text(name)
        return wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name,
            dir=config.out_dir,
            config=json.loads(as_json(config)),
            id=name,
            resume="allow",
        )
    except ImportError:
        warn("--wandb_log=True needs the package wandb (pip install wandb); going on without it")
    except Exception as error:  # not logged in, no network, …: wandb has many ways
        warn(f"Weights & Biases could not start ({error}); going on without it")
    return None
