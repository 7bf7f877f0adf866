"""How long it takes to reach a loss: whole processes, the original's recipe and ours alternating on this machine.

    python benchmarks/time_to_loss.py --original=FOLDER --target=small [--seeds=5]

FOLDER is a checkout of karpathy/nanoGPT. The clock runs from the start of each process to its end; the loss of what it
leaves behind is then taken over the whole validation set, in windows of the row's context, outside of the clock. The
number of steps is fixed beforehand, every seed counts, and the mean of ours must reach the target. What the
validation set says was not used to choose anything: recipes were tuned on a part of the training set
(`--tune` measures there). The last line is JSON.
"""

import argparse
import json
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bare import ROOT

from nanogpt.checkpoint import Checkpoint, load_checkpoint
from nanogpt.data import open_dataset
from nanogpt.device import Device
from nanogpt.evaluate import whole_split_loss
from nanogpt.model import GPT

CPU = Device("cpu", "cpu", torch.float32, compile=False)


@dataclass(frozen=True)
class Target:
    """A race: the same data set and context for both."""

    dataset: str
    context: int
    ours: str  # recipe, or settings for our train.py
    original: str  # settings for its train.py; empty: too slow for this machine, see loss
    loss: float | None = None  # to reach; None: the original's own, measured in the same run
    runs_of_original: int = 2  # it takes long, and always does the same


_SMALL = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 "
)
_README = _SMALL + "--block_size=64 --max_iters=2000 --lr_decay_iters=2000"
TARGETS = {
    "small": Target("shakespeare_char", 64, "config/train_shakespeare_char_fast.py", _README),
    # the original's recipe for both
    "readme": Target("shakespeare_char", 64, _README, _README),
    # the original's README: 1.4697 after 3 minutes on an A100, its best estimate of the validation loss
    "a100": Target("shakespeare_char", 256, "config/train_shakespeare_char_a100.py", "", loss=1.4697),
    # as many steps as fit into ten minutes here
    "pystdlib": Target(
        "pystdlib", 256, "config/train_pystdlib_fast.py",
        _SMALL + "--dataset=pystdlib --block_size=256 --max_iters=4700 --lr_decay_iters=4700 --eval_interval=4700",
        runs_of_original=1,
    ),
}  # fmt: skip


def timed_run(folder: Path, words: list[str], program: str = "train.py") -> float:
    """Return the seconds that a whole process takes."""
    began = time.perf_counter()
    command = [sys.executable, program, *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{program} {' '.join(words)}:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return time.perf_counter() - began


def loss_of(
    out_dir: Path, dataset: Path, context: int, data_dir: str = "data", device: Device = CPU, kind: type[GPT] = GPT
) -> tuple[float, Checkpoint]:
    """Return the loss over the whole validation set, in the device's dtype, and the checkpoint that it is of."""
    loaded = load_checkpoint(out_dir / "ckpt.pt", data_dir)
    model = kind.from_weights(loaded.model_config, loaded.weights).to(device.name).eval()
    loss, _ = whole_split_loss(model, open_dataset(dataset).val, context, 64, device)
    return loss, loaded


def copy_of_original(checkout: Path, dataset: Path, folder: Path) -> Path:
    """Return a copy of the original to run in, with a data set of ours."""
    copy = folder / "original"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "out*"))
    (copy / "data" / dataset.name).mkdir(exist_ok=True)
    for path in dataset.iterdir():
        if path.suffix in (".bin", ".pkl"):
            shutil.copy(path, copy / "data" / dataset.name)
    if open_dataset(dataset).tokenizer.vocab_size == 257:
        # Bytes and the end of a document; without meta.pkl the original takes GPT-2's vocabulary.
        letters = {n: chr(n) for n in range(257)}
        meta = {"vocab_size": 257, "itos": letters, "stoi": {letter: n for n, letter in letters.items()}}
        (copy / "data" / dataset.name / "meta.pkl").write_bytes(pickle.dumps(meta))
    return copy


