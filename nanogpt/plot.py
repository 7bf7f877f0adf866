"""What runs record, looked at: a table of runs, and their curves as a picture. No torch in here: it answers at once."""

import importlib.util
import logging
import math
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
_TRAINING: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.5}
_VALIDATION: dict[str, Any] = {"linewidth": 1.5, "marker": "o", "markersize": 3, "zorder": 3}
# Settings that do not change what a model learns, and those that count only where another one has a certain value.
_WITHOUT_EFFECT = """out_dir model text resume eval_only log_interval always_save_checkpoint checkpoint_interval
    keep_checkpoints sample_interval plot dry_run wandb_log wandb_project wandb_run_name tensorboard_log backend
    dist_timeout verbosity""".split()
_COUNTS_ONLY_WITH: dict[str, tuple[str, list[Any]]] = {
    "muon_lr": ("optimizer", ["muon"]), "muon_momentum": ("optimizer", ["muon"]),
    "beta2": ("optimizer", ["adamw", "muon", "adam"]), "decay_share": ("schedule", ["wsd"]),
    **dict.fromkeys("schedule warmup_iters lr_decay_iters min_lr".split(), ("decay_lr", [True])),
    "rope_theta": ("architecture", ["llama", "qwen3"]), "activation": ("architecture", ["gpt2"]),
}  # fmt: skip


@dataclass
class RunRecord:
    """A run's folder, read once."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    factors: dict[str, float] = field(default_factory=dict)  # with which `curve` multiplies what is recorded

    def __post_init__(self) -> None:
        planned = self.config.get("max_iters")
        self.name = self.path.resolve().name
        self.step = max(row["step"] for row in self.rows)  # done
        self.planned = planned if isinstance(planned, int) else 0  # 0: unknown

    @property
    def best(self) -> float | None:
        """Lowest validation loss."""
        return min((loss for _, loss in self.curve("val/loss")), default=None)

    @property
    def age(self) -> float:
        """Seconds since the last record."""
        return max(0.0, time.time() - (self.path / "metrics.jsonl").stat().st_mtime)

    @property
    def state(self) -> str:
        """One of running, done, stopped (can be resumed), diverged, crashed."""
        try:
            owner = (self.path / "lock").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            owner = ""
        found = re.fullmatch(r"process (\d+) on (.+)", owner)
        if found and _is_alive(int(found[1]), found[2], self.age):
            return "running"
        if not owner and self.step >= self.planned and self.curve("val/loss", since=self.step):
            return "done"
        losses = [row[name] for row in self.rows for name in LOSSES if name in row]
        if losses and losses[-1] is None:  # not finite
            return "diverged"
        return "crashed" if owner else "stopped"

    def curve(self, name: str, since: int = 0, by: str = "step") -> list[tuple[float, float]]:
        """Return the points (`by`, value) of what is recorded as `name`, from step `since` on."""
        rows = (row for row in self.rows if row["step"] >= since)
        factor = self.factors.get(name, 1)
        return [(r[by], factor * r[name]) for r in rows if all(isinstance(r.get(k), int | float) for k in (by, name))]


def _is_alive(process: int, host: str, age: float) -> bool:
    """Return whether a process lives; on another host, and on Windows: whether it recorded something lately."""
    if host != socket.gethostname() or os.name == "nt":  # on Windows, os.kill would end the process
        return age < 600
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def open_run(path: Path) -> RunRecord:
    """Read the run in a folder. Raises `CheckpointError` if nothing is recorded there."""
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        raise CheckpointError(f"{path / 'metrics.jsonl'} is missing or empty: no run has recorded anything there")
    return RunRecord(path, read_json(path / "config.json"), rows)


def list_runs(config: RunsConfig) -> None:
    """Print a table of the runs in and below `folder`, the latest first. Raises `CheckpointError` if there are none."""
    folder = Path(config.folder)
    runs = []
    for path in folder.rglob("metrics.jsonl"):
        is_old = any(re.fullmatch(r"previous-\d+", part) for part in path.relative_to(folder).parts)
        if (config.previous or not is_old) and (rows := read_metrics(path)):
            runs.append(RunRecord(path.parent, read_json(path.parent / "config.json"), rows))
    if not runs:
        raise CheckpointError(f"no runs in or below {folder.resolve()}")
    table = [("run", "state", "steps", "best loss", "last record")]
    for run in sorted(runs, key=lambda run: run.age):
        place = os.path.relpath(run.path, folder)
        steps = f"{run.step:,} of {run.planned:,}" if run.planned else f"{run.step:,}"
        best = "" if run.best is None else f"{run.best:.4f}"
        table.append((run.name if place == "." else place, run.state, steps, best, f"{duration(run.age)} ago"))
    print_table(table)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; cells that begin with a digit are aligned to the right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:{'>' if cell[:1].isdigit() else '<'}{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def plot(config: PlotConfig) -> None:
    """Draw the curves of the runs in `out_dir` into one picture, and print how several compare.

    Raises `CheckpointError` if a folder holds no run.
    """
    runs, unit = in_one_unit([open_run(Path(path)) for path in config.out_dir])
    target = Path(config.output or ("comparison.png" if runs[1:] else Path(config.out_dir[0]) / "loss.png"))
    draw(runs, target, unit)
    print(f"drew {target}")
    if len(runs) > 1:
        compare(runs, config.loss, unit)


def in_one_unit(runs: Sequence[RunRecord]) -> tuple[Sequence[RunRecord], str]:
    """Return runs whose losses can be compared, and their unit: nats per token, or bits per byte of different texts.

    The latter needs each data set's dataset.json, with the tokens and bytes of both splits.
    """
    sets = [Path(str(run.config.get("data_dir")), str(run.config.get("dataset"))) for run in runs]
    abouts = [read_json(path / "dataset.json") for path in sets]
    if len(set(sets)) == 1 or (abouts[0] and all(about == abouts[0] for about in abouts)):
        return runs, "nats per token"
    converted = []
    for run, about in zip(runs, abouts, strict=True):
        tokens, sizes = about.get("tokens", {}), about.get("bytes", {})
        if not all(tokens.get(split) and sizes.get(split) for split in ("train", "val")):
            return runs, "nats per token: different data, no comparison"
        factors = {f"{split}/loss": tokens[split] / sizes[split] / math.log(2) for split in ("train", "val")}
        converted.append(replace(run, factors=factors))
    return converted, "bits per byte"


def draw(runs: Sequence[RunRecord], target: Path, unit: str = "nats per token") -> None:
    """Draw the curves of runs into a .png, .svg or .pdf; `unit` is that of the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    longest = max(run.rows[-1].get("seconds") or 0.0 for run in runs)
    clock, length = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    for axes, (by, names, quantity) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for n, run in enumerate(runs):
            for name in names:
                points = run.curve(name, by=by)
                points = points[:: len(points) // 3000 + 1]  # more of them than pixels take long to draw
                x, y = [x / length if by == "seconds" else x for x, _ in points], [y for _, y in points]
                color = f"C{n}" if runs[1:] or name != "val/loss" else "C1"
                best = "" if run.best is None else f", best {run.best:.4f}"
                label = f"{run.name}, validation{best}" if name == "val/loss" else f"{run.name}, a training batch"
                axes.plot(x, y, color=color, label=label, **(_VALIDATION if name == "val/loss" else _TRAINING))
        axes.set_xlabel(f"{clock} of training" if by == "seconds" else by)
        axes.set_ylabel(quantity or f"loss, {unit}")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(_short)
        axes.yaxis.set_major_formatter(_short)
        if names == LOSSES:
            _focus(axes, runs)
        else:
            axes.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=9)
    with atomic_write(target) as file:
        figure.savefig(file, dpi=110, format=target.suffix.lstrip("."))


