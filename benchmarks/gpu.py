"""What only a GPU can tell, in one command and less than 8 minutes on an H200: is it right, is it fast, does it fit.

    python benchmarks/gpu.py [--original=FOLDER] [--data=FOLDER] [--full]

Right: short runs of train.py, whose losses must be those of the CPU in float32. Fast: tokens/s, share of the peak and
peak memory of 124M, ours beside the original's (--original: a checkout of karpathy/nanoGPT), then decoding. --full
adds float16, gradient checkpointing, resuming, 350M, and the largest batch that `nanogpt plan` gives. Needs torch and
numpy only, and no network: the text is --data, a prepared data set, or this machine's Python sources in bytes. Every
result is a line of JSON as soon as it is there; what fails is reported and the next one is tried. `--device=cpu --tiny`
tries the program itself.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bare import ROOT, python_sources, random_ids
from throughput import SHAPES, worker

from nanogpt.config import GPTConfig
from nanogpt.device import Device
from nanogpt.engine import Engine, Request, Sampling
from nanogpt.metrics import read_metrics
from nanogpt.model import GPT
from nanogpt.plan import largest_batch, memory

# How far from the CPU's losses in float32 each way of computing may be over 30 steps. On a GPU, matmuls of float32 are
# in TF32, and float16 may skip its first steps until it has found its loss scale.
CHECKS: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"dtype": "float32"}, 0.01),
    "bfloat16": ({"dtype": "bfloat16"}, 0.05),
    "compiled": ({"dtype": "bfloat16", "compile": True}, 0.05),
    "float16": ({"dtype": "float16"}, 0.3),
    "checkpointing": ({"dtype": "bfloat16", "gradient_checkpointing": True}, 0.05),
    "budget": ({"dtype": "bfloat16", "compile": True, "activation_memory_budget": 0.5}, 0.05),
}
SMALL = {"compile": False, "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 8,
         "gradient_accumulation_steps": 2, "warmup_iters": 5, "max_iters": 30, "eval_interval": 1000, "eval_iters": 2,
         "log_interval": 1, "sample_interval": 0, "plot": False}  # fmt: skip


def report(name: str, function: Callable[[], dict[str, Any]]) -> bool:
    """Print what `function` returns, or why it failed, as a line of JSON. Return whether it went well."""
    began = time.perf_counter()
    try:
        result = {"name": name, "ok": True, **function()}
    except Exception as error:  # whatever fails, the next one is worth trying
        result = {"name": name, "ok": False, "error": f"{type(error).__name__}: {error}"[-3000:]}
    print(json.dumps({**result, "seconds": round(time.perf_counter() - began, 1)}), flush=True)
    return bool(result["ok"])


def losses(settings: dict[str, Any], out_dir: Path) -> dict[int, float]:
    """Return the losses of a run of train.py by step. Raises `RuntimeError` with its messages if it fails.

    What torch.compile says of recompilations and graph breaks is in `out_dir`/stderr.
    """
    words = [f"--{name}={value}" for name, value in {**SMALL, **settings, "out_dir": out_dir}.items()]
    command = [sys.executable, str(ROOT / "train.py"), *words]
    environment = {**os.environ, "TORCH_LOGS": "recompiles,graph_breaks"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    if result.returncode:
        raise RuntimeError(result.stdout[-500:] + result.stderr[-2000:])
    (out_dir / "stderr").write_text(result.stderr)
    return {row["step"]: row["train/loss"] for row in read_metrics(out_dir / "metrics.jsonl") if "train/loss" in row}


def check(common: dict[str, Any], settings: dict[str, Any], limit: float, folder: Path) -> dict[str, Any]:
    """Return how far the losses of a run with `settings` are from those of the CPU in float32, in `folder`/cpu."""
    expected = {row["step"]: row["train/loss"] for row in read_metrics(folder / "cpu" / "metrics.jsonl") if "lr" in row}
    out_dir = Path(tempfile.mkdtemp(dir=folder))
    got = losses({**common, **settings}, out_dir)
    difference = max(abs(got[step] - loss) for step, loss in expected.items())
    recompiled = re.findall(r".*(?:Recompiling|Graph break).*", (out_dir / "stderr").read_text())
    return {"ok": difference < limit, "difference": difference, "limit": limit, "last_loss": got[max(got)],
            "recompiled": recompiled}  # fmt: skip


@torch.no_grad()
def check_graph(device: str, **shape: Any) -> dict[str, Any]:
    """Return whether static decoding, on CUDA by a graph, gives the same tokens, while rows join and leave."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=256, **shape)).to(device).eval()
    for parameter in model.parameters():  # so that it writes more than one token
        parameter.add_(torch.randn_like(parameter) * 0.1)
    tokens = []
    for static in (False, True):
        engine, rows = Engine(model, 3, static=static), []
        for n in range(6):
            while not engine.room:
                engine.step()
            rows += engine.add([Request([n + 1] * (n + 2), 4 + 5 * n, Sampling(temperature=0))])
            engine.step()
        while engine.rows:
            engine.step()
        tokens.append([row.new_tokens for row in rows])
    return {"ok": tokens[0] == tokens[1], "tokens": tokens[1][-1]}


