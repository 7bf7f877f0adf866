"""Which device, number format and compiler are chosen on which hardware."""

from typing import Any

import pytest
import torch

from nanogpt.config import Machine, TrainConfig
from nanogpt.device import Device, choose_device
from nanogpt.errors import ConfigError
from nanogpt.metrics import show_log_lines


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)  # set_device itself checks
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_cpu_is_taken_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    show_log_lines()
    chosen = choose_device(TrainConfig())
    assert (chosen.name, chosen.type, chosen.compile, chosen.peak_flops()) == ("cpu", "cpu", False, None)
    assert capsys.readouterr().out.startswith("device cpu, dtype ")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("has_amx", [True, False])
def test_bfloat16_on_a_cpu_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, has_amx: bool) -> None:
    capabilities = {"amx_tile": has_amx, "avx512_bf16": True}  # the latter is not enough
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_device(Machine()).dtype == (torch.bfloat16 if has_amx else torch.float32)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_cuda_is_preferred_and_never_emulates(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "NVIDIA A100-SXM4-80GB")
    for local_rank, expected in ((None, "cuda:0"), (1, "cuda:1")):
        chosen = choose_device(TrainConfig(), local_rank)
        assert (chosen.name, chosen.dtype, chosen.peak_flops()) == (expected, dtype, 312e12)


@pytest.mark.usefixtures("cuda")
def test_a_launcher_may_show_each_process_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device(Machine(), local_rank=3).name == "cuda:0"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_an_impossible_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device={name}, but torch"):
        choose_device(Machine(device=name))


def test_mps_computes_in_float32_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    chosen = choose_device(TrainConfig())
    assert (chosen.name, chosen.dtype, chosen.compile) == ("mps", torch.float32, False)
    with pytest.raises(ConfigError, match="float16 is not supported on mps"):
        choose_device(Machine(dtype="float16"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA GB200", 2500e12),
        ("Tesla K80", None), ("NVIDIA L40", None),
    ],
)  # fmt: skip
def test_known_gpus_have_a_peak(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert Device("cuda", "cuda", torch.bfloat16, True).peak_flops() == peak


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("settings", "compiler", "expected"),
    [
        ({"architecture": "qwen3"}, "/usr/bin/g++", True),
        ({"architecture": "qwen3"}, None, False),
        ({"architecture": "qwen3", "max_iters": 1, "gradient_accumulation_steps": 1}, "/usr/bin/g++", False),
        ({"architecture": "qwen3", "eval_only": True}, "/usr/bin/g++", False),
        ({}, "/usr/bin/g++", False),  # GPT-2 gains nothing
        ({"compile": True}, None, True),
    ],
)
def test_a_cpu_compiles_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], compiler: str | None, expected: bool
) -> None:
    monkeypatch.setattr("nanogpt.device.shutil.which", lambda _: compiler)
    assert choose_device(TrainConfig(**settings)).compile == expected


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("max_iters", "has_triton", "compiler", "expected"),
    [
        (600_000, True, "gcc", True),
        (600_000, True, None, False),
        (600_000, False, "gcc", False),
        (10, True, "gcc", False),
    ],
)
def test_cuda_compiles_long_runs_where_triton_can(
    monkeypatch: pytest.MonkeyPatch, max_iters: int, has_triton: bool, compiler: str | None, expected: bool
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("nanogpt.device.find_spec", lambda _: has_triton or None)
    monkeypatch.setattr("nanogpt.device.shutil.which", lambda _: compiler)
    monkeypatch.setattr("nanogpt.device.Path.exists", lambda _: True)
    assert choose_device(TrainConfig(max_iters=max_iters)).compile == expected
