"""Estimate whether a run fits into memory, and how long it takes: arithmetic over a config and data sheets.

Memory is that of a step without torch.compile; compiled, a model keeps less for its backward pass.
"""

import bisect
import json
import os
from dataclasses import replace
from typing import Any

import torch
from torch.utils.benchmark import Timer

from nanogpt.checkpoint import load_latest, load_model
from nanogpt.config import GPT2_NAMES, PRESETS, GPTConfig
from nanogpt.data import open_if_prepared
from nanogpt.device import GPUS, choose_device
from nanogpt.distributed import Distributed, choose_parallel
from nanogpt.errors import ConfigError
from nanogpt.lora import Adapter, add_adapters
from nanogpt.metrics import duration
from nanogpt.model import GPT, loss_chunk
from nanogpt.settings import PlanConfig


def memory(model: GPT, rows: int, *, dtype: torch.dtype, parallel: str = "none", processes: int = 1,
           accumulate: bool = False, gradient_checkpointing: bool = False, on_cpu: bool = False,
           muon: bool = False, gather_once: bool = False) -> dict[str, float]:  # fmt: skip
    """Return the bytes that training needs per device, by what they are for, in micro-batches of `rows` windows.

    The model may consist of meta tensors. parallel: none, ddp or fsdp. processes: that share a model with fsdp.
    accumulate: more than one micro-batch per step.
    """
    shape, d = model.config, dtype.itemsize
    C, F, V = shape.n_embd, shape.n_hidden, shape.vocab_size
    total = model.get_num_params(non_embedding=False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    in_block = sum(parameter.numel() for parameter in model.transformer.h[0].parameters())
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
    # Kept from the forward to the backward pass: of blocks, embeddings and the last normalisation.
    activations = tokens * (shape.n_layer * (4 * C if gradient_checkpointing else per_layer) + (8 + d) * C)
    # Temporary in the backward pass of one block: gradients in the middle of the MLP and of the residual stream, and
    # with checkpointing what is recomputed.
    block = tokens * (d * (1 if shape.is_gpt2 else 2) * F + 8 * C + gradient_checkpointing * per_layer)

    # Logits of a chunk in `dtype` and in float32, their logprobs, and what the chunks before have computed.
    chunk = loss_chunk(tokens, V, "cpu" if on_cpu else "cuda", dtype)
    logits = (8 if d == 4 else 10) * chunk * V + ((4 + d) * V * C + 4 * tokens * C) * (chunk < tokens)

    share = processes if parallel == "fsdp" else 1
    copies = 2 * total if d == 2 else 0  # of weights in 16 bits, or all-gathered by FSDP
    if parallel == "fsdp":  # three blocks at a time, or all; one with its gradient; always what is outside of blocks
        in_blocks = (shape.n_layer * (d + 4 * accumulate) + 4 if gather_once else 3 * d + 4) * in_block
        copies = in_blocks + 8 * (total - shape.n_layer * in_block)
    weights, gradients = 4 * total / share, 4 * trained / share
    optimizer = (8 * trained - 4 * muon * shape.n_layer * in_block) / share  # Muon keeps one moment, AdamW two

    # Memory peaks at the loss, in the backward pass of the last block (only the head has its gradient yet), or in
    # that of the first block (all other gradients exist).
    # With checkpointing, nothing keeps autocast's copies of the weights after the forward pass.
    stay = gradients if accumulate or parallel == "ddp" else 0
    later = 0 if gradient_checkpointing and parallel != "fsdp" else copies
    last = activations + max(stay, 4 * V * C / share)
    most = max(copies + activations + logits + stay, later + block + max(last, gradients))
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "copies": copies,
            "activations": activations, "logits": logits, "block": block,
            "peak": weights + optimizer + most + 20e6}  # which torch's kernels take for themselves  # fmt: skip


def largest_batch(model: GPT, available: float, rows: int, **how: Any) -> int:
    """Return the rows of the largest micro-batch that fits into `available` bytes, up to `rows`; 0 if none does."""
    return bisect.bisect_left(range(1, rows + 1), True, key=lambda n: memory(model, n, **how)["peak"] > available)


