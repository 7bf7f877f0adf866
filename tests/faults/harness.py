"""Breaks training runs and looks whether anything was lost: `python -m tests.faults.harness --kills=300`.

One process imports torch and forks a child per attempt, so that an attempt takes a fraction of a second. Every run
goes on with `resume=auto` until it is done, and its end is compared, bit for bit, with that of an undisturbed run:
weights, optimizer, metrics, sampled text.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanogpt import checkpoint, train
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.metrics import read_metrics
from nanogpt.tokenizer import CharTokenizer
from tests.conftest import write_dataset

PHASES = ["start", "data", "step", "evaluation", "between", "write", "rename"]
TIMES = ("seconds", "tokens_per_second", "system/memory_gb")  # of a record: what is no function of the config


@dataclass
class Fault:
    """What was done, how often, and what came of it."""

    name: str
    tries: int = 0
    lost: int = 0  # runs that could not go on, or did not come to their end
    different: int = 0  # runs whose end has a bit that is not the undisturbed run's


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    """A run of a second: dropout, accumulation, epochs, warm-up, a checkpoint after every second step."""
    settings: dict[str, Any] = {
        "out_dir": str(folder / "out"), "data_dir": str(folder / "data"), "dataset": "fox", "resume": "auto",
        "max_iters": 40, "eval_interval": 7, "eval_iters": 3, "checkpoint_interval": "2",
        "gradient_accumulation_steps": 2, "batch_size": 4, "block_size": 32, "sampling": "epoch", "n_layer": 2,
        "n_head": 2, "n_embd": 48, "dropout": 0.1, "learning_rate": 3e-3, "min_lr": 3e-4, "warmup_iters": 10,
        "lr_decay_iters": 40, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def make_data(folder: Path) -> None:
    """The data set of all runs in `folder`."""
    text = "the quick brown fox jumps over the lazy dog\n" * 130
    tokenizer = CharTokenizer(sorted(set(text)))
    write_dataset(folder / "data" / "fox", tokenizer, tokenizer.encode(text[:5000]), tokenizer.encode(text[5000:]))


def end_of(config: TrainConfig) -> dict[str, Any]:
    """All that a finished run has come to."""
    last, best = (torch.load(Path(config.out_dir, name), weights_only=True) for name in ("ckpt.pt", "best.pt"))
    model = checkpoint.load_checkpoint(Path(config.out_dir, "ckpt.pt")).build_model()
    torch.manual_seed(0)
    sample = model.generate(torch.zeros(1, 1, dtype=torch.long), 20).flatten().tolist()
    for content in (last, best):
        content.pop("config")
        content["nanogpt"].pop("seconds")
    # A run that was stopped says how far it came, in a row without values.
    rows = [row for row in read_metrics(Path(config.out_dir, "metrics.jsonl")) if len(row) > 4]
    metrics = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return {"last": last, "best": best, "metrics": metrics, "sample": sample}


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [found for key in {**a, **b} for found in differences(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [found for n, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{where}/{n}")]
    return [] if same(a, b) else [f"{where}: {str(a)[:100]} in place of {str(b)[:100]}"]


class Child:
    """One attempt at a run, in a process of its own, whose phase can be seen from outside."""

    def __init__(self, config: TrainConfig) -> None:
        self._phases = mmap.mmap(-1, 2)  # of the training, of the writer beside it
        self.log = Path(config.out_dir).with_name("log.txt")
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                with open(self.log, "a") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                os.environ["TQDM_DISABLE"] = "1"
                self._mark_phases()
                code = train.train(config)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                code = error.exit_code
            except BaseException as error:
                print(f"crash: {error!r}", file=sys.stderr)
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def _mark_phases(self) -> None:
        def mark(module: Any, name: str, phase: str, slot: int) -> None:
            function = getattr(module, name)

            def call(*arguments: Any, **settings: Any) -> Any:
                before = self._phases[slot]
                self._phases[slot] = PHASES.index(phase)
                try:
                    return function(*arguments, **settings)
                finally:
                    self._phases[slot] = before or (0 if slot else PHASES.index("between"))

            setattr(module, name, call)

        mark(train.data, "get_batch", "data", 0)
        mark(train, "compute_loss", "step", 0)
        mark(train, "step_if_finite", "step", 0)
        mark(train, "estimate_loss", "evaluation", 0)
        mark(checkpoint, "write_file", "write", 1)
        mark(os, "replace", "rename", 1)

    def phase(self) -> str:
        """What it is doing."""
        return PHASES[self._phases[1] or self._phases[0]]

    def wait(self) -> int:
        """Its exit code, or the negative number of the signal that has ended it."""
        status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(status)

    def is_running(self) -> bool:
        """Whether it has not ended yet; reaps nothing."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def finish(config: TrainConfig, reference: dict[str, Any], fault: Fault) -> None:
    """Let the run come to its end, and compare."""
    if Child(config).wait() != 0:
        fault.lost += 1
        print(f"LOST: {fault.name}: {Path(config.out_dir).with_name('log.txt').read_text()[-2000:]}")
    elif not same(end_of(config), reference):
        fault.different += 1
        print(f"DIFFERENT: {fault.name}: {differences(end_of(config), reference)}")


