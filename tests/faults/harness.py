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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanogpt import checkpoint, train
from nanogpt.checkpoint import checkpoints_of
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.metrics import read_metrics
from tests.conftest import write_fox

PHASES = ["start", "data", "step", "evaluation", "between", "write", "rename"]
TIMES = ("seconds", "tokens_per_second")  # of a record: what is no function of the config


@dataclass
class Fault:
    """What was done, how often, and what came of it."""

    name: str
    tries: int = 0
    lost: int = 0  # runs that could not go on, or did not come to their end
    different: int = 0  # runs whose end has a bit that is not the undisturbed run's


@contextmanager
def new_run(folder: Path) -> Iterator[TrainConfig]:
    """A run of a second in a folder of its own: dropout, accumulation, epochs, warm-up, frequent checkpoints."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        (Path(name) / "data").symlink_to(folder / "data")
        yield TrainConfig(
            out_dir=f"{name}/out", data_dir=f"{name}/data", dataset="fox", resume="auto", max_iters=40, eval_interval=7,
            eval_iters=3, checkpoint_interval="2", gradient_accumulation_steps=2, batch_size=4, block_size=32,
            sampling="epoch", n_layer=2, n_head=2, n_embd=48, dropout=0.1, learning_rate=3e-3, min_lr=3e-4,
            warmup_iters=10, lr_decay_iters=40, device="cpu", dtype="float32",
        )  # fmt: skip


def end_of(config: TrainConfig) -> dict[str, Any]:
    """All that a finished run has come to."""
    last, best = (torch.load(Path(config.out_dir, name), weights_only=True) for name in ("ckpt.pt", "best.pt"))
    model = checkpoint.load_checkpoint(Path(config.out_dir, "ckpt.pt")).build_model()
    torch.manual_seed(0)
    sample = model.generate(torch.zeros(1, 1, dtype=torch.long), 20)
    for content in (last, best):
        content.pop("config")
        content["nanogpt"].pop("seconds")
    # A run that was stopped says how far it came, in a row without values.
    rows = [row for row in read_metrics(Path(config.out_dir, "metrics.jsonl")) if len(row) > 4]
    metrics = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return {"last": last, "best": best, "metrics": metrics, "sample": sample}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two values are not equal bit for bit."""
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return [found for key in {**a, **b} for found in differences(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        is_same = a.dtype == b.dtype and torch.equal(a, b)
    else:
        is_same = bool(a == b)
    return [] if is_same else [f"{where}: {str(a)[:100]} in place of {str(b)[:100]}"]


class Child:
    """One attempt at a run, in a process of its own, whose phase can be seen from outside."""

    def __init__(self, config: TrainConfig) -> None:
        self._phases = mmap.mmap(-1, 2)  # of the training, of the writer beside it
        self.log = Path(config.data_dir).with_name("log.txt")
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                with open(self.log, "a") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                self._mark_phases()
                code = train.train(config)
            except UserError as error:
                print(f"error: {error}", flush=True)
                code = error.exit_code
            except BaseException as error:
                print(f"crash: {error!r}", flush=True)
            finally:
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
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def is_running(self) -> bool:
        """Whether it has not ended yet; reaps nothing."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition is met, or the child has ended."""
        while self.is_running() and not condition():
            time.sleep(0.002)

    def send(self, number: int) -> None:
        """Send a signal, if it is still running."""
        if self.is_running():
            os.kill(self.pid, number)

    def expect(self, *codes: int) -> None:
        """Assert that it ends with one of these exit codes."""
        code = self.wait()
        assert code in codes, f"exit code {code}: {self.log.read_text()[-2000:]}"


def finish(config: TrainConfig, reference: dict[str, Any], fault: Fault) -> None:
    """Let the run come to its end, and compare with that of an undisturbed run."""
    Child(config).expect(0)
    if found := differences(end_of(config), reference):
        fault.different += 1
        print(f"DIFFERENT: {fault.name}: {found}")


def kill(folder: Path, reference: dict[str, Any], count: int, rng: random.Random, seconds: float) -> Fault:
    """SIGKILL at random moments, up to a dozen times per run; seconds: what an undisturbed run takes."""
    fault, phases = Fault("SIGKILL at a random moment"), Counter[str]()
    while fault.tries < count:
        with new_run(folder) as config:
            for _ in range(min(count, 12)):
                child = Child(config)
                time.sleep(rng.uniform(0.0, seconds / 2))
                if child.is_running():
                    os.kill(child.pid, signal.SIGSTOP)  # so that it does what it was seen doing when it dies
                    phases[child.phase()] += 1
                    os.kill(child.pid, signal.SIGKILL)
                    fault.tries += 1
                if child.wait() == 0:
                    break
            try:
                finish(config, reference, fault)
            except AssertionError as error:
                fault.lost += 1
                print(f"LOST: {fault.name}: {error}")
    print(f"killed while at: {dict(phases)}")
    return fault


# ---------------------------------------------------------------------------------------------------
# Other faults: each breaks a run, or asserts; within the block the run can be resumed


@contextmanager
def stopped(config: TrainConfig, rng: random.Random, number: int) -> Iterator[TrainConfig]:
    """The signals of schedulers, terminals and people: exit 75, then go on."""
    child = Child(config)
    child.wait_until(lambda: child.phase() in ("step", "evaluation"))
    time.sleep(rng.uniform(0.0, 0.3))
    child.send(number)
    child.expect(0, train.STOPPED)
    yield config


@contextmanager
def damaged(config: TrainConfig, rng: random.Random, how: str) -> Iterator[TrainConfig]:
    """A newest checkpoint that is not what was written: the one before counts."""
    child, path = Child(config), Path(config.out_dir, "ckpt.pt")
    child.wait_until(lambda: len(checkpoints_of(config.out_dir)) > 1)
    time.sleep(rng.uniform(0.0, 0.1))
    child.send(signal.SIGTERM)
    child.expect(0, train.STOPPED)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[: rng.randrange(len(content))])
    yield config


@contextmanager
def disk_full(config: TrainConfig, rng: random.Random) -> Iterator[TrainConfig]:
    """A disk that fills up under a running job, and is cleared again."""
    with small_disk(Path(config.out_dir).with_name("disk"), megabytes=4) as disk:
        config = replace(config, out_dir=f"{disk}/out")
        child = Child(config)
        child.wait_until(lambda: bool(checkpoints_of(config.out_dir)))
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        time.sleep(rng.uniform(0.05, 0.4))
        (disk / "ballast").unlink()
        child.expect(0, 2)
        yield config


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own. Raises `PermissionError` where none can be made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        raise PermissionError("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


OTHERS: dict[str, Callable[..., Any]] = {
    "SIGTERM": partial(stopped, number=signal.SIGTERM),
    "SIGINT": partial(stopped, number=signal.SIGINT),
    "SIGUSR1": partial(stopped, number=signal.SIGUSR1),
    "byte of ckpt.pt flipped": partial(damaged, how="flipped"),
    "ckpt.pt cut off": partial(damaged, how="cut off"),
    "ckpt.pt gone": partial(damaged, how="gone"),
    "disk full, later cleared": disk_full,
}


def run_all(kills: int, others: int, seed: int) -> list[Fault]:
    """Everything; prints as it goes."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_fox(folder / "data/fox")
        with new_run(folder) as config:
            began = time.monotonic()
            Child(config).expect(0)
            seconds = time.monotonic() - began
            reference = end_of(config)
        faults = [kill(folder, reference, kills, rng, seconds)]
        for name, break_run in OTHERS.items():
            fault = Fault(name)
            faults.append(fault)
            for fault.tries in range(1, others + 1):
                try:
                    with new_run(folder) as config, break_run(config, rng) as resumable:
                        finish(resumable, reference, fault)
                except PermissionError as error:
                    print(f"not tried: {name}: {error}")
                    faults.remove(fault)
                    break
                except AssertionError as error:
                    fault.lost += 1
                    print(f"LOST: {name}: {error}")
    return faults


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