def plan(config: PlanConfig) -> None:
    """Print parameters, memory, time, and what to change if the run does not fit; then one line of JSON."""
    # The shape, as far as it is known before the data set is there.
    if config.init_from == "scratch":
        dataset = open_if_prepared(config)
        shape = config.model_config(dataset.tokenizer.padded_vocab_size if dataset else GPTConfig.vocab_size)
    elif config.init_from == "resume":
        shape = load_latest(config.out_dir, config.data_dir).model_config
    elif config.init_from in GPT2_NAMES:  # needs no download
        shape = GPTConfig(**PRESETS[config.init_from], block_size=config.block_size, vocab_size=50257)
    else:
        shape = replace(load_model(config.init_from).model.config, block_size=config.block_size)
    with torch.device("meta"):
        model = GPT(shape)
        if config.lora_rank:
            add_adapters(model, Adapter(config.lora_rank, 1.0, config.lora_targets, "", ""))
    n_parameters = model.get_num_params(non_embedding=False)

    # The machine.
    if config.gpu:
        if config.gpu not in GPUS:
            raise ConfigError(f"gpu={config.gpu!r}: known are {', '.join(GPUS)}; others: take one and --gpu_memory")
        name, flops, size = config.gpu, GPUS[config.gpu][0] * 1e12, GPUS[config.gpu][1] * 1e9
        fast = "float16" if config.gpu in ("V100", "T4") else "bfloat16"  # as device.choose_device decides
        dtype = getattr(torch, fast if config.dtype == "auto" else config.dtype)
    else:
        device = choose_device(config)
        name, dtype = device.name, device.dtype
        size = float(device.total_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        a = torch.randn(2048, 2048, device=name).to(dtype)
        flops = device.peak_flops() or 2 * 2048**3 / Timer("a @ a", globals={"a": a}).timeit(5).mean
    size = config.gpu_memory * 1e9 or size
    available = 0.92 * size  # the rest is for CUDA itself, buffers of NCCL, fragments

    # Memory and time.
    share = len(Distributed(world_size=config.gpus).my_rows(config))
    rows = min(config.batch_size, share)
    parallel = choose_parallel(config.parallel, n_parameters, size, dtype) if config.gpus > 1 else "none"
    how: dict[str, Any] = {
        "dtype": dtype, "parallel": parallel, "processes": config.shard_group or config.gpus,
        "muon": config.optimizer == "muon", "gather_once": config.gather_once,
        "accumulate": share > rows, "on_cpu": name == "cpu", "gradient_checkpointing": config.gradient_checkpointing,
    }  # fmt: skip
    needed = memory(model, rows, **how)
    largest = largest_batch(model, available, 4096, **how)
    tokens, recomputed = config.global_batch_size * shape.block_size, 4 / 3 if config.gradient_checkpointing else 1.0
    seconds = model.flops_per_token() * tokens * recomputed / (flops * config.mfu * config.gpus)
    result = {
        "parameters": n_parameters, "parallel": parallel, "fits": needed["peak"] <= available,
        "largest_batch_size": largest, **{f"{part}_bytes": n_bytes for part, n_bytes in needed.items()},
        "tokens_per_step": tokens, "seconds_per_step": seconds, "seconds": seconds * config.max_iters,
    }  # fmt: skip

    # Settings with which it would fit, the cheapest first.
    ways: list[str] = []
    first: dict[str, Any] = {"gather_once": False} if config.gather_once else {}
    changes = [first, {**first, "gradient_checkpointing": True}]
    for change in [*changes, *({"parallel": "fsdp", **each} for each in changes if parallel == "ddp")]:
        if n := largest_batch(model, available, rows, **{**how, "accumulate": True, **change}):
            way = " ".join(f"--{name}={value}" for name, value in {**change, "batch_size": n}.items())
            ways.append(f"{way} (and more gradient_accumulation_steps)" if n < rows else way)

    print(f"model: {n_parameters / 1e6:,.2f}M parameters, vocabulary {shape.vocab_size}, context {shape.block_size}")
    print(f"machine: {config.gpus} x {name}, {flops / 1e12:,.2f} TFLOP/s each")
    print(f"parallel: {parallel}; micro-batches of {rows} x {shape.block_size}, {-(-share // rows)} per step")
    print(f"memory per device, of {available / 1e9:.2f} GB to be used:")
    for part, n_bytes in needed.items():
        print(f"  {part:12} {n_bytes / 1e9:8.2f} GB")
    if result["fits"]:
        print(f"it fits; the largest micro-batch that would is batch_size={largest}")
    else:
        print(f"it does not fit; what would: {'; '.join(ways) or 'more GPUs, a smaller model or a smaller block_size'}")
    total = duration(seconds * config.max_iters)
    print(f"time at {config.mfu:.0%} of the peak: {seconds:.3g} s per step, {total} for {config.max_iters:,} steps")
    print(f"tokens: {tokens:,} per step, {tokens * config.max_iters / n_parameters:.1f} per parameter (Chinchilla: 20)")
    print(json.dumps(result))
