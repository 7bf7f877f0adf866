"""How fast is the training step on this machine? Times the very function that training calls."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanogpt.checkpoint import Progress
from nanogpt.config import BenchConfig, GPTConfig
from nanogpt.data.batches import check_length
from nanogpt.data.tokenizer import ByteTokenizer
from nanogpt.data.tokens import Dataset, Tokens
from nanogpt.device import choose
from nanogpt.distributed import World
from nanogpt.errors import DataError
from nanogpt.model import GPT
from nanogpt.optim import adamw
from nanogpt.start import Run, loader, open_or_prepare
from nanogpt.train import next_batch, update


def bench(config: BenchConfig) -> None:
    """The program behind `bench.py`: ms per step, tokens/s, MFU, peak memory, then one line of JSON."""
    device = choose(config.device, config.dtype, config.compile)
    training = config.train_config()
    torch.manual_seed(config.seed)
    vocab_size = GPTConfig.vocab_size
    if config.real_data:
        try:
            dataset = open_or_prepare(training, World())
        except DataError as error:
            raise DataError(f"{error}; or time random tokens with --real_data=False") from error
        check_length(dataset.train, config.block_size, f"the training split of {config.dataset}")
        vocab_size = dataset.tokenizer.padded_vocab_size
    else:
        tokens = torch.randint(vocab_size, (4 * config.batch_size * (config.block_size + 1),)).numpy().astype("uint16")
        dataset = Dataset(Path(), Tokens([tokens]), Tokens([tokens]), ByteTokenizer(), {})
    model = GPT(training.model_config(vocab_size)).to(device.name)
    model.transformer.gradient_checkpointing = config.gradient_checkpointing
    optimizer = adamw(model, 1e-4, (0.9, 0.95), 1e-2)
    scaler = torch.amp.GradScaler(device.type, enabled=device.dtype == torch.float16)
    rows_of = loader(training, dataset, model.config, device, World())
    run = Run(training, device, World(), dataset, model, rows_of, model, optimizer, scaler, Progress())
    if device.compile:
        print("compiling the model: takes a minute or so")
        model.compile()
    fixed = None if config.real_data else next_batch(run, 0)

    def step(n: int) -> Tensor:
        x, y = fixed or next_batch(run, n)
        loss, _, _ = update(run, x, y, learning_rate=1e-4)
        return loss

    for n in range(config.warmup_steps):
        print(f"warm-up {n + 1}/{config.warmup_steps}: loss {step(n).item():.4f}")
    times = []
    for n in range(config.steps):
        device.synchronize()
        began = time.perf_counter()
        loss = step(config.warmup_steps + n)
        device.synchronize()
        times.append(time.perf_counter() - began)
        print(f"{n + 1}/{config.steps}: loss {loss.item():.4f}, {times[-1] * 1000:.2f}ms")
    if config.profile:
        _profile(step, device.type)

    seconds = sorted(times)[len(times) // 2]
    tokens_per_second = config.batch_size * config.block_size / seconds
    peak = device.peak_flops()
    mfu = model.flops_per_token() * tokens_per_second / peak if peak else None
    memory = device.peak_memory()
    print(
        f"time per iteration: {seconds * 1000:.2f}ms (median of {len(times)}, {min(times) * 1000:.2f} to "
        f"{max(times) * 1000:.2f}), {tokens_per_second:,.0f} tokens/s, "
        f"MFU: {f'{mfu * 100:.2f}%' if mfu else 'peak of this device not known'}, peak memory {memory / 2**30:.2f} GiB"
    )
    result = {
        "ms": seconds * 1000,
        "ms_min": min(times) * 1000,
        "ms_max": max(times) * 1000,
        "n": len(times),
        "tokens_per_second": tokens_per_second,
        "mfu": mfu,
        "peak_memory_bytes": memory,
        "parameters": model.get_num_params(non_embedding=False),
        "device": device.name,
        "dtype": str(device.dtype).removeprefix("torch."),
        "compile": device.compile,
    }
    print(json.dumps(result))


def _profile(step: Callable[[int], Tensor], device_type: str) -> None:
    """Print where the time of 5 steps goes, and leave a trace in bench_log/."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device_type == "cuda" else [])]
    with profile(activities=activities, with_flops=True) as profiler:
        for n in range(5):
            step(n)
    column = "self_cuda_time_total" if device_type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=column, row_limit=20))
    trace = Path("bench_log", "trace.json")
    trace.parent.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    print(f"wrote {trace}: open it in chrome://tracing or ui.perfetto.dev")
