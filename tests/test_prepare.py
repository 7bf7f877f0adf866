"""The files that preparation leaves, compared with encoding one document after the other, for all kinds of inputs."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pyarrow
import pytest
import tokenizers
import zstandard
from pyarrow import parquet

from nanogpt import prepare as module
from nanogpt.data import open_dataset
from nanogpt.errors import DataError
from nanogpt.prepare import documents, download, find_sources, known_sources, prepare
from nanogpt.settings import PrepareConfig
from nanogpt.tokenizer import GPT2Tokenizer
from tests.conftest import ROOT, Program

SET = Path("data/set")
TEXTS = ["first\ntext", "zweiter, mit ä und 🎉\n", "third"]
JSON_LINES = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in TEXTS)


def texts(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    words = ["the", "quick", "brown", "ä", "漢字", "🎉", "e\u0301", "<|endoftext|>", "\n", "  ", "fox's", "123"]
    return [f"{n} " + " ".join(source.choices(words, k=source.randrange(5, 60))) for n in range(count)]


def write(name: str, text: str) -> str:
    """A file in the packing that its name says, .gz and .zst in several parts as pigz and pzstd write them."""
    parts = [text[n : n + len(text) // 3 + 1].encode() for n in range(0, len(text), len(text) // 3 + 1)]
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix.lower(), bytes)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(b"".join(pack(part) for part in parts))
    return name


def write_jsonl(path: str, texts: list[str]) -> str:
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_parquet(path: str, **columns: Any) -> str:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=100)
    return path


def build(*inputs: str, tokenizer: str = "byte", **settings: Any) -> dict[str, Any]:
    """Prepare the data set `set`, and return its description."""
    prepare(PrepareConfig(**{"name": "set", "input": list(inputs), "tokenizer": tokenizer, "num_proc": 1, **settings}))
    return open_dataset(SET).description


def all_text() -> str:
    """The text of a data set in bytes, with \\0 at the end of each document."""
    dataset = open_dataset(SET)
    return bytes(i if i < 256 else 0 for split in (dataset.train, dataset.val) for i in split.tolist()).decode()


def assert_split_by_content(folder: Path, documents: list[str], val_fraction: float = 0.1) -> None:
    """Each split holds the documents whose content hashes there, in order, each followed by its end."""
    dataset = open_dataset(folder)
    expected: dict[str, list[int]] = {"train": [], "val": []}
    for text in documents:
        is_val = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < val_fraction * 2**32
        end = [] if dataset.tokenizer.end_of_text is None else [dataset.tokenizer.end_of_text]
        expected["val" if is_val else "train"] += [*dataset.tokenizer.encode(text).tolist(), *end]
    assert {split: getattr(dataset, split)[:].tolist() for split in expected} == expected


def read(path: str, **settings: Any) -> list[str]:
    """The documents of a file."""
    whole = [""]
    for piece in documents(path, PrepareConfig(input=[path], **settings), Path()):
        if isinstance(piece, tuple):
            whole[-1] += piece[0]
            whole += [""] * piece[1]
    return whole[:-1]


def results(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.*") if path.suffix}


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units and pieces of little text."""
    monkeypatch.setattr(module, "UNIT", 4000)
    monkeypatch.setattr(module, "BLOCK", 500)


def test_shakespeare_char_is_the_originals_byte_for_byte(downloads: Path) -> None:
    original = {  # what the original's data/shakespeare_char/prepare.py writes
        "train.bin": "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f",
        "val.bin": "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1",
        "meta.pkl": "6ee5a37533af83b67fcbe6b93705fde9e15e78bafe895f54b2cb2cb32534526c",
    }
    for _ in range(2):  # again, from the text kept beside it
        prepare(PrepareConfig(name="shakespeare_char"))
        found = {name: Path("data/shakespeare_char", name).read_bytes() for name in original}
        assert {name: hashlib.sha256(content).hexdigest() for name, content in found.items()} == original


