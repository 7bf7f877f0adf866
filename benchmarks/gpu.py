"""Everything that only a GPU can tell, in one command: is it right, is it fast, does it fit.

    python benchmarks/gpu.py --original=FOLDER

Right: short runs of train.py on this machine's Python sources, whose losses must be those of the CPU in float32. Fast:
tokens/s, share of the peak and peak memory of 124M and 350M, ours beside the original's (FOLDER is a checkout of
karpathy/nanoGPT) at its default batch, and ours at the largest that `nanogpt plan` gives; then decoding. Without a CUDA
GPU it measures nothing and says so; `--device=cpu --tiny` tries the program itself. Needs torch and numpy only. Ends in
a table and one line of JSON.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from throughput import SHAPES, worker

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# the only package that training imports beside torch and numpy, for a machine that can't install it
NO_BAR = """
class tqdm:
    disable, format_dict = True, {"elapsed": 0}
    def __init__(self, iterable=(), *_, **__): self.iterable = iterable
    def __iter__(self): return iter(self.iterable)
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def update(self, *_): pass
    close = update
"""
if importlib.util.find_spec("tqdm") is None:
    stand_in = tempfile.mkdtemp()
    Path(stand_in, "tqdm.py").write_text(NO_BAR, encoding="utf-8")
    sys.path.append(stand_in)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), stand_in]))

from nanogpt.config import GPTConfig  # noqa: E402
from nanogpt.device import Device  # noqa: E402
from nanogpt.infer.engine import stream  # noqa: E402
from nanogpt.model import GPT  # noqa: E402
from nanogpt.plan import largest_batch, memory  # noqa: E402
from nanogpt.report.metrics import read_metrics  # noqa: E402

# how far from the CPU's losses in float32, over 30 updates, each way of computing may be
CHECKS: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"dtype": "float32"}, 0.01),  # products in TF32
    "bfloat16": ({"dtype": "bfloat16"}, 0.05),
    "float16": ({"dtype": "float16"}, 0.05),
    "compiled": ({"dtype": "bfloat16", "compile": True}, 0.05),
    "checkpointing": ({"dtype": "bfloat16", "gradient_checkpointing": True}, 0.05),
}


def losses(settings: dict[str, Any], out_dir: Path) -> dict[int, float]:
    """The losses of a run of train.py, by update."""
    words = [f"--{name}={value}" for name, value in {**settings, "out_dir": out_dir}.items()]
    command = [sys.executable, str(ROOT / "train.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return {row["step"]: row["train/loss"] for row in read_metrics(out_dir / "metrics.jsonl") if "train/loss" in row}


def check(device: str, tiny: bool) -> dict[str, float]:
    """The largest difference of a loss between the CPU in float32 and every way of computing on `device`."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common = {
            "data_dir": folder / "data", "dataset": "pystdlib", "device": device, "compile": False, "n_layer": 4,
            "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 8, "gradient_accumulation_steps": 2,
            "warmup_iters": 5, "max_iters": 30, "eval_interval": 1000, "eval_iters": 2, "log_interval": 1,
        }  # fmt: skip
        expected = losses({**common, "device": "cpu", "dtype": "float32"}, folder / "cpu")
        for name, (settings, limit) in CHECKS.items():
            if device == "cpu" and name in ("float16", "compiled"):
                continue  # the one is not for CPUs, the other says nothing about GPUs
            got = losses({**common, **settings}, folder / name)
            found[name] = max(abs(got[step] - expected[step]) for step in expected)
            assert found[name] < limit, f"{name} differs from the CPU's float32 by {found[name]:.3f}"
            print(f"right: {name}: within {found[name]:.2g} of the CPU's losses in float32", flush=True)
        stopped = {**common, "dropout": 0.1}
        whole = losses(stopped, folder / "whole")
        losses({**stopped, "max_iters": 15}, folder / "parts")
        parts = losses({**stopped, "init_from": "resume"}, folder / "parts")
        assert parts.keys() == whole.keys()
        found["resuming"] = max(abs(parts[step] - whole[step]) for step in whole)
        print(f"right: stopped and resumed: within {found['resuming']:.2g} of the undisturbed run", flush=True)
    return found