def check_resuming(common: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return how far a run that was stopped and resumed is from an undisturbed one."""
    settings = {**common, "dropout": 0.1}
    whole = losses(settings, folder / "whole")
    losses({**settings, "max_iters": 5}, folder / "parts")
    parts = losses({**settings, "init_from": "resume"}, folder / "parts")
    difference = max(abs(parts[step] - loss) for step, loss in whole.items())
    return {"ok": difference < 1e-3, "difference": difference}


def gpt_config(shape: str) -> GPTConfig:
    return GPTConfig(**{key: value for key, value in SHAPES[shape].items() if key != "batch_size"}, bias=False)


def planned(shape: str, rows: int, on_cpu: bool) -> dict[str, Any]:
    """Return what `nanogpt plan` is asked about a training process."""
    with torch.device("meta"):
        model = GPT(gpt_config(shape))
    return {"model": model, "rows": rows, "dtype": torch.float32 if on_cpu else torch.bfloat16, "on_cpu": on_cpu}


def speed(side: str, shape: str, rows: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return tokens/s, share of the peak and memory of a process that trains; rows: of its batch, 0: as many as fit."""
    on_cpu = arguments.device == "cpu"
    if not rows:
        available = 4e9 if on_cpu else 0.9 * torch.cuda.get_device_properties(arguments.device).total_memory
        rows = largest_batch(available=available, **planned(shape, 64, on_cpu))
    tokens = folder / "tokens.bin"
    random_ids(SHAPES[shape]["vocab_size"]).tofile(tokens)
    dtype = "float32" if on_cpu else "bfloat16"
    process = worker(side, shape, tokens, arguments.original, dtype, arguments.device, rows)
    first = process.ask(1)["seconds"]
    process.ask(3)
    n_steps = 1 if arguments.tiny else 5
    answers = [process.ask(n_steps) for _ in range(5)]
    process.end()
    speeds = sorted(n_steps * rows * SHAPES[shape]["block_size"] / answer["seconds"] for answer in answers)
    with torch.device("meta"):
        flops = GPT(gpt_config(shape)).flops_per_token() * statistics.median(speeds)
    peak = Device(arguments.device, arguments.device.split(":")[0], torch.bfloat16, compile=True).peak_flops()
    return {
        "rows": rows, "tokens_per_second": statistics.median(speeds), "spread": [speeds[0], speeds[-1]],
        "mfu": flops / peak if peak else None, "memory": answers[-1]["memory"], "first_step_seconds": first,
        "planned_memory": memory(**planned(shape, rows, on_cpu))["peak"] if side == "ours" else None,
        "compile": answers[-1].get("compile"),
    }  # fmt: skip


def decode(shape: str, device: str, rows: int, count: int, static: bool) -> dict[str, Any]:
    """Return the tokens per second of decoding, over all rows; static: as a CUDA graph."""
    model = GPT(gpt_config(shape)).to(device, torch.float32 if device == "cpu" else torch.bfloat16).eval()
    engine = Engine(model, rows, length=64 + count, static=static)
    engine.add([Request([n + 1] * 16, count + 8, seed=n) for n in range(rows)])
    for _ in range(8):
        engine.step()
    began = time.perf_counter()
    while engine.rows:
        engine.step()
    seconds = time.perf_counter() - began
    return {"rows": rows, "tokens_per_second": rows * count / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--original", type=lambda text: Path(text).resolve(), help="without: ours only")
    parser.add_argument("--data", type=lambda text: Path(text).resolve(), help="a prepared data set")
    parser.add_argument("--full", action="store_true", help="everything, about 20 minutes")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps, to try the program")
    arguments = parser.parse_args()
    device, is_cuda = arguments.device, arguments.device.startswith("cuda")
    if is_cuda and not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here: nothing was measured (--device=cpu --tiny tries the program)")
    began = time.perf_counter()
    about = {"device": torch.cuda.get_device_name(device) if is_cuda else device, "torch": torch.__version__}
    print(json.dumps(about), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = arguments.data or python_sources(folder / "data" / "python", 5)
        common = {"data_dir": data.parent, "dataset": data.name, "device": device}
        common |= {"block_size": 16, "max_iters": 10} if arguments.tiny else {}
        parts: dict[str, Callable[[], dict[str, Any]]] = {}

        def reference() -> dict[str, Any]:
            found = losses({**common, "device": "cpu", "dtype": "float32"}, folder / "cpu")
            return {"last_loss": found[max(found)]}

        parts["right: cpu, float32"] = reference
        for name in list(CHECKS) if arguments.full else list(CHECKS)[:3]:
            if is_cuda or name not in ("compiled", "float16", "budget"):  # on a CPU these say nothing about GPUs
                parts[f"right: {name}"] = partial(check, common, *CHECKS[name], folder)
        for architecture, n_kv_head in (("gpt2", 4), ("qwen3", 2)):
            check_it = partial(check_graph, device, architecture=architecture, n_kv_head=n_kv_head)
            parts[f"right: decoding as a graph, {architecture}"] = check_it
        if arguments.full:
            parts["right: resuming"] = partial(check_resuming, common, folder)
        theirs = "original" if arguments.tiny else "original, compiled"
        for shape in (
            ["small"] if arguments.tiny else ["124M, context 1024", "350M, context 1024"][: 1 + arguments.full]
        ):
            sides = {"ours": 12}
            if arguments.original:
                sides[theirs] = 12
            for side, rows in sides.items():
                parts[f"fast: {shape}, {side}"] = partial(speed, side, shape, rows, arguments, folder)
            if arguments.full:
                parts[f"fast: {shape}, ours, largest batch"] = partial(speed, "ours", shape, 0, arguments, folder)
            for rows, static in itertools.product([1, 16] if arguments.full else [1], [False, True]):
                name = f"decode: {shape}, {rows} rows{', as a graph' * static}"
                parts[name] = partial(decode, shape, device, rows, 20 if arguments.tiny else 100, static)
        failed = [name for name, part in parts.items() if not report(name, part)]
    print(json.dumps({**about, "failed": failed, "seconds": round(time.perf_counter() - began, 1)}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
