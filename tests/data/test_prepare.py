import hashlib
import json
from pathlib import Path

import pytest

from nanogpt.config import PrepareConfig
from nanogpt.data import prepare as module
from nanogpt.data.prepare import prepare
from nanogpt.data.tokens import open_dataset
from nanogpt.errors import ConfigError, DataError

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
    prepare(PrepareConfig(name="pystdlib", data_dir="b"))
    for name in ("train.bin", "val.bin", "dataset.json"):
        assert Path("a/pystdlib", name).read_bytes() == Path("b/pystdlib", name).read_bytes()
    dataset = open_dataset(Path("a/pystdlib"))
    sources = json.loads(Path("a/pystdlib/dataset.json").read_text())["sources"]
    for split in ("train", "val"):
        files = [source for source in sources if source["split"] == split]
        ids = dataset.split(split)
        assert len(ids) == sum(file["bytes"] for file in files) + len(files)
        assert int((ids == 256).sum()) == len(files)
        text = ids[: files[0]["bytes"]].astype("uint8").tobytes()
        assert hashlib.sha256(text).hexdigest() == files[0]["sha256"]
    assert 0.02 < len(dataset.val) / len(dataset.train) < 0.1


def test_own_text_of_few_lines(tmp_path: Path) -> None:
    source = tmp_path / "own.txt"
    source.write_text("äöü\n" * 10, encoding="utf-8")
    prepare(PrepareConfig(name="shakespeare_char", input=str(source)))
    dataset = open_dataset(Path("data/shakespeare_char"))
    assert (len(dataset.train), len(dataset.val), dataset.tokenizer.vocab_size) == (36, 4, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read --input="), (b"\xff\xfe" * 50, "is not UTF-8 text"), (b"", "0 characters: too few")],
)
def test_unusable_text_is_one_message(tmp_path: Path, content: bytes | None, message: str) -> None:
    source = tmp_path / "own.txt"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(PrepareConfig(name="shakespeare_char", input=str(source)))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown data set 'x'; known: pystdlib, shakespeare_char, shakespeare"):
        prepare(PrepareConfig(name="x"))
    with pytest.raises(ConfigError, match="--input does not apply"):
        prepare(PrepareConfig(name="pystdlib", input="x"))


def test_every_data_set_has_a_door() -> None:
    root = Path(__file__).resolve().parents[2]
    assert {path.parent.name for path in root.glob("data/*/prepare.py")} == set(module.DATASETS)
