"""The README's CPU run, whole processes, ours and the original's alternating on this machine.

    python benchmarks/shakespeare_char.py --original=FOLDER [--runs=3]

FOLDER is a checkout of karpathy/nanoGPT; data/shakespeare_char must be prepared here. Prints seconds of every run and
the exact loss over the validation split (windows of 64), then one line of JSON.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanogpt import checkpoint
from nanogpt.data import open_dataset
from nanogpt.device import Device
from nanogpt.evaluate import whole_split_loss

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()


def timed_run(program: list[str], folder: Path) -> float:
    """Seconds that the whole process takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *program], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    data = ROOT / "data" / "shakespeare_char"
    validation = open_dataset(data).val
    sides: dict[str, list[str]] = {"original": [], "ours": [], "ours, float32": ["--dtype=float32"]}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        original = Path(temporary, "original")
        shutil.copytree(arguments.original, original, ignore=shutil.ignore_patterns(".git", "out*"))
        for name in ("train.bin", "val.bin", "meta.pkl"):
            shutil.copy(data / name, original / "data" / "shakespeare_char")
        for run in range(arguments.runs):
            for side, extra in sides.items():
                out_dir = Path(temporary, side.replace(", ", "-"))
                folder = original if side == "original" else ROOT
                seconds[side].append(timed_run(["train.py", *SETTINGS, f"--out_dir={out_dir}", *extra], folder))
                loaded = checkpoint.load(out_dir / "ckpt.pt")
                cpu = Device("cpu", "cpu", torch.float32, False)
                losses[side], _ = whole_split_loss(loaded.model(cpu), validation, 64, 256, cpu)
                print(f"run {run + 1}: {side}: {seconds[side][-1]:.1f} s, loss {losses[side]:.4f}", flush=True)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    result = {
        "n": arguments.runs,
        "seconds_median": medians,
        "seconds": seconds,
        "loss": losses,
        "speedup": {side: medians["original"] / medians[side] for side in medians},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
