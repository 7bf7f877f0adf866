"""The judge of docs/speedrun.md: run a recipe with many seeds by the clock, and print the row to submit.

    python benchmarks/speedrun.py --track=small [--recipe=config/train_shakespeare_char_fast.py] [--seeds=10]

A recipe is a config file for train.py, or a program with a class `Model` that derives from `GPT` (see
benchmarks/records). The time is that of whole processes, from their start to their end; the loss of what each leaves
behind is then taken over the whole validation set, in windows of the track's context, in float32. The mean of all seeds
must lie below the target, with p < 0.01 in a one-sided t-test. The last line is JSON.
"""

import argparse
import datetime
import importlib.util
import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from all import machine
from bare import ROOT
from time_to_loss import loss_of, timed_run, tuning_set

from nanogpt.model import GPT


@dataclass(frozen=True)
class Track:
    """A loss to reach on a data set, at a context length."""

    dataset: str
    context: int
    loss: float  # to reach
    recipe: str  # the best config file


TRACKS = {
    "small": Track("shakespeare_char", 64, 1.8983, "config/train_shakespeare_char_fast.py"),
    "a100": Track("shakespeare_char", 256, 1.4697, "config/train_shakespeare_char_a100.py"),
}


def model_class(recipe: Path) -> type[GPT]:
    """Return the class `Model` of a recipe that is a program, else GPT."""
    if "class Model(" not in recipe.read_text(encoding="utf-8"):
        return GPT
    spec = importlib.util.spec_from_file_location("recipe", recipe)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model  # type: ignore[no-any-return]


def p_value(losses: list[float], target: float) -> float:
    """Return how probable a mean this far below `target` would be by chance: Student's one-sided t-test."""
    n = len(losses)
    t = (target - statistics.mean(losses)) / (statistics.stdev(losses) / math.sqrt(n))
    factor = math.gamma(n / 2) / (math.sqrt((n - 1) * math.pi) * math.gamma((n - 1) / 2))
    # The density over all numbers above t; by u = arctan(x), up to infinity.
    u = np.linspace(math.atan(t), math.pi / 2, 100_001)[:-1]
    density = factor * (1 + np.tan(u) ** 2 / (n - 1)) ** (-n / 2) / np.cos(u) ** 2
    return float(density.sum() * (u[1] - u[0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--track", choices=TRACKS, default="small")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tune", action="store_true", help="on a part of the training set: to choose settings")
    arguments, settings = parser.parse_known_args()
    if settings and not arguments.tune:
        parser.error(f"{settings[0]}: settings are for --tune; what counts is the recipe as it is")
    if arguments.seeds < 2:
        parser.error("--seeds: at least 2, for a record 10")
    track = TRACKS[arguments.track]
    recipe = (arguments.recipe or ROOT / track.recipe).resolve()
    kind, dataset = model_class(recipe), ROOT / "data" / track.dataset
    program, first = ("train.py", [str(recipe)]) if kind is GPT else (str(recipe), [])
    seconds: list[float] = []
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.tune:
            dataset = tuning_set(dataset, Path(temporary))
        for seed in range(arguments.seeds):
            out_dir = Path(temporary, f"out-{seed}")
            words = [*first, f"--out_dir={out_dir}", f"--data_dir={dataset.parent}", f"--seed={seed}", *settings]
            seconds.append(timed_run(ROOT, words, program))
            loss, loaded = loss_of(out_dir, dataset, track.context, kind=kind)
            losses.append(loss)
            print(f"seed {seed}: {seconds[-1]:.2f} s, loss {losses[-1]:.4f}", flush=True)
    p = p_value(losses, track.loss)
    name = recipe.relative_to(ROOT) if recipe.is_relative_to(ROOT) else recipe.name
    row = [
        f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
        f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}", str(len(losses)), f"{p:.1g}",
        f"{loaded.state.step}", f"{name}", "", machine(),
        f"{datetime.date.today()}",
    ]  # fmt: skip
    is_record = p < 0.01 and len(losses) >= 10 and not arguments.tune
    print(f"target {track.loss}: {'reached' if is_record else 'missed, or too few seeds, or tuning: not a record'}")
    print("| seconds | loss | n | p | steps | recipe | what is new | machine | date |")
    print(f"| {' | '.join(row)} |")
    print(
        json.dumps({"track": arguments.track, "seconds": seconds, "losses": losses, "p": p, "tuning": arguments.tune})
    )


if __name__ == "__main__":
    main()
