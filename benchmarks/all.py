"""Every benchmark that this machine allows, one after the other, and the tables of docs/performance.md made of them.

    make bench ORIGINAL=FOLDER [ONLY=throughput,decode]
    python benchmarks/all.py --original=FOLDER [--only=throughput,decode]

FOLDER is a checkout of karpathy/nanoGPT. Half an hour on two cores. Results are added to benchmarks/results.jsonl, one
JSON object a line, with date and machine; between `<!-- bench:NAME -->` and `<!-- end -->` the page then has the newest
of each. What can't run here is named with the reason, and its old table stays.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results.jsonl"
RUN = "out-shakespeare-char-fast"
MADE_BY = {  # what a benchmark needs, and what makes it
    "data/shakespeare_char/dataset.json": ["data/shakespeare_char/prepare.py"],
    f"{RUN}/best.pt": ["train.py", "config/train_shakespeare_char_fast.py"],
}


def table(*rows: list[str]) -> str:
    """Return a table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def spread(median: float, low: float, high: float, digits: int = 0) -> str:
    """Return a text such as `42.9 (42.1 to 43.7)`."""
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def spread_of(values: list[float], digits: int = 0) -> str:
    return spread(statistics.median(values), min(values), max(values), digits)


def throughput(result: dict[str, Any]) -> str:
    sides = ["original", "original, compiled", "ours"]
    rows = [["tokens/s of training", *sides, "ours over the better original", "share of the peak"]]
    for shape, row in result["rows"].items():
        cells = [spread(row["tokens_per_second"][side], *row["spread"][side]) for side in sides]
        rows.append([shape, *cells, f"**{row['ratio']:.2f}**", f"{row['peak_fraction']:.0%}"])
    if result["memory"]:
        gigabytes = [f"{result['memory'][side] / 1e9:.2f} GB" for side in ("original", "ours")]
        row = ["124M, context 1024: peak memory", gigabytes[0], "", gigabytes[1], f"{result['memory_ratio']:.2f}", ""]
        rows.append(row)
    return table(*rows)


def time_to_loss(result: dict[str, Any]) -> str:
    ours = [spread_of(result["seconds_ours_all"], 2), f"{result['loss_mean']:.4f}", f"{result['steps']:,}"]
    rows = [["", "seconds, whole process", "loss over the whole validation set", "steps"]]
    if result["seconds_original"]:
        rows.append(["original", f"{result['seconds_original']:.1f}", f"{result['loss_original']:.4f}", ""])
    elif result["loss_to_reach"]:
        rows.append(["original, as it says itself", "180 on an A100", f"{result['loss_to_reach']:.4f}", ""])
    rows.append(["ours", *ours])
    if result["speedup"]:
        rows.append(["original / ours", f"**{result['speedup']:.1f}**", "", ""])
    return table(*rows)


def decode(result: dict[str, Any]) -> str:
    rows = [["", "one row, tokens/s", "16 rows, tokens/s", "first token of a prompt of 900, s"]]
    for side, values in result["all"]["batch1"].items():
        batched, first = (result["all"][name].get(side) for name in ("batch16", "first_token"))
        cells = [spread_of(values, 1), spread_of(batched) if batched else "", spread_of(first, 3) if first else ""]
        rows.append([side, *cells])
    return table(*rows)


def data(result: dict[str, Any]) -> str:
    sides = ["original", "ours"]
    rows = [["", *sides, "ours over the original"]]
    named = {"GPT-2's tokens of 60 MB, tokens/s": (result["tokenizing"], "tokens_per_second")}
    named |= {f"batches of {n} x 1024 a second": (row, "batches_per_second") for n, row in result["loading"].items()}
    for name, (row, key) in named.items():
        cells = [spread(row[key][side], *row["spread"][side]) for side in sides]
        rows.append([name, *cells, f"**{row['speedup']:.1f}**"])
    return table(*rows)


def scale(result: dict[str, Any]) -> str:
    rows = [["", "ms per step", "cost of being two", "peak memory of a process", "planned"]]
    names = {"one": "one process", "ddp": "two processes, DDP", "fsdp": "two processes, FSDP"}
    for side, name in names.items():
        seconds = [result[f"{side}_seconds"], *result[f"{side}_spread"]]
        cells = [spread(*(1000 * value for value in seconds))]
        cells.append(f"{result[f'{side}_overhead']:.1%}" if side != "one" else "")
        cells += [f"{result[f'{side}_{what}_bytes'] / 1e6:,.0f} MB" for what in ("peak", "planned")]
        rows.append([name, *cells])
    return table(*rows)


def serve(result: dict[str, Any]) -> str:
    first, following = (
        f"{result[f'{n}_token_ms']['p50']} / {result[f'{n}_token_ms']['p99']}" for n in ("first", "next")
    )
    memory = f"{result['memory_mb'][0]} to {result['memory_mb'][-1]} MB"
    outcomes = [f"{result[name]:,}" for name in ("done", "hung_up", "refused", "errors", "tokens_per_second")]
    head = ["done", "hung up", "refused", "errors", "tokens/s", "first token, ms (p50 / p99)", "next", "memory"]
    return table(head, [*outcomes, first, following, memory])


