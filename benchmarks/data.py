"""Text to tokens and tokens to batches, ours and the original's way alternating on this machine.

    python benchmarks/data.py --original=FOLDER [--runs=3] [--megabytes=60] [--memory]

FOLDER is a checkout of karpathy/nanoGPT. Its functions are taken from its files and called as it does: `process` in
`datasets.map`, without starting Python or writing train.bin; and `get_batch`. Ours is the whole command `nanogpt
prepare`, from starting Python to train.bin, val.bin and dataset.json. The text: Python and documentation files of this
machine. With --memory also the peak memory of preparing 100 MB and 1 GB, and of a million batches. Ends in one line of
JSON.
"""

import argparse
import ast
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare import ROOT

from nanogpt.data import Dataset, epoch_window_starts, open_dataset, window_starts, windows
from nanogpt.tokenizer import GPT2Tokenizer

BLOCK_SIZE = 1024


def machines_texts() -> Iterator[str]:
    """Yield Python and documentation files of this machine, over and over, in an order drawn once."""
    roots = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc"}
    suffixes = {".py", ".md", ".rst", ".txt", ".html"}
    paths = sorted({path for root in roots for path in Path(root).rglob("*") if path.suffix in suffixes})
    random.Random(0).shuffle(paths)
    while True:
        for path in paths:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                yield text


def write_corpus(path: Path, megabytes: float) -> None:
    """Write a file of JSON lines with so much text."""
    size = 0
    with path.open("w") as file:
        for text in machines_texts():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                return


def function_of(path: Path, name: str, names: dict[str, Any]) -> Callable[..., Any]:
    """Return a function out of a program, to be called with `names` for its globals."""
    tree = ast.parse(path.read_text())
    [node] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    exec(compile(ast.Module([node], []), str(path), "exec"), names)
    function: Callable[..., Any] = names[name]
    return function


def seconds_of(function: Callable[..., object]) -> float:
    """Return the wall-clock time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def tokenizing(original: Path, corpus: Path, runs: int, num_proc: int) -> dict[str, Any]:
    """Return the tokens per second of both sides, same text, same number of processes."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    loaded = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(corpus.parent / "hf"))
    encoding = GPT2Tokenizer()._encoding
    process = function_of(original / "data" / "openwebtext" / "prepare.py", "process", {"enc": encoding})
    folder = corpus.parent / "ours"

    def theirs() -> None:
        loaded.map(process, remove_columns=["text"], num_proc=num_proc)

    def ours() -> None:
        words = [folder.name, f"--data_dir={folder.parent}", f"--input={corpus}", f"--num_proc={num_proc}"]
        command = [sys.executable, "-m", "nanogpt", "prepare", *words]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

    texts = loaded["text"][:]

    def tiktokens_batch() -> None:
        encoding.encode_ordinary_batch(texts, num_threads=num_proc)

    sides = {"original": theirs, "ours": ours, "tiktoken, batch call": tiktokens_batch}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, function in sides.items():
            times[side].append(seconds_of(function))
            print(f"tokenizing, {side}: {times[side][-1]:.2f} s", flush=True)
    tokens = sum(open_dataset(folder).description["tokens"].values())
    rates = {side: sorted(tokens / s for s in seconds) for side, seconds in times.items()}
    for side, values in rates.items():
        print(f"{side}: {statistics.median(values):,.0f} tokens/s ({values[0]:,.0f} to {values[-1]:,.0f}, n={runs})")
    medians = {side: statistics.median(values) for side, values in rates.items()}
    return {
        "tokens": tokens,
        "processes": num_proc,
        "tokens_per_second": medians,
        "spread": {side: [values[0], values[-1]] for side, values in rates.items()},
        "speedup": medians["ours"] / medians["original"],
    }


