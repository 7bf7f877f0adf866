import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt.data import Tokens, is_prepared, open_dataset
from nanogpt.errors import DataError
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, read_meta, write_meta
from tests.conftest import write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = CharTokenizer("abc")
    write_dataset(tmp_path / "set", tokenizer, tokenizer.encode("abccab"), tokenizer.encode("bb"))
    return tmp_path / "set"


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    dataset = open_dataset(folder)
    assert dataset.train[:].tolist() == [0, 1, 2, 2, 0, 1]
    assert dataset.split("val")[:].tolist() == [1, 1]
    assert dataset.tokenizer.describe() == {"kind": "char", "characters": "abc"}
    assert np.fromfile(folder / "train.bin", dtype="<u2").tolist() == [0, 1, 2, 2, 0, 1]
    description = json.loads((folder / "dataset.json").read_text())
    assert description["tokens"] == {"train": 6, "val": 2}
    with (folder / "meta.pkl").open("rb") as file:
        meta = pickle.load(file)
    assert meta == {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}


def test_a_data_set_of_the_original_opens(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        np.array([1, 0], dtype="<u2").tofile(tmp_path / name)
    assert is_prepared(tmp_path)
    assert isinstance(open_dataset(tmp_path).tokenizer, GPT2Tokenizer)
    write_meta(tmp_path / "meta.pkl", CharTokenizer("xy"))
    dataset = open_dataset(tmp_path)
    assert dataset.tokenizer.decode(dataset.train[:].tolist()) == "yx"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train.bin").unlink(), "cannot read"),
        (lambda f: (f / "train.bin").write_bytes(b""), "has 0 bytes"),
        (lambda f: (f / "train.bin").write_bytes(b"123"), "has 3 bytes, which is no whole number of uint16"),
        (lambda f: (f / "train.bin").write_bytes(b"1234"), "holds 2 tokens, but dataset.json promises 6"),
        (lambda f: (f / "dataset.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "dataset.json").write_bytes(b"\xff"), "cannot be read"),
        (lambda f: (f / "dataset.json").write_text("[]"), "does not describe a data set"),
        (lambda f: (f / "dataset.json").write_text('{"tokens": {}}'), "unknown tokenizer"),
        (
            lambda f: (f / "dataset.json").write_text('{"tokens": {}, "tokenizer": {"kind": "byte"}, "dtype": "O"}'),
            "dtype is",
        ),
    ],
)
def test_damage_is_one_message(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(DataError) as caught:
        open_dataset(folder)
    assert message in str(caught.value)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch attacked",)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Attack()), pickle.dumps({"itos": Attack(), "vocab_size": 1}), b"", b"\x80\x04.", pickle.dumps([1]),
     pickle.dumps({"vocab_size": 10**9, "itos": {}}), pickle.dumps({"vocab_size": 1, "itos": 5}),
     pickle.dumps({"itos": {0: "a"}}), pickle.dumps({"vocab_size": 1, "itos": ["a" * 10**6]}),
     pickle.dumps({"vocab_size": np.float64(1)}), pickle.dumps({"vocab_size": np.array([1])}),
     b"\x80\x04Nr\x00\x87\x93\x03.", b"\x80\x05\x8d" + b"\xff" * 7 + b"\x7f.", b"\x80\x05\x96\0\0\0\x10\0\0\0\0."],
)  # fmt: skip
def test_a_hostile_or_broken_meta_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "meta.pkl").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match="is no vocabulary"):
        read_meta(tmp_path / "meta.pkl")
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()
    assert not Path("attacked").exists()


