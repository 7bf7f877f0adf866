"""Two machines, as far as one can tell from within: network namespaces that are joined by a virtual cable."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanogpt.metrics import read_metrics
from tests.conftest import ROOT
from tests.test_cli import TINY
from tests.test_distributed import COMMON, alone, assert_same_run

pytestmark = pytest.mark.slow
WORDS = ["--gradient_accumulation_steps=2", "--max_iters=600", "--eval_interval=200", "--checkpoint_interval=20",
         "--log_interval=10", "--learning_rate=1e-3", "--resume=auto"]  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces with the addresses 10.98.0.1 and 10.98.0.2."""
    names = f"nanogpt-{os.getpid()}-a", f"nanogpt-{os.getpid()}-b"
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for n, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.98.0.{n}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', '') or error}")
    try:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def start_on(name: str, number: int) -> "subprocess.Popen[str]":
    """torchrun on one of the hosts, which waits for the other."""
    launcher = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=5", "--rdzv-id=run", "--rdzv-backend=c10d",
                "--rdzv-endpoint=10.98.0.1:29501", f"--local-addr=10.98.0.{number}",
                f"--rdzv-conf=is_host={int(number == 1)}"]  # fmt: skip  # the names of real hosts say it
    train = [str(ROOT / "train.py"), *TINY, *COMMON, *WORDS, "--out_dir=two", "--dist_timeout=0.2"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, *train]
    # without the second, torchrun gives a host that comes back no address to meet the others at
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = open(f"host-{number}.log", "a", encoding="utf-8")
    return subprocess.Popen(["ip", "netns", "exec", name, *command], stdout=log, stderr=log, text=True, env=environment)


def wait_for_step(step: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if Path("two/metrics.jsonl").exists() and any(
            row["step"] >= step for row in read_metrics(Path("two/metrics.jsonl"))
        ):
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached: {Path('host-1.log').read_text()[-3000:]}")


@pytest.mark.skipif(not shutil.which("ip"), reason="the program `ip` (iproute2) is not here")
def test_a_run_on_two_hosts_survives_the_loss_of_one(data_dir: Path) -> None:
    alone("one", *WORDS)
    with two_hosts() as names:
        first, second = start_on(names[0], 1), start_on(names[1], 2)
        try:
            wait_for_step(100)
            ip("-n", names[1], "link", "set", "cable", "down")  # nobody is told that it is gone
            listed = subprocess.run(["ip", "netns", "pids", names[1]], check=True, capture_output=True, text=True)
            subprocess.run(["kill", "-9", *listed.stdout.split()], check=True)
            second.wait(10)
            time.sleep(2)
            ip("-n", names[1], "link", "set", "cable", "up")
            second = start_on(names[1], 2)
            assert first.wait(150) == 0, Path("host-1.log").read_text()[-5000:]
            assert second.wait(60) == 0, Path("host-2.log").read_text()[-5000:]
        finally:
            for process in (first, second):
                process.kill()
    said = Path("host-1.log").read_text() + Path("host-2.log").read_text()
    assert "resuming two/ckpt.pt after" in said
    assert_same_run("one", "two")
