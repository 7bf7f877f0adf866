"""What several processes cost, and whether the plan of their memory holds.

    python benchmarks/scale.py --rounds=5

Two processes with one thread each against one process with one thread, equal global batch, alternating: with no cost
at all they would take half the time. Bytes on the wire are counted on the loopback device, so nothing else may talk
there. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bare import random_ids

from nanogpt.bench import make_step
from nanogpt.config import TrainConfig
from nanogpt.data import Dataset
from nanogpt.device import choose_device
from nanogpt.distributed import init_distributed
from nanogpt.model import GPT
from nanogpt.plan import memory
from nanogpt.tokenizer import ByteTokenizer

VOCABULARY = 256


def config_of(arguments: argparse.Namespace, parallel: Any) -> TrainConfig:
    return TrainConfig(n_layer=arguments.n_layer, n_head=8, n_embd=arguments.n_embd, block_size=arguments.block_size,
                       batch_size=arguments.batch_size, gradient_accumulation_steps=arguments.accumulation,
                       device="cpu", dtype=arguments.dtype, compile=False, parallel=parallel)  # fmt: skip


def work(arguments: argparse.Namespace) -> None:
    """Do some steps as one of the processes; the main one prints what they took."""
    torch.set_num_threads(1)
    config = config_of(arguments, arguments.parallel)
    device, ids = choose_device(config), random_ids(VOCABULARY)
    dataset = Dataset(Path(), ids, ids, ByteTokenizer(), {})
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with init_distributed("gloo", device, 10) as dist:
        step, model, _ = make_step(config, dataset, VOCABULARY, device, dist)
        times = []
        for n in range(arguments.steps + 2):
            if n == 2:  # the first ones allocate
                dist.any(False)
                sent = loopback_bytes()
            began = time.perf_counter()
            step(n)
            dist.any(False)  # as training asks after every step whether to stop
            times.append(time.perf_counter() - began)
        if dist.is_main:
            status = Path("/proc/self/status").read_text().split("VmHWM:")[1]  # getrusage counts parents, too
            peak = int(status.split()[0]) * 1024 - before
            parameters = model.get_num_params(non_embedding=False)
            print(json.dumps({"seconds": statistics.median(times[2:]), "peak": peak, "parameters": parameters,
                              "bytes": (loopback_bytes() - sent) / arguments.steps}))  # fmt: skip


def loopback_bytes() -> int:
    """Return the bytes that have gone through the loopback device so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def measure(words: list[str], processes: int, parallel: str) -> dict[str, float]:
    """Return what the main one of `processes` prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, *words, f"--parallel={parallel}"]
    # Without the second, memory that was given back stays with the process, and the peak is that of malloc.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        sys.exit(result.stderr)
    values: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--n_layer", type=int, default=6)
    parser.add_argument("--n_embd", type=int, default=512)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--parallel", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.parallel:
        return work(arguments)

    sides = {"one": (1, "ddp"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for n in range(arguments.rounds):
        for side, (processes, parallel) in sides.items():
            rows[side].append(measure(sys.argv[1:], processes, parallel))
            print(f"round {n + 1}, {side}: {rows[side][-1]['seconds'] * 1000:.0f} ms", flush=True)
    parameters = rows["one"][0]["parameters"]
    ring = 2 * (2 - 1) / 2 * 4 * parameters * 2  # bytes of a ring all-reduce in float32, of both processes
    result: dict[str, object] = {"parameters": parameters, "n": arguments.rounds, "ring_bytes": ring}
    for side, (processes, parallel) in sides.items():
        seconds = [row["seconds"] for row in rows[side]]
        result[f"{side}_seconds"] = statistics.median(seconds)
        result[f"{side}_spread"] = [min(seconds), max(seconds)]
        result[f"{side}_peak_bytes"] = statistics.median(row["peak"] for row in rows[side])
        config = config_of(arguments, parallel)
        share = config.global_batch_size // processes
        with torch.device("meta"):
            model = GPT(config.model_config(VOCABULARY))
        result[f"{side}_planned_bytes"] = memory(
            model, min(share, config.batch_size), dtype=choose_device(config).dtype,
            parallel=parallel if processes > 1 else "none", processes=processes, accumulate=share > config.batch_size,
        )["peak"]  # fmt: skip
        if processes > 1:
            paired = [2 * row["seconds"] / one["seconds"] - 1 for row, one in zip(rows[side], rows["one"], strict=True)]
            result[f"{side}_overhead"] = statistics.median(paired)
            result[f"{side}_bytes"] = statistics.median(row["bytes"] for row in rows[side])
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    main()
