import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from nanogpt import prepare as module
from nanogpt.data import open_dataset
from nanogpt.errors import ConfigError, DataError
from nanogpt.prepare import prepare
from nanogpt.programs import PrepareConfig
from tests.conftest import ROOT, Program

# what the original's data/shakespeare_char/prepare.py writes
ORIGINAL = {
    "train.bin": "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f",
    "val.bin": "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1",
    "meta.pkl": "6ee5a37533af83b67fcbe6b93705fde9e15e78bafe895f54b2cb2cb32534526c",
}


def test_shakespeare_char_is_the_originals_byte_for_byte(downloads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(PrepareConfig(name="shakespeare_char"))
    folder = Path("data/shakespeare_char")
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ORIGINAL} == ORIGINAL
    out = capsys.readouterr().out
    for line in ("vocabulary of 65 characters", "train has 1,003,854 tokens", "val has 111,540 tokens"):
        assert line in out
    prepare(PrepareConfig(name="shakespeare_char"))  # again, from the text kept beside it
    assert hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest() == ORIGINAL["train.bin"]


def test_shakespeare_in_gpt2s_tokens_has_the_known_size(downloads: Path) -> None:
    prepare(PrepareConfig(name="shakespeare"))
    dataset = open_dataset(Path("data/shakespeare"))
    assert (len(dataset.train), len(dataset.val)) == (301_966, 36_059)
    assert dataset.tokenizer.decode(dataset.train[:7].tolist()).startswith("First Citizen:\nBefore")


def test_pystdlib_is_split_by_file_and_reproducible() -> None:
    prepare(PrepareConfig(name="pystdlib", data_dir="a"))
    prepare(PrepareConfig(name="pystdlib", data_dir="b", num_proc=1))
    for name in ("train.bin", "val.bin", "dataset.json"):
        assert Path("a/pystdlib", name).read_bytes() == Path("b/pystdlib", name).read_bytes()
    dataset = open_dataset(Path("a/pystdlib"))
    description = dataset.description
    for split in ("train", "val"):
        ids = dataset.split(split)[:]
        assert len(ids) == description["bytes"][split] + description["documents"][split]
        assert int((ids == 256).sum()) == description["documents"][split]
    first = Path(description["sources"][0]["path"]).read_bytes()
    assert first in (dataset.train[: len(first)].astype("uint8").tobytes(), dataset.val[: len(first)].tobytes())
    assert 0.02 < len(dataset.val) / len(dataset.train) < 0.1


def test_own_text_of_few_lines() -> None:
    Path("own.txt").write_text("äöü\n" * 10, encoding="utf-8")
    prepare(PrepareConfig(name="mine", input=["own.txt"], tokenizer="char", val_fraction=0.1))
    dataset = open_dataset(Path("data/mine"))
    assert (len(dataset.train), len(dataset.val), dataset.tokenizer.vocab_size) == (36, 4, 4)


def test_known_data_sets_take_other_text_and_other_tokens() -> None:
    Path("own.txt").write_text("to be or not to be\n" * 10)
    prepare(PrepareConfig(name="shakespeare_char", input=["own.txt"]))
    assert open_dataset(Path("data/shakespeare_char")).tokenizer.name == "char"
    prepare(PrepareConfig(name="openwebtext", input=["own.txt"], tokenizer="byte", val_fraction=0.2))
    assert open_dataset(Path("data/openwebtext")).tokenizer.name == "byte"


