"""How `nanogpt serve` bears many clients at a time: times, refusals, and its memory.

    python benchmarks/serve.py --run=RUN [--clients=200] [--requests=10000]

A server on loopback, in a process of its own; clients on connections of their own, each with one request after another:
streams of mixed lengths, of which a third hang up midway. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bare import ROOT


@dataclass
class Seen:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)  # seconds from a request to its first token
    gaps: list[float] = field(default_factory=list)  # seconds from a token to the next
    done: int = 0
    left: int = 0  # hung up midway
    refused: int = 0  # answered with 429
    errors: list[str] = field(default_factory=list)


def start(run: str) -> tuple[subprocess.Popen[str], int, str]:
    """Start a server; return its process, its port and its model's name."""
    command = [sys.executable, "-m", "nanogpt", "serve", run, "--port=0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    name = ""
    for line in process.stdout:
        print(line, end="")
        name = found[1] if (found := re.search(r"as '(.+)';", line)) else name
        if found := re.match(r"page at http://[\d.]+:(\d+)", line):
            return process, int(found[1]), name
    raise SystemExit("the server did not start")


def resident_mb(pid: int) -> float:
    """Return the memory of a process, in MB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


async def get(port: int, path: str) -> str:
    """Return what the server answers to a GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return answer


async def ask(port: int, model: str, draw: random.Random, seen: Seen) -> None:
    """Make one request, and read to its end or until the client hangs up."""
    count = draw.randint(1, 64)
    patience = draw.randint(0, count) if draw.random() < 1 / 3 else None  # events until it hangs up
    prompt = "".join(draw.choice("abcdefghij \n") for _ in range(draw.randint(1, 200)))
    content = {"model": model, "prompt": prompt, "max_tokens": count, "stream": True}
    body = json.dumps(content | {"truncate_prompt_tokens": -1})
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json"
    began = latest = time.perf_counter()
    events = 0
    try:
        writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        status = (await reader.readline()).split()[1:2]
        if status == [b"429"]:
            seen.refused += 1
            await reader.read()
            await asyncio.sleep(0.05)
            return
        if status != [b"200"]:
            seen.errors.append(f"status {status}")
            return
        while True:
            if events == patience:
                seen.left += 1
                return
            line = await reader.readline()
            if not line:
                seen.errors.append("the stream ended early")
                return
            if line.startswith(b"data: [DONE]"):
                seen.done += 1
                return
            if line.startswith(b'data: {"error'):
                seen.errors.append(line.decode())
                return
            if line.startswith(b"data: "):
                now = time.perf_counter()
                (seen.gaps if events else seen.first).append(now - latest)
                latest = now
                events += 1
    except OSError as error:
        seen.errors.append(f"{error!r} after {time.perf_counter() - began:.1f} s")
    finally:
        writer.close()


async def load(port: int, model: str, clients: int, requests: int, seed: int) -> Seen:
    """Make so many requests, from so many clients at a time."""
    seen, numbers = Seen(), iter(range(requests))

    async def client() -> None:
        for number in numbers:
            await ask(port, model, random.Random(seed + number), seen)

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen


async def is_idle(port: int) -> bool:
    """Return whether the server comes to rest within ten seconds."""
    for _ in range(100):
        metrics = await get(port, "/metrics")
        if "nanogpt_rows_busy 0\n" in metrics and "nanogpt_waiting 0\n" in metrics:
            return True
        await asyncio.sleep(0.1)
    return False


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    return {f"p{q}": round(1000 * float(np.percentile(seconds, q)), 2) for q in (50, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the run folder of a small model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    process, port, model = start(os.path.abspath(arguments.run))
    memory = []
    try:
        total = Seen()
        began = time.perf_counter()
        for part in range(5):
            seen = asyncio.run(load(port, model, arguments.clients, arguments.requests // 5, part * 10**6))
            for name, value in vars(seen).items():
                setattr(total, name, getattr(total, name) + value)
            idle = asyncio.run(is_idle(port))
            memory.append(round(resident_mb(process.pid), 1))
            print(f"{(part + 1) * (arguments.requests // 5):,} requests: {memory[-1]} MB, idle {idle}", flush=True)
        seconds = time.perf_counter() - began
    finally:
        process.terminate()
    for error in total.errors[:5]:
        print(error)
    result = {
        "clients": arguments.clients,
        "done": total.done,
        "hung_up": total.left,
        "refused": total.refused,
        "errors": len(total.errors),
        "seconds": round(seconds, 1),
        "tokens_per_second": round((len(total.first) + len(total.gaps)) / seconds),
        "first_token_ms": milliseconds(total.first),
        "next_token_ms": milliseconds(total.gaps),
        "memory_mb": memory,
        "idle": idle,
        "exit_code": process.wait(60),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
