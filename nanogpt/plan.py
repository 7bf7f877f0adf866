"""Would it fit, and how long would it take? Arithmetic over a config and a description of the machines."""

import bisect
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nanogpt.checkpoint import load_latest, load_model
from nanogpt.config import GPT2_NAMES, GPTConfig
from nanogpt.data import open_if_prepared
from nanogpt.device import PEAK_FLOPS, Device, choose_device
from nanogpt.distributed import Distributed, choose_parallel
from nanogpt.errors import ConfigError
from nanogpt.model import GPT, loss_chunk
from nanogpt.settings import PlanConfig

# GB of memory, from the vendors' data sheets
_MEMORY = {"B200": 180, "GH200": 96, "H200": 141, "H100": 80, "A100": 80, "L40S": 48, "L4": 24, "A40": 48, "A10G": 24,
           "RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24, "V100": 32, "T4": 16}  # fmt: skip
_USABLE = 0.92  # of a GPU's memory: CUDA itself, buffers of nccl, fragments
_KERNELS = 30e6  # bytes that torch itself takes for them
_CHINCHILLA = 20  # tokens per parameter (Hoffmann et al. 2022)


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs per device, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    copies: float  # of weights in 16 bits, or collected from other processes
    activations: float  # kept from the forward to the backward pass
    logits: float  # of a chunk, with their gradients and the head's
    block: float  # what going through one needs
    gradients_stay: bool  # while activations are there

    @property
    def peak(self) -> float:
        """The most at a time: after the forward pass, or when all gradients are there and the activations are gone."""
        after_forward = self.activations + max(self.logits, self.block)
        after_forward += self.gradients if self.gradients_stay else 0
        return self.weights + self.optimizer + self.copies + max(after_forward, self.gradients) + _KERNELS


def memory(shape: GPTConfig, rows: int, *, bytes_of_dtype: int, parallel: str, processes: int, accumulate: bool,
           gradient_checkpointing: bool, on_cpu: bool = False, muon: bool = False,
           float16: bool = False) -> Memory:  # fmt: skip
    """What training needs per device, for micro-batches of `rows` windows.

    parallel: none, ddp or fsdp. `accumulate`: more than one micro-batch per step.
    """
    d, C, F, D, V = bytes_of_dtype, shape.n_embd, shape.n_hidden, shape.head_size, shape.vocab_size
    total, block = _parameters(shape)
    root = total - shape.n_layer * block
    tokens = rows * shape.block_size
    heads = shape.n_head * D

    # what the backward pass of a block needs, per token: the residual stream twice in float32, and in `dtype` the
    # inputs of its products, queries, keys, values (groups are spelled out), what attention gave, the MLP's inside
    inside = 2 * F if shape.is_gpt2 else 4 * F
    per_layer = 8 * C + d * (2 * C + 4 * heads + inside) + 4 * shape.n_head
    if not shape.is_gpt2:
        per_layer += 8 * C  # RMSNorm's quotients
        per_layer += d * 2 * heads  # queries and keys before and after they are turned
    if shape.architecture == "qwen3":  # which normalises them in float32
        per_layer += (8 if d == 2 else 4) * (shape.n_head + shape.n_kv_head) * D
    if on_cpu and d == 2 and shape.block_size <= 512:  # the attention's probabilities are kept
        per_layer += d * shape.n_head * shape.block_size
    if shape.dropout and shape.is_gpt2:
        per_layer += 2 * C * (1 + d)
    kept = 4 * C if gradient_checkpointing else per_layer
    # the gradients in the middle of the MLP and of the residual stream, and what is computed again
    block_memory = d * (2 if shape.is_gpt2 else 5) * F + 12 * C + (per_layer if gradient_checkpointing else 0)

    # logits, their logprobs in float32 and their gradients, all of them or of a chunk, and what a chunk has computed
    chunk = loss_chunk(tokens, V, "cpu" if on_cpu else "cuda", torch.float16 if float16 else torch.bfloat16)
    logits = (4 + d + d % 4) * chunk * V + ((4 + d) * V * C + 4 * tokens * C) * (chunk < tokens)

    share = processes if parallel == "fsdp" else 1
    if parallel == "fsdp":  # two blocks at a time, one of them with its gradient, and always what is outside of blocks
        copies = 2 * d * block + (d + 4) * block + 8 * root
    else:
        copies = 2 * total if d == 2 else 0
    return Memory(
        weights=4 * total / share,
        gradients=4 * total / share,
        optimizer=(8 * total - 4 * muon * shape.n_layer * block) / share,  # Muon keeps one average, AdamW two
        copies=copies,
        activations=tokens * (shape.n_layer * kept + (8 + d) * C),  # blocks; embeddings and the last normalisation
        logits=logits,
        block=tokens * block_memory + 4 * V * C,  # the gradient of the head is there already
        gradients_stay=accumulate or parallel == "ddp",
    )


def largest_batch(shape: GPTConfig, available: float, rows: int, **how: Any) -> int:
    """Rows of the largest micro-batch that fits into `available` bytes, up to `rows`; 0 if none does."""
    return bisect.bisect_left(range(1, rows + 1), True, key=lambda n: memory(shape, n, **how).peak > available)


def plan(config: PlanConfig) -> None:
    """The program behind `nanogpt plan`: parameters, memory, time, and what to change; then one line of JSON."""
    shape = _shape_to_train(config)
    parameters = _parameters(shape)[0]
    machine = _machine(config)
    share = len(Distributed(world_size=config.gpus).my_rows(config.batch_size, config.gradient_accumulation_steps))
    rows = min(config.batch_size, share)
    dtype = torch.float16 if config.dtype == "float16" else torch.bfloat16
    parallel = choose_parallel(config.parallel, parameters, machine.memory, dtype) if config.gpus > 1 else "none"
    how: dict[str, Any] = {"bytes_of_dtype": machine.bytes_of_dtype, "parallel": parallel, "processes": config.gpus,
           "accumulate": share > rows, "gradient_checkpointing": config.gradient_checkpointing,
           "on_cpu": machine.on_cpu, "muon": config.optimizer == "muon",
           "float16": config.dtype == "float16"}  # fmt: skip
    needed, available = memory(shape, rows, **how), machine.memory * _USABLE
    largest = largest_batch(shape, available, 4096, **how)

    with torch.device("meta"):
        model = GPT(shape)
    flops = model.flops_per_token()
    tokens = config.rows * shape.block_size
    recomputed = 4 / 3 if config.gradient_checkpointing else 1.0
    seconds = flops * tokens * recomputed / (machine.flops * config.mfu * config.gpus)

    print(f"model: {model.get_num_params() / 1e6:,.2f}M parameters, {shape.n_layer} layers, {shape.n_embd} channels, "
          f"vocabulary {shape.vocab_size}, context {shape.block_size}")  # fmt: skip
    print(f"machine: {config.gpus} x {machine.name} on {config.nodes} node{'s' if config.nodes > 1 else ''}, each "
          f"{machine.memory / 1e9:.0f} GB and {machine.flops / 1e12:,.2f} TFLOP/s ({machine.source})")  # fmt: skip
    print(
        f"parallel: {parallel}; micro-batches of {rows} x {shape.block_size}, {-(-share // rows)} per update and device"
    )
    print("memory per device:")
    for name, size in asdict(needed).items():
        if name != "gradients_stay":
            print(f"  {name:12} {size / 1e9:8.2f} GB")
    print(f"  {'peak':12} {needed.peak / 1e9:8.2f} GB of {available / 1e9:.2f} GB that can be used")
    fits = needed.peak <= available
    if fits:
        print(f"it fits; the largest micro-batch that would is batch_size={largest}{'+' if largest == 4096 else ''}")
    else:
        ways = "; ".join(_ways_out(config, shape, available, rows, how))
        print(f"it does not fit; what would: {ways or 'more GPUs, a smaller model or a smaller block_size'}")
    total = tokens * config.max_iters
    print(f"time at {config.mfu:.0%} of the peak: {_duration(seconds)} per step of {tokens:,} tokens, "
          f"{_duration(seconds * config.max_iters)} for {config.max_iters:,} steps")  # fmt: skip
    print(f"tokens: {total:,}, {total / parameters:.1f} per parameter; Chinchilla's {_CHINCHILLA} per parameter would "
          f"be {_CHINCHILLA * parameters / tokens:,.0f} steps")  # fmt: skip
    parts = {f"{name}_bytes": value for name, value in asdict(needed).items() if name != "gradients_stay"}
    result = {"parameters": parameters, "parallel": parallel, **parts, "peak_bytes": needed.peak, "fits": fits,
              "largest_batch_size": largest, "tokens_per_step": tokens, "seconds_per_step": seconds,
              "seconds": seconds * config.max_iters}  # fmt: skip
    print(json.dumps(result))


def _ways_out(config: PlanConfig, shape: GPTConfig, available: float, rows: int, how: dict[str, Any]) -> Iterator[str]:
    """Settings with which it would fit, the cheapest first."""
    changes: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
    if config.gpus > 1 and how["parallel"] != "fsdp":
        changes += [{"parallel": "fsdp"}, {"parallel": "fsdp", "gradient_checkpointing": True}]
    for change in changes:
        largest = largest_batch(shape, available, rows, **{**how, "accumulate": True, **change})
        settings = [f"--{name}={value}" for name, value in change.items()]
        if largest and largest < rows:
            settings.append(f"--batch_size={largest} (and more gradient_accumulation_steps)")
        if largest and settings:
            yield " ".join(settings)


@dataclass(frozen=True)
class _Machine:
    name: str
    memory: float  # bytes
    flops: float  # per second, of a matmul in the dtype
    bytes_of_dtype: int
    source: str
    on_cpu: bool


def _machine(config: PlanConfig) -> _Machine:
    """What a device of the machines can hold and do. Raises `ConfigError` for one that is not known."""
    if config.gpu:
        if config.gpu not in _MEMORY:
            raise ConfigError(f"gpu={config.gpu!r}: known are {', '.join(_MEMORY)}; others: take one and --gpu_memory")
        size = 4 if config.dtype == "float32" else 2
        return _Machine(config.gpu, (config.gpu_memory or _MEMORY[config.gpu]) * 1e9, PEAK_FLOPS[config.gpu],
                        size, "data sheet, 16 bits", on_cpu=False)  # fmt: skip
    device = choose_device(replace(config, compile=False))
    ram = device.total_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops = device.peak_flops()
    source = "data sheet" if flops else "measured now"
    return _Machine(device.name, config.gpu_memory * 1e9 or ram, flops or _measured_flops(device),
                    device.dtype.itemsize, source, on_cpu=device.type == "cpu")  # fmt: skip


def _measured_flops(device: Device, n: int = 2048) -> float:
    """FLOP/s of a matmul of n x n in the device's dtype, the best of five."""
    a = torch.randn(n, n, device=device.name).to(device.dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        device.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def _shape_to_train(config: PlanConfig) -> GPTConfig:
    """Return the shape that a run of `config` would have, as far as that is known before its data set is there."""
    if config.init_from == "resume":
        return load_latest(config.out_dir, config.data_dir).model_config
    if config.init_from in GPT2_NAMES:
        return GPTConfig.preset(config.init_from, block_size=config.block_size, vocab_size=50257)
    if config.init_from != "scratch":
        return replace(load_model(config.init_from)[0].config, block_size=config.block_size)
    dataset = open_if_prepared(config)
    return config.model_config(dataset.tokenizer.padded_vocab_size if dataset else GPTConfig.vocab_size)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _parameters(shape: GPTConfig) -> tuple[int, int]:
    """How many there are, and in one block."""
    with torch.device("meta"):
        model = GPT(replace(shape, n_layer=1))
    block = sum(parameter.numel() for parameter in model.transformer.h.parameters())
    return sum(p.numel() for p in model.parameters()) + (shape.n_layer - 1) * block, block
