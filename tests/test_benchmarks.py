"""`nanogpt bench`; and the page of benchmarks, which is made of their results."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanogpt.bench import bench
from nanogpt.data import open_dataset
from nanogpt.settings import BenchConfig
from tests.conftest import ROOT, Program, import_file


def test_the_page_shows_the_newest_results() -> None:
    """Nobody has written figures by hand, and every benchmark has a place."""
    bench = import_file(ROOT / "benchmarks" / "all.py")
    page = bench.PAGE.read_text("utf-8")
    assert all(f"<!-- bench:{name} -->" in page for name in bench.BENCHMARKS)
    records = [json.loads(line) for line in bench.RESULTS.read_text("utf-8").splitlines()]
    names = "|".join({record["benchmark"] for record in records})
    without_tables = re.sub(rf"(<!-- bench:({names}) -->\n).*?(<!-- end -->)", r"\1old\n\3", page, flags=re.DOTALL)
    assert bench.rewritten(page, records) == bench.rewritten(without_tables, records) == page


def test_the_gpu_benchmarks_start_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("tqdm", "tokenizers", "safetensors", "huggingface_hub", "transformers", "datasets", "matplotlib"):
    sys.modules[name] = None  # importing it fails
import bare, gpu, gpu_bytes, gpu_time_to_loss, nanogpt.train
bare.python_sources(bare.Path({str(tmp_path / "python")!r}), megabytes=1)
from nanogpt.tokenizer import ByteTokenizer
assert ByteTokenizer().has_ids_of(ByteTokenizer())  # as resuming asks
print(nanogpt.__file__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parents[1] == ROOT
    dataset = open_dataset(tmp_path / "python")
    assert min(len(dataset.train), len(dataset.val)) > 0
    assert dataset.tokenizer.end_of_text == 256


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
    assert summary["tokens_per_second"] == pytest.approx(2 * 2 * 8 / summary["ms"] * 1000)
    assert summary["peak_memory_bytes"] > 10**7
    assert float(result.stdout.partition("loss ")[2].split(",")[0]) == pytest.approx(10.8, abs=0.5)  # ln 50,304
    assert "aten::" in result.stdout
    assert Path("bench_log/trace.json").exists()


def test_real_data_is_timed(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(BenchConfig(**SMALL, data_dir=str(data_dir), dataset="tiny"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 2
