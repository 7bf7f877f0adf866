"""The server's second page: how runs go, from what they record. Only folders that were named are read."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from nanogpt.errors import UserError
from nanogpt.plot import RunRecord, differences, open_run
from nanogpt.protocol import ErrorReply, RefusedError

_CURVES = ("train/loss", "val/loss", "lr", "grad_norm", "tokens_per_second")
_POINTS = 600  # of a curve at most: what a screen can show


class Watched:
    """A run's folder, read again when it has changed; a large one the less often the longer that takes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run: RunRecord | None = None
        self._size, self._next = -1, 0.0

    @property
    def run(self) -> RunRecord | None:
        """What is recorded; None if nothing is."""
        try:
            size = (self.path / "metrics.jsonl").stat().st_size
            began = time.monotonic()
            if size != self._size and began >= self._next:
                self._run, self._size = open_run(self.path), size
                self._next = time.monotonic() + 20 * (time.monotonic() - began)
        except (OSError, UserError):
            self._run, self._size = None, -1
        return self._run


def add_board(app: FastAPI, folders: Sequence[Path]) -> None:
    """Add the paths below /runs."""
    watched = [Watched(folder) for folder in folders]
    refusals: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}}

    @app.get("/runs", responses=refusals)
    def runs() -> dict[str, Any]:
        """The runs, by number, and the settings in which they differ."""
        there = {number: each.run for number, each in enumerate(watched)}
        known = {number: run for number, run in there.items() if run}
        return {
            "runs": [_summary(number, run) for number, run in known.items()],
            "differences": differences(list(known.values())) if len(known) > 1 else {},
        }

    @app.get("/runs/{number}", responses=refusals)
    def run(number: int) -> dict[str, Any]:
        """A run's curves and texts."""
        found = watched[number].run if 0 <= number < len(watched) else None
        if found is None:
            raise RefusedError(404, "no such run, or it has recorded nothing yet")
        samples = [(row["step"], row["sample"]) for row in found.rows if row.get("sample")]
        return {
            **_summary(number, found),
            "curves": {name: _curve(found, name) for name in _CURVES},
            "samples": [{"step": step, "text": text} for step, text in samples[-20:]],
        }


def _summary(number: int, run: RunRecord) -> dict[str, Any]:
    """What the table shows of a run."""
    speed = run.curve("tokens_per_second")[-1:]
    return {
        "number": number,
        "name": run.name,
        "state": run.state,
        "step": run.step,
        "max_iters": run.config.get("max_iters"),
        "best": run.best,
        "tokens_per_second": speed[0][1] if speed else None,
        "age": round(run.age),
    }


def _curve(run: RunRecord, name: str) -> list[list[float]]:
    """The points [step, tokens, seconds, value] of a curve, thinned out evenly, with the last one."""
    rows = [row for row in run.rows if row.get(name) is not None]
    kept = rows[:: max(1, -(-len(rows) // _POINTS))]
    if rows and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    return [[row["step"], row.get("tokens", 0), row.get("seconds", 0.0), row[name]] for row in kept]
