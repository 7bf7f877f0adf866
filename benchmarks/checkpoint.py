"""What saving costs: training with a checkpoint every 20 steps against none, beyond the copy that can't be avoided.

    python benchmarks/checkpoint.py --runs=3

One process, GPT-2 124M on this machine's device, random tokens; the two sides alternate. The last line is JSON:
`overhead` is the median of what the steps of a block take longer than if all took as long as the median one of its
second half, when nothing is written any more. (The speed of a shared machine drifts by more from block to block than
saving costs.)
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bare import random_ids

from nanogpt.bench import make_step
from nanogpt.checkpoint import Checkpoints, TrainState
from nanogpt.config import PRESETS, TrainConfig
from nanogpt.data import Dataset
from nanogpt.device import choose_device
from nanogpt.distributed import Distributed
from nanogpt.tokenizer import GPT2Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", choices=PRESETS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="between checkpoints")
    parser.add_argument("--n_layer", type=int, default=0, help="0: as the model has")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    shape = {**PRESETS[arguments.model], "block_size": arguments.block_size}
    shape["n_layer"] = arguments.n_layer or shape["n_layer"]
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(batch_size=arguments.batch_size, gradient_accumulation_steps=1, dtype=arguments.dtype,
                             compile=False, out_dir=folder, **shape)  # fmt: skip
        device, ids, tokenizer = choose_device(config), random_ids(50257), GPT2Tokenizer()
        step, model, optimizer = make_step(config, Dataset(Path(), ids, ids, tokenizer, {}), 50304, device)
        scaler, state = torch.amp.GradScaler(device.type, enabled=False), TrainState()
        checkpoints = Checkpoints(config, Distributed(), is_sharded=False)

        def seconds(function: Callable[[], object]) -> float:
            device.synchronize()
            began = time.perf_counter()
            function()
            device.synchronize()
            return time.perf_counter() - began

        def take_step() -> None:
            step(state.step)
            state.step += 1

        take_step()  # allocates the optimizer's state
        rows = []
        for n in range(arguments.runs):
            without = [seconds(take_step) for _ in range(arguments.steps)]
            copying = seconds(lambda: checkpoints.save(model, optimizer, scaler, state, tokenizer))
            times = [seconds(take_step) for _ in range(arguments.steps)]
            waited = seconds(checkpoints.written.exception)
            usual = statistics.median(times[arguments.steps // 2 :])
            overhead = (sum(times) + waited) / (usual * arguments.steps) - 1
            rows.append((sum(without), sum(times), copying, overhead))
            print(f"run {n + 1}: {sum(without):.2f} s without, {sum(times):.2f} s with, copy {copying:.2f} s, "
                  f"first steps {', '.join(f'{t:.2f}' for t in times[:4])} s, others {usual:.2f} s: {overhead:+.2%}",
                  flush=True)  # fmt: skip
        size = Path(folder, "ckpt.pt").stat().st_size
    without_saving, with_saving, copy, median = (statistics.median(column) for column in zip(*rows, strict=True))
    spread = [min(row[3] for row in rows), max(row[3] for row in rows)]
    result = {"model": arguments.model, "steps": arguments.steps, "n": arguments.runs, "checkpoint_gb": size / 1e9,
              "seconds_without": without_saving, "seconds_with": with_saving, "seconds_copy": copy,
              "overhead": median, "overhead_spread": spread}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