@contextlib.contextmanager
def new_run(folder: Path, **changes: Any) -> Iterator[TrainConfig]:
    """A run in a folder of its own, which goes when it was good."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        (Path(name) / "data").symlink_to(folder / "data")
        yield config_of(Path(name), **changes)


def kill(
    folder: Path, reference: dict[str, Any], count: int, rng: random.Random, seconds: float
) -> tuple[list[Fault], Counter[str]]:
    """SIGKILL at random moments, a dozen times per run; seconds: what an undisturbed run takes."""
    fault, phases = Fault("SIGKILL at a random moment"), Counter[str]()
    while fault.tries < count:
        with new_run(folder) as config:
            for _ in range(12):
                child = Child(config)
                time.sleep(rng.uniform(0.0, seconds / 2))
                if not child.is_running():
                    child.wait()
                    break
                os.kill(child.pid, signal.SIGSTOP)  # so that it does what it was seen doing when it dies
                phases[child.phase()] += 1
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
                fault.tries += 1
            finish(config, reference, fault)
    return [fault], phases


def stop(folder: Path, reference: dict[str, Any], count: int, rng: random.Random) -> list[Fault]:
    """The signals of schedulers, terminals and people: exit 75, then go on."""
    faults = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        fault = Fault(f"{number.name}")
        while fault.tries < count:
            with new_run(folder) as config:
                child = Child(config)
                deadline = time.monotonic() + 60
                while child.phase() not in ("step", "evaluation") and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0.0, 0.3))
                if child.is_running():
                    os.kill(child.pid, number)
                code = child.wait()
                fault.tries += 1
                if code not in (0, train.STOPPED):
                    fault.lost += 1
                    print(f"LOST: {fault.name}: exit code {code}")
                finish(config, reference, fault)
        faults.append(fault)
    return faults


def half_done(config: TrainConfig, rng: random.Random) -> None:
    """Run up to somewhere in the middle."""
    code = Child(replace(config, max_iters=rng.randrange(9, 36), eval_interval=7)).wait()
    assert code == 0, code


def damage(folder: Path, reference: dict[str, Any], count: int, rng: random.Random) -> list[Fault]:
    """Files that are not what was written: the one before counts."""
    faults = [Fault("byte of ckpt.pt flipped"), Fault("ckpt.pt cut off"), Fault("ckpt.pt gone")]
    for fault in faults:
        while fault.tries < count:
            with new_run(folder, checkpoint_interval="0") as config:
                stop_after(config, rng)
                path = Path(config.out_dir, "ckpt.pt")
                content = bytearray(path.read_bytes())
                if "flipped" in fault.name:
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                    path.write_bytes(content)
                elif "cut" in fault.name:
                    path.write_bytes(content[: rng.randrange(len(content))])
                else:
                    path.unlink()
                fault.tries += 1
                finish(config, reference, fault)
    return faults


def stop_after(config: TrainConfig, rng: random.Random) -> None:
    """Run until there are two checkpoints at least, then stop by signal."""
    child = Child(config)
    while child.is_running() and len(checkpoint.checkpoints_of(config.out_dir)) < 2:
        time.sleep(0.005)
    time.sleep(rng.uniform(0.0, 0.1))
    if child.is_running():
        os.kill(child.pid, signal.SIGTERM)
    child.wait()


def cut_data(folder: Path, reference: dict[str, Any], count: int, rng: random.Random) -> list[Fault]:
    """The data file cut off under a running job: the system ends the process; whole again, the run goes on.

    It is cut between two pages of memory: the rest of a page would read as zeros.
    """
    fault = Fault("train.bin cut off under a running job")
    while fault.tries < count:
        with new_run(folder) as config:
            data = Path(config.data_dir)
            data.unlink()
            shutil.copytree(folder / "data", data)
            file = data / "fox" / "train.bin"
            whole = file.read_bytes()
            child = Child(config)
            while child.is_running() and child.phase() == "start":
                time.sleep(0.002)
            os.truncate(file, rng.randrange(0, len(whole), mmap.PAGESIZE))
            code = child.wait()
            file.write_bytes(whole)
            fault.tries += 1
            if code != -signal.SIGBUS:
                fault.lost += 1
                print(f"LOST: {fault.name}: exit code {code}: {child.log.read_text()[-300:]}")
            finish(config, reference, fault)
    return [fault]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own. Raises `PermissionError` where none can be made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        why = made.stderr if made.returncode else ""
    except OSError as error:
        why = str(error)
    if why:
        folder.rmdir()
        raise PermissionError(f"no tmpfs can be mounted here: {why.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def full_disk(folder: Path, reference: dict[str, Any], count: int, rng: random.Random) -> list[Fault]:
    """A disk that fills up while the run goes on, and is cleared again; a file in place of the folder; no folder."""
    faults = [Fault("disk full, later cleared"), Fault("out_dir a file, later back"), Fault("out_dir deleted")]
    for fault in faults:
        while fault.tries < count:
            with new_run(folder) as config, small_disk(Path(config.out_dir).parent / "disk", 4) as disk:
                config = replace(config, out_dir=str(disk / "out"))
                child = Child(config)
                while child.is_running() and not checkpoint.checkpoints_of(config.out_dir):
                    time.sleep(0.002)
                if "full" in fault.name:
                    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
                        while True:
                            file.write(bytes(4096))
                elif "a file" in fault.name:
                    (disk / "out").rename(disk / "away")
                    (disk / "out").write_text("in the way")
                else:
                    shutil.rmtree(config.out_dir, ignore_errors=True)
                time.sleep(rng.uniform(0.05, 0.4))
                (disk / "ballast").unlink(missing_ok=True)
                if "a file" in fault.name:
                    (disk / "out").unlink()
                    (disk / "away").rename(disk / "out")
                code = child.wait()
                fault.tries += 1
                if code not in (0, 2):
                    fault.lost += 1
                    print(f"LOST: {fault.name}: exit code {code}: {child.log.read_text()[-300:]}")
                if "deleted" in fault.name and code == 0:  # what was recorded before is gone with the folder
                    finish(config, {**reference, "metrics": end_of(config)["metrics"]}, fault)
                else:
                    finish(config, reference, fault)
    return faults


def run_all(kills: int, others: int, seed: int) -> list[Fault]:
    """Everything; prints as it goes."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        with new_run(folder) as config:
            began = time.monotonic()
            assert Child(config).wait() == 0
            seconds = time.monotonic() - began
            reference = end_of(config)
        with new_run(folder, checkpoint_interval="0", eval_interval=7) as config:  # saving less often changes nothing
            assert Child(config).wait() == 0
            assert same(end_of(config), reference)
        found, phases = kill(folder, reference, kills, rng, seconds)
        print(f"killed while at: {dict(phases)}")
        for experiment in (stop, damage, cut_data, full_disk):
            try:
                found += experiment(folder, reference, others, rng)
            except PermissionError as error:
                print(f"not tried: {experiment.__name__}: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--others", type=int, default=20, help="tries of each other fault")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faults = run_all(arguments.kills, arguments.others, arguments.seed)
    print("\n| fault | tries | runs lost | bits different |\n|---|---|---|---|")
    for fault in faults:
        print(f"| {fault.name} | {fault.tries} | {fault.lost} | {fault.different} |")
    print(json.dumps({fault.name: [fault.tries, fault.lost, fault.different] for fault in faults}))
    sys.exit(any(fault.lost or fault.different for fault in faults))


if __name__ == "__main__":
    main()
