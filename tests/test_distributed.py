"""Several processes on one machine, started as a person does, equal one process."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanogpt import checkpoint
from nanogpt.report.metrics import read_metrics
from tests.conftest import ROOT
from tests.test_cli import TINY


def command(processes: int, out_dir: str, *words: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    common = ["--max_iters=6", "--eval_interval=3", "--eval_iters=3", "--learning_rate=1e-2", "--warmup_iters=2"]
    return [sys.executable, *launcher, str(ROOT / "train.py"), *TINY, *common, f"--out_dir={out_dir}", *words]


def train(processes: int, out_dir: str, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(processes, out_dir, *words), capture_output=True, text=True, timeout=240, check=False)


def test_two_processes_equal_one(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=4", "--batch_size=3"]
    for processes, out_dir in [(1, "one"), (2, "two")]:
        result = train(processes, out_dir, *words)
        assert result.returncode == 0, result.stderr
    assert result.stdout.count("iter 0: ") == 1  # one process speaks
    one, two = (read_metrics(Path(name, "metrics.jsonl")) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("step", "tokens", "train/loss", "val/loss", "train/eval_loss", "grad_norm"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5)
    c, d = (checkpoint.load(Path(name, "ckpt.pt")) for name in ("one", "two"))
    for name, tensor in c.weights.items():
        torch.testing.assert_close(tensor, d.weights[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--gradient_accumulation_steps=3",
            "gradient_accumulation_steps=3 can't be shared by 2 processes; gradient_accumulation_steps=2 or 4 can",
        ),
        ("--backend=nccl", "--backend=nccl connects CUDA GPUs, but this run computes on cpu"),
        ("--dataset=nowhere", "nanogpt prepare nowhere --input=PATH"),
    ],
)
def test_what_cannot_work_is_refused_by_all_alike(data_dir: Path, word: str, message: str) -> None:
    result = train(2, "two", "--gradient_accumulation_steps=2", word)
    assert result.returncode != 0
    assert message in result.stderr
    ours = result.stderr.split("torch/distributed/run.py")[0]  # what torchrun adds is its own traceback
    assert "Traceback" not in ours.split("elastic")[0]
    assert not Path("two").exists()


def test_a_stop_signal_to_one_process_saves_and_the_run_goes_on(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--eval_interval=100000", "--log_interval=50"]
    process = subprocess.Popen(command(2, "two", *words, "--max_iters=100000"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("iter 50:"):
        assert process.poll() is None
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(listed.stdout.split()[-1]), signal.SIGTERM)
    out = process.stdout.read()
    process.wait(timeout=60)
    stopped = int(re.findall(r"stopped after (\d+) updates", out)[0])
    assert checkpoint.load(Path("two", "ckpt.pt")).progress.step == stopped
    result = train(2, "two", *words, f"--max_iters={stopped + 5}", "--init_from=resume")
    assert result.returncode == 0, result.stderr
    assert checkpoint.load(Path("two", "ckpt.pt")).progress.step == stopped + 5
