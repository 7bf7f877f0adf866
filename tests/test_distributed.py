"""Several processes on one machine, started as a person does, equal one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanogpt import checkpoint
from nanogpt.report.metrics import read_metrics
from tests.conftest import ROOT
from tests.test_cli import TINY


def train(processes: int, out_dir: str, *words: str) -> "subprocess.CompletedProcess[str]":
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    settings = [
        *TINY,
        "--max_iters=6",
        "--eval_interval=3",
        "--eval_iters=3",
        "--learning_rate=1e-2",
        "--warmup_iters=2",
    ]
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *settings, f"--out_dir={out_dir}", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


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
    a, b = (checkpoint.load(Path(name, "ckpt.pt")) for name in ("one", "two"))
    for name, tensor in a.weights.items():
        torch.testing.assert_close(tensor, b.weights[name], atol=1e-4, rtol=1e-4)


def test_micro_batches_that_cannot_be_dealt_out_are_refused(data_dir: Path) -> None:
    result = train(2, "two", "--gradient_accumulation_steps=3")
    assert result.returncode != 0
    assert "gradient_accumulation_steps=3 can't be shared by 2 processes; gradient_accumulation_steps=2 or 4 can" in (
        result.stderr
    )
    assert not Path("two").exists()
