"""Time and profile one training step."""

import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt.config import TrainConfig
from nanogpt.data import Dataset, get_batch
from nanogpt.device import Device, choose_device
from nanogpt.distributed import Distributed, full_tensor, parallelize
from nanogpt.model import GPT
from nanogpt.optim import make_optimizer, step_if_finite
from nanogpt.settings import BenchConfig
from nanogpt.tokenizer import GPT2Tokenizer
from nanogpt.train import Run, forward_backward, open_or_prepare

log = logging.getLogger(__name__)


def make_step(
    config: TrainConfig, dataset: Dataset, vocab_size: int, device: Device, dist: Distributed | None = None
) -> tuple[Callable[[int], Tensor], GPT, torch.optim.Optimizer]:
    """Return a function that does step n as the loop in train.py does it, without loss scale; model and optimizer."""
    dist, config = dist or Distributed(), config.with_muon_rates()
    torch.manual_seed(config.seed)
    model = GPT(config.model_config(vocab_size), config.zero_init)
    run, scaler = Run(config, device, dist, dataset, model), torch.amp.GradScaler(device.type, enabled=False)
    network = parallelize(model, config, device, dist)
    optimizer = make_optimizer(model, config, device.dtype)
    rows = dist.my_rows(config)
    n_micro = math.ceil(len(rows) / config.batch_size)

    def step(n: int) -> Tensor:
        loss = forward_backward(run, network, scaler, get_batch(dataset, n, config, rows, device.put), n_micro)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        step_if_finite(optimizer, dist.all(torch.isfinite(loss + full_tensor(grad_norm))))
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step, model, optimizer


def bench(config: BenchConfig) -> None:
    """Time the training step at its full context: ms per step, tokens/s, MFU, peak memory, then one line of JSON."""
    config = replace(config, context_warmup=0.0)
    device = choose_device(config)
    if config.real_data:
        dataset = open_or_prepare(config, Distributed())
        dataset.check_length(config.block_size)
    else:
        tokenizer, n_tokens = GPT2Tokenizer(), 4 * config.batch_size * (config.block_size + 1)
        ids = np.random.default_rng(config.seed).integers(tokenizer.vocab_size, size=n_tokens, dtype=np.uint16)
        dataset = Dataset(Path(), ids, ids, tokenizer, {})
    step, model, _ = make_step(config, dataset, dataset.tokenizer.padded_vocab_size, device)
    times = []
    for n in range(config.warmup_steps + config.steps):
        began = time.perf_counter()
        loss = step(n)
        device.synchronize()
        times.append((time.perf_counter() - began) * 1000)
        log.info(f"step {n}: loss {loss.item():.4f}, {times[-1]:.2f}ms")
    if config.profile:
        with torch.profiler.profile(with_flops=True) as profiler:
            for n in range(5):
                step(n)
        column = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=column, row_limit=20))
        Path("bench_log").mkdir(exist_ok=True)
        profiler.export_chrome_trace("bench_log/trace.json")
        print("wrote bench_log/trace.json: open it in chrome://tracing or ui.perfetto.dev")

    ms = times[config.warmup_steps :]
    median = statistics.median(ms)
    speed = config.global_batch_size * config.block_size / median * 1000
    peak, memory = device.peak_flops(), device.peak_memory()
    mfu = model.flops_per_token() * speed / peak if peak else None
    print(
        f"time per step: {median:.2f}ms (median of {len(ms)}, {min(ms):.2f} to {max(ms):.2f}), {speed:,.0f} tokens/s,"
        f" MFU: {f'{mfu:.2%}' if mfu else 'peak of this device unknown'}, peak memory {memory / 2**30:.2f} GiB"
    )
    print(json.dumps({
        "ms": median, "ms_min": min(ms), "ms_max": max(ms), "n": len(ms), "tokens_per_second": speed,
        "peak_memory_bytes": memory, "mfu": mfu, "parameters": model.get_num_params(non_embedding=False),
        "device": device.name, "dtype": str(device.dtype).removeprefix("torch."), "compile": device.compile,
    }))  # fmt: skip