def test_shakespeare_in_gpt2s_tokens_has_the_originals_size_and_a_text_of_ones_own_its_own(downloads: Path) -> None:
    for text, sizes in ((None, (301_966, 36_059)), ("years of work\n" * 20, (72, 8))):
        if text:
            Path("data/shakespeare/input.txt").write_text(text)
        prepare(PrepareConfig(name="shakespeare"))
        dataset = open_dataset(Path("data/shakespeare"))
        assert (len(dataset.train), len(dataset.val)) == sizes


def test_pystdlib_is_the_library_without_tests() -> None:
    assert {path.parent.name for path in ROOT.glob("data/*/prepare.py")} == set(module.DATASETS)  # each has a script
    names = list(known_sources("pystdlib", SET))
    assert any(name.endswith("/argparse.py") for name in names)
    assert not any("/test/" in name for name in names)
    prepare(PrepareConfig(name="pystdlib", limit=300))
    about = open_dataset(Path("data/pystdlib")).description
    for split in ("train", "val"):
        assert about["tokens"][split] == about["bytes"][split] + about["documents"][split]


CUT_OFF = 1  # a "status": the connection ends before the promised length


class Hub:
    """A Hugging Face hub on this machine: `files`, by path, at `url`, as of any web server and as a data set of it."""

    def __init__(self, files: dict[str, bytes], repository: str = "org/name") -> None:
        self.files, self.failures = files, list[int]()  # statuses to answer with before all goes well
        self.asked: list[str] = []  # paths of files that were downloaded
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path).removeprefix("/")
                tree, resolve = f"api/datasets/{repository}/tree/main", f"datasets/{repository}/resolve/main/"
                name = path.removeprefix(resolve)
                if path.startswith(tree):
                    listed = [name for name in hub.files if name.startswith(path.removeprefix(tree).strip("/"))]
                    more = {"type": "file", "oid": "0" * 40}
                    entries = [{"path": name, "size": len(hub.files[name]), **more} for name in listed]
                    self.answer(200, json.dumps(entries).encode())
                elif name in hub.files:
                    if self.command == "GET":
                        hub.asked.append(name)
                    self.answer(hub.failures.pop(0) if hub.failures else 200, hub.files[name])
                else:
                    self.answer(404, b"")

            do_HEAD = do_GET  # noqa: N815

            def answer(self, status: int, content: bytes) -> None:
                self.send_response(200 if status == CUT_OFF else status)
                self.send_header("Content-Length", str(len(content) + 1000 * (status == CUT_OFF)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "1" * 40)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()


# Where the files of known data sets lie, and what else does.
LAYOUTS = {
    "fineweb-edu": [f"sample/10BT/{n:03}_00000.parquet" for n in range(3)],
    "allenai/c4": [f"en/c4-train.{n:05}-of-00002.json.gz" for n in range(2)],
    "roneneldan/TinyStories": [f"data/train-{n:05}-of-00002-2d5a1467fff1081b.parquet" for n in range(2)],
}
OTHERS = ["data/CC-MAIN-2024-10/000.parquet", "data/validation-00000-of-00001.parquet", "notes-train.txt", "README.md",
          "en/c4-validation.00000-of-00001.json.gz", "dataset_infos.json"]  # fmt: skip


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the layout of a data set, 150 rows in each of its shards."""
    shards = {}
    for n, path in enumerate(LAYOUTS[request.param]):
        rows = texts(150, seed=n)
        shard = write_jsonl("x.gz", rows) if path.endswith("gz") else write_parquet("x", id=list(range(150)), text=rows)
        shards[path] = Path(shard).read_bytes()
    repository = module.DATASETS.get(request.param, {}).get("input", [request.param])[0].partition(":")[0]
    hub = Hub({**shards, **dict.fromkeys(OTHERS["/" in request.param :], b"not to be read")}, repository)
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "hf", "NANOGPT_DOWNLOADS": ""}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield hub
    hub.server.shutdown()


@pytest.mark.parametrize("hub", LAYOUTS, indirect=True)
def test_a_data_set_of_the_hub_is_read_shard_by_shard(
    hub: Hub, request: pytest.FixtureRequest, program: Program
) -> None:
    name = request.node.callspec.params["hub"]
    words = ["set", f"--input={name}"] if "/" in name else [name]
    hub.failures = [503, CUT_OFF]  # it is asked again
    result = program("nanogpt", "prepare", *words, "--tokenizer=byte", "--val_fraction=0.1")
    assert result.returncode == 0, result.stderr
    folder = Path("data", words[0])
    assert_split_by_content(folder, [text for n in range(len(LAYOUTS[name])) for text in texts(150, seed=n)])
    assert sorted(set(hub.asked)) == LAYOUTS[name]
    assert {path.name for path in folder.iterdir()} == {".lock", "train.bin", "val.bin", "dataset.json"}


@pytest.mark.parametrize("hub", ["fineweb-edu"], indirect=True)
def test_with_a_limit_only_the_first_shards_are_downloaded(hub: Hub, program: Program) -> None:
    result = program("nanogpt", "prepare", "fineweb-edu", "--tokenizer=byte", "--limit=20")
    assert result.returncode == 0, result.stderr
    assert set(hub.asked) == {LAYOUTS["fineweb-edu"][0]}
    assert sum(open_dataset(Path("data/fineweb-edu")).description["documents"].values()) == 20


@pytest.mark.usefixtures("_small")
def test_a_shard_that_is_done_is_not_downloaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    corpora = [texts(150, seed=n) for n in range(3)]
    asked: list[str] = []

    def hf_hub_download(repository: str, path: str, local_dir: Path, **_: object) -> None:
        asked.append(path)
        if len(asked) == 2:
            raise KeyboardInterrupt
        local_dir.mkdir(parents=True, exist_ok=True)
        write_jsonl(str(local_dir / path), corpora[int(path.partition(".")[0])])
        assert len(list(local_dir.iterdir())) <= 2  # one to read, one to encode

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(module, "hub_sources", lambda name: {f"hf://org/name/{n}.jsonl": 1000 for n in range(3)})
    with pytest.raises(KeyboardInterrupt):
        build("org/name", val_fraction=0.1)
    build("org/name", val_fraction=0.1)
    assert_split_by_content(SET, [text for corpus in corpora for text in corpus])
    assert asked == ["0.jsonl", "1.jsonl", "1.jsonl", "2.jsonl"]


def test_the_mirror_folder_comes_before_the_hub_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_DOWNLOADS", str(tmp_path))
    Path("karpathy/tinystories-gpt4-clean").mkdir(parents=True)
    file = write_parquet("karpathy/tinystories-gpt4-clean/tinystories_gpt4_clean.parquet", text=texts(50))
    prepare(PrepareConfig(name="tinystories", tokenizer="byte"))
    assert open_dataset(Path("data/tinystories")).description["source_files"] == 1
    assert Path(file).exists()


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL.gz", "x.ndjson.zst", "x.json", "x.JSON.gz", "x.parquet"])
def test_rows_are_documents(name: str) -> None:
    write_parquet(name, n=[1, 2, 3], text=TEXTS) if name == "x.parquet" else write(name, JSON_LINES)
    assert read(name) == TEXTS


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_objects_has_the_rows_that_json_reads(indent: int | None) -> None:
    rows = [{"text": text, "more": [1, "]", {}]} for text in [*texts(40), "x" * 5000, '[\\"{']]
    write("x.json", json.dumps([*rows, 5], indent=indent) + "\n")
    assert read("x.json") == [row["text"] for row in json.loads(json.dumps(rows))]


def test_json_that_is_no_data_is_text_and_so_is_data_in_a_text_file() -> None:
    settings = json.dumps({"compilerOptions": {"strict": True}}, indent=2)
    assert read(write("x.json", settings)) == [settings]
    assert read(write("x.txt", JSON_LINES)) == [JSON_LINES]


@pytest.mark.parametrize("name", ["x.md", "x", "x.txt.gz", "x.py.zst"])
def test_a_text_file_is_a_document_or_what_stands_between_separators(name: str) -> None:
    expected = [text.strip() for text in TEXTS]
    write(name, "\n\n".join(expected))
    assert read(name) == read(name, separator="not there") == ["\n\n".join(expected)]
    assert read(name, separator=r"\n\n") == expected


def test_newlines_and_byte_order_marks_are_as_in_text_mode() -> None:
    Path("x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read("x.txt") == ["one\ntwo\nthree\n"]
    for encoding in ("utf-8-sig", "utf-16"):
        Path("x.jsonl").write_bytes('{"text": "öne"}\r\n{"text": "two\\r\\n"}\r\n'.encode(encoding))
        assert read("x.jsonl") == ["öne", "two\r\n"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "ab", "—"])
@pytest.mark.parametrize("block", [17, 1 << 20])
def test_separators_are_found_wherever_blocks_end(
    block: int, separator: str, newline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    records = [f"record\n{n} x" * (n % 7 + 1) for n in range(40)]
    Path("x.txt").write_bytes(separator.join([*records, ""]).replace("\n", newline).encode())
    assert read("x.txt", separator=separator.replace("\n", r"\n")) == records


def test_what_a_text_is_cut_into_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = ["a", "be", "ä", "漢字", "🎉", " ", "  ", "\n", "\r\n", "\t", "'s", "12", "!", "…", "\u3000", "\u00a0"]
    text = "".join(random.Random(0).choices(letters, k=9000))
    Path("x.txt").write_bytes(text.encode())
    monkeypatch.setattr(module, "BLOCK", 211)
    tokenizer = GPT2Tokenizer()
    pieces = [piece[0] for piece in documents("x.txt", PrepareConfig(input=["x.txt"]), Path())]
    assert len(pieces) > 10
    ids = [i for piece in pieces for i in tokenizer.encode(piece).tolist()]
    assert ids == tokenizer.encode(text.replace("\r\n", "\n")).tolist()


def test_rows_without_text_are_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    rows = ['{"text": "a text to keep"}', '{"text": null}', '{"body": "x"}', '{"text": ""}', "no json",
            '{"text": "a\\ud800b"}', "", '{"text": "another"}']  # fmt: skip
    Path("x.jsonl").write_text("\n".join(rows))
    assert read("x.jsonl") == ["a text to keep", "a\ufffdb", "another"]
    assert sum(build("x.jsonl")["skipped"].values()) == 4
    assert "skipped 2 x row without text in its field 'text'" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"too few tokens.*row without text in its field 'nothing'.*--field"):
        build("x.jsonl", field="nothing")
    write_parquet("x.parquet", text=pyarrow.array(["a text", None, "another text", ""]).dictionary_encode())
    assert sorted(build("x.parquet")["skipped"].values()) == [1, 1]


def test_a_folder_is_read_without_what_is_hidden_or_no_text() -> None:
    contents = {
        "b.txt": b"text b " * 9, "a.md": b"text a " * 9, "sub/c.jsonl": JSON_LINES.encode(), "sub/empty.txt": b"",
        ".hidden": b"x", ".git/x.txt": b"x", "p.png": b"\x89PNG\xff" * 99, "zero": b"a\0b", "d": b"\xc3",
    }  # fmt: skip
    for name, content in contents.items():
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        Path("in", name).write_bytes(content)
    Path("in/loop").symlink_to("../in")
    about = build("in")
    assert about["skipped"] == {"file without UTF-8 text": 3, "empty document": 1}
    assert all_text().replace("\0", "") == "text a " * 9 + "text b " * 9 + "".join(TEXTS)
    assert [Path(name).name for name in find_sources(["in/*.txt", "in/sub"])] == ["b.txt", "c.jsonl", "empty.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("nothing.txt", None, r"--input=nothing.txt: there is no such file"),
     ("empty", None, "no folder with files of text"), ("x.txt", b" \n", "too few tokens, 0 in train and 0 in val"),
     ("x.txt", b"abc\xff\xfe", r"x\.txt is not UTF-8 text .* byte 0xff"),
     ("x.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-20], r"x\.txt\.gz cannot be read"),
     ("x.parquet", b"text", r"x\.parquet cannot be read")],
)  # fmt: skip
def test_what_cannot_become_a_data_set_is_one_message(name: str, content: bytes | None, message: str) -> None:
    Path("empty").mkdir()
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build(name)
    assert not (SET / "train.bin").exists()


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(("tokenizer", "num_proc"), [("byte", 1), ("char", 1), ("gpt2", 1), ("bpe:400", 2)])
def test_documents_are_encoded_in_order_and_split_by_content(tokenizer: str, num_proc: int) -> None:
    corpora = texts(400)
    about = build(write_jsonl("x.jsonl", corpora), tokenizer=tokenizer, val_fraction=0.1, num_proc=num_proc)
    assert_split_by_content(SET, corpora)
    assert sum(about["documents"].values()) == 400
    assert sum(about["bytes"].values()) == sum(len(text.encode()) for text in corpora)
    assert about["sources"] == [{"path": "x.jsonl", "bytes": os.path.getsize("x.jsonl")}]
    assert (SET / "meta.pkl").exists() == (tokenizer == "char")
    if tokenizer.startswith("bpe"):  # The tokenizer of another data set can be taken.
        prepare(PrepareConfig(name="other", input=["x.jsonl"], tokenizer="data/set"))
        open_dataset(SET).match_tokenizer(open_dataset(Path("data/other")).tokenizer, "the model")


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_a_single_text_is_split_near_its_end(name: str) -> None:
    text = "".join(texts(300))
    about = build(write(name, text), tokenizer="char", val_fraction=0.1)
    dataset, cut = open_dataset(SET), int(len(text) * 0.9)  # in characters, as in the original
    assert dataset.tokenizer.decode(dataset.train[:].tolist()) == text[:cut]
    assert dataset.tokenizer.decode(dataset.val[:].tolist()) == text[cut:]
    assert sum(about["documents"].values()) == 1


def test_a_limit_counts_documents_of_all_files() -> None:
    build(write_jsonl("x.jsonl", texts(5)), write_jsonl("y.jsonl", texts(9, seed=1)), limit=7)
    assert all_text() == "\0".join([*texts(5), *texts(9, seed=1)[:2], ""])


def test_a_vocabulary_beyond_16_bits_takes_32() -> None:
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 70_000, "b": 1}, unk_token="[UNK]"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    write("model/config.json", '{"model_type": "llama"}')  # Its weights need not be there.
    engine.save("model/tokenizer.json")
    assert build(write("x.txt", "a b a a " * 20), tokenizer="model")["dtype"] == "uint32"
    assert np.fromfile(SET / "train.bin", "<u4")[:4].tolist() == [70_000, 1, 70_000, 70_000]


@pytest.mark.parametrize("change", [{"val_fraction": 0.2}, {"limit": 9}, {}, None])
def test_a_failure_keeps_all_and_only_the_same_request_resumes(
    change: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(write_jsonl("x.jsonl", texts(300)))
    before = results("data/set")
    monkeypatch.setattr(module, "encode_unit", Mock(side_effect=OSError("disk full")))
    with pytest.raises(DataError, match=r"disk full; what is finished .* is kept: the same command resumes"):
        build("x.jsonl", tokenizer="gpt2")
    assert results("data/set") == before
    monkeypatch.undo()
    if change is None:
        write_jsonl("x.jsonl", texts(310))
    build("x.jsonl", tokenizer="gpt2", **(change or {}))
    assert ("resuming from" in capsys.readouterr().out) == (change == {})


DRIVER = """
import json, resource, sys
from nanogpt import prepare
from nanogpt.settings import PrepareConfig
prepare.UNIT, memory, settings = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (memory << 20, memory << 20))
prepare.prepare(PrepareConfig(**settings))
assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1 << 20  # kilobytes, with the pages of the file
"""


def start(unit: int = 4_000, memory: int = 8000, **settings: Any) -> "subprocess.Popen[bytes]":
    """Prepare in another process, in small units, with so many megabytes of memory."""
    command = [sys.executable, "-c", DRIVER, json.dumps([unit, memory, settings])]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)


def is_alive(session: int) -> bool:
    """Whether a process of this session is left."""
    states = subprocess.run(["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True).stdout.split()
    return any(not state.startswith("Z") for state in states)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_files(num_proc: int) -> None:
    settings = {"data_dir": ".", "input": [write_jsonl("x.jsonl", texts(3_000))], "num_proc": num_proc}
    assert start(name="whole", **settings).wait(120) == 0
    moments, done, journal = random.Random(num_proc), [0], Path("killed/.preparing/plan.json")
    for _ in range(3):
        process, counted = start(name="killed", **settings), 0
        while process.poll() is None and counted <= done[-1]:  # until there is something more to lose
            counted = sum(json.loads(journal.read_bytes())["counts"]["tokens"].values()) if journal.exists() else 0
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)  # the main process alone: its workers must notice
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
        assert results("killed") == {}
        done.append(counted)
        deadline = time.monotonic() + 30
        while is_alive(process.pid):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.05)
    assert start(name="killed", **settings).wait(120) == 0
    assert results("killed") == results("whole")


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_a_line_of_a_gigabyte_needs_600_mb_at_most(name: str, tokenizer: str) -> None:
    line = b"The quick brown fox jumps over the lazy dog. " * 2000
    with gzip.open(name, "wb", compresslevel=1) if name.endswith("gz") else open(name, "wb") as file:
        for _ in range(1 + (1 << 30) // len(line)):
            file.write(line)
    settings = {"name": "set", "input": [name], "tokenizer": tokenizer, "num_proc": 2}
    assert start(module.UNIT, 600, **settings).wait() == 0
    assert sum(open_dataset(SET).description["bytes"].values()) > 1 << 30


CONTENT = b"To be, or not to be"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("NANOGPT_DOWNLOADS", raising=False)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    hub = Hub({"x.txt": CONTENT})
    yield hub
    hub.server.shutdown()


@pytest.mark.parametrize(("failures", "requests"), [([404], 1), ([500] * 3, 3), ([CUT_OFF] * 3, 3), ([429, 404], 2)])
def test_a_download_is_tried_again_unless_it_is_refused(server: Hub, failures: list[int], requests: int) -> None:
    server.failures = failures
    with pytest.raises(DataError, match=r"x.txt could not be read .*--lambada=FILE.*NANOGPT_DOWNLOADS"):
        download(Path("x.txt"), "x.txt", f"{server.url}/x.txt", SHA256, option="lambada")
    assert len(server.asked) == requests
    assert not Path("x.txt").exists()


def test_a_file_is_kept_and_one_of_the_mirror_needs_no_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.url}/x.txt"
    with pytest.raises(DataError, match=r"x.txt has 19 bytes that are not the file expected; get http"):
        download(Path("here/x.txt"), "x.txt", url, "0" * 64)
    for _ in range(2):
        assert download(Path("here/x.txt"), "x.txt", url, SHA256).read_bytes() == CONTENT
    monkeypatch.setenv("NANOGPT_DOWNLOADS", "mirror")
    write("mirror/x.txt", CONTENT.decode())
    assert download(Path("there/x.txt"), "x.txt", url, SHA256).read_bytes() == CONTENT
    write("mirror/x.txt", "something else")
    with pytest.raises(DataError, match=r"mirror/x\.txt has 14 bytes that are not the file expected"):
        download(Path("x.txt"), "x.txt", url, SHA256)
    assert server.asked == ["x.txt"] * 2
