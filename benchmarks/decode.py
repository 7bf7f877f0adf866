"""Tokens per second of generation, ours and others' on one machine, taking turns.

    python benchmarks/decode.py --original=FOLDER [--rounds=5] [--new=100]

GPT-2's shape (124M) with drawn weights, which cost what learned ones cost; always the most probable token. FOLDER is a
checkout of karpathy/nanoGPT; transformers and llama.cpp (through llama-cpp-python) take part where they are installed.
Each side is a process of its own. Batch 1: a prompt of 16 tokens and 100 new ones, prompt and all; the bandwidth is
what the weights of every new token make it at least. Then 16 rows at a time, the time to the first token of a prompt of
900, and with --run=FOLDER, a trained run, what fewer bits cost there: the loss over its validation set. The last line
is JSON.
"""

import argparse
import importlib
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bare import ROOT
from worker import Worker

SHAPE: dict[str, Any] = {
    "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257, "bias": True,
}  # fmt: skip
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "f32": 4.0, "bf16": 2.0, "q8_0": 34 / 32}  # per weight
PEERS = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}  # of llama.cpp, at equal precision
FILES = {"f32": "float32", "bf16": "bfloat16", "q8_0": "q8_0"}  # our words for them
Generate = Callable[[list[int], int, int], float]  # prompt, new tokens, rows -> seconds until the first one


# ---------------------------------------------------------------------------------------------------
# What runs in the processes


def ours(folder: Path, precision: str) -> Generate:
    from nanogpt.config import GPTConfig, Machine
    from nanogpt.device import choose_device
    from nanogpt.engine import Engine, Request, Sampling, quantize
    from nanogpt.model import GPT

    model = GPT.from_weights(GPTConfig(**SHAPE), torch.load(folder / "weights.pt")).eval()
    dtype = choose_device(Machine(device="cpu", dtype="float32" if precision == "float32" else "bfloat16")).dtype
    quantize(model, dtype, int8=precision == "int8")

    def generate(prompt: list[int], new: int, rows: int) -> float:
        began = time.perf_counter()
        engine = Engine(model, rows, length=len(prompt) + new, dtype=dtype)
        engine.add([Request(prompt, new, Sampling(temperature=0))] * rows)
        engine.step()
        first = time.perf_counter() - began
        while engine.rows:
            engine.step()
        return first

    return generate


def original(folder: Path, checkout: Path) -> Generate:
    sys.path.insert(0, str(checkout))
    import model as theirs

    model = theirs.GPT(theirs.GPTConfig(**SHAPE))
    model.load_state_dict(torch.load(folder / "weights.pt"))
    model.train(False)

    def generate(prompt: list[int], new: int, rows: int) -> float:
        idx = torch.tensor([prompt] * rows)
        began = time.perf_counter()
        idx = model.generate(idx, 1, top_k=1)
        first = time.perf_counter() - began
        model.generate(idx, new - 1, top_k=1)
        return first

    return generate


def transformers(folder: Path, precision: str) -> Generate:
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=getattr(torch, precision))
    model.eval()

    class Clock(BaseStreamer):
        times: list[float]

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def generate(prompt: list[int], new: int, rows: int) -> float:
        idx = torch.tensor([prompt] * rows)
        clock = Clock() if rows == 1 else None
        if clock:
            clock.times = []
        began = time.perf_counter()
        model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, min_new_tokens=new,
                       do_sample=False, pad_token_id=0, streamer=clock)  # fmt: skip
        return clock.times[1] - began if clock else 0.0  # the first that it puts is the prompt

    return generate


def llama_cpp(folder: Path, precision: str) -> Generate:
    library: Any = importlib.import_module("llama_cpp")
    defaults = library.llama_cpp.llama_model_default_params

    def plain() -> Any:  # its AMX kernels end the process where the system keeps those registers to itself
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    library.llama_cpp.llama_model_default_params = plain
    threads = torch.get_num_threads()
    model = library.Llama(str(folder / f"{precision}.gguf"), n_ctx=SHAPE["block_size"], n_threads=threads,
                          n_threads_batch=threads, verbose=False)  # fmt: skip

    def generate(prompt: list[int], new: int, rows: int) -> float:
        if rows > 1:
            return 0.0
        model.reset()
        began = time.perf_counter()
        tokens = model.generate(prompt, temp=0.0)
        next(tokens)
        first = time.perf_counter() - began
        for _ in range(new - 1):
            next(tokens)
        return first

    return generate


