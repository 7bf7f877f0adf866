"""Several processes on one machine, started as a person does, equal one process; and what they say when they fail."""

import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
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
from tests.programs import ROOT, Started
from tests.test_cli import TINY

COMMON = ["--max_iters=6", "--eval_interval=3", "--eval_iters=3", "--learning_rate=1e-2", "--warmup_iters=2"]
COMPARED = ("train/loss", "val/loss", "train/eval_loss", "grad_norm")

# What a process does to itself before step 4; %s: a statement.
SABOTAGED = """
import os, signal, sys, time
from nanogpt import cli, data
real = data.get_batch
def get_batch(dataset, step, **settings):
    if os.environ["RANK"] == "1" and step == 4 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        %s
    return real(dataset, step, **settings)
data.get_batch = get_batch
cli.run("train")
"""


def torchrun(processes: int, out_dir: str, *words: str, script: Path = ROOT / "train.py", restarts: int = 0) -> Started:
    launcher = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={restarts}", str(script)]
    return Started(["-m", "torch.distributed.run", *launcher, *TINY, *COMMON, f"--out_dir={out_dir}", *words])


def ranks(
    processes: int, out_dir: str, *words: str, script: Path = ROOT / "train.py", of_last: Sequence[str] = ()
) -> list[Started]:
    """Processes that are told by their environment, as by torchrun, which of how many they are."""
    command = [str(script), *TINY, *COMMON, f"--out_dir={out_dir}", *words]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    started = []
    for rank in range(processes):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), **meeting}
        extra = of_last if rank == processes - 1 else ()
        started.append(Started([*command, *extra], **environment))
    return started


