"""Several processes on one machine, started as a person does, equal one process; and what they say when they part."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from nanogpt import checkpoint, sharded
from nanogpt.config import TrainConfig
from nanogpt.device import Device
from nanogpt.distributed import World, choose_parallel
from nanogpt.errors import CheckpointError, ConfigError
from nanogpt.report.metrics import read_metrics
from nanogpt.settings import parse
from nanogpt.train import train
from tests.conftest import ROOT
from tests.test_cli import TINY

Recipe = Callable[..., TrainConfig]
COMMON = ["--max_iters=6", "--eval_interval=3", "--eval_iters=3", "--learning_rate=1e-2", "--warmup_iters=2"]
COMPARED = ("train/loss", "val/loss", "train/eval_loss", "grad_norm", "health/update_ratio")

# what a process does to itself at step 4; %s: a statement
SABOTAGED = """
import os, signal, sys, time
from nanogpt import cli, train
real = train.update
def update(run, *arguments):
    if run.world.rank == 1 and run.progress.step == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        %s
    return real(run, *arguments)
train.update = update
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
    """The same values at every step that both have recorded, the same end."""
    a, b = ({(row["step"], key): row[key] for row in read_metrics(Path(name, "metrics.jsonl")) for key in COMPARED
             if key in row} for name in (one, two))  # fmt: skip
    assert len(a.keys() & b.keys()) > 8
    for place in a.keys() & b.keys():
        assert a[place] == pytest.approx(b[place], abs=1e-5), place
    c, d = (checkpoint.load(Path(name, "ckpt.pt")) for name in (one, two))
    assert c.progress.step == d.progress.step
    assert c.weights.keys() == d.weights.keys()
    assert c.optimizer
    assert d.optimizer
    for name, tensor in c.weights.items():
        torch.testing.assert_close(tensor, d.weights[name], atol=1e-4, rtol=1e-4)
    for number, state in c.optimizer["state"].items():
        torch.testing.assert_close(state, d.optimizer["state"][number], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (2, ["--gradient_accumulation_steps=4", "--batch_size=3", "--optimizer=muon"]),
        pytest.param(4, ["--gradient_accumulation_steps=1", "--batch_size=12", "--mask_documents=False",
                         "--parallel=ddp"], marks=pytest.mark.slow),
        (4, ["--gradient_accumulation_steps=5", "--batch_size=4", "--parallel=fsdp", "--sampling=epoch",
             "--optimizer=muon", "--zero_init"]),
        pytest.param(2, ["--gradient_accumulation_steps=1", "--batch_size=6", "--parallel=fsdp", "--health_interval=2",
                         "--gradient_checkpointing", "--architecture=qwen3", "--tied_head=False"],
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_several_processes_equal_one(data_dir: Path, processes: int, words: list[str]) -> None:
    alone("one", *words)
    result = launch(processes, "several", *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("iter 0: ") == 1  # one process speaks
    for rank in range(1, processes):  # each keeps a log
        assert Path(f"several/logs/rank-{rank}.log").read_text().count("iter 5: ") == 1
    assert_same_run("one", "several")


def test_a_run_goes_on_at_any_number_of_processes(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--batch_size=6", "--max_iters=9"]
    alone("one", *words)
    alone("moved", *words, "--max_iters=2")
    result = launch(2, "moved", *words, "--max_iters=4", "--init_from=resume", "--parallel=fsdp")  # from one file
    assert result.returncode == 0, result.stderr
    assert [path.name for path in sharded.finished(Path("moved"))] == ["4", "3"]  # ckpt.pt, too, is of step 4
    Path("moved/ckpt.pt").unlink()  # the shares alone are enough
    result = launch(4, "moved", *words, "--max_iters=6", "--resume=auto")
    assert result.returncode == 0, result.stderr
    assert "4 processes, fsdp" in result.stdout  # as it was
    Path("moved/ckpt.pt").unlink()
    result = launch(2, "moved", *words, "--max_iters=7", "--resume=auto", "--parallel=ddp")
    assert result.returncode == 0, result.stderr
    alone("moved", *words, "--init_from=resume")
    assert_same_run("one", "moved")
    assert len(checkpoint.kept("moved")) == 2
    assert checkpoint.kept("moved")[0].name == "ckpt.pt"


def test_damaged_shares_are_passed_over_and_run_no_code(data_dir: Path) -> None:
    words = ["--gradient_accumulation_steps=2", "--parallel=fsdp", "--keep_checkpoints=3"]
    assert launch(2, "out", *words).returncode == 0
    Path("out/ckpt.pt").unlink()
    newest, older = checkpoint.kept("out")
    assert (newest, older) == (Path("out/ckpt.dcp/6"), Path("out/ckpt.dcp/3"))
    file = newest / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ckpt.dcp/6 is damaged: checksum of .* is wrong"):
        checkpoint.load(newest)
    result = launch(2, "out", *words, "--resume=auto")
    assert result.returncode == 0, result.stderr
    assert "going on from 3, the one before it" in result.stderr
    assert Path("out/ckpt.dcp/6.damaged").is_dir()
    assert checkpoint.load(Path("out/ckpt.dcp/6")).progress.step == 6
    file.write_bytes(content)
    newest.joinpath(".metadata").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(CheckpointError, match="has no place in a checkpoint"):
        checkpoint.load(newest)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--batch_size=3", "makes 3 rows, which can't be shared by 2 processes; --gradient_accumulation_steps=2 or"),
        ("--backend=nccl", "--backend=nccl connects CUDA GPUs, but this run computes on cpu"),
        ("--dataset=nowhere", "nanogpt prepare nowhere --input=PATH"),
        ("--init_from=resume", "there is no folder two"),
    ],
)
def test_what_cannot_work_is_refused_by_all_alike(data_dir: Path, word: str, message: str) -> None:
    result = launch(2, "two", "--gradient_accumulation_steps=1", word)
    assert result.returncode != 0
    assert message in result.stderr
    ours = result.stderr.split("torch/distributed/run.py")[0]  # what torchrun adds is its own traceback
    assert "Traceback" not in ours.split("elastic")[0]
    assert not Path("two").exists()


def test_processes_that_were_started_differently_are_refused(data_dir: Path) -> None:
    script = Path("differs.py")
    script.write_text(
        "import os\nfrom nanogpt import cli\n"
        f"words = {[*TINY, '--out_dir=two', '--batch_size=4', '--dist_timeout=0.2']}\n"
        "cli.run('train', words + ['--seed=1', '--resume=auto'] * int(os.environ['RANK']))\n"
    )
    result = launch(2, "two", script=script)
    assert result.returncode != 0
    for difference in ("seed is 1 in process 1, 1337 in", "resume is 'auto' in process 1, 'never' in"):
        assert difference in result.stderr.split("the processes do not agree: ")[1].split("; start all with")[0]
    assert not Path("two").exists()


@pytest.mark.parametrize(
    ("statement", "words", "messages"),
    [
        ("raise ArithmeticError('what happened')", [], ["ArithmeticError: what happened", "process 0 of 2, after 4"]),
        ("os.kill(os.getpid(), 9)", ["--parallel=fsdp"], ["process 0 of 2, after 4 updates: another process is gone"]),
        ("time.sleep(15)", ["--dist_timeout=0.1"], ["process 0 of 2, after 4 updates: waited 0.1 minutes for the "
         "others (--dist_timeout); no word from process 1"]),
    ],
)  # fmt: skip
def test_a_process_that_fails_ends_the_others_with_its_reason(
    data_dir: Path, statement: str, words: list[str], messages: list[str]
) -> None:
    Path("sabotaged.py").write_text(SABOTAGED % statement)
    result = launch(2, "out", "--gradient_accumulation_steps=2", *words, script=Path("sabotaged.py"))
    assert result.returncode != 0
    for message in messages:
        assert message in result.stderr, result.stderr
    assert "Root Cause" in result.stderr
    if "raise" in statement:
        assert "ArithmeticError" in result.stderr.split("Root Cause")[1]


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
    a, b = (checkpoint.load(Path(name, "ckpt.pt")) for name in ("undisturbed", "killed"))
    assert all(torch.equal(tensor, b.weights[name]) for name, tensor in a.weights.items())
    c, d = (read_metrics(Path(name, "metrics.jsonl")) for name in ("undisturbed", "killed"))
    measured = ("seconds", "tokens_per_second")
    assert [{k: v for k, v in row.items() if k not in measured} for row in c] == [
        {k: v for k, v in row.items() if k not in measured} for row in d
    ]
    print(f"{kills} kills, {Path('log.txt').read_text().count('resuming killed/')} times resumed")


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
    result = launch(2, "two", *words, f"--max_iters={stopped + 5}", "--init_from=resume")
    assert result.returncode == 0, result.stderr
    assert checkpoint.load(Path("two", "ckpt.pt")).progress.step == stopped + 5


def test_the_others_wait_for_what_the_main_process_does_alone() -> None:
    store, done = HashStore(), []
    worlds = [World(rank, rank, 2, store) for rank in range(2)]
    other = threading.Thread(target=worlds[1].after_main, args=[lambda: done.append("by the other")])
    other.start()
    with pytest.raises(ArithmeticError):
        worlds[0].after_main(lambda: done.append(f"while it waits: {other.is_alive()}") or 1 / 0)  # type: ignore[func-returns-value]
    other.join(60)
    assert not other.is_alive()  # and will see at the next barrier that the main one has failed
    assert done == ["while it waits: True"]


def test_one_gpu_for_several_processes_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--device=cuda:0 is one GPU for all; with --device=cuda each process takes"):
        train(recipe(device="cuda:0"))


def test_the_choice_between_ddp_and_fsdp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, world = Device("cuda:0", "cuda", torch.bfloat16, False), World(0, 0, 8)
    monkeypatch.setattr(Device, "total_memory", lambda _: 80 * 10**9)
    assert choose_parallel("auto", 2 * 10**9, gpu, world) == "ddp"
    assert choose_parallel("auto", 7 * 10**9, gpu, world) == "fsdp"
    assert "112.0 GB of weights, gradients and averages do not fit" in capsys.readouterr().out
    assert choose_parallel("fsdp", 10**6, gpu, World()) == "none"
    with pytest.raises(ConfigError, match="not in float16"):
        choose_parallel("fsdp", 10**6, Device("cuda:0", "cuda", torch.float16, False), world)