def serve(arguments: argparse.Namespace) -> None:
    """Generate as each line of standard input says; answer with the seconds it took, and those to the first token."""
    kind, _, precision = arguments.side.partition(" ")
    folder = arguments.folder
    if kind == "ours":
        generate = ours(folder, precision)
    elif kind == "original":
        generate = original(folder, arguments.original)
    else:
        generate = (transformers if kind == "transformers" else llama_cpp)(folder, precision)
    with torch.inference_mode():
        for line in sys.stdin:
            prompt, new, rows = json.loads(line)
            ids = torch.randint(SHAPE["vocab_size"], (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
            began = time.perf_counter()
            first = generate(ids, new, rows)
            print(json.dumps({"seconds": time.perf_counter() - began, "first": first}), flush=True)


# ---------------------------------------------------------------------------------------------------
# What asks them


def make_models(folder: Path, with_llama_cpp: bool, with_transformers: bool) -> None:
    """Write the same model in the format of each side."""
    from nanogpt.config import GPTConfig
    from nanogpt.gguf import save_gguf
    from nanogpt.huggingface import save_pretrained
    from nanogpt.model import GPT
    from nanogpt.tokenizer import GPT2Tokenizer

    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    torch.save(model.state_dict(), folder / "weights.pt")
    if with_transformers:
        (folder / "hf").mkdir()
        save_pretrained(folder / "hf", model, GPT2Tokenizer(), torch.float32)
    if with_llama_cpp:
        for name, dtype in FILES.items():
            save_gguf(folder / f"{name}.gguf", "gpt2", model, GPT2Tokenizer(), dtype)


def losses_of(run: Path) -> dict[str, float]:
    """Return the mean loss of a trained run over its validation set, in nats, by precision."""
    from nanogpt.checkpoint import find_checkpoint, load_checkpoint
    from nanogpt.data import open_dataset
    from nanogpt.engine import quantize

    loaded = load_checkpoint(find_checkpoint(run, "auto"))
    ids = open_dataset(ROOT / "data" / loaded.config["dataset"]).val[:400_000].astype("int64")
    T = loaded.config["block_size"]
    windows = torch.from_numpy(ids[: (len(ids) - 1) // T * T]).view(-1, T)
    targets = torch.from_numpy(ids[1 : windows.numel() + 1]).view(-1, T)
    losses = {}
    for precision in PEERS:
        model = loaded.build_model()
        quantize(model, torch.float32 if precision == "float32" else torch.bfloat16, int8=precision == "int8")
        total = 0.0
        with torch.inference_mode():
            for x, y in zip(torch.split(windows, 32), torch.split(targets, 32), strict=True):
                logits = model.lm_head(model.transformer(x)).float()
                total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
        losses[precision] = total / targets.numel()
    return losses


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=100, help="tokens to generate")
    parser.add_argument("--run", type=Path, help="a trained run, to see what fewer bits cost")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments)
        return
    installed = {name: importlib.util.find_spec(name) is not None for name in ("llama_cpp", "transformers")}
    sides = ["original float32", *(f"ours {precision}" for precision in PEERS)]
    if installed["transformers"]:
        sides += ["transformers float32", "transformers bfloat16"]
    if installed["llama_cpp"]:
        sides += [f"llama_cpp {precision}" for precision in PEERS.values()]
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    batched: dict[str, list[float]] = {side: [] for side in sides if side.startswith("ours")}
    firsts: dict[str, list[float]] = {side: [] for side in sides if not side.startswith("original")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder, installed["llama_cpp"], installed["transformers"])
        tensors = torch.load(folder / "weights.pt")
        looked_up = ("transformer.wte.weight", "transformer.wpe.weight")  # the first is the head's too, which counts
        weights = sum(t.numel() for name, t in tensors.items() if t.dim() == 2 and name not in looked_up)
        settings = {"original": arguments.original, "folder": folder}
        workers = {side: Worker(__file__, {**settings, "side": side}, folder) for side in sides}
        for side in sides:
            workers[side].ask([16, 8, 1])
        for _ in range(arguments.rounds):
            for side in sides:
                speeds[side].append(arguments.new / workers[side].ask([16, arguments.new, 1])["seconds"])
        for _ in range(arguments.rounds):
            for side in batched:
                batched[side].append(16 * arguments.new / workers[side].ask([16, arguments.new, 16])["seconds"])
        for _ in range(arguments.rounds):
            for side in firsts:
                firsts[side].append(workers[side].ask([900, 2, 1])["first"])
        for worker in workers.values():
            worker.end()

    batch1 = {side: statistics.median(values) for side, values in speeds.items()}
    print(f"batch 1, 16 + {arguments.new} tokens: tokens/s, median (smallest to largest) of {arguments.rounds}")
    for side in sides:
        bandwidth = batch1[side] * weights * BYTES[side.split()[1]] / 1e9
        print(f"  {side:22} {spread(speeds[side])}, {bandwidth:.1f} GB/s")
    print("16 rows:")
    for side, values in batched.items():
        print(f"  {side:22} {spread(values)}, {statistics.median(values) / batch1[side]:.1f} times batch 1")
    print("first token of a prompt of 900, seconds:")
    for side, values in firsts.items():
        print(f"  {side:22} {spread(values, 3)}")

    losses = losses_of(arguments.run) if arguments.run else {}
    for precision, loss in losses.items():
        print(f"loss of {arguments.run} in {precision}: {loss:.5f}, perplexity {math.exp(loss):.4f} "
              f"({math.exp(loss - losses['float32']) - 1:+.3%})")  # fmt: skip

    def ratio(a: list[float], b: list[float]) -> float:
        """Return the median of the ratios within a round."""
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    vs_original = {p: ratio(speeds[f"ours {p}"], speeds["original float32"]) for p in PEERS}
    vs_llama_cpp = {
        p: ratio(speeds[f"ours {p}"], speeds[f"llama_cpp {peer}"]) if installed["llama_cpp"] else None
        for p, peer in PEERS.items()
    }
    vs_transformers = {
        p: ratio(firsts[f"ours {p}"], firsts[f"transformers {p}"]) if installed["transformers"] else None
        for p in ("float32", "bfloat16")
    }
    print(json.dumps({
        "batch1": batch1, "all": {"batch1": speeds, "batch16": batched, "first_token": firsts},
        "spread": {side: [min(v), max(v)] for side, v in speeds.items()}, "vs_original": vs_original,
        "vs_llama_cpp": vs_llama_cpp,
        "batch16_over_batch1": {p: statistics.median(batched[f"ours {p}"]) / batch1[f"ours {p}"] for p in PEERS},
        "first_token_vs_transformers": vs_transformers, "losses": losses, "n": arguments.rounds,
        "machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
