"""What several tests share: a tiny data set, a tiny recipe, and the programs as a person starts them."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt import train
from nanogpt.config import TrainConfig
from nanogpt.files import write_json
from nanogpt.huggingface import save_pretrained
from nanogpt.metrics import show_log_lines
from nanogpt.model import GPT
from nanogpt.tokenizer import CharTokenizer, Ids, Tokenizer, write_meta
from tests.programs import ROOT as ROOT
from tests.programs import Started

Recipe = Callable[..., TrainConfig]
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
    for started in list(Started.running):  # by a test that has failed
        started.end()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder with the data set `tiny`."""
    write_fox(tmp_path / "data" / "tiny")
    return tmp_path / "data"


def write_fox(folder: Path) -> None:
    """A data set: 5,000 characters of a repeating, learnable text, and some to evaluate on."""
    text = "the quick brown fox jumps over the lazy dog\n" * 130
    tokenizer = CharTokenizer(sorted(set(text)))
    write_dataset(folder, tokenizer, tokenizer.encode(text[:5000]), tokenizer.encode(text[5000:]))


@pytest.fixture
def recipe(data_dir: Path, tmp_path: Path) -> Recipe:
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
def trained(recipe: Recipe) -> Path:
    """The folder of a run of two steps."""
    train.train(recipe(max_iters=2))
    return Path(recipe().out_dir)


@pytest.fixture
def program() -> Program:
    """Start a program as a person does: `program("train.py", "--help")`, in an empty folder."""

    def run(script: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        words = ["-m", "nanogpt"] if script == "nanogpt" else [str(ROOT / script)]
        return Started([*words, *arguments], **environment).wait()

    return run


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can become larger than 20,000 bytes, as where the disk is full."""
    resource = pytest.importorskip("resource", reason="no limits on file sizes here")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def downloads() -> Path:
    """The folder of files that are not in the repository."""
    folder = os.environ.get("NANOGPT_DOWNLOADS")
    if not folder or not (Path(folder) / "tinyshakespeare.txt").exists():
        pytest.skip("NANOGPT_DOWNLOADS names no folder with tinyshakespeare.txt")
    return Path(folder)


@pytest.fixture
def original() -> Path:
    """A checkout of the original."""
    folder = os.environ.get("NANOGPT_ORIGINAL")
    if not folder:
        pytest.skip("NANOGPT_ORIGINAL names no checkout of karpathy/nanoGPT")
    return Path(folder)


def import_file(path: Path) -> Any:
    """A module that is no part of a package."""
    spec = importlib.util.spec_from_file_location(f"imported_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def write_dataset(folder: Path, tokenizer: Tokenizer, train: Ids, val: Ids) -> None:
    """A data set of these ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in (("train", train), ("val", val)):
        ids.astype(tokenizer.dtype).tofile(folder / f"{name}.bin")
    tokens = {"train": len(train), "val": len(val)}
    about = {"dtype": tokenizer.dtype.name, "tokens": tokens, "tokenizer": tokenizer.describe()}
    write_json(folder / "dataset.json", about)
    if tokenizer.kind == "char":
        write_meta(folder / "meta.pkl", tokenizer)


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """A folder in Hugging Face's format."""
    folder.mkdir(exist_ok=True)
    save_pretrained(folder, model, tokenizer, torch.float32)


def random_ids(*shape: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    """Token ids that are the same everywhere."""
    return torch.from_numpy(np.random.default_rng(seed).integers(vocab_size, size=shape))


def write_llama(folder: Path, starts: bool = True) -> dict[str, int]:
    """A tiny Llama 2 in transformers' format, and the ids of its tokens: bytes for what has none, words with blanks."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    words = ["▁Hello", "▁world", "▁is", "▁true"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *sorted(set("".join(words)))]
    merges = [(word[:n], word[n]) for word in words for n in range(1, len(word))]
    ids = {piece: n for n, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    engine = Tokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    engine.decoder = decoders.Sequence(back)
    if starts:
        engine.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=engine, **named).save_pretrained(folder)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    shape |= {"vocab_size": len(ids), "max_position_embeddings": 512, "initializer_range": 0.2}
    config = transformers.LlamaConfig(**shape, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return ids


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that several workers end together."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/test_readme.py", "tests/test_distributed.py")))
