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
from nanogpt.config import PRESETS, GPTConfig
from nanogpt.model import GPT
from nanogpt.plan import largest_batch, memory, plan
from nanogpt.settings import PlanConfig
from tests.conftest import ROOT

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
    ({"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 512, "vocab_size": 4096}, 8),
    ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 1024}, 16),
    ({"n_layer": 4, "n_head": 8, "n_embd": 512, "block_size": 512, "vocab_size": 8192}, 8),
    ({"n_layer": 8, "n_head": 4, "n_embd": 256, "block_size": 1024, "vocab_size": 256}, 8),
    ({"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512, "vocab_size": 50304}, 2),
]


def meta_model(shape: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(shape)


GRID = itertools.product(["gpt2", "llama", "qwen3"], ["float32", "bfloat16"], [False, True], SHAPES[1:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
@pytest.mark.parametrize(
    ("architecture", "dtype", "checkpointing", "shape_and_rows"),
    [("gpt2", "float32", False, SHAPES[0]), *(pytest.param(*each, marks=pytest.mark.slow) for each in GRID)],
)
def test_planned_memory_is_within_15_percent_of_measured(
    architecture: str, dtype: str, checkpointing: bool, shape_and_rows: Any
) -> None:
    shape, rows = {**shape_and_rows[0], "architecture": architecture}, shape_and_rows[1]
    # memory that malloc keeps for later is not needed
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, json.dumps([shape, rows, dtype, checkpointing])]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    how: dict[str, Any] = {"dtype": getattr(torch, dtype), "gradient_checkpointing": checkpointing, "on_cpu": True}
    planned = memory(meta_model(GPTConfig(**shape)), rows, **how)
    assert planned["peak"] == pytest.approx(float(result.stdout.splitlines()[-1]), rel=0.15), planned


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, dict[str, Any]]:
    plan(parse(PlanConfig, list(words), "usage"))
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


def test_the_arithmetic_of_gpt2(capsys: pytest.CaptureFixture[str]) -> None:
    printed, values = planned(capsys, str(ROOT / "config" / "train_gpt2.py"), "--gpu=H100", "--gpus=16")
    assert values["parameters"] == 124_373_760
    assert values["weights_bytes"] == 4 * values["parameters"]
    assert values["optimizer_bytes"] == 8 * values["parameters"]
    assert values["fits"]
    assert values["tokens_per_step"] == 491_520
    # 6 x parameters (without positions) + attention, times tokens, over 16 GPUs at 40 % of 989 TFLOP/s
    flops = (6 * 123_587_328 + 12 * 12 * 768 * 1024) * 491_520
    assert values["seconds_per_step"] == pytest.approx(flops / (16 * 989e12 * 0.4))
    assert "11 h for 600,000 steps" in printed


def test_what_does_not_fit_comes_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    big = ["--model=llama-2-7b", "--batch_size=8", "--block_size=4096", "--gpu=A100", "--gather_once"]
    printed, values = planned(capsys, *big, "--gpus=8")
    assert values["parallel"] == "fsdp"
    assert not values["fits"]
    ways = printed.split("what would: ")[1].splitlines()[0].split("; ")
    assert ways[0].startswith("--gather_once=False --batch_size=")
    for way in ways:
        settings = way.replace(" (and more gradient_accumulation_steps)", "").split()
        assert planned(capsys, *big, "--gpus=8", *settings)[1]["fits"]
    printed, values = planned(capsys, *big, "--gpus=1")
    assert "it does not fit; what would: more GPUs, a smaller model" in printed


def test_muon_keeps_one_moment_per_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "config" / "train_gpt2_fast.py")
    muon = planned(capsys, recipe, "--gpu=H100")[1]
    adamw = planned(capsys, recipe, "--gpu=H100", "--optimizer=adamw")[1]
    in_blocks = muon["parameters"] - 2 * 50304 * 768 - 768
    assert adamw["optimizer_bytes"] - muon["optimizer_bytes"] == 4 * in_blocks


def test_fsdp_shards_the_optimizer_but_not_activations() -> None:
    model = meta_model(GPTConfig(**PRESETS["llama-2-7b"], vocab_size=32000, block_size=4096))
    few, many = ({"dtype": torch.bfloat16, "parallel": "fsdp", "processes": n} for n in (8, 64))
    assert memory(model, 1, **few)["optimizer"] == 8 * memory(model, 1, **many)["optimizer"]
    assert memory(model, 1, **few)["activations"] == memory(model, 1, **many)["activations"]
    largest = largest_batch(model, 73.6e9, 512, **many)
    assert memory(model, largest, **many)["peak"] <= 73.6e9 < memory(model, largest + 1, **many)["peak"]
