"""What a run would need, against what runs have needed."""

import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from nanogpt.cli import parse
from nanogpt.config import GPTConfig
from nanogpt.errors import ConfigError
from nanogpt.plan import largest_batch, memory, plan
from nanogpt.settings import PlanConfig
from tests.conftest import ROOT, Program

# two steps in a process of their own; prints by how much its memory has grown at most
MEASURE = """
import json, os, sys
import torch, torch._dynamo  # which torch's optimizers import, and which counts as no memory of the run
from nanogpt.config import GPTConfig, Machine
from nanogpt.device import choose_device
from nanogpt.model import GPT
shape, rows, dtype, checkpointing = json.loads(sys.argv[1])
torch.set_num_threads(1)
device = choose_device(Machine(device="cpu", dtype=dtype))
a = torch.randn(64, 64, requires_grad=True)
with device.autocast():
    (a @ a).sum().backward()
before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
model = GPT(GPTConfig(**shape))
model.transformer.gradient_checkpointing = checkpointing
optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
for _ in range(2):
    ids = torch.randint(shape["vocab_size"], (rows, shape["block_size"] + 1))
    with device.autocast():
        _, loss = model(ids[:, :-1], ids[:, 1:], return_logits=False)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))  # getrusage counts parents, too
print(int(peak.split()[1]) * 1024 - before)
"""
SHAPES = [
    ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 1024}, 16),
    ({"n_layer": 4, "n_head": 8, "n_embd": 512, "block_size": 512, "vocab_size": 8192}, 8),
    ({"n_layer": 8, "n_head": 4, "n_embd": 256, "block_size": 1024, "vocab_size": 256}, 8),
    ({"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512, "vocab_size": 50304}, 2),
]
TAKES_MINUTES_WITHOUT_BF16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this processor has no bfloat16, and takes minutes to imitate it; the slow grid does",
)


def assert_plan_holds(shape: dict[str, Any], rows: int, dtype: str, checkpointing: bool) -> None:
    # memory that malloc keeps for later is not needed
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, json.dumps([shape, rows, dtype, checkpointing])]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    planned = memory(GPTConfig(**shape), rows, bytes_of_dtype=2 if dtype == "bfloat16" else 4, parallel="none",
                     processes=1, accumulate=False, gradient_checkpointing=checkpointing, on_cpu=True)  # fmt: skip
    assert planned.peak == pytest.approx(float(result.stdout.splitlines()[-1]), rel=0.15), planned


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [("float32", False), pytest.param("bfloat16", True, marks=TAKES_MINUTES_WITHOUT_BF16)]
)
def test_planned_memory_is_within_15_percent_of_measured(dtype: str, checkpointing: bool) -> None:
    shape = {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 512, "vocab_size": 4096}
    assert_plan_holds(shape, 8, dtype, checkpointing)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
@pytest.mark.parametrize(
    ("architecture", "dtype", "checkpointing", "number"),
    list(itertools.product(["gpt2", "llama", "qwen3"], ["float32", "bfloat16"], [False, True], range(len(SHAPES)))),
)
def test_planned_memory_over_a_grid(architecture: str, dtype: str, checkpointing: bool, number: int) -> None:
    shape, rows = SHAPES[number]
    assert_plan_holds({**shape, "architecture": architecture}, rows, dtype, checkpointing)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, dict[str, Any]]:
    plan(parse(PlanConfig, list(words), "usage"))
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


def test_the_arithmetic_of_gpt2(capsys: pytest.CaptureFixture[str]) -> None:
    printed, values = planned(capsys, str(ROOT / "config" / "train_gpt2.py"), "--gpu=H100", "--gpus=16", "--nodes=2")
    assert values["parameters"] == 124_373_760
    assert values["weights_bytes"] == 4 * values["parameters"]
    assert values["optimizer_bytes"] == 8 * values["parameters"]
    assert values["fits"]
    assert values["tokens_per_step"] == 491_520
    # 6 x parameters (without positions) + attention, times tokens, over 16 GPUs at 40 % of 989 TFLOP/s
    flops = (6 * 123_587_328 + 12 * 12 * 768 * 1024) * 491_520
    assert values["seconds_per_step"] == pytest.approx(flops / (16 * 989e12 * 0.4))
    assert "11 h for 600,000 steps" in printed
    assert "5,061 steps" in printed


def test_what_does_not_fit_comes_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    big = ["--model=llama-2-7b", "--batch_size=8", "--block_size=4096", "--gpu=A100"]
    printed, values = planned(capsys, *big, "--gpus=8")
    assert values["parallel"] == "fsdp"
    assert not values["fits"]
    ways = printed.split("what would: ")[1].splitlines()[0].split("; ")
    assert ways[0].startswith("--batch_size=")
    for way in ways:
        settings = way.replace(" (and more gradient_accumulation_steps)", "").split()
        assert planned(capsys, *big, "--gpus=8", *settings)[1]["fits"]
    printed, values = planned(capsys, *big, "--gpus=1")
    assert "it does not fit; what would: more GPUs, a smaller model" in printed


def test_muon_keeps_one_average_per_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "config" / "train_gpt2_fast.py")
    muon, adamw = (
        planned(capsys, recipe, "--gpu=H100", *words)[1]
        for words in ([], ["--optimizer=adamw", "--learning_rate=1e-3"])
    )
    in_blocks = muon["parameters"] - 2 * 50304 * 768 - 768
    assert adamw["optimizer_bytes"] - muon["optimizer_bytes"] == 4 * in_blocks


def test_more_processes_share_what_fsdp_spreads() -> None:
    how: dict[str, Any] = {"bytes_of_dtype": 2, "accumulate": False, "gradient_checkpointing": False}
    shape = GPTConfig.preset("llama-2-7b", vocab_size=32000, block_size=4096)
    needed = [memory(shape, 1, parallel="fsdp", processes=n, **how) for n in (8, 64)]
    assert needed[0].optimizer == 8 * needed[1].optimizer
    assert needed[0].activations == needed[1].activations
    largest = largest_batch(shape, 73.6e9, 512, parallel="fsdp", processes=64, **how)
    assert memory(shape, largest, parallel="fsdp", processes=64, **how).peak <= 73.6e9
    assert memory(shape, largest + 1, parallel="fsdp", processes=64, **how).peak > 73.6e9


def test_this_machine_and_mistakes(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    result = program("nanogpt", "plan", "--n_layer=2", "--n_embd=64", "--n_head=2", "--device=cpu")
    assert result.returncode == 0, result.stderr
    assert "measured now" in result.stdout
    for words, message in [
        (["--gpu=H900"], "known are B200"),
        (["--gpus=3", "--nodes=2"], "expected a multiple of nodes=2"),
        (["--mfu=1.5"], "mfu=1.5"),
    ]:
        with pytest.raises(ConfigError, match=message):
            planned(capsys, *words)
