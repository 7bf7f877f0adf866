"""Several processes on one machine, started as a person does, equal one process; and what they say when they fail."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.checkpoint import checkpoints_of, load_checkpoint
from nanogpt.cli import parse
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.device import Device
from nanogpt.distributed import Distributed, choose_parallel, parallelize
from nanogpt.errors import ConfigError
from nanogpt.metrics import read_metrics
from nanogpt.model import GPT
from nanogpt.optim import make_optimizer
from nanogpt.train import train
from tests.conftest import ROOT
from tests.test_cli import TINY

Recipe = Callable[..., TrainConfig]
COMMON = ["--max_iters=6", "--eval_interval=3", "--eval_iters=3", "--learning_rate=1e-2", "--warmup_iters=2"]
COMPARED = ("train/loss", "val/loss", "train/eval_loss", "grad_norm")

# What a process does to itself before step 4; %s: a statement.
SABOTAGED = """
import os, signal, sys, time
from nanogpt import cli, data
real = data.get_batch
def get_batch(dataset, step, **settings):
    if os.environ["RANK"] == "1" and step == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        %s
    return real(dataset, step, **settings)
data.get_batch = get_batch
cli.run("train")
"""


def command(
    processes: int, out_dir: str, *words: str, script: Path = ROOT / "train.py", restarts: int = 0
) -> list[str]:
    launcher = [f"--nproc_per_node={processes}", f"--max-restarts={restarts}", str(script)]
    settings = [*TINY, *COMMON, f"--out_dir={out_dir}", *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *launcher, *settings]


def launch(
    processes: int, out_dir: str, *words: str, script: Path = ROOT / "train.py", restarts: int = 0
) -> "subprocess.CompletedProcess[str]":
    line = command(processes, out_dir, *words, script=script, restarts=restarts)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False, env=environment)


def alone(out_dir: str, *words: str) -> None:
    assert train(parse(TrainConfig, [*TINY, *COMMON, f"--out_dir={out_dir}", *words], "")) == 0


def assert_same_run(one: str, two: str) -> None:
    """Assert that both recorded the same values at every step that both have, and came to the same end."""
    a, b = ({(row["step"], key): row[key] for row in read_metrics(Path(name, "metrics.jsonl")) for key in COMPARED
             if key in row} for name in (one, two))  # fmt: skip
    assert len(a.keys() & b.keys()) > 8
    for place in a.keys() & b.keys():
        assert a[place] == pytest.approx(b[place], abs=1e-5), place
    (step, weights, moments), (other_step, other_weights, other_moments) = end_of(one), end_of(two)
    assert step == other_step
    torch.testing.assert_close(weights, other_weights, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moments, other_moments, atol=1e-4, rtol=1e-3)


def end_of(out_dir: str) -> tuple[int, dict[str, torch.Tensor], dict[int, Any]]:
    """Step, weights and optimizer state of the newest checkpoint, whole or sharded."""
    loaded = load_checkpoint(checkpoints_of(out_dir)[0])
    model = loaded.build_model()
    optimizer = make_optimizer(model, TrainConfig(**loaded.config), torch.float32)
    loaded.restore(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    return loaded.state.step, model.state_dict(), optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (2, ["--gradient_accumulation_steps=4", "--batch_size=3", "--optimizer=muon"]),
        pytest.param(4, ["--gradient_accumulation_steps=1", "--batch_size=12", "--parallel=ddp"],
                     marks=pytest.mark.slow),
        (4, ["--gradient_accumulation_steps=5", "--batch_size=4", "--parallel=fsdp", "--sampling=epoch",
             "--optimizer=muon", "--zero_init"]),
        pytest.param(2, ["--gradient_accumulation_steps=1", "--batch_size=6", "--parallel=fsdp",
                         "--gradient_checkpointing", "--architecture=qwen3", "--tied_head=False"],
                     marks=pytest.mark.slow),
        (4, ["--gradient_accumulation_steps=4", "--batch_size=3", "--parallel=fsdp", "--shard_group=2", "--gather_once",
             "--optimizer=muon"]),
        pytest.param(2, ["--gradient_accumulation_steps=2", "--parallel=fsdp", "--optimizer=sgd"],
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_several_processes_equal_one(data_dir: Path, processes: int, words: list[str]) -> None:
    alone("one", *words)
    result = launch(processes, "several", *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("iter 0: ") == 1  # one process prints
    assert_same_run("one", "several")


def test_a_run_resumes_at_any_number_of_processes(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--batch_size=6", "--max_iters=9"]
    alone("one", *words)
    alone("moved", *words, "--max_iters=2")
    result = launch(2, "moved", *words, "--max_iters=4", "--init_from=resume", "--parallel=fsdp")  # from one file
    assert result.returncode == 0, result.stderr
    assert checkpoints_of("moved")[0] == Path("moved/ckpt.dcp/4")
    result = launch(4, "moved", *words, "--max_iters=6", "--resume=auto")  # from shards, to more of them
    assert result.returncode == 0, result.stderr
    assert "4 processes, fsdp" in result.stdout
    result = launch(2, "moved", *words, "--max_iters=7", "--resume=auto", "--parallel=ddp")
    assert result.returncode == 0, result.stderr
    alone("moved", *words, "--init_from=resume")
    assert_same_run("one", "moved")
    assert checkpoints_of("moved")[0].name == "ckpt.pt"


def test_damaged_shards_are_skipped_and_run_no_code(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--parallel=fsdp", "--keep_checkpoints=3"]
    assert launch(2, "out", *words).returncode == 0
    newest, older = checkpoints_of("out")
    assert (newest, older) == (Path("out/ckpt.dcp/6"), Path("out/ckpt.dcp/3"))
    file = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    result = launch(2, "out", *words, "--resume=auto")
    assert result.returncode == 0, result.stderr
    assert "resuming out/ckpt.dcp/3" in result.stdout
    assert load_checkpoint(checkpoints_of("out")[0]).state.step == 6


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--batch_size=3", "rows can't be divided evenly among 2 processes; --gradient_accumulation_steps=2"),
        ("--dataset=nowhere", "python -m nanogpt prepare nowhere --data_dir="),
        ("--init_from=resume", "there is no folder two"),
    ],
)
def test_what_cannot_work_is_refused_by_all_alike(data_dir: Path, word: str, message: str) -> None:
    result = launch(2, "two", "--gradient_accumulation_steps=1", word)
    assert result.returncode != 0
    assert message in result.stderr
    assert not Path("two").exists()


def test_processes_that_were_started_differently_are_refused(data_dir: Path) -> None:
    script = Path("differs.py")
    script.write_text(
        "import os\nfrom nanogpt import cli\n"
        f"words = {[*TINY, '--out_dir=two', '--batch_size=4']}\n"
        "cli.run('train', words + ['--seed=1', '--resume=auto'] * int(os.environ['RANK']))\n"
    )
    result = launch(2, "two", script=script)
    assert result.returncode != 0
    for difference in ("seed is 1, not 1337", "resume is 'auto', not 'never'"):
        assert difference in result.stderr
    assert not Path("two").exists()


@pytest.mark.parametrize(
    ("statement", "words", "message"),
    [
        ("raise ArithmeticError('what happened')", [], "ArithmeticError: what happened"),
        ("os.kill(os.getpid(), 9)", ["--parallel=fsdp"], "Signal 9 (SIGKILL)"),
        ("time.sleep(15)", ["--dist_timeout=0.1"], "imed out"),
    ],
)
def test_a_process_that_fails_ends_the_others_with_its_reason(
    data_dir: Path, statement: str, words: list[str], message: str
) -> None:
    Path("sabotaged.py").write_text(SABOTAGED % statement)
    result = launch(2, "out", "--gradient_accumulation_steps=2", *words, script=Path("sabotaged.py"))
    assert result.returncode != 0
    assert message in result.stderr, result.stderr
    assert "Root Cause" in result.stderr
    if "raise" in statement:  # torchrun shows the traceback of the process that failed first
        assert message in result.stderr.split("Root Cause")[1]


def test_with_restarts_a_killed_process_leaves_no_trace(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--checkpoint_interval=1", "--parallel=fsdp", "--resume=auto"]
    alone("one", *words)
    Path("sabotaged.py").write_text(SABOTAGED % "os.kill(os.getpid(), 9)")
    result = launch(2, "out", *words, script=Path("sabotaged.py"), restarts=2)
    assert result.returncode == 0, result.stderr
    assert "resuming out/ckpt.dcp/" in result.stdout
    assert_same_run("one", "out")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_killed_at_random_moments_leave_no_trace(data_dir: Path, parallel: str) -> None:
    words = ["--gradient_accumulation_steps=4", "--max_iters=1500", "--eval_interval=500", "--checkpoint_interval=40",
             "--log_interval=10", "--learning_rate=1e-3", "--dropout=0.1", f"--parallel={parallel}"]  # fmt: skip
    assert launch(4, "undisturbed", *words).returncode == 0
    random_moments, kills = random.Random(5), 0
    log = open("log.txt", "w", encoding="utf-8")
    line = command(4, "killed", *words, "--resume=auto", restarts=50)
    process = subprocess.Popen(line, stdout=log, stderr=log, text=True)
    while process.poll() is None and kills < 5:
        time.sleep(random_moments.uniform(2, 8))
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
        if pids := listed.stdout.split():
            os.kill(int(random_moments.choice(pids)), signal.SIGKILL)
            kills += 1
    assert process.wait(240) == 0, Path("log.txt").read_text()[-5000:]
    assert kills >= 3
    a, b = (load_checkpoint(checkpoints_of(name)[0]).weights for name in ("undisturbed", "killed"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    c, d = ([{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}
             for row in read_metrics(Path(name, "metrics.jsonl"))] for name in ("undisturbed", "killed"))  # fmt: skip
    assert c == d


def test_a_stop_signal_to_one_process_saves_and_the_run_resumes(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--eval_interval=100000", "--log_interval=50"]
    process = subprocess.Popen(command(2, "two", *words, "--max_iters=100000"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("iter 50:"):
        assert process.poll() is None
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(listed.stdout.split()[-1]), signal.SIGTERM)
    out = process.stdout.read()
    process.wait(timeout=60)
    stopped = int(re.findall(r"stopped after (\d+) steps", out)[0])
    assert load_checkpoint(Path("two", "ckpt.pt")).state.step == stopped
    result = launch(2, "two", *words, f"--max_iters={stopped + 5}", "--init_from=resume")
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(Path("two", "ckpt.pt")).state.step == stopped + 5


def test_the_rows_of_a_process_are_its_consecutive_part() -> None:
    assert [list(Distributed(rank, rank, 4).my_rows(2, 4)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [len(Distributed(rank, rank, 4).my_rows(12, 1)) for rank in range(4)] == [3] * 4


@pytest.mark.parametrize(("batch_size", "accumulation", "size", "advice"), [(6, 1, 4, 2), (12, 5, 8, 4), (1, 1, 3, 3)])
def test_rows_that_cannot_be_shared_come_with_a_number_that_can(
    batch_size: int, accumulation: int, size: int, advice: int
) -> None:
    with pytest.raises(
        ConfigError, match=f"divided evenly among {size} processes; --gradient_accumulation_steps={advice} "
    ):
        Distributed(0, 0, size).my_rows(batch_size, accumulation)
    Distributed(0, 0, size).my_rows(batch_size, advice)


def test_fsdp_is_taken_where_ddp_does_not_fit_or_is_asked_for() -> None:
    assert choose_parallel("auto", 7 * 10**9, 80e9, torch.bfloat16) == "fsdp"
    assert choose_parallel("auto", 7 * 10**9, 80e9, torch.float16) == "ddp"  # for FSDP has no loss scale
    assert choose_parallel("auto", 7 * 10**9, 0, torch.bfloat16) == "ddp"  # on CPUs
    assert choose_parallel("auto", 124 * 10**6, 80e9, torch.bfloat16) == "ddp"
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ConfigError, match="not in float16"):
        parallelize(
            model, TrainConfig(parallel="fsdp"), Device("cpu", "cpu", torch.float16, False), Distributed(0, 0, 8)
        )
