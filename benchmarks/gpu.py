"""Everything that only a GPU can tell, in one command: speed, memory against the plan, resuming.

    python benchmarks/gpu.py

On a machine without a CUDA GPU it measures nothing and says so; `--device=cpu --rows small` tries the program itself.
Each row is a process of its own. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from nanogpt.config import PRESETS, GPTConfig
from nanogpt.plan import memory
from nanogpt.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ROWS: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "compile": False},
    "gpt2": {"model": "gpt2", "block_size": 1024, "batch_size": 12, "compile": True},
    "gpt2-eager": {"model": "gpt2", "block_size": 1024, "batch_size": 12, "compile": False},
    "gpt2-large-batch": {"model": "gpt2", "block_size": 1024, "batch_size": 48, "compile": True},
    "gpt2-xl": {"model": "gpt2-xl", "block_size": 1024, "batch_size": 8, "compile": True},
    "gpt2-xl-checkpointing": {"model": "gpt2-xl", "block_size": 1024, "batch_size": 32, "compile": False,
                              "gradient_checkpointing": True},
    "llama-3.2-1b": {"model": "llama-3.2-1b", "block_size": 2048, "batch_size": 4, "compile": True},
}  # fmt: skip


def run(program: str, settings: dict[str, Any]) -> str:
    words = [f"--{name}={value}" for name, value in settings.items()]
    result = subprocess.run([sys.executable, str(ROOT / program), *words], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{program} {' '.join(words)}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return result.stdout


def planned_bytes(settings: dict[str, Any], bytes_of_dtype: int) -> float:
    fields = {name: value for name, value in settings.items() if name in ("n_layer", "n_head", "n_embd", "block_size")}
    shape = GPTConfig(**{**PRESETS.get(settings.get("model", ""), {}), **fields})
    checkpointing = settings.get("gradient_checkpointing", False)
    return memory(shape, settings["batch_size"], bytes_of_dtype=bytes_of_dtype, parallel="none", processes=1,
                  accumulate=False, gradient_checkpointing=checkpointing).peak  # fmt: skip


def speed(name: str, device: str, steps: int) -> dict[str, Any]:
    """One row: time per update, tokens/s, share of the peak, memory and what the plan says of it."""
    settings = ROWS[name]
    printed = run("bench.py", {**settings, "device": device, "real_data": False, "steps": steps, "warmup_steps": 5})
    values: dict[str, Any] = json.loads(printed.splitlines()[-1])
    values["planned_memory_bytes"] = planned_bytes(settings, 4 if values["dtype"] == "float32" else 2)
    mfu = f"{values['mfu']:.1%} of the peak" if values["mfu"] else "peak not known"
    print(f"{name}: {values['ms']:.1f} ms ({values['ms_min']:.1f} to {values['ms_max']:.1f}, n = {values['n']}), "
          f"{values['tokens_per_second']:,.0f} tokens/s, {mfu}, {values['peak_memory_bytes'] / 1e9:.2f} GB "
          f"(plan {values['planned_memory_bytes'] / 1e9:.2f} GB), {values['dtype']}, compile {values['compile']}",
          flush=True)  # fmt: skip
    return values


def resuming(device: str) -> float:
    """The largest difference of a loss between a run and the same run, stopped and resumed half-way."""
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "data_dir": f"{folder}/data", "dataset": "pystdlib", "device": device, "compile": False,
            "n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "dropout": 0.1,
            "batch_size": 16, "gradient_accumulation_steps": 1, "warmup_iters": 5,
            "eval_interval": 1000, "eval_iters": 2, "log_interval": 1,
        }  # fmt: skip
        run("train.py", {**common, "out_dir": f"{folder}/whole", "max_iters": 40})
        run("train.py", {**common, "out_dir": f"{folder}/parts", "max_iters": 20})
        run("train.py", {**common, "out_dir": f"{folder}/parts", "max_iters": 40, "init_from": "resume"})
        losses = [
            {row["step"]: row["train/loss"] for row in read_metrics(Path(folder, name, "metrics.jsonl"))
             if "train/loss" in row} for name in ("whole", "parts")
        ]  # fmt: skip
    assert losses[0].keys() == losses[1].keys()
    return max(abs(float(losses[0][step]) - float(losses[1][step])) for step in losses[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=[name for name in ROWS if name != "small"])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: nothing was measured")
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device
    print(f"{name}, torch {torch.__version__}")
    result: dict[str, Any] = {"device": name, "torch": torch.__version__}
    result["rows"] = {row: speed(row, arguments.device, arguments.steps) for row in arguments.rows}
    result["resuming_largest_difference"] = resuming(arguments.device)
    print(
        f"a resumed run differs from an undisturbed one by at most {result['resuming_largest_difference']:.2g} in loss"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
