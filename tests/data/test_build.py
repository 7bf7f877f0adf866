"""The files that preparation leaves, compared with encoding one document after the other."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanogpt import build as module
from nanogpt import corpus, documents, tokens
from nanogpt.build import build
from nanogpt.data import is_prepared, open_dataset
from nanogpt.documents import Reading
from nanogpt.errors import DataError, UserError
from nanogpt.files import locked
from nanogpt.prepare_plan import Recipe
from nanogpt.tokenizer import Tokenizer
from nanogpt.tokenizer_json import from_description
from tests.conftest import ROOT

SET = Path("data/set")


def texts(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    words = ["the", "quick", "brown", "ä", "漢字", "🎉", "<|endoftext|>", "\n", "  ", "fox's", "123"]
    return [f"{n} " + " ".join(source.choices(words, k=source.randrange(5, 60))) for n in range(count)]


def write_jsonl(path: str, documents: list[str]) -> str:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def encoded(documents: list[str], tokenizer: Tokenizer, split: str, val_fraction: float) -> list[int]:
    """What `split` must hold: the documents whose content hashes there, each followed by its end."""
    ids: list[int] = []
    for text in documents:
        is_val = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < val_fraction * 2**32
        if is_val == (split == "val"):
            ids += tokenizer.encode(text).tolist()
            ids += [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return ids


def files() -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in SET.glob("*.*") if p.suffix}


@pytest.mark.parametrize("setting", ["byte", "char", "gpt2", "bpe:400"])
@pytest.mark.parametrize("num_proc", [1, 2])
def test_documents_are_encoded_in_order_and_split_by_content(
    setting: str, num_proc: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SPAN", 4000)
    corpora = texts(400)
    source = write_jsonl("x.jsonl", corpora)
    description = build(SET, Recipe([source], setting, val_fraction=0.1), num_proc)
    dataset = open_dataset(SET)
    for split in ("train", "val"):
        assert dataset.split(split)[:].tolist() == encoded(corpora, dataset.tokenizer, split, 0.1)
    assert sum(description["documents"].values()) == 400
    assert sum(description["bytes"].values()) == sum(len(text.encode()) for text in corpora)
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert description["sources"] == [{"path": "x.jsonl", "bytes": os.path.getsize(source), "sha256": digest}]
    assert not (SET / ".preparing").exists()


def test_a_document_keeps_its_split_when_others_come_or_the_order_changes() -> None:
    corpora = texts(300)
    held_out = []
    for collection in (corpora, corpora[::-1], corpora + texts(100, seed=1)):
        build(SET, Recipe([write_jsonl("x.jsonl", collection)], "byte", val_fraction=0.1))
        dataset = open_dataset(SET)
        text = dataset.tokenizer.decode(dataset.val[:].tolist())
        held_out.append({document for document in corpora if document in text})
    assert held_out[0] == held_out[1] == held_out[2] != set()


def test_text_files_of_a_folder_are_split_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 100)  # a file comes in several pieces
    corpora = texts(250)
    Path("folder").mkdir()
    for n, text in enumerate(corpora):
        Path(f"folder/{n:03}.txt").write_text(text)
    Path("folder/picture.png").write_bytes(b"\x89PNG\xff")
    Path("folder/zero.txt").write_bytes(b"")
    description = build(SET, Recipe(["folder"], "gpt2"))
    dataset = open_dataset(SET)
    for split in ("train", "val"):
        assert dataset.split(split)[:].tolist() == encoded(corpora, dataset.tokenizer, split, 0.05)
    assert description["skipped"] == {"not UTF-8 text": 1, "empty": 1}
    assert description["source_files"] == 251  # without the picture


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_a_single_text_is_split_near_its_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    text = "".join(texts(300))
    Path(name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    monkeypatch.setattr(corpus, "SPAN", 3000)
    monkeypatch.setattr(documents, "BLOCK", 500)
    description = build(SET, Recipe([name], "byte", val_fraction=0.1), 2)
    dataset = open_dataset(SET)
    train, val = (dataset.split(split)[:].tolist() for split in ("train", "val"))
    assert val.pop() == 256
    assert bytes(train + val) == text.encode()
    assert len(train) - int(len(text.encode()) * 0.9) in range(4)
    assert bytes(train).decode()  # not cut in the midst of a character
    assert description["documents"] == {"train": 1, "val": 1}


def test_separators_and_the_end_of_documents() -> None:
    Path("x.txt").write_text("one<|endoftext|>two<|endoftext|>three")
    build(SET, Recipe(["x.txt"], "byte", val_fraction=0.3, reading=Reading(separator="<|endoftext|>")))
    dataset = open_dataset(SET)
    assert dataset.train[:].tolist() + dataset.val[:].tolist() == [*b"one", 256, *b"two", 256, *b"three", 256]
    build(SET, Recipe(["x.txt"], "byte", end_documents=False))
    dataset = open_dataset(SET)
    spelled_out = dataset.train[:].tolist() + dataset.val[:].tolist()
    assert bytes(spelled_out) == b"one<|endoftext|>two<|endoftext|>three"


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "a": 70_000, "b": 1}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    engine.save("tokenizer.json")
    Path("x.txt").write_text("a b a a " * 20)
    build(SET, Recipe(["x.txt"], "tokenizer.json"))
    assert np.fromfile(SET / "train.bin", "<u4")[:4].tolist() == [70_000, 1, 70_000, 70_000]
    assert open_dataset(SET).val[-2:].tolist() == [70_000, 70_000]


def test_a_limit_takes_the_first_documents() -> None:
    corpora = texts(50)
    build(SET, Recipe([write_jsonl("x.jsonl", corpora)], "byte", limit=7))
    dataset = open_dataset(SET)
    both = dataset.train[:].tolist() + dataset.val[:].tolist()
    assert dataset.tokenizer.decode(both) == "".join(text + "<|endoftext|>" for text in corpora[:7])
    assert dataset.description["sources"] == [{"path": "x.jsonl", "first_documents": 7}]


def test_a_published_data_set_comes_through_the_datasets_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    corpora = texts(300)
    Path("org/name").mkdir(parents=True)  # the library takes a folder where the hub would be asked
    datasets.Dataset.from_dict({"text": corpora}).to_parquet("org/name/train.parquet")
    build(SET, Recipe(["hf:org/name"], "byte"))
    dataset = open_dataset(SET)
    assert dataset.train[:].tolist() == encoded(corpora, dataset.tokenizer, "train", 0.05)
    build(SET, Recipe(["hf:org/name"], "byte", limit=5, val_fraction=0.2))
    dataset = open_dataset(SET)
    both = dataset.train[:].tolist() + dataset.val[:].tolist()
    assert dataset.tokenizer.decode(both) == "".join(text + "<|endoftext|>" for text in corpora[:5])


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no text in the corpus .passed over: 1 empty"), (" \n", "no text in the corpus"),
     ("ab", "too small to split"), ("a\0" * 99, "x.txt is no text")],
)  # fmt: skip
@pytest.mark.parametrize("setting", ["byte", "char", "bpe:300"])
def test_what_cannot_become_a_data_set_is_one_message(content: str, message: str, setting: str) -> None:
    Path("x.txt").write_text(content)
    with pytest.raises(DataError, match=message if setting != "char" else f"{message}|there is no text"):
        build(SET, Recipe(["x.txt"], setting))
    assert files() == {}


def test_a_full_disk_is_seen_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl("x.jsonl", texts(300))
    usage = module.shutil.disk_usage(".")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"take about .* MB, but the disk of data/set has only 0 MB left"):
        build(SET, Recipe(["x.jsonl"], "byte"))


def test_a_failure_keeps_the_data_set_that_was_there() -> None:
    build(SET, Recipe([write_jsonl("x.jsonl", texts(300))], "byte"))
    before = files()
    Path("y.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="no JSON"):
        build(SET, Recipe(["y.jsonl"], "byte"))
    assert files() == before


@pytest.mark.parametrize("stop_after", [0, 1, 4, 7])
def test_what_is_finished_is_not_done_again(stop_after: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(corpus, "SPAN", 4000)
    source = write_jsonl("x.jsonl", texts(400))
    recipe = Recipe([source], "gpt2", val_fraction=0.1)
    build(SET, recipe, 1)
    undisturbed = files()
    real, done = module.tokenize, list[int]()

    def tokenize(unit: module.Unit) -> None:
        if len(done) == stop_after:
            raise KeyboardInterrupt
        real(unit)
        done.append(unit.number)

    monkeypatch.setattr(module, "tokenize", tokenize)
    with pytest.raises(KeyboardInterrupt):
        build(SET, recipe, 1)
    assert files() == undisturbed  # still the old ones
    stop_after = -1
    build(SET, recipe, 1)
    assert "going on with" in capsys.readouterr().out
    assert sorted(done) == list(range(len(done)))  # each unit once
    assert files() == undisturbed


def test_another_request_or_a_changed_file_starts_afresh(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source = write_jsonl("x.jsonl", texts(300))
    real = module.tokenize

    def interrupted(unit: module.Unit) -> None:
        raise KeyboardInterrupt

    for change in ({"val_fraction": 0.2}, {"tokenizer": "gpt2"}, {"reading": Reading(separator="x")}, {}):
        monkeypatch.setattr(module, "tokenize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(SET, Recipe([source], "byte"))
        monkeypatch.setattr(module, "tokenize", real)
        if not change:
            write_jsonl("x.jsonl", texts(310))
        build(SET, Recipe([source], **{"tokenizer": "byte", **change}))  # type: ignore[arg-type]
        assert "going on" not in capsys.readouterr().out


DRIVER = """
import sys
from pathlib import Path
from nanogpt import corpus
from nanogpt.build import build
from nanogpt.prepare_plan import Recipe

