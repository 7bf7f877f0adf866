import json
from pathlib import Path
from typing import Any

import pytest

from nanogpt.bench import bench
from nanogpt.errors import DataError
from nanogpt.settings import BenchConfig
from tests.conftest import Program

SMALL: dict[str, Any] = {
    "batch_size": 2, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "steps": 2, "warmup_steps": 1,
    "device": "cpu",
}  # fmt: skip


def test_bench_ends_in_one_line_of_json(program: Program) -> None:
    settings = [f"--{name}={value}" for name, value in SMALL.items()]
    result = program("bench.py", *settings, "--real_data=False", "--steps=3", "--profile",
                     "--gradient_accumulation_steps=2")  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["n"] == 3
    assert summary["ms"] > 0
    assert summary["tokens_per_second"] == pytest.approx(2 * 2 * 8 / summary["ms"] * 1000)
    assert summary["peak_memory_bytes"] > 10**7
    assert float(result.stdout.partition("loss ")[2].split(",")[0]) == pytest.approx(10.8, abs=0.5)  # ln 50,304
    assert "aten::" in result.stdout
    assert Path("bench_log/trace.json").exists()


def test_real_data_is_timed_and_checked(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**SMALL, "data_dir": str(data_dir), "dataset": "tiny"}
    bench(BenchConfig(**settings))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 2
    with pytest.raises(DataError, match="too few for block_size=6000"):
        bench(BenchConfig(**{**settings, "block_size": 6000}))
