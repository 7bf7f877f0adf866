from typing import Any

import pytest
import torch

from nanogpt import device
from nanogpt.config import TrainConfig
from nanogpt.device import choose
from nanogpt.errors import ConfigError


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)  # set_device itself checks
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_cpu_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = choose("auto", "auto", "auto")
    assert (chosen.name, chosen.type, chosen.compile, chosen.peak_flops()) == ("cpu", "cpu", False, None)
    assert capsys.readouterr().out.startswith("device cpu (auto: no GPU here), dtype ")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("has_amx", [True, False])
def test_bfloat16_on_a_cpu_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, has_amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # which is not enough
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert choose("cpu", "auto", "auto").dtype == (torch.bfloat16 if has_amx else torch.float32)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_cuda_is_preferred_compiled_and_never_emulates(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "NVIDIA A100-SXM4-80GB")
    for name, local_rank, expected in (("auto", None, "cuda:1"), ("cuda", None, "cuda:1"), ("auto", 0, "cuda:0")):
        chosen = choose(name, "auto", "auto", local_rank)
        assert (chosen.name, chosen.dtype, chosen.compile, chosen.peak_flops()) == (expected, dtype, True, 312e12)


@pytest.mark.usefixtures("cuda")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="this machine has cuda:0 to cuda:1"):
        choose("cuda:2", "auto", "auto")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("name", "message"), [("cuda", "finds no CUDA GPU"), ("mps", "no Apple GPU")])
def test_an_impossible_device_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(name, "auto", "auto")


def test_mps_computes_in_float32_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    chosen = choose("auto", "auto", "auto")
    assert (chosen.name, chosen.dtype, chosen.compile) == ("mps", torch.float32, False)
    with pytest.raises(ConfigError, match="float16 is not supported on mps"):
        choose("auto", "float16", "auto")


def test_known_gpus_have_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = device.Device("cuda", "cuda", torch.bfloat16, True)
    for name, peak in [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("Tesla K80", None),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert chosen.peak_flops() == peak


@pytest.mark.parametrize(
    ("settings", "compiler", "expected"),
    [
        ({"architecture": "qwen3"}, "/usr/bin/g++", "True (auto: takes about 20 s, and saves"),
        ({"architecture": "qwen3"}, None, "False (auto: there is no C++ compiler"),
        (
            {"architecture": "qwen3", "max_iters": 1, "gradient_accumulation_steps": 1},
            "/usr/bin/g++",
            "False (auto: takes about 20 s, and would save 3",
        ),
        ({}, "/usr/bin/g++", "False (auto: makes GPT-2 no faster"),
        ({"compile": True}, None, "True (as set)"),
    ],
)
def test_a_cpu_compiles_what_pays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any], compiler: str | None, expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("nanogpt.device.shutil.which", lambda _: compiler)
    config = TrainConfig(**settings)
    chosen = choose("cpu", "float32", config.compile, training=config)
    assert chosen.compile == expected.startswith("True")
    assert f"compile {expected}" in capsys.readouterr().out


def test_only_who_sets_malloc_keeps_its_habits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    library = type("Library", (), {"mallopt": staticmethod(lambda *arguments: calls.append(arguments))})
    monkeypatch.setattr("nanogpt.device.ctypes.CDLL", lambda _: library)
    monkeypatch.setattr("nanogpt.device.sys.platform", "linux")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    choose("cpu", "float32", False)
    assert calls == []
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    choose("cpu", "float32", False)
    assert calls == [(-4, 0), (-1, -1)]
