"""Tokens per second of the whole training step, ours and the original's side by side.

    python benchmarks/throughput.py [--original=FOLDER] [--rounds=5] [--shapes small middle 124M]

FOLDER is a checkout of karpathy/nanoGPT. Each side is a process that takes steps when asked to: data, forward,
backward, clipping, AdamW. They take turns, block by block, so that what slows down the machine slows down all. Three
sides: ours, the original as it is started on a CPU (float32, not compiled), and the original compiled; the ratio is
ours over the faster of these. The peak of this machine is that of a large matmul, measured between the blocks. Without
--original only ours is timed. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import torch
from bare import random_ids
from worker import Worker

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "vocab_size": 65},
    "middle": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "vocab_size": 65},
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 256, "batch_size": 4, "vocab_size": 50304},
    "124M, context 1024": {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 4, "vocab_size": 50304,
    },
    "350M, context 1024": {
        "n_layer": 24, "n_head": 16, "n_embd": 1024, "block_size": 1024, "batch_size": 4, "vocab_size": 50304,
    },
}  # fmt: skip
STEPS = {"small": 100, "middle": 6, "124M": 3, "124M, context 1024": 1, "350M, context 1024": 1}  # of a block
SIDES = ("ours", "original", "original, compiled")


# ---------------------------------------------------------------------------------------------------
# What runs in the processes


def our_step(arguments: argparse.Namespace, shape: dict[str, Any]) -> tuple[Callable[[int], object], dict[str, Any]]:
    """Return a function that does step n as train.py does it, and what there is to say about it."""
    from nanogpt.bench import make_step
    from nanogpt.config import TrainConfig
    from nanogpt.data import Dataset
    from nanogpt.device import choose_device
    from nanogpt.tokenizer import GPT2Tokenizer

    ids = np.asarray(np.memmap(arguments.tokens, dtype=np.uint16, mode="r"))
    config = TrainConfig(gradient_accumulation_steps=1, device=arguments.device, dtype=arguments.dtype,
                         **{name: value for name, value in shape.items() if name != "vocab_size"})  # fmt: skip
    device = choose_device(config)
    dataset = Dataset(Path(), ids, ids, GPT2Tokenizer(), {})
    step, model, _ = make_step(config, dataset, shape["vocab_size"], device)
    return step, {
        "flops_per_token": model.flops_per_token(), "dtype": str(device.dtype).removeprefix("torch."),
        "compile": device.compile, "data_sheet": device.peak_flops(),
    }  # fmt: skip


def original_step(arguments: argparse.Namespace, shape: dict[str, Any]) -> Callable[[int], None]:
    """Return a function that does a step as the original's train.py does, from its own model.py."""
    sys.path.insert(0, str(arguments.original))
    import model as original

    on_gpu = arguments.device.startswith("cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = original.GPT(original.GPTConfig(**{k: v for k, v in shape.items() if k != "batch_size"}, bias=False))
    model.to(arguments.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), arguments.device)
    network = torch.compile(model) if arguments.side.endswith("compiled") else model
    B, T = shape["batch_size"], shape["block_size"]

    def step(n: int) -> None:
        data = np.memmap(arguments.tokens, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - T, (B,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        if on_gpu:
            x, y = (t.pin_memory().to(arguments.device, non_blocking=True) for t in (x, y))
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            _, loss = network(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_flops(dtype: torch.dtype, n: int = 2048, times: int = 3) -> float:
    """Return the FLOP/s of a CPU in a matmul of n x n, the best of `times`."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def serve(arguments: argparse.Namespace) -> None:
    """Do as many steps as each line of standard input says; answer each with a line of JSON."""
    shape = {**SHAPES[arguments.shape]}
    shape["batch_size"] = arguments.batch_size or shape["batch_size"]
    on_gpu = arguments.device.startswith("cuda")
    torch.manual_seed(0)
    is_ours = arguments.side == "ours"
    step, about = our_step(arguments, shape) if is_ours else (original_step(arguments, shape), {})
    done = 0
    for line in sys.stdin:
        began, count = time.perf_counter(), int(line)
        for _ in range(count):
            step(done)
            done += 1
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        memory = torch.cuda.max_memory_allocated() if on_gpu else getrusage(RUSAGE_SELF).ru_maxrss * 1024
        peak = 0.0
        if is_ours:
            peak = about["data_sheet"] or peak_flops(getattr(torch, about["dtype"]))
        print(json.dumps({"seconds": seconds, "memory": memory, "peak": peak, **about}), flush=True)


# ---------------------------------------------------------------------------------------------------
# What asks them


def worker(side: str, shape: str, tokens: Path, original: Path, dtype: str = "auto", device: str = "cpu",
           batch_size: int = 0) -> Worker:  # fmt: skip
    """Start one side at one shape; it does as many steps as one asks for."""
    settings = {"side": side, "shape": shape, "tokens": tokens, "original": original, "dtype": dtype,
                "device": device, "batch_size": batch_size}  # fmt: skip
    return Worker(__file__, settings, tokens.parent)


def with_spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def compare(arguments: argparse.Namespace, name: str, tokens: Path) -> dict[str, Any]:
    """Return one row of the table: all sides at one shape, taking turns."""
    shape = SHAPES[name]
    per_block = STEPS[name] * shape["batch_size"] * shape["block_size"]
    sides = SIDES if arguments.original else SIDES[:1]
    workers, speeds, peaks, first = {}, {side: list[float]() for side in sides}, list[float](), {}
    for side in sides:
        workers[side] = worker(side, name, tokens, arguments.original, arguments.dtype)
        first[side] = workers[side].ask(1)["seconds"]
        workers[side].ask(3)
    for _ in range(arguments.rounds):
        for side in sides:
            answer = workers[side].ask(STEPS[name])
            speeds[side].append(per_block / answer["seconds"])
            if side == "ours":
                peaks.append(answer["peak"])
                about = answer
    for each in workers.values():
        each.end()
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    best = max(sides[1:], key=lambda side: medians[side], default="ours")
    ratios = [mine / theirs for mine, theirs in zip(speeds["ours"], speeds[best], strict=True)]
    fraction = medians["ours"] * about["flops_per_token"] / statistics.median(peaks)
    print(f"{name}, tokens/s, median (smallest to largest) of {arguments.rounds}:")
    for side in sides:
        print(f"  {side:20} {with_spread(speeds[side])}; first step after {first[side]:.1f} s")
    if arguments.original:
        print(f"  ours / {best}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"  ours in {about['dtype']}, compile {about['compile']}: {fraction:.0%} of the peak, "
          f"{statistics.median(peaks) / 1e9:,.0f} GFLOP/s", flush=True)  # fmt: skip
    return {"tokens_per_second": medians, "spread": {side: [min(v), max(v)] for side, v in speeds.items()},
            "ratio": statistics.median(ratios), "peak_fraction": fraction,
            "peak_gflops": statistics.median(peaks) / 1e9}  # fmt: skip


def compare_memory(arguments: argparse.Namespace, tokens: Path) -> dict[str, int]:
    """Return the peak memory of a process that does three steps of 124M, 4 rows of 1024, by side."""
    memory = {}
    for side in SIDES[:2]:
        asked = worker(side, "124M, context 1024", tokens, arguments.original, arguments.dtype)
        memory[side] = asked.ask(3)["memory"]
        asked.end()
        print(f"peak memory, 124M, 4 rows of 1024: {side} {memory[side] / 1e9:.2f} GB", flush=True)
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=lambda text: Path(text).resolve())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES)[:3])
    parser.add_argument("--dtype", default="auto", help="of ours")
    for name, default in (("side", ""), ("shape", ""), ("tokens", ""), ("device", "cpu")):
        parser.add_argument(f"--{name}", default=default, help=argparse.SUPPRESS)
    parser.add_argument("--batch_size", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for name in arguments.shapes:
            tokens = Path(folder, f"{SHAPES[name]['vocab_size']}.bin")
            random_ids(SHAPES[name]["vocab_size"]).tofile(tokens)
            rows[name] = compare(arguments, name, tokens)
        memory = compare_memory(arguments, Path(folder, "50304.bin")) if arguments.original and "124M" in rows else {}
    result = {
        "ratio": {name: row["ratio"] for name, row in rows.items()},
        "peak_fraction": rows["124M"]["peak_fraction"] if "124M" in rows else None,
        "memory_ratio": memory["ours"] / memory["original"] if memory else None,
        "n": arguments.rounds,
        "rows": rows,
        "memory": memory,
        "machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
