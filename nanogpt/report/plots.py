"""Pictures of a run."""

from pathlib import Path

from nanogpt.errors import CheckpointError, ConfigError
from nanogpt.programs import PlotConfig
from nanogpt.report.metrics import read_metrics


def plot(config: PlotConfig) -> None:
    """Draw training and validation loss of the run in `out_dir` into its loss.png.

    Raises `ConfigError` without matplotlib, `CheckpointError` if there are no metrics.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install matplotlib") from error
    source = Path(config.out_dir) / "metrics.jsonl"
    rows = read_metrics(source)
    if not rows:
        raise CheckpointError(
            f"nothing to draw: {source} is missing or empty; train a model into {config.out_dir} first"
        )
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="updates", ylabel="loss (nats per token)", title=Path(config.out_dir).resolve().name
    )
    training = [(row["step"], row["train/loss"]) for row in rows if row.get("train/loss") is not None]
    validation = [(row["step"], row["val/loss"]) for row in rows if row.get("val/loss") is not None]
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="training batch")
    if validation:
        best = min(loss for _, loss in validation)
        axes.plot(
            *zip(*validation, strict=True),
            color="tab:orange",
            marker="o",
            markersize=4,
            label=f"validation, best {best:.3f}",
        )
    axes.grid(alpha=0.3)
    axes.legend()
    target = Path(config.out_dir) / "loss.png"
    figure.savefig(target, dpi=120)
    print(f"drew {target}")
