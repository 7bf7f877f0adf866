"""The page of benchmarks is made of their results, and nothing else on it changes."""

import json
import re
import subprocess
import sys
from pathlib import Path

from nanogpt.data import open_dataset
from tests.conftest import ROOT, import_file


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
