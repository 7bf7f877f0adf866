"""What runs record, looked at: a table of runs, and their curves as a picture. No torch in here: it answers at once."""

import importlib.util
import logging
import math
import os
import re
import socket
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
_PANELS = [  # over what, which columns of metrics.jsonl, and what to write beside them
    ("step", LOSSES, ""), ("tokens", LOSSES, ""), ("seconds", LOSSES, ""), ("step", ("lr",), "learning rate"),
    ("step", ("grad_norm",), "norm of the gradient before clipping"),
    ("step", ("tokens_per_second",), "tokens per second"),
]  # fmt: skip


# Settings that do not change what a model learns.
_WITHOUT_EFFECT = """out_dir model text resume eval_only log_interval always_save_checkpoint checkpoint_interval
    keep_checkpoints sample_interval plot dry_run wandb_log wandb_project wandb_run_name tensorboard_log backend
    shard_group gather_once dist_timeout verbosity""".split()


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
        owner = lock.read_text(encoding="utf-8") if lock.exists() else ""
        found = re.fullmatch(r"process (\d+) on (.+)", owner)
        if found and _is_alive(int(found[1]), found[2], self.age):
            return "running"
        if not owner and self.step >= self.planned:
            return "done"
        losses = [row[name] for row in self.rows for name in LOSSES if name in row]
        if losses and losses[-1] is None:  # not finite
            return "diverged"
        return "crashed" if owner else "stopped"


def _is_alive(process: int, host: str, age: float) -> bool:
    """Return whether a process lives; on another host, and on Windows: whether it recorded something lately."""
    if host != socket.gethostname() or os.name == "nt":  # on Windows, os.kill would end the process
        return age < 600
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is another user's
    return True


def list_runs(config: RunsConfig) -> None:
    """Print a table of the runs in and below `folder`, the latest first. Raises `CheckpointError` if there are none."""
    folder, runs = Path(config.folder), []
    for path in folder.rglob("metrics.jsonl"):
        if config.previous or not re.search(r"previous-\d", str(path.relative_to(folder))):
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
    unit = use_one_unit(runs)
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
    shared = set.intersection(*(set(run.config) for run in runs)) - set(_WITHOUT_EFFECT)
    values = {name: [str(run.config[name]) for run in runs] for name in sorted(shared)}
    if changed := [(name, *each) for name, each in values.items() if len(set(each)) > 1]:
        print()
        print_table([("setting", *(run.name for run in runs)), *changed])


def use_one_unit(runs: Sequence[RunRecord]) -> str:
    """Make the losses of runs comparable, and return their unit: bits per byte if they have different data sets."""
    folders = [Path(str(run.config.get("data_dir")), str(run.config.get("dataset"))) for run in runs]
    if len(set(folders)) == 1:
        return "nats per token"
    abouts = [read_json(folder / "dataset.json") for folder in folders]
    if not all("bytes" in about for about in abouts):
        return "nats per token: different data, no comparison"
    for run, about in zip(runs, abouts, strict=True):
        for split in ("train", "val"):
            rate = about["tokens"][split] / about["bytes"][split] / math.log(2)
            for row in run.rows:
                if row.get(f"{split}/loss") is not None:
                    row[f"{split}/loss"] *= rate
    return "bits per byte"


def draw(runs: Sequence[RunRecord], target: Path, unit: str = "nats per token") -> None:
    """Draw the curves of runs into a .png, .svg or .pdf; `unit` is that of the losses."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(14, 8), layout="constrained")
    longest = max(run.rows[-1]["seconds"] for run in runs)
    clock, length = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    late = [y for run in runs for name in LOSSES for step, y in run.curve(name) if step >= run.step // 20]
    for axes, (by, names, quantity) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
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
        axes.set_ylabel(quantity or f"loss, {unit}")
        axes.grid(alpha=0.3)
        if by != "seconds":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k, 1.5M
        if names != LOSSES:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(EngFormatter(sep="") if "tokens" in names[0] else "{x:g}")
        elif late:  # All the room is for the losses after the first twentieth of the runs.
            axes.set_ylim(min(late) - 0.05, max(late) + 0.05)
            begin = max(run.curve(name)[0][1] for run in runs for name in LOSSES if run.curve(name))
            axes.set_title(f"begins at {begin:.2f}" * (begin > max(late)), fontsize=9, loc="left", color="dimgray")
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
