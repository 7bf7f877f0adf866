"""What watches over a run: updates that must not be made, losses that stand out, the health of the network."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.checkpoint import Progress
from nanogpt.errors import DivergedError, UserError
from nanogpt.files import write_json
from nanogpt.spread import whole
from nanogpt.start import Run

log = logging.getLogger(__name__)

_FEW = 50  # recorded losses, before which none stands out
_MEMORY = 0.05  # weight of the newest loss in the averages
_FAR = 6.0  # usual deviations from the average


class Guard:
    """Counts what happens to updates, on the device: reading a number at every step would make a GPU wait."""

    def __init__(self, run: Run) -> None:
        self._run = run
        counts = [0, run.progress.skipped, run.progress.clipped]
        self._in_a_row, self._skipped, self._clipped = (torch.tensor(n, device=run.device.name) for n in counts)

    def note(self, grad_norm: Tensor, is_bad: Tensor) -> None:
        """After an update with this gradient norm; `is_bad` if it was skipped."""
        self._in_a_row = (self._in_a_row + 1) * is_bad
        self._skipped = self._skipped + is_bad
        if clip := self._run.config.grad_clip:
            self._clipped = self._clipped + ((grad_norm > clip) & ~is_bad)

    def store(self) -> None:
        """Bring the counts into the run's progress, where checkpoints find them."""
        self._run.progress.skipped, self._run.progress.clipped = int(self._skipped), int(self._clipped)

    def check(self, backward: Callable[[], Tensor], learning_rate: float) -> None:
        """Raise `DivergedError` if too many updates in a row had to be skipped.

        `backward` computes the gradients of the last one again, and returns its loss.
        """
        if int(self._in_a_row) >= self._run.config.max_bad_steps:
            raise DivergedError(_diagnosis(self._run, backward, learning_rate, int(self._in_a_row)))

    def clip_fraction(self) -> float:
        """The share of the last `health_interval` updates whose gradient was clipped; counts anew from here."""
        fraction = int(self._clipped) / self._run.config.health_interval
        self._clipped = torch.zeros_like(self._clipped)
        return fraction


def is_spike(progress: Progress, loss: float) -> bool:
    """Whether a recorded loss stands out from those before it; remembers it."""
    if not math.isfinite(loss):
        return False  # the guard's business
    difference = loss - progress.loss_average
    found = progress.losses >= _FEW and difference > _FAR * progress.loss_deviation
    progress.losses += 1
    weight = max(1 / progress.losses, _MEMORY)
    progress.loss_average += weight * difference
    if progress.losses > 1:
        progress.loss_deviation += weight * (abs(difference) - progress.loss_deviation)
    return found


def _diagnosis(run: Run, backward: Callable[[], Tensor], learning_rate: float, in_a_row: int) -> str:
    """Compute the last gradients again, write what is known to diverged.json, and say it in a sentence."""
    config, step = run.config, run.progress.step - 1
    run.optimizer.zero_grad()
    loss = run.world.mean(backward())
    named = {name: whole(p.grad.norm()) for name, p in run.model.named_parameters() if p.grad is not None}
    values = torch.stack(list(named.values())) / run.scaler.get_scale()
    norms = dict(zip(named, values.tolist(), strict=True))
    run.optimizer.zero_grad()
    report: dict[str, Any] = {
        "step": step,
        "skipped_in_a_row": in_a_row,
        "learning_rate": learning_rate,
        "loss": str(loss.item()),
        "batch": {"dataset": config.dataset, "seed": config.seed, "step": step, "rows": config.rows},
        "gradient_norms": {name: norm if math.isfinite(norm) else str(norm) for name, norm in norms.items()},
        "not_finite": [name for name, p in run.model.named_parameters() if not math.isfinite(norms.get(name, 0.0))],
        "weights_not_finite": [name for name, p in run.model.named_parameters() if not whole(p.isfinite().all())],
    }
    path = Path(config.out_dir) / "diverged.json"
    if run.world.is_main:
        try:
            write_json(path, report)
        except UserError as error:
            log.warning(str(error))
    return (
        f"loss or gradient was not finite in {in_a_row} updates in a row, up to update {step}: loss {loss.item()}, "
        f"learning rate {learning_rate:g}, {len(report['not_finite'])} of {len(norms)} gradients not finite. They were "
        f"skipped, so the checkpoints in {config.out_dir} know nothing of them; {path} has the norms of all layers and "
        f"says which batch it was. Try {ways_out(run)}"
    )


def ways_out(run: Run) -> str:
    """What to try against losses that are not finite, as far as it is not in use."""
    ways = [f"a lower learning_rate (now {run.config.learning_rate:g})"]
    ways += ["grad_clip=1"] * (run.config.grad_clip != 1) + ["dtype=float32"] * (run.device.dtype != torch.float32)
    return ", or ".join(ways)
