"""A loss that takes the original's recipe four minutes on a GPU: how far does ours get in eighty seconds?

    python benchmarks/gpu_time_to_loss.py --original=FOLDER [--data=FOLDER]

FOLDER is a checkout of karpathy/nanoGPT; the shape is GPT-2's (124M), the text is this machine's Python sources in
GPT-2's tokens, or a data set made elsewhere. Two short runs of each tell how long it takes to start and to make an
update; from that follows how many updates fit into its time, with warm-up and decay fitted to them. Then whole
processes run, original and ours in turn; every one that was started counts, and the mean loss of ours over the
validation set, in windows of the row's context, must reach the original's. `--device=cpu --tiny` tries the program
itself. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from time_to_loss import ROOT, copy_of_original, loss_of, timed_run

from nanogpt.data import is_prepared
from nanogpt.device import Device

BUDGETS = {"original": 240.0, "ours": 80.0}  # seconds
# its own recipe; evaluations are outside of the race
ORIGINAL = "config/train_gpt2.py --wandb_log=False --eval_iters=1 --log_interval=10 --always_save_checkpoint=True"
# 65,536 tokens per update: in so short a time many small ones go further than few large ones
OURS = (
    "config/train_gpt2_fast.py --batch_size=16 --gradient_accumulation_steps=4 --eval_iters=1 --checkpoint_interval=0"
)
TINY = "--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=4 --gradient_accumulation_steps=2"


def python_sources(folder: Path) -> Path:
    """A data set of this machine's Python sources in GPT-2's tokens."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "purelib")}
    words = [f"--input={path}" for path in paths]
    command = [sys.executable, "-m", "nanogpt", "prepare", "python", *words, "--tokenizer=gpt2", f"--data_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "python"


def updates_within(budget: float, seconds_of: dict[int, float]) -> int:
    """How many updates fit into `budget` seconds, given what two short runs took by their number of updates."""
    (few, first), (many, second) = sorted(seconds_of.items())
    per_update = max(second - first, 1e-9) / (many - few)
    start = first - few * per_update
    print(f"    {start:.1f} s to start, {per_update:.3f} s per update", flush=True)
    return max(10, int((budget - start) / per_update))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="a prepared data set with GPT-2's tokens")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small network for a few seconds: is the program right?")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here: nothing was measured (--device=cpu --tiny tries the program)")
    budgets = {name: seconds / 20 if arguments.tiny else seconds for name, seconds in BUDGETS.items()}
    losses: dict[str, list[float]] = {"original": [], "ours": []}
    seconds: dict[str, list[float]] = {"original": [], "ours": []}
    with tempfile.TemporaryDirectory() as temporary:
        dataset = (arguments.data or python_sources(Path(temporary))).absolute()
        if not is_prepared(dataset):
            sys.exit(f"{dataset} holds no prepared data set")
        original = copy_of_original(arguments.original, dataset, Path(temporary))
        device = Device(arguments.device, arguments.device.split(":")[0], torch.float32, compile=False)
        common = f"--dataset={dataset.name} --device={arguments.device} " + (TINY if arguments.tiny else "")
        common += " --compile=False --dtype=float32" if arguments.tiny else ""

        def run(name: str, updates: int, seed: int = 1337) -> float:
            """Seconds of a process; what it trained is in the folder `name`."""
            schedule = f"--max_iters={updates} --lr_decay_iters={updates} --eval_interval={updates}"
            words = f"{common} {schedule} --out_dir={temporary}/{name}"
            if name == "original":
                return timed_run(original, f"{ORIGINAL} {words} --warmup_iters={updates // 10}".split())
            return timed_run(
                ROOT, f"{OURS} {words} --warmup_iters={updates // 50} --data_dir={dataset.parent} --seed={seed}".split()
            )

        context = 64 if arguments.tiny else 1024
        updates: dict[str, int] = {}
        for name, budget in budgets.items():
            print(f"{name}, {budget:g} s:")
            run(name, 2)  # fills caches of compiled kernels for both alike
            updates[name] = updates_within(budget, {few: run(name, few) for few in (4, 24)})
        for seed in range(arguments.seeds):
            for name in ("original", "ours") if seed == 0 else ("ours",):
                seconds[name].append(run(name, updates[name], seed))
                loss, loaded = loss_of(Path(temporary, name), dataset, context, str(original / "data"), device)
                losses[name].append(loss)
                print(
                    f"{name}, {updates[name]} updates, {loaded.progress.tokens:,} tokens: {seconds[name][-1]:.1f} s, "
                    f"loss {loss:.4f}",
                    flush=True,
                )
    mean = statistics.mean(losses["ours"])
    print(f"ours {'reaches' if mean <= losses['original'][0] else 'misses'} the original's loss")
    print(json.dumps({
        "speedup": seconds["original"][0] / statistics.median(seconds["ours"]),
        "seconds_ours": statistics.median(seconds["ours"]), "seconds_ours_all": seconds["ours"],
        "seconds_original": seconds["original"][0], "loss_mean": mean, "losses": losses["ours"],
        "loss_original": losses["original"][0], "steps": updates["ours"], "steps_original": updates["original"],
        "device": arguments.device, "tiny": arguments.tiny,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