def speed(side: str, name: str, batch_size: int, arguments: argparse.Namespace, tokens: Path) -> dict[str, Any]:
    """One row of the table: a process that takes steps."""
    dtype = "bfloat16" if arguments.device != "cpu" else "float32"
    process = worker(side, name, tokens, arguments.original, dtype, arguments.device, batch_size)
    first = process.ask(1)["seconds"]
    process.ask(3)
    times, steps = [], 1 if arguments.tiny else 5
    for _ in range(5):
        answer = process.ask(steps)
        times.append(answer["seconds"] / steps)
    process.end()
    shape = SHAPES[name]
    tokens_per_second = batch_size * shape["block_size"] / statistics.median(times)
    with torch.device("meta"):
        flops = GPT(gpt_config(name)).flops_per_token()
    peak = Device(arguments.device, arguments.device.split(":")[0], torch.bfloat16, compile=True).peak_flops()
    row = {
        "side": side, "shape": name, "batch_size": batch_size, "tokens_per_second": tokens_per_second,
        "spread": [batch_size * shape["block_size"] / t for t in (max(times), min(times))], "n": len(times),
        "mfu": flops * tokens_per_second / peak if peak else None,
        "flops": flops * tokens_per_second, "memory": answer["memory"], "first_step_seconds": first,
    }  # fmt: skip
    if side == "ours":
        on_cpu = arguments.device == "cpu"
        row["planned_memory"] = memory(gpt_config(name), batch_size, **how(on_cpu)).peak
    print(f"fast: {name}, {batch_size} rows, {side}: {tokens_per_second:,.0f} tokens/s, {row['memory'] / 1e9:.2f} GB, "
          f"first step after {first:.0f} s", flush=True)  # fmt: skip
    return row


def gpt_config(name: str) -> GPTConfig:
    return GPTConfig(**{key: value for key, value in SHAPES[name].items() if key != "batch_size"})


def how(on_cpu: bool) -> dict[str, Any]:
    return {"bytes_of_dtype": 4 if on_cpu else 2, "parallel": "none", "processes": 1, "accumulate": False,
            "gradient_checkpointing": False, "on_cpu": on_cpu}  # fmt: skip


@torch.no_grad()
def decoding(name: str, device: str, rows: int, count: int) -> float:
    """Tokens per second of sampling, over all rows."""
    model = GPT(gpt_config(name)).to(device, torch.float32 if device == "cpu" else torch.bfloat16).eval()
    prompt = torch.zeros(rows, 16, dtype=torch.long, device=device)
    list(stream(model, prompt, 4))
    began = time.perf_counter()
    for ids in stream(model, prompt, count):
        ids.tolist()
    return rows * count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--original", type=Path, help="without: ours only")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps, to try the program")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: nothing was measured")
    began = time.perf_counter()
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device
    total = torch.cuda.get_device_properties(0).total_memory if arguments.device.startswith("cuda") else 4e9
    print(f"{name}, torch {torch.__version__}")
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "right": {}}
    result["right"] = check(arguments.device, arguments.tiny)

    shapes = ["small"] if arguments.tiny else ["124M, context 1024", "350M, context 1024"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            tokens = Path(folder, "tokens.bin")
            np.random.default_rng(0).integers(SHAPES[shape]["vocab_size"], size=2**20).astype("uint16").tofile(tokens)
            largest = largest_batch(gpt_config(shape), 0.9 * total, 64, **how(arguments.device == "cpu"))
            plans = [("ours", 12), ("ours", largest)]
            if arguments.original:
                arguments.original = arguments.original.resolve()
                plans.insert(1, ("original" if arguments.tiny else "original, compiled", 12))
            rows += [speed(side, shape, count, arguments, tokens) for side, count in plans]
    result["rows"] = rows
    result["decoding_tokens_per_second"] = {
        str(count): decoding(shapes[0], arguments.device, count, 20 if arguments.tiny else 100) for count in (1, 16)
    }
    print(f"{'shape':20} {'rows':>4} {'side':20} {'tokens/s':>10} {'MFU':>6} {'memory':>9} {'planned':>9}")
    for row in rows:
        planned = f"{row['planned_memory'] / 1e9:.2f} GB" if "planned_memory" in row else ""
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
        print(f"{row['shape']:20} {row['batch_size']:4} {row['side']:20} {row['tokens_per_second']:10,.0f} "
              f"{mfu:>6} {row['memory'] / 1e9:6.2f} GB {planned:>9}")  # fmt: skip
    for count, tokens_per_second in result["decoding_tokens_per_second"].items():
        print(f"decoding {shapes[0]}, {count} at a time: {tokens_per_second:,.0f} tokens/s")
    result["seconds"] = time.perf_counter() - began
    print(json.dumps(result))


if __name__ == "__main__":
    main()