def loading(original: Path, folder: Path, runs: int) -> dict[str, Any]:
    """Return the batches per second of both sides."""
    dataset = open_dataset(folder)
    result = {}
    for batch_size, count in ((12, 4000), (64, 1500)):
        names = {"np": np, "torch": torch, "os": os, "data_dir": str(folder), "block_size": BLOCK_SIZE,
                 "batch_size": batch_size, "device_type": "cpu", "device": "cpu"}  # fmt: skip
        get_batch = function_of(original / "train.py", "get_batch", names)

        def theirs(count: int = count, get_batch: Callable[[str], object] = get_batch) -> None:
            for _ in range(count):
                get_batch("train")

        def ours(count: int = count, rows: int = batch_size, draw: Callable[..., Any] = window_starts) -> None:
            for step in range(count):
                starts = draw(len(dataset.train), BLOCK_SIZE, seed=0, step=step, rows=rows)
                windows(dataset, "train", starts, BLOCK_SIZE)

        def epoch(count: int = count, rows: int = batch_size) -> None:
            ours(count, rows, epoch_window_starts)

        sides: dict[str, Callable[[], None]] = {"original": theirs, "ours": ours, "ours, epoch": epoch}
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(runs):
            for side, function in sides.items():
                rates[side].append(count / seconds_of(function))
        medians = {side: statistics.median(values) for side, values in rates.items()}
        for side, values in rates.items():
            print(f"batch {batch_size} x {BLOCK_SIZE}, {side}: {medians[side]:,.0f} batches/s "
                  f"({min(values):,.0f} to {max(values):,.0f}, n={runs}), "
                  f"{medians[side] * batch_size * BLOCK_SIZE * 2 / 1e9:.2f} GB/s of ids", flush=True)  # fmt: skip
        result[str(batch_size)] = {
            "batches_per_second": medians,
            "spread": {side: [min(values), max(values)] for side, values in rates.items()},
            "speedup": medians["ours"] / medians["original"],
        }
    return result


# Prints the peak memory of the largest process below it, in kB. What this script itself takes would count with it.
MEMORY_OF = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def memory_of_preparing(folder: Path, sizes: tuple[int, ...] = (100, 1000)) -> dict[str, int]:
    """Return the peak memory of the largest process, in MB; for JSON lines and for one large text."""
    result = {}
    for megabytes in sizes:
        corpus, text = folder / f"{megabytes}.jsonl", folder / f"{megabytes}.txt"
        write_corpus(corpus, megabytes)
        with corpus.open() as lines, text.open("w") as file:
            file.writelines(json.loads(line)["text"] + "\n\n\n" for line in lines)
        for path, words in ((corpus, []), (text, []), (text, ["--separator=\\n\\n\\n"])):
            command = [sys.executable, "-m", "nanogpt", "prepare", "built", f"--data_dir={folder}", f"--input={path}"]
            out = subprocess.run(
                [sys.executable, "-c", MEMORY_OF, *command, *words], stdout=subprocess.PIPE, check=True
            )
            name = f"{path.name}{', separated' if words else ''}"
            result[name] = int(out.stdout) // 1024
            print(f"preparing {name}: {result[name]} MB", flush=True)
            shutil.rmtree(folder / "built")
        corpus.unlink()
        text.unlink()
    return result


def memory_of_a_million_batches(dataset: Dataset) -> dict[str, int]:
    """Return the memory of this process that is not page cache of the data, in MB, before and after."""

    def own_memory() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) // 1024

    before = 0
    for step in range(1_000_000):
        starts = window_starts(len(dataset.train), BLOCK_SIZE, seed=0, step=step, rows=12)
        windows(dataset, "train", starts, BLOCK_SIZE)
        if step == 1000:
            before = own_memory()
    print(f"a million batches: {before} MB before, {own_memory()} MB after")
    return {"before_mb": before, "after_mb": own_memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--num_proc", type=int, default=os.cpu_count())
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "corpus.jsonl", arguments.megabytes)
        result: dict[str, Any] = {
            "n": arguments.runs,
            "tokenizing": tokenizing(arguments.original, folder / "corpus.jsonl", arguments.runs, arguments.num_proc),
            "loading": loading(arguments.original, folder / "ours", arguments.runs),
        }
        if arguments.memory:
            result["preparing"] = memory_of_preparing(folder)
            result["million_batches"] = memory_of_a_million_batches(open_dataset(folder / "ours"))
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