def _short(number: float, _: object = None) -> str:
    """Return the label of a tick: 50k, 1.5M, 300B."""
    power = min(3, int(math.log10(abs(number)) // 3)) if abs(number) >= 1000 else 0
    return f"{number / 1000**power:g}{' kMB'[power].strip()}"


def _focus(axes: Any, runs: Sequence[RunRecord]) -> None:
    """Give the losses after the first twentieth of the runs all the room, and say in words where they begin."""
    late = [loss for run in runs for name in LOSSES for _, loss in run.curve(name, since=run.step // 20)]
    first = max((run.curve(name)[0][1] for run in runs for name in LOSSES if run.curve(name)), default=0.0)
    if late and first > max(late):
        margin = 0.05 * (max(late) - min(late)) + 1e-9
        axes.set_ylim(min(late) - margin, max(late) + margin)
        axes.set_title(f"begins at {first:.2f}, above this picture", fontsize=9, loc="left", color="dimgray")


def compare(runs: Sequence[RunRecord], loss: float, unit: str) -> None:
    """Print the best losses, how long each run took to a loss that all reached, and the settings that differ."""
    bests = [run.best for run in runs if run.best is not None]
    loss = loss or max(bests, default=0.0)
    print(f"losses in {unit}")
    table = [("run", "steps", "best loss", f"training to {loss:.4f}")]
    for run in runs:
        seconds = next((seconds for seconds, value in run.curve("val/loss", by="seconds") if value <= loss), None)
        best = "" if run.best is None else f"{run.best:.4f}"
        table.append((run.name, f"{run.step:,}", best, "never" if seconds is None else duration(seconds)))
    print_table(table)
    if changed := differences(runs):
        print()
        rows = [(name, *(f"{v:g}" if isinstance(v, float) else str(v) for v in vs)) for name, vs in changed.items()]
        print_table([("setting", *(run.name for run in runs)), *rows])


def differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ and that have an effect in one of them, with the value of each run."""
    shared = set.intersection(*(set(run.config) for run in runs)) - set(_WITHOUT_EFFECT)
    values = {name: [run.config[name] for run in runs] for name in sorted(shared)}
    counts = {
        name: any(run.config.get(other, wanted[0]) in wanted for run in runs)
        for name, (other, wanted) in _COUNTS_ONLY_WITH.items()
    }
    return {n: each for n, each in values.items() if any(v != each[0] for v in each) and counts.get(n, True)}


def draw_if_possible(folder: str, at_most_every: float = 0.0) -> None:
    """Draw a run into its loss.png, if matplotlib is there; what goes wrong is a warning.

    at_most_every: seconds since the last drawing, or the start of the run, within which nothing is done.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return
    files = [Path(folder, name) for name in ("config.json", "loss.png")]
    last = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    if time.time() - last < at_most_every:
        return
    try:
        draw([open_run(Path(folder))], Path(folder) / "loss.png")
    except Exception as error:  # a full disk, a damaged matplotlib: the run continues all the same
        log.warning(f"loss.png could not be drawn: {error}")
