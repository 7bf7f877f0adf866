"""What a run's reports cost: lines, metrics.jsonl, norms by layer, with all defaults, as a share of the training.

    python benchmarks/records.py [--shape=small|gpt2] [--rounds=5]

One process trains on random tokens, and a clock is stopped within everything that the run says beside training: all
of it can be left out. (Two runs, with and without, differ by more from one to the next than this is.) Texts and the
picture come with evaluations, and are told apart. The last line is JSON; `share` is the median over the rounds.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from nanogpt import health, train
from nanogpt.build import dtype_of, finish_dataset
from nanogpt.config import PRESETS, TrainConfig
from nanogpt.report import metrics, progress
from nanogpt.tokenizer import ByteTokenizer

REPORTING = [
    (train, "record"), (health.Checkup, "before_step"), (health.Checkup, "values"), (progress.Console, "advance"),
    (metrics.Metrics, "write"),
]  # fmt: skip
WITH_EVALUATIONS = [(train, "sample_text"), (train, "draw_if_possible")]


class Clock:
    """Seconds spent within functions, each counted once where they call each other."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    @contextlib.contextmanager
    def stopping(self, places: list[tuple[Any, str]]) -> Iterator[None]:
        """Count what these functions take within the block."""
        with contextlib.ExitStack() as stack:
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name))))
            yield

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - began

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", "gpt2"], default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="updates; 0: 600 of the small shape, 200 of GPT-2")
    arguments = parser.parse_args()
    small = {"n_layer": 4, "n_head": 4, "n_embd": 128, "batch_size": 12, "block_size": 64}
    shape = small if arguments.shape == "small" else {**PRESETS["gpt2"], "batch_size": 4, "block_size": 256}
    steps = arguments.steps or (600 if arguments.shape == "small" else 200)
    shares, others = [], []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = ByteTokenizer()
        ids = np.random.default_rng(0).integers(256, size=100_000).astype("uint16")
        work = Path(folder, "random", "work")
        work.mkdir(parents=True)
        for split in ("train", "val"):
            ids.astype(dtype_of(tokenizer)).tofile(work / f"{split}.bin")
        tally = {"tokens": dict.fromkeys(("train", "val"), len(ids)), "documents": {}, "bytes": {}, "skipped": {}}
        finish_dataset(work.parent, work, tokenizer, tally, [])
        for _ in range(arguments.rounds):
            config = TrainConfig(
                dataset="random", data_dir=folder, out_dir=str(Path(folder, "out")), max_iters=steps, eval_iters=1,
                eval_interval=steps, gradient_accumulation_steps=1, checkpoint_interval="0", **shape,
            )  # fmt: skip
            reports, with_evaluations = Clock(), Clock()
            quiet = contextlib.redirect_stdout(io.StringIO())
            with reports.stopping(REPORTING), with_evaluations.stopping(WITH_EVALUATIONS), quiet:
                train.train(config)
            rows = metrics.read_metrics(Path(config.out_dir, "metrics.jsonl"))
            training = rows[-1]["seconds"]
            shares.append(reports.seconds / training)
            others.append(with_evaluations.seconds)
            print(f"{steps} updates, {training:.1f} s: reports {shares[-1]:.3%}; text and picture {others[-1]:.2f} s")
    result = {
        "shape": arguments.shape,
        "share": statistics.median(shares),
        "shares": shares,
        "seconds_at_the_end": others,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
