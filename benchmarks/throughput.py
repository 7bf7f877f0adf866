"""Tokens per second of the whole training step, ours and the original's side by side.

    python benchmarks/throughput.py --original=FOLDER [--rounds=5] [--shapes small middle 124M]

FOLDER is a checkout of karpathy/nanoGPT. Each side is a process that takes steps when asked to: data, forward,
backward, clipping, AdamW. They take turns, block by block, so that what slows down the machine slows down all. Three
sides: ours, the original as it is started on a CPU (float32, not compiled), and the original compiled; the ratio is
ours over the faster of these. The peak of this machine is that of a large matrix product, measured between the blocks.
The last line is JSON.
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
from worker import Worker

ROOT = Path(__file__).resolve().parents[1]
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


def our_step(arguments: argparse.Namespace, shape: dict[str, Any]) -> tuple[Callable[[int], None], dict[str, Any]]:
    """A function that takes step n of our training, and what there is to say about it."""
    sys.path.insert(0, str(ROOT))
    from nanogpt.bench import run_of
    from nanogpt.config import TrainConfig
    from nanogpt.data import Dataset, Tokens
    from nanogpt.device import choose
    from nanogpt.tokenizer import ByteTokenizer
    from nanogpt.train import next_batch, update

    data = Tokens([np.memmap(arguments.tokens, dtype=np.uint16, mode="r")])
    settings = {name: value for name, value in shape.items() if name != "vocab_size"}
    config = TrainConfig(**settings, gradient_accumulation_steps=1)
    device = choose(arguments.device, arguments.dtype, "auto")
    run = run_of(config, Dataset(Path(), data, data, ByteTokenizer(), {}), shape["vocab_size"], device)
    about = {
        "flops_per_token": run.model.flops_per_token(),
        "dtype": str(device.dtype).removeprefix("torch."),
        "compile": device.compile,
        "data_sheet": device.peak_flops(),
    }

    def step(n: int) -> None:
        x, y = next_batch(run, n)
        update(run, x, y, 6e-4)

    return step, about


def original_step(arguments: argparse.Namespace, shape: dict[str, Any]) -> Callable[[int], None]:
    """A function that takes a step as the original's train.py does, from its own model.py."""
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
    """FLOP/s of a CPU in a matrix product of n x n, the best of `times`."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def serve(arguments: argparse.Namespace) -> None:
    """Take as many steps as each line of standard input says; answer each with a line of JSON."""
    shape = {**SHAPES[arguments.shape]}
    shape["batch_size"] = arguments.batch_size or shape["batch_size"]
    on_gpu = arguments.device.startswith("cuda")
    about: dict[str, Any] = {}
    torch.manual_seed(0)
    if arguments.side == "ours":
        step, about = our_step(arguments, shape)
    else:
        step = original_step(arguments, shape)
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
        if arguments.side == "ours":
            peak = about["data_sheet"] or peak_flops(getattr(torch, about["dtype"]))
        print(json.dumps({"seconds": seconds, "memory": memory, "peak": peak, **about}), flush=True)


# ---------------------------------------------------------------------------------------------------
# Who asks them


def worker(side: str, shape: str, tokens: Path, original: Path, dtype: str = "auto", device: str = "cpu",
           batch_size: int = 0) -> Worker:  # fmt: skip
    """One side at one shape; it takes as many steps as one asks for."""
    settings = {"side": side, "shape": shape, "tokens": tokens, "original": original, "dtype": dtype,
                "device": device, "batch_size": batch_size}  # fmt: skip
    return Worker(__file__, settings, tokens.parent)


def with_spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def compare(arguments: argparse.Namespace, name: str, tokens: Path) -> dict[str, Any]:
    """One row of the table: all sides at one shape, taking turns."""
    shape = SHAPES[name]
    per_block = STEPS[name] * shape["batch_size"] * shape["block_size"]
    workers, speeds, peaks, first = {}, {side: list[float]() for side in SIDES}, list[float](), {}
    for side in SIDES:
        workers[side] = worker(side, name, tokens, arguments.original, arguments.dtype)
        first[side] = workers[side].ask(1)["seconds"]
        workers[side].ask(3)
    for _ in range(arguments.rounds):
        for side in SIDES:
            answer = workers[side].ask(STEPS[name])
            speeds[side].append(per_block / answer["seconds"])
            if side == "ours":
                peaks.append(answer["peak"])
                about = answer
    for each in workers.values():
        each.end()
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    best = max(SIDES[1:], key=lambda side: medians[side])
    ratios = [mine / theirs for mine, theirs in zip(speeds["ours"], speeds[best], strict=True)]
    fraction = medians["ours"] * about["flops_per_token"] / statistics.median(peaks)
    print(f"{name}, tokens/s, median (smallest to largest) of {arguments.rounds}:")
    for side in SIDES:
        print(f"  {side:20} {with_spread(speeds[side])}; first step after {first[side]:.1f} s")
    print(f"  ours / {best}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); over the "
          f"original as it is started: {medians['ours'] / medians['original']:.2f}; ours in {about['dtype']}, "
          f"compile {about['compile']}, {fraction:.0%} of {statistics.median(peaks) / 1e9:,.0f} GFLOP/s",
          flush=True)  # fmt: skip
    return {"tokens_per_second": medians, "spread": {side: [min(v), max(v)] for side, v in speeds.items()},
            "ratio": statistics.median(ratios), "ratio_as_started": medians["ours"] / medians["original"],
            "peak_fraction": fraction, "peak_gflops": statistics.median(peaks) / 1e9}  # fmt: skip


def compare_memory(arguments: argparse.Namespace, tokens: Path) -> dict[str, int]:
    """Peak memory of a process that takes three steps of 124M, 4 rows of 1024, by side."""
    memory = {}
    for side in SIDES[:2]:
        asked = worker(side, "124M, context 1024", tokens, arguments.original, arguments.dtype)
        memory[side] = asked.ask(3)["memory"]
        asked.end()
        print(f"peak memory, 124M, 4 rows of 1024: {side} {memory[side] / 1e9:.2f} GB", flush=True)
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES)[:3])
    parser.add_argument("--dtype", default="auto", help="of ours")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    for name, default in (("tokens", ""), ("device", "cpu")):
        parser.add_argument(f"--{name}", default=default, help=argparse.SUPPRESS)
    parser.add_argument("--batch_size", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.original = arguments.original.resolve()
    if arguments.side:
        serve(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for name in arguments.shapes:
            tokens = Path(folder, f"{SHAPES[name]['vocab_size']}.bin")
            ids = np.random.default_rng(0).integers(SHAPES[name]["vocab_size"], size=1_000_000)
            ids.astype("uint16").tofile(tokens)
            rows[name] = compare(arguments, name, tokens)
        memory = compare_memory(arguments, Path(folder, "50304.bin")) if "124M" in rows else {}
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
