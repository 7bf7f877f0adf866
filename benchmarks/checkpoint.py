"""What saving costs: training with a checkpoint every 20 updates against none, beyond the copy that can't be avoided.

    python benchmarks/checkpoint.py --runs=3

One process, GPT-2 124M on this machine's device, random tokens; the two sides alternate. The last line is JSON:
`overhead` is the median of what the updates of a block take longer than if all took as long as the median one of its
second half, when nothing is written any more. (The speed of a shared machine drifts by more from block to block than
saving costs.)
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from nanogpt.bench import run_of
from nanogpt.config import PRESETS, TrainConfig
from nanogpt.data import Dataset, Tokens
from nanogpt.device import choose
from nanogpt.saver import Saver
from nanogpt.start import Run
from nanogpt.tokenizer import GPT2Tokenizer
from nanogpt.train import next_batch, snapshot, update


def make_run(arguments: argparse.Namespace) -> Run:
    shape = {**PRESETS[arguments.model], "block_size": arguments.block_size}
    config = TrainConfig(batch_size=arguments.batch_size, gradient_accumulation_steps=1, **shape)
    device = choose("auto", arguments.dtype, False)
    tokens = Tokens([np.random.default_rng(0).integers(50257, size=100_000).astype("uint16")])
    dataset = Dataset(Path(), tokens, tokens, GPT2Tokenizer(), {})
    return run_of(config, dataset, 50304, device)


def seconds_of(run: Run, steps: int, saver: Saver | None) -> tuple[list[float], float]:
    """How long each of `steps` updates takes, and the copy before the first, if there is a saver to write it."""
    copying, times = 0.0, []
    if saver:
        began = time.perf_counter()
        saver.save(lambda old: snapshot(run, old))
        copying = time.perf_counter() - began
    for _ in range(steps):
        began = time.perf_counter()
        x, y = next_batch(run, run.progress.step)
        update(run, x, y, 1e-4)
        run.device.synchronize()
        run.progress.step += 1
        times.append(time.perf_counter() - began)
    return times, copying


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", choices=PRESETS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="updates between checkpoints")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    run = make_run(arguments)
    seconds_of(run, 2, None)  # warm-up: the optimizer's state, the allocator
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), "0", 2)
        for n in range(arguments.runs):
            without, _ = seconds_of(run, arguments.steps, None)
            with_saving, copying = seconds_of(run, arguments.steps, saver)
            began = time.perf_counter()
            saver.wait()
            waited = time.perf_counter() - began
            undisturbed = arguments.steps * statistics.median(with_saving[arguments.steps // 2 :])
            overhead = (sum(with_saving) + waited - undisturbed) / undisturbed
            rows.append((sum(without), sum(with_saving), copying, overhead))
            print(f"run {n + 1}: {sum(without):.2f} s without, {sum(with_saving):.2f} s with, copy {copying:.2f} s, "
                  f"first updates {', '.join(f'{t:.2f}' for t in with_saving[:4])} s, others "
                  f"{undisturbed / arguments.steps:.2f} s: {overhead:+.2%}", flush=True)  # fmt: skip
        size = (Path(folder) / "ckpt.pt").stat().st_size
    without, with_saving, copying, overhead = (statistics.median(column) for column in zip(*rows, strict=True))
    spread = [min(row[3] for row in rows), max(row[3] for row in rows)]
    result = {"model": arguments.model, "steps": arguments.steps, "n": arguments.runs, "checkpoint_gb": size / 1e9,
              "seconds_without": without, "seconds_with": with_saving, "seconds_copy": copying,
              "overhead": overhead, "overhead_spread": spread}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
