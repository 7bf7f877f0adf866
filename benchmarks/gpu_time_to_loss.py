"""How far does our recipe get on a GPU in a third of the time that the original's takes?

    python benchmarks/gpu_time_to_loss.py --original=FOLDER [--data=FOLDER] [--budget=60] [--seeds=2]

FOLDER is a checkout of karpathy/nanoGPT; the shape is GPT-2's (124M), the text is --data, a prepared data set, or this
machine's Python sources in bytes. Two short runs of each tell how long it takes to start and to do a step; from that
follows how many steps fit into its time, with warm-up and decay fitted to them. Then whole processes run, original and
ours in turn; every one that was started counts, and the mean loss of ours over the validation set, in windows of the
row's context, must reach the original's. About ten minutes on an H200; needs torch and numpy only, and no network.
`--device=cpu --tiny` tries the program itself. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from bare import ROOT, python_sources
from time_to_loss import copy_of_original, loss_of, timed_run

from nanogpt.data import is_prepared
from nanogpt.device import Device

# Its own recipe; evaluations are outside of the race.
ORIGINAL = "config/train_gpt2.py --wandb_log=False --eval_iters=1 --log_interval=10 --always_save_checkpoint=True"
# 65,536 tokens per step: in so short a time many small ones go further than few large ones. So short a run would not be
# compiled by itself.
OURS = (
    "config/train_gpt2_fast.py --batch_size=16 --gradient_accumulation_steps=4 --eval_iters=1 --checkpoint_interval=0 "
    "--compile=True --plot=False --sample_interval=0"
)
TINY = (
    "--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=4 --gradient_accumulation_steps=2 "
    "--compile=False --dtype=float32"
)


def steps_within(budget: float, seconds_of: dict[int, float]) -> int:
    """Return how many steps fit into `budget` seconds, given what two short runs took by their number of steps."""
    (few, first), (many, second) = sorted(seconds_of.items())
    per_step = max(second - first, 1e-9) / (many - few)
    start = first - few * per_step
    print(f"    {start:.1f} s to start, {per_step:.3f} s per step", flush=True)
    return max(10, int((budget - start) / per_step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="a prepared data set, for example with GPT-2's tokens")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--budget", type=float, default=60, help="seconds of a run of ours; the original has three times"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small network for a few seconds: is the program right?")
    arguments = parser.parse_args()
    kind = arguments.device.split(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here: nothing was measured (--device=cpu --tiny tries the program)")
    # The original first: what is slow to start for the first time, such as a GPU, is slow for it.
    budgets = {"original": 3 * arguments.budget, "ours": arguments.budget}
    losses: dict[str, list[float]] = {name: [] for name in budgets}
    seconds: dict[str, list[float]] = {name: [] for name in budgets}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = (
            arguments.data or python_sources(folder / "data" / "python", 5 if arguments.tiny else 100)
        ).absolute()
        if not is_prepared(dataset):
            sys.exit(f"{dataset} holds no prepared data set")
        original = copy_of_original(arguments.original, dataset, folder)
        device = Device(arguments.device, kind, torch.bfloat16 if kind == "cuda" else torch.float32, compile=False)
        common = f"--dataset={dataset.name} --device={arguments.device} {TINY if arguments.tiny else ''}"

        def run(name: str, steps: int, seed: int = 1337) -> float:
            """Return the seconds of a process; what it trained is in the folder `name`."""
            words = f"{common} --max_iters={steps} --lr_decay_iters={steps} --eval_interval={steps}"
            words += f" --out_dir={folder / name}"
            if name == "original":
                return timed_run(original, f"{ORIGINAL} {words} --warmup_iters={steps // 10}".split())
            ours = f"{OURS} {words} --warmup_iters={steps // 50} --data_dir={dataset.parent} --seed={seed}"
            return timed_run(ROOT, ours.split())

        steps: dict[str, int] = {}
        for name, budget in budgets.items():
            print(f"{name}, {budget:g} s:", flush=True)
            run(name, 2)  # fills caches of compiled kernels
            counts = (4, 404) if arguments.tiny else (4, 24)  # tiny steps are lost in how starts differ
            steps[name] = steps_within(budget, {count: run(name, count) for count in counts})
        for seed in range(arguments.seeds):
            for name in ("original", "ours") if seed == 0 else ("ours",):
                seconds[name].append(run(name, steps[name], seed))
                context = 64 if arguments.tiny else 1024
                loss, loaded = loss_of(folder / name, dataset, context, str(original / "data"), device)
                losses[name].append(loss)
                print(f"{name}, {steps[name]} steps of {loaded.config['batch_size']} x {context} x "
                      f"{loaded.config['gradient_accumulation_steps']} tokens: {seconds[name][-1]:.1f} s, "
                      f"loss {loss:.4f}", flush=True)  # fmt: skip
    mean, ours = statistics.mean(losses["ours"]), statistics.median(seconds["ours"])
    print(f"ours {'reaches' if mean <= losses['original'][0] else 'misses'} the original's loss")
    print(json.dumps({
        "speedup": seconds["original"][0] / ours, "seconds_ours": ours, "seconds_ours_all": seconds["ours"],
        "seconds_original": seconds["original"][0], "loss_mean": mean, "losses": losses["ours"],
        "loss_original": losses["original"][0], "steps": steps["ours"], "steps_original": steps["original"],
        "device": arguments.device, "tiny": arguments.tiny,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
