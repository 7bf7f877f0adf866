"""Estimate whether a run fits into memory, and how long it takes: arithmetic over a config and data sheets.

Memory is that of a step without torch.compile; compiled, a model keeps less for its backward pass.
"""

import bisect
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils.benchmark import Timer

from nanogpt.checkpoint import load_latest, load_model
from nanogpt.config import GPT2_NAMES, GPTConfig
from nanogpt.data import open_if_prepared
from nanogpt.device import PEAK_FLOPS, Device, choose_device
from nanogpt.distributed import Distributed, choose_parallel
from nanogpt.errors import ConfigError
from nanogpt.metrics import duration
from nanogpt.model import GPT, loss_chunk
from nanogpt.settings import PlanConfig

# GB of memory, from the vendors' data sheets
_MEMORY = {"B200": 180, "GH200": 96, "H200": 141, "H100": 80, "A100": 80, "L40S": 48, "L4": 24, "A40": 48, "A10G": 24,
           "RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24, "V100": 32, "T4": 16}  # fmt: skip
_USABLE = 0.92  # of a GPU's memory: the rest is for CUDA itself, buffers of NCCL, fragments
_KERNELS = 20e6  # bytes that torch's kernels take for themselves
_CHINCHILLA = 20  # tokens per parameter (Hoffmann et al. 2022)


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs per device, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    copies: float  # of weights in 16 bits, or all-gathered by FSDP
    activations: float  # kept from the forward to the backward pass
    logits: float  # of a chunk, with their gradients and the head's
    block: float  # temporary, in the backward pass of one block; recomputed activations included
    peak: float  # the most at a time


def memory(shape: GPTConfig, rows: int, *, bytes_of_dtype: int, parallel: str, processes: int, accumulate: bool,
           gradient_checkpointing: bool, on_cpu: bool = False, muon: bool = False,
           float16: bool = False) -> Memory:  # fmt: skip
    """Return what training needs per device, for micro-batches of `rows` windows.

    parallel: none, ddp or fsdp. `accumulate`: more than one micro-batch per step.
    """
    d, C, F, V = bytes_of_dtype, shape.n_embd, shape.n_hidden, shape.vocab_size
    total, in_block = _parameters(shape)
    tokens, heads = rows * shape.block_size, shape.n_head * shape.head_size

    # What the backward pass of a block needs, in bytes per token: the residual stream twice in float32, and in `dtype`
    # the inputs of its matmuls, queries, keys, values (repeated for grouped queries), attention's output, the MLP.
    per_layer = 8 * C + d * (2 * C + 4 * heads + (2 if shape.is_gpt2 else 4) * F) + 4 * shape.n_head
    if not shape.is_gpt2:  # RMSNorm's quotients in float32; queries and keys before and after they are rotated
        per_layer += 8 * C + d * 2 * heads
    if shape.architecture == "qwen3":  # normalises queries and keys in float32
        per_layer += (8 if d == 2 else 4) * (shape.n_head + shape.n_kv_head) * shape.head_size
    if on_cpu and d == 2 and shape.block_size <= 512:  # plain matmuls keep the attention's probabilities
        per_layer += d * shape.n_head * shape.block_size
    if shape.dropout and shape.is_gpt2:
        per_layer += 2 * C * (1 + d)
    kept = 4 * C if gradient_checkpointing else per_layer
    # Gradients in the middle of the MLP and of the residual stream, and with checkpointing what is recomputed.
    block = tokens * (d * (1 if shape.is_gpt2 else 2) * F + 8 * C + gradient_checkpointing * per_layer)
    activations = tokens * (shape.n_layer * kept + (8 + d) * C)  # of blocks, embeddings and the last normalisation

    # Logits of a chunk in `dtype` and in float32, their logprobs, and what the chunks before have computed.
    chunk = loss_chunk(tokens, V, "cpu" if on_cpu else "cuda", torch.float16 if float16 else torch.bfloat16)
    logits = (8 if d == 4 else 10) * chunk * V + ((4 + d) * V * C + 4 * tokens * C) * (chunk < tokens)

    share = processes if parallel == "fsdp" else 1
    copies = 2 * total if d == 2 else 0
    if parallel == "fsdp":  # two blocks at a time, one of them with its gradient, and always what is outside of blocks
        copies = 2 * d * in_block + (d + 4) * in_block + 8 * (total - shape.n_layer * in_block)
    weights = gradients = 4 * total / share
    optimizer = (8 * total - 4 * muon * shape.n_layer * in_block) / share  # Muon keeps one moment, AdamW two

    # The peak is at the loss, in the last block (the head has its gradient) or in the first (all others have theirs).
    # With checkpointing, nothing keeps autocast's copies of the weights after the forward pass.
    stay = gradients if accumulate or parallel == "ddp" else 0
    in_last_block = activations + block + max(stay, 4 * V * C / share)
    later = 0 if gradient_checkpointing and parallel != "fsdp" else copies
    most = max(copies + activations + logits + stay, later + in_last_block, later + gradients + block)
    peak = weights + optimizer + most + _KERNELS
    return Memory(weights, gradients, optimizer, copies, activations, logits, block, peak)


def largest_batch(shape: GPTConfig, available: float, rows: int, **how: Any) -> int:
    """Return the rows of the largest micro-batch that fits into `available` bytes, up to `rows`; 0 if none does."""
    return bisect.bisect_left(range(1, rows + 1), True, key=lambda n: memory(shape, n, **how).peak > available)


def plan(config: PlanConfig) -> None:
    """Print parameters, memory, time, and what to change if the run does not fit; then one line of JSON."""
    shape, device, name, source = _shape_to_train(config), None, config.gpu, "data sheet, 16 bits"
    if not config.gpu:
        device = choose_device(replace(config, compile=False))
        name, source = device.name, "data sheet" if device.peak_flops() else "measured now"
        size: float = device.total_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        itemsize, flops = device.dtype.itemsize, device.peak_flops() or _measured_flops(device)
    elif config.gpu in _MEMORY:
        size, flops, itemsize = _MEMORY[name] * 1e9, PEAK_FLOPS[name], 4 if config.dtype == "float32" else 2
    else:
        raise ConfigError(f"gpu={name!r}: known are {', '.join(_MEMORY)}; others: take one and --gpu_memory")
    size = config.gpu_memory * 1e9 or size
    available = size * _USABLE

    total_parameters = _parameters(shape)[0]
    share = len(Distributed(world_size=config.gpus).my_rows(config.batch_size, config.gradient_accumulation_steps))
    rows, is_float16 = min(config.batch_size, share), config.dtype == "float16"
    dtype = torch.float16 if is_float16 else torch.bfloat16
    parallel = choose_parallel(config.parallel, total_parameters, size, dtype) if config.gpus > 1 else "none"
    how: dict[str, Any] = {
        "bytes_of_dtype": itemsize, "parallel": parallel, "processes": config.gpus, "accumulate": share > rows,
        "gradient_checkpointing": config.gradient_checkpointing, "on_cpu": bool(device and device.type == "cpu"),
        "muon": config.optimizer == "muon", "float16": is_float16,
    }  # fmt: skip
    needed = memory(shape, rows, **how)
    largest = largest_batch(shape, available, 4096, **how)
    with torch.device("meta"):
        model = GPT(shape)
    tokens = config.rows * shape.block_size
    total, recomputed = tokens * config.max_iters, 4 / 3 if config.gradient_checkpointing else 1.0
    seconds = model.flops_per_token() * tokens * recomputed / (flops * config.mfu * config.gpus)

    print(f"model: {model.get_num_params() / 1e6:,.2f}M parameters, {shape.n_layer} layers, {shape.n_embd} channels, "
          f"vocabulary {shape.vocab_size}, context {shape.block_size}")  # fmt: skip
    print(f"machine: {config.gpus} x {name} on {config.nodes} node{'s' if config.nodes > 1 else ''}, each "
          f"{size / 1e9:.0f} GB and {flops / 1e12:,.2f} TFLOP/s ({source})")  # fmt: skip
    print(f"parallel: {parallel}; micro-batches of {rows} x {shape.block_size}, {-(-share // rows)} per step")
    print("memory per device:")
    for part, needs in asdict(needed).items():
        print(f"  {part:12} {needs / 1e9:8.2f} GB" + f" of {available / 1e9:.2f} GB to be used" * (part == "peak"))
    if fits := needed.peak <= available:
        print(f"it fits; the largest micro-batch that would is batch_size={largest}{'+' if largest == 4096 else ''}")
    else:
        ways = "; ".join(_ways_out(config.gpus, shape, available, rows, how))
        print(f"it does not fit; what would: {ways or 'more GPUs, a smaller model or a smaller block_size'}")
    print(f"time at {config.mfu:.0%} of the peak: {seconds:.3g} s per step of {tokens:,} tokens, "
          f"{duration(seconds * config.max_iters)} for {config.max_iters:,} steps")  # fmt: skip
    print(f"tokens: {total:,}, {total / total_parameters:.1f} per parameter; Chinchilla's {_CHINCHILLA} per parameter "
          f"would be {_CHINCHILLA * total_parameters / tokens:,.0f} steps")  # fmt: skip
    result = {"parameters": total_parameters, "parallel": parallel, "fits": fits, "largest_batch_size": largest,
              **{f"{part}_bytes": needs for part, needs in asdict(needed).items()}, "tokens_per_step": tokens,
              "seconds_per_step": seconds, "seconds": seconds * config.max_iters}  # fmt: skip
    print(json.dumps(result))


def _ways_out(gpus: int, shape: GPTConfig, available: float, rows: int, how: dict[str, Any]) -> Iterator[str]:
    """Yield settings with which it would fit, the cheapest first."""
    changes: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
    if gpus > 1 and how["parallel"] != "fsdp":
        changes += [{"parallel": "fsdp"}, {"parallel": "fsdp", "gradient_checkpointing": True}]
    for change in changes:
        largest = largest_batch(shape, available, rows, **{**how, "accumulate": True, **change})
        settings = [f"--{name}={value}" for name, value in change.items()]
        if largest and largest < rows:
            settings.append(f"--batch_size={largest} (and more gradient_accumulation_steps)")
        if largest and settings:
            yield " ".join(settings)


def _measured_flops(device: Device, n: int = 2048) -> float:
    """Return the FLOP/s of a matmul of n x n in the device's dtype."""
    a = torch.randn(n, n, device=device.name).to(device.dtype)
    return 2 * n**3 / Timer("a @ a", globals={"a": a}).timeit(5).mean


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


def _parameters(shape: GPTConfig) -> tuple[int, int]:
    """Return how many there are, and in one block."""
    with torch.device("meta"):
        model = GPT(replace(shape, n_layer=1))
    block = sum(parameter.numel() for parameter in model.transformer.h.parameters())
    return sum(p.numel() for p in model.parameters()) + (shape.n_layer - 1) * block, block
