"""What several tests share: a tiny data set, a tiny recipe, and the programs as a person starts them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt.config import TrainConfig
from nanogpt.metrics import show_log_lines
from nanogpt.prepare import write_description
from nanogpt.tokenizer import CharTokenizer, Ids, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    """Tests run side by side and compare digits: one thread each, an empty folder, no progress bars, no trackers."""
    with pytest.MonkeyPatch.context() as patch:  # its own: a test that undoes its patches stays in its folder
        patch.chdir(tmp_path)
        torch.set_num_threads(1)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TQDM_DISABLE", "1")
        patch.setenv("WANDB_MODE", "disabled")
        show_log_lines()
        yield


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder with the data set `tiny`: 5,000 characters of a repeating, learnable text."""
    text = "the quick brown fox jumps over the lazy dog\n" * 130
    tokenizer = CharTokenizer(sorted(set(text)))
    write_dataset(tmp_path / "data" / "tiny", tokenizer, tokenizer.encode(text[:5000]), tokenizer.encode(text[5000:]))
    return tmp_path / "data"


@pytest.fixture
def recipe(data_dir: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A training config that takes a second: `recipe(max_iters=5)`."""

    def make(**settings: object) -> TrainConfig:
        values = {
            "out_dir": str(tmp_path / "out"),
            "data_dir": str(data_dir),
            "dataset": "tiny",
            "max_iters": 6,
            "eval_interval": 4,
            "eval_iters": 2,
            "gradient_accumulation_steps": 1,
            "batch_size": 4,
            "block_size": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "learning_rate": 3e-3,
            "min_lr": 3e-4,
            "warmup_iters": 2,
            "lr_decay_iters": 6,
            "device": "cpu",
            "dtype": "float32",
            "plot": False,
        }
        return TrainConfig(**{**values, **settings})  # type: ignore[arg-type]

    return make


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Start a program as a person does: `program("train.py", "--help")`, in an empty folder."""

    def run(
        script: str, *arguments: str, cwd: Path = tmp_path, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, *(["-m", "nanogpt"] if script == "nanogpt" else [str(ROOT / script)]), *arguments]
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        return subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def downloads() -> Path:
    """The folder of files that are not in the repository."""
    folder = os.environ.get("NANOGPT_DOWNLOADS")
    if not folder or not (Path(folder) / "tinyshakespeare.txt").exists():
        pytest.skip("NANOGPT_DOWNLOADS names no folder with tinyshakespeare.txt")
    return Path(folder)


def write_dataset(folder: Path, tokenizer: Tokenizer, train: Ids, val: Ids) -> None:
    """A data set of these ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in (("train", train), ("val", val)):
        ids.astype(tokenizer.dtype).tofile(folder / f"{name}.bin")
    write_description(folder, tokenizer, {"tokens": {"train": len(train), "val": len(val)}})


def random_ids(*shape: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    """Token ids that are the same everywhere."""
    return torch.from_numpy(np.random.default_rng(seed).integers(vocab_size, size=shape))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that several workers end together."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/test_readme.py", "tests/test_distributed.py")))
