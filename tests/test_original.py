"""The original's own programs and ours on each other's checkpoints, where a checkout of it is at hand."""

import shutil
from pathlib import Path

import pytest

from nanogpt import train
from nanogpt.evaluate import evaluate
from nanogpt.prepare import prepare
from nanogpt.sample import sample
from nanogpt.settings import EvalConfig, PrepareConfig, SampleConfig
from tests.conftest import Recipe
from tests.programs import Started

TINY = ["--device=cpu", "--compile=False", "--dtype=float32", "--eval_iters=1", "--eval_interval=5", "--batch_size=4",
        "--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=32", "--dropout=0.0"]  # fmt: skip


@pytest.fixture
def original(original: Path, tmp_path: Path, downloads: Path) -> Path:
    """A copy of the checkout, with Shakespeare prepared as it would."""
    shutil.copytree(original, tmp_path / "original", ignore=shutil.ignore_patterns(".git", "out*"))
    data = tmp_path / "original" / "data" / "shakespeare_char"
    prepare(PrepareConfig(name="shakespeare_char", data_dir=str(data.parent)))
    (data / "dataset.json").unlink()  # the original writes none
    return tmp_path / "original"


def run(folder: Path, *words: str) -> str:
    result = Started(list(words), folder).wait()
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_ours_in_theirs(original: Path, recipe: Recipe) -> None:
    train.train(recipe(dataset="shakespeare_char", data_dir=str(original / "data"), out_dir=str(original / "out-ours")))
    text = run(original, "sample.py", "--out_dir=out-ours", "--device=cpu", "--num_samples=2", "--max_new_tokens=20")
    assert text.count("---------------") == 2
    words = [*TINY, "--out_dir=out-ours", "--max_iters=8", "--log_interval=1", "--init_from=resume"]
    text = run(original, "train.py", "config/train_shakespeare_char.py", *words)
    assert "iter 6: loss" in text  # goes on after our 6 steps
    assert "iter 5: loss" not in text


def test_theirs_in_ours(
    original: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, "--out_dir=out-theirs", "--max_iters=5", "--always_save_checkpoint=True"]
    run(original, "train.py", "config/train_shakespeare_char.py", *words)
    monkeypatch.chdir(original)
    sample(SampleConfig(out_dir="out-theirs", device="cpu", num_samples=2, max_new_tokens=20))
    assert capsys.readouterr().out.count("---------------") == 2
    assert 3 < evaluate(EvalConfig(out_dir="out-theirs", device="cpu", dtype="float32"))["loss"] < 4.5
    resumed = recipe(dataset="shakespeare_char", data_dir="data", out_dir="out-theirs", init_from="resume", max_iters=9)
    assert train.train(resumed) == 0
