"""What a run records: one JSON object a line in metrics.jsonl, and Weights & Biases when asked for."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nanogpt.checkpoint import Progress
from nanogpt.config import TrainConfig
from nanogpt.files import atomic_write
from nanogpt.settings import as_json


class Metrics:
    """The records of a run, open for writing. A resumed run goes on in the same file, with no step twice."""

    def __init__(self, config: TrainConfig, resumed_at: int | None = None, is_main: bool = True) -> None:
        self._wandb: Any = None
        self._file: IO[str] | None = None
        if not is_main:
            return  # one process of a run writes
        path = Path(config.out_dir) / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if resumed_at is not None and row["step"] <= resumed_at]
        with atomic_write(path) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in kept)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # line by line: nothing is lost in a crash
        if config.wandb_log:
            self._wandb = _start_wandb(config)

    def write(self, progress: Progress, values: dict[str, float]) -> None:
        """Record `values` after `progress.step` updates; a number that is not finite becomes null."""
        if self._file is None:
            return
        row: dict[str, Any] = {"v": 1, "step": progress.step, "seconds": round(progress.seconds, 3)}
        row |= {"tokens": progress.tokens, **values}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        if self._wandb:
            self._wandb.log(values | {"iter": progress.step, "tokens": progress.tokens}, step=progress.step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(error is not None))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order; none if there is no file. A line cut off by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _start_wandb(config: TrainConfig) -> Any:
    """A Weights & Biases run, or None with a warning: a tracker that fails must not end the training."""
    try:
        import wandb

        return wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name,
            dir=config.out_dir,
            config=json.loads(as_json(config)),
        )
    except ImportError:
        print("warning: --wandb_log=True needs the package wandb (pip install wandb); going on without it")
    except Exception as error:  # not logged in, no network, …: wandb has many ways
        print(f"warning: Weights & Biases could not start ({error}); going on without it")
    return None