def tuning_set(dataset: Path, folder: Path) -> Path:
    """Return a data set made of the training part of another: every tenth document, or the last tenth, validates."""
    made = folder / "data" / dataset.name
    made.mkdir(parents=True)
    described = json.loads((dataset / "dataset.json").read_text())
    ids = np.fromfile(dataset / "train.bin", described["dtype"])
    ends = np.flatnonzero(ids == open_dataset(dataset).tokenizer.end_of_text) + 1  # none in Shakespeare
    if len(ends) < 100:
        parts = [ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]]
    else:  # as the validation set is made: documents from everywhere
        documents = np.split(ids, ends)
        parts = [
            np.concatenate([d for n, d in enumerate(documents) if (n % 10 == 9) == held]) for held in (False, True)
        ]
    for split, part in zip(("train", "val"), parts, strict=True):
        part.tofile(made / f"{split}.bin")
        described["tokens"][split] = len(part)
    (made / "dataset.json").write_text(json.dumps(described))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path)
    parser.add_argument("--target", choices=TARGETS, default="small")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--tune", action="store_true", help="on a part of the training set, with other settings for ours"
    )
    arguments, settings = parser.parse_known_args()  # settings: for our recipe, with --tune
    if settings and not arguments.tune:
        parser.error(f"{settings[0]}: settings are for --tune; what is measured is the recipe")
    target = TARGETS[arguments.target]
    dataset = ROOT / "data" / target.dataset
    seconds: dict[str, list[float]] = {"ours": [], "original": []}
    losses: dict[str, list[float]] = {"ours": [], "original": []}
    has_original = bool(target.original and arguments.original)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.tune:
            dataset = tuning_set(dataset, Path(temporary))
        if has_original:
            original = copy_of_original(arguments.original, dataset, Path(temporary))
        for seed in range(arguments.seeds):
            out_dir = Path(temporary, f"ours-{seed}")
            words = [
                *target.ours.split(),
                f"--out_dir={out_dir}",
                f"--data_dir={dataset.parent}",
                f"--seed={seed}",
                *settings,
            ]
            seconds["ours"].append(timed_run(ROOT, words))
            loss, loaded = loss_of(out_dir, dataset, target.context)
            losses["ours"].append(loss)
            print(f"ours, seed {seed}: {seconds['ours'][-1]:.2f} s, loss {loss:.4f}", flush=True)
            if has_original and seed < target.runs_of_original:
                out_dir = Path(temporary, "original-out")
                words = [*target.original.split(), f"--out_dir={out_dir}", "--always_save_checkpoint=True"]
                seconds["original"].append(timed_run(original, words))
                losses["original"].append(loss_of(out_dir, dataset, target.context, str(original / "data"))[0])
                print(f"original: {seconds['original'][-1]:.2f} s, loss {losses['original'][-1]:.4f}", flush=True)
    mean = statistics.mean(losses["ours"])
    goal = target.loss or (losses["original"][0] if has_original else None)
    median = statistics.median(seconds["ours"])
    theirs = statistics.median(seconds["original"]) if has_original else None
    spread = statistics.stdev(losses["ours"]) if len(losses["ours"]) > 1 else 0.0
    reached = "" if goal is None else f"; {'reaches' if mean <= goal else 'misses'} {goal:.4f}"
    parameters = {tensor.data_ptr(): tensor.numel() for tensor in loaded.weights.values()}  # a tied head counts once
    print(
        f"ours: {median:.2f} s (median), loss {mean:.4f} (mean of {arguments.seeds}, deviation {spread:.4f}){reached}"
    )
    print(f"{loaded.state.step} steps, {loaded.state.tokens:,} tokens, {sum(parameters.values()):,} parameters")
    print(json.dumps({
        "target": arguments.target, "speedup": theirs / median if theirs else None, "seconds_ours": median,
        "seconds_ours_all": seconds["ours"], "seconds_original": theirs, "loss_mean": mean, "losses": losses["ours"],
        "loss_original": losses["original"][0] if has_original else None, "loss_to_reach": goal,
        "steps": loaded.state.step, "tokens": loaded.state.tokens, "tuning": arguments.tune,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
