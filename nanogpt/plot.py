"""Pictures of runs."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from nanogpt.files import atomic_write
from nanogpt.metrics import duration
from nanogpt.runs import RunRecord, differences, open_run, print_table
from nanogpt.settings import PlotConfig

log = logging.getLogger(__name__)

_PANELS = (  # title, what is drawn over what
    ("loss by steps", "step", ("train/loss", "val/loss")),
    ("loss by tokens", "tokens", ("train/loss", "val/loss")),
    ("loss by seconds of training", "seconds", ("train/loss", "val/loss")),
    ("learning rate", "step", ("lr",)),
    ("gradient norm", "step", ("grad_norm",)),
    ("tokens per second", "step", ("tokens_per_second",)),
)


def plot(config: PlotConfig) -> None:
    """Draw the curves of the runs in `out_dir` into one picture, and print how they compare.

    Raises `CheckpointError` if a folder holds no run.
    """
    runs = [open_run(Path(path)) for path in config.out_dir]
    target = Path(config.output or ("comparison.png" if runs[1:] else Path(config.out_dir[0]) / "loss.png"))
    draw(runs, target)
    print(f"drew {target}")
    if len(runs) > 1:
        compare(runs, config.loss)


def draw(runs: Sequence[RunRecord], target: Path) -> None:
    """Draw the curves of runs into a .png, .svg or .pdf."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    figure.suptitle(_label(runs[0]) if len(runs) == 1 else "")
    for axes, (title, by, names) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for n, run in enumerate(runs):
            for name in names:
                points = run.curve(name, by=by)
                if not points:
                    continue
                is_validation = name == "val/loss"
                color = f"C{n}" if len(runs) > 1 or not is_validation else "C1"
                style = {"marker": "o", "markersize": 4, "linewidth": 1.2} if is_validation else {"linewidth": 0.8}
                faint = 0.35 if name == "train/loss" else 0.8
                axes.plot(*zip(*points, strict=True), color=color, alpha=1 if is_validation else faint, **style)
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
        if "val/loss" in names:
            axes.set_ylabel("nats per token")
            late = [loss for run in runs for name in names for _, loss in run.curve(name, since=run.step // 20)]
            if late:  # what is learned at once, in the first twentieth, would leave no room for the rest
                axes.set_ylim(top=max(late) + 0.05 * (max(late) - min(late)) + 1e-9)
    handles = [Figure().subplots().plot([], [], color=f"C{n}")[0] for n in range(len(runs) if len(runs) > 1 else 2)]
    labels = [_label(run) for run in runs] if len(runs) > 1 else ["a training batch", "validation"]
    figure.axes[0].legend(handles, labels, fontsize=9)
    with atomic_write(target) as file:
        figure.savefig(file, dpi=110, format=target.suffix.lstrip("."))


def _label(run: RunRecord) -> str:
    return run.name if run.best is None else f"{run.name}, best {run.best:.4f}"


def compare(runs: Sequence[RunRecord], loss: float) -> None:
    """Print the best losses, how long each run took to a loss that all reached, and the settings that differ."""
    bests = [run.best for run in runs if run.best is not None]
    loss = loss or max(bests, default=0.0)
    table = [("run", "steps", "best loss", f"training to {loss:.4f}")]
    for run in runs:
        seconds = run.reached(loss)
        best = "" if run.best is None else f"{run.best:.4f}"
        table.append((run.name, f"{run.step:,}", best, "never" if seconds is None else duration(seconds)))
    print_table(table)
    if changed := differences(runs):
        print()
        rows = [(name, *(f"{v:g}" if isinstance(v, float) else str(v) for v in vs)) for name, vs in changed.items()]
        print_table([("setting", *(run.name for run in runs)), *rows])


def draw_if_possible(folder: str) -> None:
    """Draw a run that has ended into its loss.png, if matplotlib is there; what goes wrong is a warning."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    try:
        draw([open_run(Path(folder))], Path(folder) / "loss.png")
    except Exception as error:  # a full disk, a damaged matplotlib: the run is done all the same
        log.warning(f"loss.png could not be drawn: {error}")