if __name__ == "__main__":
    corpus.SPAN = 10_000  # many small units
    build(Path(sys.argv[1]), Recipe(["x.jsonl"], "gpt2", val_fraction=0.1), int(sys.argv[2]))
"""


def start(folder: str, num_proc: int) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "driver.py", folder, str(num_proc)], env=environment, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def workers_of(session: int) -> list[int]:
    """Living processes of a session."""
    living = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            living.append(int(path.parent.name))
    return living


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("num_proc", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_files(num_proc: int) -> None:
    write_jsonl("x.jsonl", texts(12_000))
    Path("driver.py").write_text(DRIVER)
    whole = start("whole", num_proc)
    began = time.monotonic()
    assert whole.wait(120) == 0
    duration = time.monotonic() - began
    expected = {path.name: path.read_bytes() for path in Path("whole").iterdir()}
    assert expected.keys() == {"train.bin", "val.bin", "dataset.json"}
    moments = random.Random(num_proc)
    appended, kills = [], 0
    journal = Path("killed/.preparing/progress.json")
    for attempt in range(60):
        process = start("killed", num_proc)
        while attempt < 6 and process.poll() is None and not journal.exists():
            time.sleep(0.01)  # there is something to lose
        try:
            pause = moments.uniform(0, 0.4 + attempt / 10) * duration if attempt else 0.0
            assert process.wait(pause) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the main process alone: its workers must notice
            process.wait()
            kills += 1
        if not Path("killed/.preparing/plan.json").exists():
            appended.clear()  # killed while planning, or behind the end: it begins anew
        elif journal.exists():
            appended.append(json.loads(journal.read_bytes())["appended"])
        for path in Path("killed").glob("*.bin"):
            assert path.read_bytes() == expected[path.name]  # whole, or not there
        deadline = time.monotonic() + 20
        while workers_of(process.pid):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.05)
    else:
        pytest.fail("not finished after 60 attempts")
    assert kills
    assert appended == sorted(appended)
    assert {path.name: path.read_bytes() for path in Path("killed").iterdir()} == expected


def test_the_description_gives_the_tokenizer_back() -> None:
    build(SET, Recipe([write_jsonl("x.jsonl", texts(300))], "bpe:400"))
    description = json.loads((SET / "dataset.json").read_text())
    tokenizer = from_description(description["tokenizer"])
    assert tokenizer.vocab_size == 400
    assert open_dataset(SET).tokenizer.describe() == tokenizer.describe()


def test_large_binaries_in_a_folder_are_passed_over_and_do_not_count_as_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(corpus, "SPAN", 1000)
    Path("folder").mkdir()
    for n in range(300):
        Path(f"folder/{n}.png").write_bytes(b"\x89PNG\xff" * 999)
    for n in range(3):
        Path(f"folder/{n}.txt").write_text(f"text {n}\n" * 100)
    description = build(SET, Recipe(["folder"], "byte"))
    assert description["skipped"] == {"not UTF-8 text": 300}
    assert description["bytes"]["val"] == 2100 - int(2100 * 0.95)  # the end of the text


def test_packed_and_plain_texts_have_the_same_split() -> None:
    import gzip

    held_out = []
    for folder, pack in (("plain", lambda data: data), ("packed", gzip.compress)):
        Path(folder).mkdir()
        for n, text in enumerate(texts(300)):
            Path(folder, f"{n}.txt" + (".gz" if folder == "packed" else "")).write_bytes(pack(text.encode()))
        build(SET, Recipe([folder], "byte", val_fraction=0.1))
        dataset = open_dataset(SET)
        held_out.append(set(dataset.tokenizer.decode(dataset.val[:].tolist()).split("<|endoftext|>")))
    assert held_out[0] == held_out[1]


def test_a_data_set_is_made_by_one_process_at_a_time() -> None:
    with (
        locked(SET / ".lock", "it"),
        pytest.raises(UserError, match=r"process \d+ on .* is at work on the data set data/set"),
    ):
        build(SET, Recipe([write_jsonl("x.jsonl", texts(300))], "byte"))
    build(SET, Recipe(["x.jsonl"], "byte"))


@pytest.mark.parametrize("moment", ["unlink", "write_json", "replace", "rmtree"])
def test_interrupted_while_finishing_it_finishes(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe([write_jsonl("x.jsonl", texts(300))], "byte")
    build(SET, recipe)
    before = files()
    write_jsonl("y.jsonl", texts(310))
    recipe = Recipe(["y.jsonl"], "gpt2")
    build(SET, recipe)
    after = files()
    build(SET, Recipe(["x.jsonl"], "byte"))
    assert files() == before

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "unlink":
            patch.setattr(Path, "unlink", interrupted)
        elif moment == "rmtree":
            patch.setattr(shutil, "rmtree", interrupted)
        else:
            patch.setattr(tokens if moment == "write_json" else tokens.os, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(SET, recipe)
    if is_prepared(SET):
        assert {name: files()[name] for name in after} in (before, after)
    build(SET, recipe)
    assert files() == after


def test_a_file_that_changes_meanwhile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe([write_jsonl("x.jsonl", texts(300))], "byte")
    real = module.tokenize

    def tokenize(unit: module.Unit) -> None:
        real(unit)
        write_jsonl("x.jsonl", texts(299))

    with monkeypatch.context() as patch:
        patch.setattr(module, "tokenize", tokenize)
        with pytest.raises(DataError, match=r"x\.jsonl has changed while it was read"):
            build(SET, recipe)
    assert files() == {}
    build(SET, recipe)
    assert sum(open_dataset(SET).description["documents"].values()) == 299


@pytest.mark.parametrize("name", ["plan.json", "progress.json"])
@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null"])
def test_a_damaged_journal_only_costs_time(name: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SPAN", 4000)
    recipe = Recipe([write_jsonl("x.jsonl", texts(300))], "byte")
    build(SET, recipe, 1)
    undisturbed, real = files(), module.tokenize

    def interrupted(unit: module.Unit) -> None:
        if unit.number == 5:
            raise KeyboardInterrupt
        real(unit)

    with monkeypatch.context() as patch:
        patch.setattr(module, "tokenize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(SET, recipe, 1)
    (SET / ".preparing" / name).write_text(content)
    build(SET, recipe, 1)
    assert files() == undisturbed


def test_the_tokenizer_of_another_data_set_can_be_taken() -> None:
    build(Path("data/one"), Recipe([write_jsonl("x.jsonl", texts(300))], "bpe:400"))
    build(SET, Recipe([write_jsonl("y.jsonl", texts(300, seed=1))], "data/one"))
    one = open_dataset(Path("data/one")).tokenizer
    open_dataset(SET).check_tokenizer(one, "the model")
