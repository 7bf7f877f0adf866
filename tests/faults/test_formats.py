"""Files from outside, damaged or hostile: each is read, or refused with one message. No code runs, no memory bursts."""

import json
import os
import pickle
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt import train
from nanogpt.checkpoint import load_checkpoint
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data import evaluation_batch, open_dataset
from nanogpt.errors import CheckpointError, DamagedError, UserError
from nanogpt.gguf import load_gguf, save_gguf
from nanogpt.huggingface import load_pretrained
from nanogpt.model import GPT
from nanogpt.sample import sample
from nanogpt.settings import SampleConfig
from tests.conftest import random_ids
from tests.test_huggingface import TOKENIZER, write_model

Recipe = Callable[..., TrainConfig]
TRIES = 60


def damaged(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """What chance, a disk or a person with bad intentions makes of a file."""
    for _ in range(TRIES):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 20])):
            place = rng.randrange(len(changed))
            match rng.randrange(4):
                case 0:
                    changed[place] = rng.randrange(256)
                case 1:
                    del changed[place : place + rng.randrange(1, 50)]
                case 2:
                    changed[place:place] = rng.randbytes(rng.randrange(1, 50))
                case _:
                    changed[place : place + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, b"9" * 8])
            if not changed:
                break
        yield bytes(changed)
    yield from (b"", b"\x00", b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff" * 1000, content * 2)


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """8 GB at most for this process: a bomb goes off as a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (min(8 << 30, before[1]) if before[1] > 0 else 8 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def try_all(path: Path, use: Callable[[], Any]) -> None:
    """Damage `path` in many ways; each time `use` works, or says in one message why not."""
    content, messages = path.read_bytes(), []
    for changed in damaged(content, random.Random(0)):
        path.write_bytes(changed)
        try:
            use()
        except UserError as error:
            messages.append(str(error))
    path.write_bytes(content)
    use()
    assert len(messages) > 5
    assert all(10 < len(message) < 2000 for message in messages)


@pytest.mark.parametrize("file", ["train.bin", "dataset.json", "meta.pkl"])
def test_data_sets(file: str, data_dir: Path) -> None:
    folder = data_dir / "tiny"
    if file == "meta.pkl":
        (folder / "dataset.json").unlink()  # then it counts, as in the original's data sets

    def use() -> None:
        evaluation_batch(open_dataset(folder), "train", 0, 16, 64)

    try_all(folder / file, use)


def test_checkpoints(recipe: Recipe) -> None:
    config = recipe(max_iters=1)
    train.train(config)
    path = Path(config.out_dir, "ckpt.pt")
    try_all(
        path, lambda: sample(SampleConfig(out_dir=config.out_dir, checkpoint="last", num_samples=1, max_new_tokens=1))
    )


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_folders_of_hugging_face(file: str, tmp_path: Path) -> None:
    write_model(tmp_path / "m", "llama")
    x = random_ids(1, 8, vocab_size=300)
    try_all(tmp_path / "m" / file, lambda: load_pretrained(str(tmp_path / "m"))[0](x))


def test_gguf_files(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    shape = GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=8, architecture="llama", bias=False)
    save_gguf(tmp_path / "m.gguf", "m", GPT(shape), TOKENIZER, "float32")
    x = random_ids(1, 8, vocab_size=200)
    try_all(tmp_path / "m.gguf", lambda: load_gguf(tmp_path / "m.gguf")[0](x))


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_no_pickle_runs_code(recipe: Recipe, data_dir: Path, tmp_path: Path) -> None:
    train.train(recipe(max_iters=1))
    path = Path(recipe().out_dir, "ckpt.pt")
    content = torch.load(path, weights_only=True)
    torch.save({**content, "config": Bomb()}, path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        train.train(recipe(init_from="resume"))
    (data_dir / "tiny" / "dataset.json").unlink()
    (data_dir / "tiny" / "meta.pkl").write_bytes(pickle.dumps({"itos": Bomb(), "stoi": {}, "vocab_size": 1}))
    with pytest.raises(UserError):
        open_dataset(data_dir / "tiny")
    write_model(tmp_path / "m", "llama")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="a pickle can run any code"):
        load_pretrained(str(tmp_path / "m"))
    assert not list(tmp_path.rglob("exploded"))


def test_no_shape_allocates_more_than_the_weights_hold(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "llama")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    for name, value in {"num_hidden_layers": 10**9, "vocab_size": 10**12, "intermediate_size": 10**13}.items():
        file.write_text(json.dumps({**config, name: value}))
        with pytest.raises(UserError):
            load_pretrained(str(tmp_path / "m"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_checkpoints_run_no_code_and_are_told_from_damaged_ones(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemWriter, save

    save({"model.w": torch.ones(3)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    (tmp_path / "run.json").write_text(json.dumps({"nanogpt": {"model_config": {"tied_head": False}}}))
    for name in (".metadata", "__0_0.distcp"):
        content = (tmp_path / name).read_bytes()
        for changed in damaged(content, random.Random(0)):
            (tmp_path / name).write_bytes(changed)
            with suppress(CheckpointError):
                load_checkpoint(tmp_path)
        (tmp_path / name).write_bytes(content)
    for hostile in (pickle.dumps(Bomb()), b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."):
        (tmp_path / ".metadata").write_bytes(hostile)
        with pytest.raises(DamagedError, match=r"(posix|os)\.system has no place in a checkpoint"):
            load_checkpoint(tmp_path)
    assert not Path("exploded").exists()