@pytest.mark.parametrize(
    ("meta", "tokens"),
    [
        ({"vocab_size": 3, "itos": {0: "the", 1: " ", 2: "fox"}}, ["the", " ", "fox"]),
        ({"vocab_size": 4, "itos": ["A", "C", "G", "T"]}, "ACGT"),
        ({"vocab_size": 2, "itos": {0: "b", 1: "a"}, "stoi": {}}, ["b", "a"]),
        ({"vocab_size": np.int64(2), "itos": {np.int32(0): b"\xc3\xa9", 1: np.str_("né")}}, ["é", "né"]),
        ({"vocab_size": 2, "itos": {0: 60}}, ["60", "<1>"]),
        ({"vocab_size": 2}, ["<0>", "<1>"]),
        ({"vocab_size": 1, "itos": {0: (60, 4)}}, ["<0>"]),
    ],
)  # fmt: skip
def test_vocabularies_of_other_peoples_programs_are_read(tmp_path: Path, meta: Any, tokens: Any) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    kind = ("char", "characters") if isinstance(tokens, str) else ("vocabulary", "tokens")
    assert read_meta(tmp_path / "meta.pkl").describe() == {"kind": kind[0], kind[1]: tokens}


def test_ids_are_never_read_with_a_tokenizer_that_is_not_theirs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing anew with another vocabulary, interrupted after the description and before the ids take their names."""
    from nanogpt.data import tokens

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "write_meta", interrupted)
    tokenizer = CharTokenizer("abcd")
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, tokenizer, tokenizer.encode("dddddd"), tokenizer.encode("dd"))  # as many as before
    with pytest.raises(DataError, match=r"cannot read .*train\.bin"):
        open_dataset(folder)


def test_ids_have_their_names_on_the_disk_before_the_work_is_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanogpt.data import tokens

    seen: list[bool] = []
    monkeypatch.setattr(tokens, "sync_folder", lambda path: seen.append(is_prepared(path)))
    write_dataset(folder, ByteTokenizer(), np.arange(9), np.arange(3))
    assert seen == [True]


def test_several_files_are_one_stream(folder: Path) -> None:
    whole = open_dataset(folder).train
    np.array([0, 1], dtype="<u2").tofile(folder / "train-0.bin")
    np.array([2], dtype="<u2").tofile(folder / "train-1.bin")
    np.array([2, 0, 1], dtype="<u2").tofile(folder / "train-2.bin")
    (folder / "train.bin").unlink()
    assert is_prepared(folder)
    shards = open_dataset(folder).train
    assert len(shards.shards) == 3
    assert len(shards) == len(whole) == 6
    starts = np.array([3, 0, 1, 2])
    assert np.array_equal(shards.windows(starts, 3), whole.windows(starts, 3))
    for start in range(7):
        for stop in range(start, 8):
            assert np.array_equal(shards[start:stop], whole[start:stop]), (start, stop)


def test_windows_of_a_single_file_are_slices() -> None:
    tokens = Tokens([np.arange(50, dtype=np.uint16)])
    assert tokens.windows(np.array([0, 7, 40]), 10).tolist() == [list(range(n, n + 10)) for n in (0, 7, 40)]


def test_another_data_set_leaves_nothing_of_the_one_before(folder: Path) -> None:
    assert (folder / "meta.pkl").exists()
    np.array([1], dtype="<u2").tofile(folder / "train-0.bin")
    write_dataset(folder, ByteTokenizer(), np.arange(9), np.arange(3))
    assert {path.name for path in folder.iterdir()} == {"train.bin", "val.bin", "dataset.json"}
    assert open_dataset(folder).train[:].tolist() == list(range(9))


def test_a_file_cut_off_is_named_and_one_replaced_stays_as_it_was(folder: Path) -> None:
    tokens = open_dataset(folder).train
    before = tokens.windows(np.array([0]), 3).tolist()
    path = next(folder.glob("train*.bin"))
    copy = path.read_bytes()
    path.rename(path.with_suffix(".old"))
    assert tokens.windows(np.array([0]), 3).tolist() == before
    path.write_bytes(copy[:2])
    assert tokens.windows(np.array([0]), 3).tolist() == before
    path.with_suffix(".old").rename(path)
    os.truncate(path, 4)
    with pytest.raises(DataError, match=r"train.*\.bin has been cut off to 4 of"):
        tokens.windows(np.array([0]), 3)
