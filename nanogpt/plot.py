"""What runs record, looked at: a table of runs, and their curves as a picture. No torch in here: it answers at once."""

import importlib.util
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nanogpt.errors import CheckpointError
from nanogpt.files import atomic_write, read_json
from nanogpt.metrics import duration, read_metrics
from nanogpt.settings import PlotConfig, RunsConfig

log = logging.getLogger(__name__)

LOSSES = ("train/loss", "val/loss")
# What the panels show, by the names of metrics.jsonl: over what, and which values.
_PANELS = [("step", LOSSES), ("tokens", LOSSES), ("seconds", LOSSES),
           ("step", ("lr",)), ("step", ("grad_norm",)), ("step", ("tokens_per_second",))]  # fmt: skip


class RunRecord:
    """A run's folder, read once. Raises `CheckpointError` if nothing is recorded there."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name
        self.rows = read_metrics(path / "metrics.jsonl")
        if not self.rows:
            raise CheckpointError(f"{path / 'metrics.jsonl'} is missing or empty: no run has recorded anything there")
        self.config = read_json(path / "config.json")
        self.step, self.planned = self.rows[-1]["step"], self.config.get("max_iters", 0)
        self.age = time.time() - (path / "metrics.jsonl").stat().st_mtime  # seconds since the last record

    def curve(self, name: str, by: str = "step") -> list[tuple[float, float]]:
        """Return the points (`by`, value) of what is recorded as `name`."""
        return [(row[by], row[name]) for row in self.rows if row.get(name) is not None]

    @property
    def best(self) -> float:
        """Lowest validation loss."""
        return min((loss for _, loss in self.curve("val/loss")), default=math.inf)

    @property
    def state(self) -> str:
        """One of running, done, stopped (can be resumed), diverged, crashed."""
        lock = self.path / "lock"
        owner = lock.read_text(encoding="utf-8") if lock.exists() else ""  # a process, or "failed"
        if owner.startswith("process") and self.age < 600:
            return "running"
        if not owner and self.step >= self.planned:
            return "done"
        losses = [row[name] for row in self.rows for name in LOSSES if name in row]
        if losses and losses[-1] is None:  # not finite
            return "diverged"
        return "crashed" if owner else "stopped"


def list_runs(config: RunsConfig) -> None:
    """Print a table of the runs in and below `folder`, the latest first. Raises `CheckpointError` if there are none."""
    folder, runs = Path(config.folder), []
    for path in folder.rglob("metrics.jsonl"):
        if config.previous or not path.relative_to(folder).match("previous-[0-9]*/*"):
            with suppress(CheckpointError):  # nothing recorded yet
                runs.append(RunRecord(path.parent))
    if not runs:
        raise CheckpointError(f"no runs in or below {folder.resolve()}")
    table = [("run", "state", "steps", "best loss", "last record")]
    for run in sorted(runs, key=lambda run: run.age):
        steps = f"{run.step:,} of {run.planned:,}"
        table.append((str(run.path), run.state, steps, f"{run.best:.4f}", f"{duration(run.age)} ago"))
    print_table(table)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; cells that begin with a digit are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{'>' if cell[:1].isdigit() else '<'}{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def plot(config: PlotConfig) -> None:
    """Draw the curves of the runs in `out_dir` into one picture; of several, print best losses and what differs."""
    runs = [RunRecord(Path(path)) for path in config.out_dir]
    folders = {(run.config.get("data_dir"), run.config.get("dataset")) for run in runs}
    unit = "nats per token" + ": different data, no comparison" * (len(folders) > 1)
    target = Path(config.output or ("comparison.png" if runs[1:] else Path(config.out_dir[0]) / "loss.png"))
    draw(runs, target, unit)
    print(f"drew {target}")
    if len(runs) == 1:
        return
    loss = config.loss or max(run.best for run in runs)
    print(f"losses in {unit}")
    table = [("run", "steps", "best loss", f"training to {loss:.4f}")]
    for run in runs:
        seconds = [seconds for seconds, value in run.curve("val/loss", by="seconds") if value <= loss]
        table.append((run.name, f"{run.step:,}", f"{run.best:.4f}", duration(seconds[0]) if seconds else "never"))
    print_table(table)
    settings = [(name, *(str(run.config.get(name)) for run in runs)) for name in runs[0].config if name != "out_dir"]
    print()
    print_table([("setting", *(run.name for run in runs)), *(row for row in settings if len(set(row[1:])) > 1)])


def draw(runs: Sequence[RunRecord], target: Path, unit: str = "nats per token") -> None:
    """Draw the curves of runs into a .png, .svg or .pdf; `unit` is that of the losses."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(14, 8), layout="constrained")
    longest = max(run.rows[-1]["seconds"] for run in runs)
    clock, length = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    late = [y for run in runs for name in LOSSES for step, y in run.curve(name) if step >= run.step // 20]
    for axes, (by, names) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for n, run in enumerate(runs):
            for name in names:
                points = run.curve(name, by)
                points = points[:: len(points) // 3000 + 1]  # more of them than pixels take long to draw
                x, y = [x / length if by == "seconds" else x for x, _ in points], [y for _, y in points]
                if name == "val/loss":
                    axes.plot(x, y, f"C{n}o-", label=f"{run.name}, validation, best {run.best:.4f}", markersize=3)
                else:
                    axes.plot(x, y, f"C{n}", label=f"{run.name}, a training batch", linewidth=0.8, alpha=0.5)
        axes.set_xlabel(f"{clock} of training" if by == "seconds" else by)
        axes.set_ylabel(f"loss, {unit}" if names == LOSSES else names[0].replace("_", " "))
        axes.grid(alpha=0.3)
        if by != "seconds":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 1.5M
        if names != LOSSES:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(EngFormatter(sep="") if "tokens" in names[0] else "{x:g}")
        elif late:  # All the room is for the losses after the first twentieth of the runs.
            axes.set_ylim(min(late) - 0.05, max(late) + 0.05)
    figure.axes[0].legend(fontsize=9)
    with atomic_write(target) as file:
        figure.savefig(file, dpi=110, format=target.suffix.lstrip("."))


def draw_if_possible(folder: str, at_most_every: float = 0.0) -> None:
    """Draw a run into its loss.png, but not within so many seconds after its start or the last drawing."""
    files = [Path(folder, name) for name in ("config.json", "loss.png")]
    last = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    if importlib.util.find_spec("matplotlib") is None or time.time() - last < at_most_every:
        return
    try:
        draw([RunRecord(Path(folder))], Path(folder) / "loss.png")
    except Exception as error:  # a full disk, a damaged matplotlib: the run continues all the same
        log.warning(f"loss.png could not be drawn: {error}")
