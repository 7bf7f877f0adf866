"""What runs there are, how they are, and how they compare: from their metrics.jsonl and config.json alone."""

import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.errors import CheckpointError
from nanogpt.files import read_json
from nanogpt.metrics import duration, read_metrics
from nanogpt.settings import RunsConfig


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, read once."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl

    @property
    def name(self) -> str:
        """What to call it."""
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """Updates done."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def planned(self) -> int:
        """Steps to do; 0 if nobody knows."""
        steps = self.config.get("max_iters")
        return steps if isinstance(steps, int) else 0

    @property
    def best(self) -> float | None:
        """The lowest validation loss."""
        return min((loss for _, loss in self.curve("val/loss")), default=None)

    @property
    def age(self) -> float:
        """Seconds since it last recorded something."""
        return max(0.0, time.time() - (self.path / "metrics.jsonl").stat().st_mtime)

    @property
    def state(self) -> str:
        """running, done, stopped (in order, to be resumed), diverged or crashed."""
        try:
            owner = (self.path / "lock").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            owner = ""
        found = re.fullmatch(r"process (\d+) on (.+)", owner)
        if found and _is_alive(int(found[1]), found[2], self.age):
            return "running"
        if not owner and self.step >= self.planned and self.curve("val/loss", since=self.step):
            return "done"
        losses = [row[name] for row in self.rows for name in ("train/loss", "val/loss") if name in row]
        if losses and losses[-1] is None:  # not finite
            return "diverged"
        return "crashed" if owner else "stopped"

    def curve(self, name: str, since: int = 0, by: str = "step") -> list[tuple[float, float]]:
        """The points (`by`, value) of what was recorded as `name`, from step `since` on."""
        rows = (row for row in self.rows if row["step"] >= since)
        return [(r[by], r[name]) for r in rows if all(isinstance(r.get(key), (int, float)) for key in (by, name))]

    def reached(self, loss: float) -> float | None:
        """Seconds of training until the validation loss was `loss` or lower."""
        return next((seconds for seconds, value in self.curve("val/loss", by="seconds") if value <= loss), None)


def open_run(path: Path) -> RunRecord:
    """The run in a folder. Raises `CheckpointError` if nothing was recorded there."""
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        raise CheckpointError(f"{path / 'metrics.jsonl'} is missing or empty: no run has recorded anything there")
    return RunRecord(path, read_json(path / "config.json"), rows)


def differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The settings that all runs have and in which they differ, with the value of each run."""
    shared = set.intersection(*(set(run.config) for run in runs)) - {"out_dir", "wandb_run_name"}
    values = {name: [run.config[name] for run in runs] for name in sorted(shared)}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def list_runs(config: RunsConfig) -> None:
    """Print the runs in and below `folder`. Raises `CheckpointError` if there are none."""
    folder = Path(config.folder)
    runs = []
    for path in sorted(folder.rglob("metrics.jsonl")):
        is_old = any(re.fullmatch(r"previous-\d+", part) for part in path.relative_to(folder).parts)
        if is_old and not config.previous:
            continue
        if rows := read_metrics(path):
            runs.append(RunRecord(path.parent, read_json(path.parent / "config.json"), rows))
    if not runs:
        raise CheckpointError(f"no runs in or below {folder.resolve()}")
    table = [("run", "state", "steps", "best loss", "last word")]
    for run in sorted(runs, key=lambda run: run.age):
        place = os.path.relpath(run.path, folder)
        steps = f"{run.step:,} of {run.planned:,}" if run.planned else f"{run.step:,}"
        best = "" if run.best is None else f"{run.best:.4f}"
        table.append((run.name if place == "." else place, run.state, steps, best, f"{duration(run.age)} ago"))
    print_table(table)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; what begins with a digit stands right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if re.match(r"[\d<]", cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _is_alive(process: int, host: str, age: float) -> bool:
    """Whether a process lives; on another host, and on Windows, whether it was heard of within ten minutes."""
    if host != socket.gethostname() or os.name == "nt":  # there, the question below would end it
        return age < 600
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is somebody else's
        pass
    return True
