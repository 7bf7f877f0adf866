"""Which device and number format to compute with, and how fast the hardware could go."""

import contextlib
import ctypes
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanogpt.config import TrainConfig
from nanogpt.errors import ConfigError

log = logging.getLogger(__name__)

# dense bfloat16/float16 tensor-core peak in FLOP/s, from the vendors' data sheets; the first match counts
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10G": 70e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}

_SECONDS_OF_COMPILING = {"cpu": 20, "cuda": 60}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Device:
    """A resolved choice: what `auto` stood for."""

    name: str  # as torch.device takes it: cpu, mps, cuda:0, cuda:1
    type: str  # cpu, mps or cuda
    dtype: torch.dtype  # of the matrix products
    compile: bool

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.type, self.dtype)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in memory that a GPU copies from without waiting; on other devices itself."""
        return tensor.pin_memory() if self.type == "cuda" else tensor

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on this device, without waiting for the copy where that is possible."""
        if self.type == "cuda":
            return self.pin(tensor).to(self.name, non_blocking=True)
        return tensor.to(self.name)

    def synchronize(self) -> None:
        """Wait until everything asked for has been computed, so that a clock means something."""
        if self.type == "cuda":
            torch.cuda.synchronize(self.name)
        elif self.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> int:
        """Most bytes ever in use: of the GPU's memory on CUDA, of the whole process elsewhere."""
        if self.type == "cuda":
            return torch.cuda.max_memory_allocated(self.name)
        if sys.platform == "win32":
            return 0  # Windows keeps no such count
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def vitals(self) -> dict[str, float]:
        """Memory in use, and of a GPU how busy it is and what it draws, as far as that can be read."""
        values = {"system/memory_gb": self.peak_memory() / 1e9}
        if self.type == "cuda":
            with contextlib.suppress(Exception):  # without the package nvidia-ml-py, or the right to ask
                values["system/gpu_utilization"] = torch.cuda.utilization(self.name) / 100
                values["system/gpu_watts"] = torch.cuda.power_draw(self.name) / 1000
        return values

    def total_memory(self) -> int:
        """Bytes that a CUDA GPU has; 0 elsewhere."""
        return torch.cuda.get_device_properties(self.name).total_memory if self.type == "cuda" else 0

    def peak_flops(self) -> float | None:
        """FLOP/s that the data sheet promises for matrix products in 16 bits; None where not known."""
        if self.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.name)
        if "Laptop" in name:  # slower than the card of the same name
            return None
        return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)

    def measured_flops(self, n: int = 2048) -> float:
        """FLOP/s of a product of n x n matrices in `dtype`, the best of five."""
        a = torch.randn(n, n, device=self.name).to(self.dtype)
        return 2 * n**3 / min(self.time(lambda: a @ a) for _ in range(5))

    def measured_bandwidth(self, n: int = 2**26) -> float:
        """Bytes per second that a copy of n float32 numbers reads and writes, the best of five."""
        a = torch.zeros(n, device=self.name)
        b = torch.zeros_like(a)
        return 8 * n / min(self.time(lambda: b.copy_(a)) for _ in range(5))

    def time(self, function: Callable[[], object]) -> float:
        """Seconds that `function` takes, with all that it has asked a GPU for."""
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began


def choose(
    device: str, dtype: str, compile: bool | str, local_rank: int | None = None, training: TrainConfig | None = None
) -> Device:
    """Resolve the settings `device`, `dtype` and `compile`, print the choice, set up the backend.

    `local_rank` is the number of this process on this machine, where there are several: each takes its own GPU.
    `training`: the run that is to come, if it is one: a short one does not make up for compiling the network.
    Raises `ConfigError` for a device that is not here or a dtype that it can't compute with.
    """
    name, why_device = _choose_name(device)
    if name == "cuda":
        name, _ = _choose_name(f"cuda:{torch.cuda.current_device() if local_rank is None else local_rank}")
    kind = name.split(":")[0]
    number_format, why_dtype = _choose_dtype(kind, name, dtype)
    compiled, why_compile = _choose_compile(kind, compile, training)
    if kind == "cpu":
        _keep_freed_memory()
    if kind == "cuda":
        torch.cuda.set_device(name)
        torch.set_float32_matmul_precision("high")  # TF32 where a product is left in float32
    short = str(number_format).removeprefix("torch.")
    if not local_rank:
        log.info(f"device {name} ({why_device}), dtype {short} ({why_dtype}), compile {compiled} ({why_compile})")
    return Device(name, kind, number_format, compiled)