def test_a_text_of_ones_own_in_the_place_of_shakespeare_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("data/shakespeare_char/input.txt")
    path.parent.mkdir(parents=True)
    path.write_text("years of work\n" * 20)
    prepare(PrepareConfig(name="shakespeare_char"))
    assert path.read_text() == "years of work\n" * 20
    assert open_dataset(path.parent).tokenizer.describe()["characters"] == "\n aefkorswy"
    assert "is not Tiny Shakespeare as published" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file or folder"), (b"\xff\xfe" * 50, "is not UTF-8 text"), (b"", "there is no text")],
)
def test_unusable_text_is_one_message(content: bytes | None, message: str) -> None:
    if content is not None:
        Path("own.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(PrepareConfig(name="shakespeare_char", input=["own.txt"]))
    assert not Path("data/shakespeare_char").exists()


def test_an_unknown_name_says_how_to_use_ones_own_text() -> None:
    with pytest.raises(ConfigError, match=r"'x'; for your own text: nanogpt prepare x --input=PATH .*pystdlib, shakes"):
        prepare(PrepareConfig(name="x"))
    with pytest.raises(ConfigError, match="--input does not apply"):
        prepare(PrepareConfig(name="pystdlib", input=["x"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"name": ""}, "which data set"), ({"name": "a/b"}, "name of a folder below data_dir"),
     ({"tokenizer": "bpe:100"}, "expected bpe:257"), ({"tokenizer": "nowhere.json"}, "expected char, byte, gpt2"),
     ({"val_fraction": 1.0}, "val_fraction=1.0"), ({"val_fraction": 0.0}, "between 0 and 1"),
     ({"num_proc": -1}, "num_proc=-1"), ({"input": [""]}, "input is empty"), ({"separator": "\\x"}, "separator=")],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], message: str) -> None:
    [problem] = PrepareConfig(**{"name": "x", **settings}).problems()
    assert message in problem


def test_openwebtext_says_what_it_takes_and_refuses_without(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    datasets = pytest.importorskip("datasets")
    usage = module.shutil.disk_usage(".")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    with pytest.raises(DataError, match=r"has 1 GB left, and (88|70) GB are needed.*--limit=10000.*--input=FOLDER"):
        prepare(PrepareConfig(name="openwebtext"))
    out = capsys.readouterr().out
    assert "OpenWebText takes about 70 GB in" in out
    assert "and 18 GB in data/openwebtext" in out

    def load_dataset(name: str, config: object, **options: object) -> object:
        assert (name, config, options) == ("Skylion007/openwebtext", None, {"split": "train", "streaming": True})
        return datasets.Dataset.from_dict({"text": [f"page {n}" for n in range(500)]})

    monkeypatch.undo()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare(PrepareConfig(name="openwebtext", limit=100, data_dir=str(Path.cwd() / "data"), val_fraction=0.1))
    dataset = open_dataset(Path("data/openwebtext"))
    assert sum(dataset.description["documents"].values()) == 100
    assert dataset.tokenizer.name == "gpt2"


def test_openwebtext_comes_from_a_folder_of_shards(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "openwebtext"
    folder.mkdir(parents=True)
    Path("shards").mkdir()
    for shard in range(2):
        lines = (json.dumps({"text": f"page {shard}-{n}"}) + "\n" for n in range(100))
        Path(f"shards/{shard}.jsonl").write_text("".join(lines))
    words = ["openwebtext", "--data_dir=data", "--input=shards", "--num_proc=2", "--val_fraction=0.1"]
    result = program("nanogpt", "prepare", *words)
    assert result.returncode == 0, result.stderr
    assert sum(open_dataset(folder).description["documents"].values()) == 200


def test_describe_shows_counts_sources_and_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.txt").write_text("to be or not to be\n" * 20)
    prepare(PrepareConfig(name="mine", input=["own.txt"], tokenizer="gpt2"))
    capsys.readouterr()
    prepare(PrepareConfig(name="mine", describe=True))
    out = capsys.readouterr().out
    for expected in ("gpt2 tokenizer (50257 entries), uint16", "bytes per token", "source: path own.txt, bytes 380",
                     "train begins: 1462:'to' 307:' be'"):  # fmt: skip
        assert expected in out
    with pytest.raises(DataError, match="there is no data set data/nothing"):
        prepare(PrepareConfig(name="nothing", describe=True))
    description = json.loads(Path("data/mine/dataset.json").read_text())
    for damage, message in (
        ({"sources": 3}, "is damaged"),
        ({"version": 99}, "newer version"),
        ({"bytes": []}, "is damaged"),
    ):
        Path("data/mine/dataset.json").write_text(json.dumps({**description, **damage}))
        with pytest.raises(DataError, match=message):
            prepare(PrepareConfig(name="mine", describe=True))


def test_every_data_set_has_a_door() -> None:
    assert {path.parent.name for path in ROOT.glob("data/*/prepare.py")} == set(module.DATASETS)