def checkpoint(result: dict[str, Any]) -> str:
    head = [f"one checkpoint of {result['checkpoint_gb']:.2f} GB every {result['steps']} steps", "cost"]
    median, low, high = (100 * value for value in (result["overhead"], *result["overhead_spread"]))
    return table(head, ["in per cent of the training time, beside the copy", spread(median, low, high, 1)])


@dataclass(frozen=True)
class Benchmark:
    """A script, how its result is shown, and what it needs."""

    words: str
    show: Callable[[dict[str, Any]], str]
    needs: tuple[str, ...] = ()
    original: bool = False
    only_if_named: bool = False  # it takes too long for every time


SHAKESPEARE, FAST = MADE_BY
BENCHMARKS = {
    "throughput": Benchmark("throughput.py --rounds=5", throughput, original=True),
    "small": Benchmark("time_to_loss.py --target=small --seeds=5", time_to_loss, (SHAKESPEARE,), True),
    "a100": Benchmark("time_to_loss.py --target=a100 --seeds=5", time_to_loss, (SHAKESPEARE,), only_if_named=True),
    "decode": Benchmark(f"decode.py --rounds=5 --run={RUN}", decode, (SHAKESPEARE, FAST), True),
    "data": Benchmark("data.py --runs=3", data, original=True),
    "scale": Benchmark("scale.py --rounds=5", scale),
    "serve": Benchmark(f"serve.py --run={RUN} --requests=2000", serve, (SHAKESPEARE, FAST)),
    "checkpoint": Benchmark("checkpoint.py --runs=5", checkpoint),
}


def machine() -> str:
    """Return what the figures are of."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", information.read_text()) if information.exists() else None
    name = " ".join(found[1].replace("(R)", "").split()) if found else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    units = {"AMX": "amx_tile", "AVX512-BF16": "avx512_bf16", "AVX512": "avx512_f", "AVX2": "avx2"}
    best = next((unit for unit, flag in units.items() if capabilities.get(flag)), "no AVX")
    return f"{name} ({best}), {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def why_not(benchmark: Benchmark, original: Path | None) -> str:
    """Return what keeps it from running here, or nothing; what it needs is made first."""
    if benchmark.original and not original:
        return "it needs --original=FOLDER, a checkout of karpathy/nanoGPT"
    for path in benchmark.needs:
        if not (ROOT / path).exists():
            made = subprocess.run([sys.executable, *MADE_BY[path]], cwd=ROOT, check=False)
            if made.returncode:
                return f"`python {' '.join(MADE_BY[path])}` failed, so there is no {path}"
    return ""


def measure(benchmark: Benchmark, original: Path | None) -> dict[str, Any] | None:
    """Return what a benchmark says in its last line; None if it failed. Everything that it prints passes through."""
    words = [sys.executable, "-u", *f"benchmarks/{benchmark.words}".split()]
    words += [f"--original={original}"] if benchmark.original else []
    last = ""
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line
    return None if process.returncode else json.loads(last)


def rewritten(page: str, records: list[dict[str, Any]]) -> str:
    """Return the page with the tables of these records; of several of a benchmark the last one counts."""
    for record in records:
        benchmark = BENCHMARKS[record["benchmark"]]
        words = benchmark.words + (" --original=FOLDER" if benchmark.original else "")
        about = f"{record['date']}, {record['machine']}; `python benchmarks/{words}`, {record['seconds']:.0f} s"
        block = f"{benchmark.show(record['result'])}\n\n{about}\n"
        before, begin, after = page.partition(f"<!-- bench:{record['benchmark']} -->\n")
        _, end, rest = after.partition("<!-- end -->")
        if not end:
            raise SystemExit(f"docs/performance.md has no <!-- bench:{record['benchmark']} --> ... <!-- end -->")
        page = before + begin + block + end + rest
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=lambda text: Path(text).resolve() if text else None)
    parser.add_argument("--only", default="", help=f"of {', '.join(BENCHMARKS)}; separated by commas")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.only.split(",") if name]
    if unknown := set(chosen) - set(BENCHMARKS):
        parser.error(f"--only: no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    left_out = {}
    for name, benchmark in BENCHMARKS.items():
        if chosen and name not in chosen:
            continue
        if benchmark.only_if_named and not chosen:
            left_out[name] = f"it takes long; --only={name}"
        elif not (reason := why_not(benchmark, arguments.original)):
            print(f"\n{name}: python benchmarks/{benchmark.words}", flush=True)
            began = time.perf_counter()
            result = measure(benchmark, arguments.original)
            if result is None:
                left_out[name] = "it failed; see above"
                continue
            date = datetime.date.today().isoformat()
            seconds = round(time.perf_counter() - began, 1)
            record = {"benchmark": name, "date": date, "machine": machine(), "seconds": seconds, "result": result}
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            PAGE.write_text(rewritten(PAGE.read_text("utf-8"), [record]), "utf-8")
        else:
            left_out[name] = reason
    for name, reason in left_out.items():
        print(f"{name} was left out: {reason}")
    sys.exit(any("failed" in reason for reason in left_out.values()))


if __name__ == "__main__":
    main()
