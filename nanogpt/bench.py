"""How fast is the training step on this machine? Times the very function that training calls."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nanogpt.model
from nanogpt.config import BenchConfig, GPTConfig, TrainConfig
from nanogpt.data import Dataset, Tokens
from nanogpt.device import Device, choose
from nanogpt.distributed import World
from nanogpt.errors import DataError
from nanogpt.model import GPT
from nanogpt.start import Run, assemble, open_or_prepare
from nanogpt.tokenizer import ByteTokenizer
from nanogpt.train import next_batch, update

log = logging.getLogger(__name__)


def run_of(config: TrainConfig, dataset: Dataset, vocab_size: int, device: Device) -> Run:
    """A run from scratch in a single process, without a folder: what there is to time."""
    torch.manual_seed(config.seed)
    return assemble(config, device, World(), dataset, GPT(config.model_config(vocab_size), config.zero_init))


def bench(config: BenchConfig) -> None:
    """The program behind `bench.py`: ms per step, tokens/s, MFU, peak memory, then one line of JSON."""
    training = config.train_config()
    device = choose(config.device, config.dtype, config.compile, training=training)
    torch.manual_seed(config.seed)
    vocab_size = GPTConfig.vocab_size
    if config.real_data:
        try:
            dataset = open_or_prepare(training, World())
        except DataError as error:
            raise DataError(f"{error}; or time random tokens with --real_data=False") from error
        dataset.check_length(config.block_size)
        vocab_size = dataset.tokenizer.padded_vocab_size
    else:
        tokens = torch.randint(vocab_size, (4 * config.batch_size * (config.block_size + 1),)).numpy().astype("uint16")
        dataset = Dataset(Path(), Tokens([tokens]), Tokens([tokens]), ByteTokenizer(), {})
    run = run_of(training, dataset, vocab_size, device)
    model = run.model
    fixed = None if config.real_data else next_batch(run, 0)

    def step(n: int) -> Tensor:
        x, y = fixed or next_batch(run, n)
        loss, _, _ = update(run, x, y, learning_rate=1e-4)
        return loss

    for n in range(config.warmup_steps):
        log.info(f"warm-up {n + 1}/{config.warmup_steps}: loss {step(n).item():.4f}")
    times = []
    for n in range(config.steps):
        device.synchronize()
        began = time.perf_counter()
        loss = step(config.warmup_steps + n)
        device.synchronize()
        times.append(time.perf_counter() - began)
        log.info(f"{n + 1}/{config.steps}: loss {loss.item():.4f}, {times[-1] * 1000:.2f}ms")
    if config.profile:
        _profile(step, device.type)
        print_parts(run, lambda n: step(config.warmup_steps + n))

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


def print_parts(run: Run, step: Callable[[int], object], steps: int = 5) -> None:
    """Time the parts of `steps` steps, and print them beside what the hardware would need at least."""
    inside: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            run.device.synchronize()
            began = time.perf_counter()
            result = function(*args, **settings)
            run.device.synchronize()
            inside.setdefault(name, []).append(time.perf_counter() - began)
            return result

        return call

    places = [("data", run, "rows_of"), ("forward", run, "network"), ("loss", nanogpt.model, "head_loss"),
              ("backward", torch.Tensor, "backward"), ("clip", torch.nn.utils, "clip_grad_norm_"),
              ("optimizer", run.optimizer, "step")]  # fmt: skip
    before = [(owner, attribute, getattr(owner, attribute)) for _, owner, attribute in places]
    for name, owner, attribute in places:
        if name != "loss" or not run.device.compile:  # there it is a part of what is compiled
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    try:
        seconds = run.device.time(lambda: [step(n) for n in range(steps)]) / steps
    finally:
        for owner, attribute, function in before:
            setattr(owner, attribute, function)
    parts = {name: sum(inside.get(name, [0.0])) / steps for name, _, _ in places}
    parts["forward"] -= parts["loss"]  # which it calls
    parts["rest"] = seconds - sum(parts.values())
    print("part         ms      share")
    for name, value in parts.items():
        print(f"{name:10} {value * 1000:7.2f} {value / seconds:8.1%}")

    flops, bandwidth = run.device.peak_flops() or run.device.measured_flops(), run.device.measured_bandwidth()
    tokens = run.config.rows * run.model.config.block_size
    computing = run.model.flops_per_token() * tokens / flops
    moving = 28 * run.model.get_num_params(non_embedding=False) / bandwidth  # 4 tensors are read, 3 written
    print(
        f"at least: {computing * 1000:.2f} ms for the matrix products at {flops / 1e12:,.2f} TFLOP/s, "
        f"{moving * 1000:.2f} ms for AdamW at {bandwidth / 1e9:,.1f} GB/s; a step takes "
        f"{seconds / (computing + moving):.2f} times as long"
    )


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
