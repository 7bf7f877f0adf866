"""Which device, number format and compiler to compute with, and how fast the hardware could go."""

import contextlib
import ctypes
import inspect
import logging
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.config import Machine, TrainConfig
from nanogpt.errors import ConfigError

log = logging.getLogger(__name__)

# Dense bfloat16/float16 peak in TFLOP/s and GB of memory, from the vendors' data sheets; the first match counts.
GPUS = {
    "GB300": (2500, 279), "B300": (2250, 270), "GB200": (2500, 186), "B200": (2250, 180), "GH200": (989, 96),
    "H200": (989, 141), "H100 PCIe": (756, 80), "H100 NVL": (835, 94), "H100": (989, 80), "H20": (148, 96),
    "A100": (312, 80), "L40S": (362, 48), "L4": (121, 24), "A40": (150, 48), "A10G": (70, 24), "A10": (125, 24),
    "RTX PRO 6000": (504, 96), "RTX 5090": (210, 32), "RTX 4090": (165, 24), "RTX 3090": (71, 24), "V100": (125, 32),
    "T4": (65, 16),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A resolved choice: what `auto` stood for."""

    name: str  # as torch.device takes it: cpu, mps, cuda:0, cuda:1
    type: str  # cpu, mps or cuda
    dtype: torch.dtype  # of the matmuls
    compile: bool

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which matmuls compute in `dtype`."""
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.type, self.dtype)

    def put(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on this device; on CUDA without waiting for the copy."""
        if self.type == "cuda":
            return tensor.contiguous().pin_memory().to(self.name, non_blocking=True)
        return tensor.to(self.name)

    def synchronize(self) -> None:
        """Wait until everything queued has been computed, so that a clock means something."""
        if self.type != "cpu":
            torch.accelerator.synchronize(self.name)

    def peak_memory(self) -> int:
        """Return the most bytes ever in use: of the GPU's memory on CUDA, of the whole process elsewhere."""
        if self.type == "cuda":
            return torch.cuda.max_memory_allocated(self.name)
        import resource  # Windows has none

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def total_memory(self) -> int:
        """Return the bytes that a CUDA GPU has; 0 elsewhere."""
        return torch.cuda.get_device_properties(self.name).total_memory if self.type == "cuda" else 0

    def peak_flops(self) -> float | None:
        """Return the FLOP/s that the data sheet promises for 16-bit matmuls; None where not known."""
        if self.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.name)
        return next((peak * 1e12 for key, (peak, _) in GPUS.items() if re.search(rf"\b{key}\b", name)), None)


def choose_device(config: Machine, local_rank: int | None = None) -> Device:
    """Resolve the settings `device`, `dtype` and `compile`, and log the choice.

    local_rank: the number of this process on its machine where there are several; each takes its own GPU.
    Raises `ConfigError` for a device that is not here.
    """
    kind, _, index = config.device.partition(":")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(kind for kind in available if available[kind])
    if not available[kind]:
        raise ConfigError(f"--device={config.device}, but torch {torch.__version__} finds none here; use --device=cpu")
    name = kind
    if kind == "cuda":
        count = torch.cuda.device_count()
        if local_rank is not None and count > 1 and (index or local_rank >= count):
            raise ConfigError(f"--device={config.device}, {count} GPUs: each process needs its own; use --device=cuda")
        name = f"cuda:{index or (local_rank or 0) % count}"
        torch.cuda.set_device(name)
        torch.set_float32_matmul_precision("high")  # TF32 where a matmul stays in float32
    elif kind == "cpu":
        keep_freed_memory()
    # 16 bits where the hardware gains by it: on CPUs with AMX, and on AMD's from Zen 4 on, where a step of GPT-2 124M
    # takes 2.4 s in place of 4.7. Elsewhere bfloat16 is emulated, or as fast as float32.
    fast = torch.float16 if kind == "cuda" and torch.cuda.get_device_capability(name) < (8, 0) else torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_zen4 = capabilities.get("avx512_bf16") and "AMD" in capabilities.get("cpu_name", "")
    has_fast = kind == "cuda" or (kind == "cpu" and (capabilities.get("amx_tile") or is_zen4))
    chosen = getattr(torch, config.dtype) if config.dtype != "auto" else fast if has_fast else torch.float32
    if kind == "mps" and chosen == torch.float16:
        raise ConfigError("--dtype=float16 is not supported on mps; use float32 or bfloat16")
    compiled = getattr(config, "compile", False)
    if compiled == "auto":
        compiled = isinstance(config, TrainConfig) and compiling_pays(kind, config)
    if not local_rank:
        log.info(f"device {name}, dtype {str(chosen).removeprefix('torch.')}, compile {compiled}")
    return Device(name, kind, chosen, compiled)


def compiling_pays(kind: str, training: TrainConfig) -> bool:
    """Return whether torch.compile, which takes 20 s on a CPU and 60 s on CUDA, will save twice that in this run."""
    if kind == "mps" or training.eval_only:
        return False
    # Seconds are saved per value of a layer's output: measured on a CPU, estimated from the memory traffic on an H100.
    values = training.max_iters * training.global_batch_size * training.block_size * training.n_layer * training.n_embd
    if kind == "cpu":
        # GPT-2 gains nothing; the small operations of rotary positions, RMSNorm and SwiGLU do.
        can_gain = training.architecture != "gpt2" and shutil.which(os.environ.get("CXX", "g++"))
        return bool(can_gain) and values * 26e-9 > 2 * 20
    # Triton needs a C compiler and Python's headers, which small container images lack.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return bool(find_spec("triton") and compiler and header.exists()) and values * 1.2e-10 > 2 * 60


def without_compiler(kind: type[torch.optim.Optimizer]) -> Any:
    """Return a class of optimizers without the decorators that import torch.compile only to be left out of it.

    The import takes 1.0 of the 2.6 s in which a run starts, saves and ends on two cores.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, which it would return and fetch again page by page in every step.

    A step of GPT-2 124M on two cores takes 1,240 ms with this and 2,100 ms without; the small shape 19.2 and 21.5.
    Set one of malloc's own variables (MALLOC_TRIM_THRESHOLD_, ...) to keep its usual behaviour.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
