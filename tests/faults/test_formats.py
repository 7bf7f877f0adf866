"""Files from outside, damaged or hostile: each is read, or refused with one message. No code runs, no memory bursts."""

import json
import os
import pickle
import random
import resource
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt import checkpoint, sharded, train
from nanogpt.config import TrainConfig
from nanogpt.data import gather, open_dataset, window_starts
from nanogpt.errors import UserError
from nanogpt.infer.sample import sample
from nanogpt.interop.huggingface import load_pretrained
from nanogpt.programs import SampleConfig
from tests.conftest import random_ids
from tests.interop.test_shapes import write_model

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
        dataset = open_dataset(folder)
        starts = window_starts(len(dataset.train), 16, seed=0, step=0, rows=64)
        gather(dataset.train, starts, 16, dataset.tokenizer.vocab_size)

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
    try_all(tmp_path / "m" / file, lambda: load_pretrained(str(tmp_path / "m")).model(x))


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
        checkpoint.load(path)
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


def test_no_shape_allocates_more_than_the_weights_hold(recipe: Recipe, tmp_path: Path) -> None:
    train.train(recipe(max_iters=1))
    path = Path(recipe().out_dir, "ckpt.pt")
    content = torch.load(path, weights_only=True)
    for name, value in {"n_layer": 10**9, "vocab_size": 10**12, "block_size": 10**12, "n_hidden": 10**14}.items():
        shape = {**content["nanogpt"]["model_config"], name: value}
        torch.save({**content, "nanogpt": {**content["nanogpt"], "model_config": shape}}, path)
        with pytest.raises(UserError):
            sample(SampleConfig(out_dir=recipe().out_dir, checkpoint="last", num_samples=1, max_new_tokens=1))
    write_model(tmp_path / "m", "llama")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    for name, value in {"num_hidden_layers": 10**9, "vocab_size": 10**12, "intermediate_size": 10**13}.items():
        file.write_text(json.dumps({**config, name: value}))
        with pytest.raises(UserError):
            load_pretrained(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: torch.zeros(1).expand(w.shape), "no plain tensor"),
        (lambda w: w.to_sparse(), "no plain tensor"),
        (lambda w: w.long(), "no plain tensor"),
        (lambda w: 5, "AttributeError"),
    ],
)
def test_weights_that_no_kernel_expects_are_refused(change: Callable[..., Any], message: str, recipe: Recipe) -> None:
    train.train(recipe(max_iters=1))
    path = Path(recipe().out_dir, "ckpt.pt")
    content = torch.load(path, weights_only=True)
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = content["model"][name]
    torch.save({**content, "model": {**content["model"], name: change(weight)}}, path)
    with pytest.raises(UserError, match=f"is no checkpoint of a GPT: .*{message}"):
        checkpoint.load(path)
    torch.save({**content, "model": {**content["model"], name: weight.T.contiguous().T}}, path)
    loaded = checkpoint.load(path).weights[name]
    assert loaded.is_contiguous()
    assert torch.equal(loaded, weight)


def test_a_compressed_checkpoint_is_no_checkpoint(recipe: Recipe) -> None:
    train.train(recipe(max_iters=1))
    path = Path(recipe().out_dir, "ckpt.pt")
    torch.save({**torch.load(path, weights_only=True), "more": torch.zeros(1 << 22)}, path)
    checkpoint.load(path)
    shutil.move(path, "stored.pt")
    with zipfile.ZipFile("stored.pt") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert path.stat().st_size < 1 << 20  # 16 MB in less than one
    with pytest.raises(UserError, match="compressed"):
        checkpoint.load(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shares_of_checkpoints_lie_in_their_folder(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemWriter, save

    folder = tmp_path / "1"
    save({"model.w": torch.ones(3)}, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "run.json").write_text('{"iter_num": 1}')
    assert sharded.damage(folder) is None
    (tmp_path / "share").write_bytes(next(folder.glob("*.distcp")).read_bytes())
    content = (folder / ".metadata").read_bytes()
    for field, value in {
        "relative_path": "../share", "length": 10**12, "offset": -1, " relative_path": "/dev/zero",
    }.items():  # fmt: skip
        metadata = pickle.loads(content)
        setattr(next(iter(metadata.storage_data.values())), field.strip(), value)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises((KeyError, ValueError)):
            sharded.damage(folder)
        assert checkpoint.is_damaged(folder)
    (folder / ".metadata").write_bytes(b"\x80\x04Nr\x00\x87\x93\x03.")
    tracemalloc.start()
    assert checkpoint.is_damaged(folder)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()
