"""Which device, number format and compiler are chosen on which hardware."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanogpt.config import Machine, TrainConfig
from nanogpt.device import Device, choose_device
from nanogpt.errors import ConfigError
from nanogpt.metrics import show_log_lines

Pretend = Callable[..., None]
QWEN3: Any = {"architecture": "qwen3"}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """`pretend("cuda")`: a machine with two GPUs; or with Metal, or neither."""

    def change(kind: str, capability: tuple[int, int] = (9, 0), gpus: int = 2, has_amx: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "NVIDIA A100-SXM4-80GB")
        monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)  # set_device itself checks
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
        # AVX-512's bfloat16 alone is not fast enough.
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": has_amx, "avx512_bf16": True})

    return change


def test_without_a_gpu_the_cpu_is_taken_and_named(pretend: Pretend, capsys: pytest.CaptureFixture[str]) -> None:
    show_log_lines()
    for has_amx, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        pretend("cpu", has_amx=has_amx)
        chosen = choose_device(TrainConfig())
        assert (chosen.name, chosen.type, chosen.dtype, chosen.peak_flops()) == ("cpu", "cpu", dtype, None)
        assert capsys.readouterr().out.startswith("device cpu, dtype ")
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ConfigError, match=f"--device={name}, but torch"):
            choose_device(Machine(device=name))


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_cuda_is_preferred_and_never_emulates(
    pretend: Pretend, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    pretend("cuda", capability)
    for local_rank, expected in ((None, "cuda:0"), (1, "cuda:1")):
        chosen = choose_device(TrainConfig(), local_rank)
        assert (chosen.name, chosen.dtype, chosen.peak_flops()) == (expected, dtype, 312e12)
    pretend("cuda", gpus=1)  # a launcher may show each process one GPU
    assert choose_device(Machine(), local_rank=3).name == "cuda:0"


def test_mps_computes_in_float32_unless_asked(pretend: Pretend) -> None:
    pretend("mps")
    chosen = choose_device(TrainConfig())
    assert (chosen.name, chosen.dtype, chosen.compile) == ("mps", torch.float32, False)
    with pytest.raises(ConfigError, match="float16 is not supported on mps"):
        choose_device(Machine(dtype="float16"))


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L40", None)]
)
def test_known_gpus_have_a_peak(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert Device("cuda", "cuda", torch.bfloat16, True).peak_flops() == peak


@pytest.mark.parametrize(
    ("kind", "settings", "compiler", "has_triton", "expected"),
    [
        ("cpu", QWEN3, "g++", False, True),
        ("cpu", QWEN3, None, False, False),
        ("cpu", {**QWEN3, "max_iters": 1, "gradient_accumulation_steps": 1}, "g++", False, False),
        ("cpu", {}, "g++", False, False),  # GPT-2 gains nothing
        ("cpu", {"compile": True}, None, False, True),
        ("cuda", {}, "gcc", True, True),
        ("cuda", {}, None, True, False),
        ("cuda", {}, "gcc", False, False),
        ("cuda", {"max_iters": 10}, "gcc", True, False),
    ],
)
def test_compiled_is_where_it_pays_and_can_be(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, kind: str, settings: Any, compiler: str | None,
    has_triton: bool, expected: bool,
) -> None:  # fmt: skip
    pretend(kind)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("nanogpt.device.find_spec", lambda _: has_triton or None)
    monkeypatch.setattr("nanogpt.device.shutil.which", lambda _: compiler)
    monkeypatch.setattr("nanogpt.device.Path.exists", lambda _: True)
    assert choose_device(TrainConfig(**settings)).compile == expected