def output_of(started: list[Started], code: int = 0) -> str:
    """What the main process has printed, and no other one, once all have ended with this exit code."""
    results = [each.wait() for each in started]
    for result in results:
        assert result.returncode == code, result.stderr
    assert not any(result.stdout for result in results[1:])
    return results[0].stdout


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
        pytest.param(4, ["--gradient_accumulation_steps=1", "--batch_size=12", "--parallel=ddp"],
                     marks=pytest.mark.slow),
        (4, ["--gradient_accumulation_steps=5", "--batch_size=4", "--parallel=fsdp", "--sampling=epoch",
             "--optimizer=muon", "--zero_init", "--gather_once"]),
        pytest.param(2, ["--gradient_accumulation_steps=1", "--batch_size=6", "--parallel=fsdp",
                         "--gradient_checkpointing", "--architecture=qwen3", "--tied_head=False"],
                     marks=pytest.mark.slow),
        (4, ["--gradient_accumulation_steps=4", "--batch_size=3", "--parallel=fsdp", "--shard_group=2",
             "--optimizer=muon"]),
        pytest.param(2, ["--gradient_accumulation_steps=2", "--parallel=fsdp", "--optimizer=sgd"],
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_several_processes_equal_one(data_dir: Path, processes: int, words: list[str]) -> None:
    alone("one", *words)
    output_of(ranks(processes, "several", *words))
    assert_same_run("one", "several")


def test_torchrun_starts_several_processes_that_equal_one(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=4", "--batch_size=3", "--optimizer=muon"]
    alone("one", *words)
    result = torchrun(2, "several", *words).wait()
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("iter 0: ") == 1  # one process prints
    assert_same_run("one", "several")


def test_a_run_resumes_at_any_number_of_processes(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--batch_size=6", "--max_iters=9"]
    alone("one", *words)
    alone("moved", *words, "--max_iters=2")
    output_of(ranks(2, "moved", *words, "--max_iters=4", "--init_from=resume", "--parallel=fsdp"))  # from one file
    assert checkpoints_of("moved")[0] == Path("moved/ckpt.dcp/4")
    shown = output_of(ranks(4, "moved", *words, "--max_iters=6", "--resume=auto"))  # from shards, to more of them
    assert "4 processes, fsdp" in shown
    output_of(ranks(2, "moved", *words, "--max_iters=7", "--resume=auto", "--parallel=ddp"))
    alone("moved", *words, "--init_from=resume")
    assert_same_run("one", "moved")
    assert checkpoints_of("moved")[0].name == "ckpt.pt"


def test_damaged_shards_are_skipped(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--parallel=fsdp", "--keep_checkpoints=3"]
    output_of(ranks(2, "out", *words))
    newest, older = checkpoints_of("out")
    assert (newest, older) == (Path("out/ckpt.dcp/6"), Path("out/ckpt.dcp/3"))
    file = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert "resuming out/ckpt.dcp/3" in output_of(ranks(2, "out", *words, "--resume=auto"))
    assert load_checkpoint(checkpoints_of("out")[0]).state.step == 6


@pytest.mark.parametrize(
    ("words", "of_last", "message"),
    [
        (["--batch_size=3"], [], "rows can't be divided evenly among 2 processes; a multiple of 2"),
        (["--shard_group=3"], [], "shard_group=3: expected a divisor of 2, the number of processes"),
        (["--init_from=resume"], [], "two holds no trained model"),
        ([], ["--seed=1", "--resume=auto"], "seed is 1, not 1337"),
    ],
)
def test_what_cannot_work_is_refused_by_all_alike(
    data_dir: Path, words: list[str], of_last: list[str], message: str
) -> None:
    for result in [each.wait() for each in ranks(2, "two", "--batch_size=4", *words, of_last=of_last)]:
        assert result.returncode == 2
        assert message in result.stderr or (of_last and "what differs here: []" in result.stderr)
    assert not Path("two").exists()


def test_a_process_that_fails_ends_the_others_with_its_reason(data_dir: Path) -> None:
    Path("sabotaged.py").write_text(SABOTAGED % "raise ArithmeticError('what happened')")
    result = torchrun(2, "out", "--gradient_accumulation_steps=2", script=Path("sabotaged.py")).wait()
    assert result.returncode != 0
    # torchrun shows the traceback of the process that failed first.
    assert "ArithmeticError: what happened" in result.stderr.split("Root Cause")[1], result.stderr


def test_a_process_that_hangs_is_waited_for_in_vain(data_dir: Path) -> None:
    Path("sabotaged.py").write_text(SABOTAGED % "time.sleep(12)")
    words = ["--gradient_accumulation_steps=2", "--dist_timeout=0.1"]
    main, _ = [each.wait() for each in ranks(2, "out", *words, script=Path("sabotaged.py"))]
    assert main.returncode != 0
    assert "imed out" in main.stderr


def test_with_restarts_a_killed_process_leaves_no_trace(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--checkpoint_interval=1", "--parallel=fsdp", "--resume=auto"]
    alone("one", *words)
    Path("sabotaged.py").write_text(SABOTAGED % "os.kill(os.getpid(), 9)")
    result = torchrun(2, "out", *words, script=Path("sabotaged.py"), restarts=2).wait()
    assert result.returncode == 0, result.stderr
    assert "resuming out/ckpt.dcp/" in result.stdout
    assert_same_run("one", "out")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_killed_at_random_moments_leave_no_trace(data_dir: Path, parallel: str) -> None:
    words = ["--gradient_accumulation_steps=4", "--max_iters=1500", "--eval_interval=500", "--checkpoint_interval=40",
             "--log_interval=10", "--learning_rate=1e-3", "--dropout=0.1", f"--parallel={parallel}"]  # fmt: skip
    output_of(ranks(4, "undisturbed", *words))
    random_moments, kills = random.Random(5), 0
    started = torchrun(4, "killed", *words, "--resume=auto", restarts=50)
    while started.process.is_alive() and kills < 5:
        time.sleep(random_moments.uniform(2, 8))
        command = ["pgrep", "-P", str(started.process.pid)]
        if pids := subprocess.run(command, capture_output=True, text=True, check=False).stdout.split():
            os.kill(int(random_moments.choice(pids)), signal.SIGKILL)
            kills += 1
    result = started.wait()
    assert result.returncode == 0, result.stderr[-5000:]
    assert kills >= 3
    a, b = (load_checkpoint(checkpoints_of(name)[0]).weights for name in ("undisturbed", "killed"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    c, d = ([{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")}
             for row in read_metrics(Path(name, "metrics.jsonl"))] for name in ("undisturbed", "killed"))  # fmt: skip
    assert c == d


def test_a_stop_signal_to_one_process_saves_and_the_run_resumes(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--eval_interval=100000", "--log_interval=50"]
    started = ranks(2, "two", *words, "--max_iters=100000")
    started[0].wait_for("iter 50:")
    started[1].send(signal.SIGTERM)
    stopped = int(re.findall(r"stopped after (\d+) steps", output_of(started, code=75))[0])
    assert load_checkpoint(Path("two", "ckpt.pt")).state.step == stopped
    output_of(ranks(2, "two", *words, f"--max_iters={stopped + 5}", "--init_from=resume"))
    assert load_checkpoint(Path("two", "ckpt.pt")).state.step == stopped + 5


def test_fsdp_is_taken_where_ddp_does_not_fit_or_is_asked_for() -> None:
    assert choose_parallel("auto", 7 * 10**9, 80e9, torch.bfloat16) == "fsdp"
    assert choose_parallel("auto", 7 * 10**9, 80e9, torch.float16) == "ddp"  # for FSDP has no loss scale
    assert choose_parallel("auto", 7 * 10**9, 0, torch.bfloat16) == "ddp"  # on CPUs
    assert choose_parallel("auto", 124 * 10**6, 80e9, torch.bfloat16) == "ddp"
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    device = Device("cpu", "cpu", torch.float16, compile=False)
    with pytest.raises(ConfigError, match="not in float16"):
        parallelize(model, TrainConfig(parallel="fsdp"), device, Distributed(0, 0, 8))