def _choose_name(device: str) -> tuple[str, str]:
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        if has_cuda:
            return "cuda", "auto: a CUDA GPU is here"
        return ("mps", "auto: an Apple GPU is here") if has_mps else ("cpu", "auto: no GPU here")
    if device.startswith("cuda"):
        if not has_cuda:
            raise ConfigError(
                f"--device={device}, but torch {torch.__version__} finds no CUDA GPU; use --device=cpu, or install "
                "a CUDA build of torch and check that nvidia-smi lists the GPU"
            )
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(f"--device={device}, but this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    if device == "mps" and not has_mps:
        raise ConfigError("--device=mps, but torch finds no Apple GPU here; use --device=cpu")
    return device, "as set"


def _choose_dtype(kind: str, name: str, dtype: str) -> tuple[torch.dtype, str]:
    if kind == "mps" and dtype == "float16":
        raise ConfigError("--dtype=float16 is not supported on mps; use float32 or bfloat16")
    if dtype != "auto":
        asked: torch.dtype = getattr(torch, dtype)
        if asked == torch.bfloat16 and not _has_fast_bfloat16(kind, name):
            return asked, "as set; slower than float32 here"
        return asked, "as set"
    if kind == "mps":
        return torch.float32, "auto: the safe choice on mps"
    if _has_fast_bfloat16(kind, name):
        return torch.bfloat16, "auto: fast here"
    if kind == "cuda":
        return torch.float16, "auto: this GPU has no bfloat16; with a gradient scaler"
    return torch.float32, "auto: this CPU is no faster in bfloat16"


def _has_fast_bfloat16(kind: str, name: str) -> bool:
    """Whether the hardware computes products in bfloat16, and gains by it."""
    if kind == "cuda":
        return torch.cuda.get_device_capability(name) >= (8, 0)
    if kind == "cpu":
        # private, but the only question that torch answers; with AVX512-BF16 alone it is slower than float32
        return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    return True


def _choose_compile(kind: str, compile: bool | str, training: TrainConfig | None) -> tuple[bool, str]:
    if compile != "auto":
        return bool(compile), "as set"
    if kind == "cuda" and training is None:
        return True, "auto: pays on CUDA"
    if training and training.eval_only:
        return False, "auto: nothing is trained"
    if kind == "mps" or training is None:
        return False, "auto: no gain here"
    if kind == "cpu" and training.architecture == "gpt2":
        return False, "auto: makes GPT-2 no faster on a CPU"
    if kind == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return False, "auto: there is no C++ compiler here"
    calls = training.max_iters * training.gradient_accumulation_steps
    # what was measured: the many small operations of rotary positions, RMSNorm and SwiGLU on a CPU; guessed for CUDA
    values = training.batch_size * training.block_size * training.n_layer * training.n_embd
    saved = calls * (values * 26e-9 if kind == "cpu" else 0.03)
    if saved < 2 * _SECONDS_OF_COMPILING[kind]:
        return False, f"auto: takes about {_SECONDS_OF_COMPILING[kind]} s, and would save {saved:.0f}"
    return True, f"auto: takes about {_SECONDS_OF_COMPILING[kind]} s, and saves {saved:,.0f}"


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: it would give large blocks back, and get them again page by page in every update.

    That costs up to 14 % more memory and saves up to 40 % of the time (docs/performance.md). Whoever has set one of
    malloc's own variables (MALLOC_TRIM_THRESHOLD_, …) knows better.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)
