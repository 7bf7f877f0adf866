import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from nanogpt import corpus, documents
from nanogpt.corpus import Source, Span, cut
from nanogpt.documents import Reading
from nanogpt.errors import DataError
from nanogpt.tokenizer import GPT2Tokenizer

TEXTS = ["first\ntext", "zweiter, mit ä und 🎉\n", "third"]
PLAIN = Reading()
JSON_LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS)


def read(path: str, reading: Reading = PLAIN, found: bool = False, skipped: Counter[str] | None = None) -> list[str]:
    """The documents of a file, whatever it is cut into."""
    result, pieces = [], ""
    for unit in cut([Source(path, Path(path).stat().st_size, found)]):
        for span in unit:
            for piece in documents.documents(span, reading, Counter() if skipped is None else skipped):
                pieces += piece.text
                if piece.ends:
                    result.append(pieces)
                    pieces = ""
    assert pieces == ""
    return result


def write_zst(path: str, text: str) -> None:
    Path(path).write_bytes(zstandard.compress(text.encode()))


def write_parquet(path: str) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), path, row_group_size=1)


def write_arrow(path: str) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"n": [1, 2, 3], "text": TEXTS})
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


WRITERS: dict[str, Callable[[str], object]] = {
    "x.jsonl": lambda path: Path(path).write_text(JSON_LINES),
    "x.jsonl.gz": lambda path: gzip.open(path, "wt").write(JSON_LINES),
    "x.ndjson.zst": lambda path: write_zst(path, JSON_LINES),
    "x.parquet": write_parquet,
    "x.arrow": write_arrow,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_documents(name: str) -> None:
    WRITERS[name](name)
    assert read(name) == TEXTS
    with pytest.raises(DataError, match=r"'body'.*--field=NAME \((fields|columns): .*text"):
        read(name, Reading(field="body"))
    with pytest.raises(DataError, match=r"field 'n'|column 'n' holds int, not text"):
        read(name, Reading(field="n"))


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x", "x.txt.gz", "x.py.zst"])
def test_a_text_file_is_a_document_or_what_stands_between_separators(name: str) -> None:
    texts = [text.strip() for text in TEXTS]
    text = "\n\n".join(texts)
    if name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(text.encode(), mtime=0))
    elif name.endswith(".zst"):
        write_zst(name, text)
    else:
        Path(name).write_text(text)
    assert read(name) == [text]
    assert read(name, Reading(separator="\n\n")) == texts
    assert read(name, Reading(separator="not there")) == [text]


def test_newlines_and_byte_order_marks_are_as_in_text_mode() -> None:
    Path("x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read("x.txt") == ["one\ntwo\nthree\n"]


def random_text(seed: int, length: int) -> str:
    source = random.Random(seed)
    letters = ["a", "be", "ä", "漢字", "🎉", " ", "  ", "\n", "\r\n", "\t", "'s", "12", "!", "…", "\u3000", "\u00a0"]
    return "".join(source.choices(letters, k=length))


@pytest.mark.parametrize("seed", range(8))
def test_what_a_file_is_cut_into_changes_neither_text_nor_tokens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_text(seed, 3000)
    Path("x.txt").write_bytes(text.encode())
    Path("x.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    monkeypatch.setattr(corpus, "SPAN", 1 + 997 * seed)
    monkeypatch.setattr(documents, "BLOCK", 211)
    expected = text.replace("\r\n", "\n")
    assert read("x.txt") == read("x.txt.gz") == [expected]
    tokenizer = GPT2Tokenizer()
    spans = [span for unit in cut([Source("x.txt", len(text.encode()))]) for span in unit]
    pieces = [piece.text for span in spans for piece in documents.documents(span, Reading(), Counter())]
    assert len(pieces) > 10
    assert [i for piece in pieces for i in tokenizer.encode(piece).tolist()] == tokenizer.encode(expected).tolist()


@pytest.mark.parametrize("span", [1, 7, 50, 333, 10**6])
@pytest.mark.parametrize("separator", ["\n", "\n\n", "<|endoftext|>", "ä"])
def test_spans_share_records_out_exactly_once(span: int, separator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [f"record {n}" * (n % 7 + 1) for n in range(60)]
    Path("x.txt").write_text(separator.join(records))
    monkeypatch.setattr(corpus, "SPAN", span)
    monkeypatch.setattr(documents, "BLOCK", 64)
    assert read("x.txt", Reading(separator=separator)) == records


def test_a_text_without_blanks_is_cut_between_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SPAN", 1000)
    monkeypatch.setattr(documents, "BLOCK", 100)
    Path("x.txt").write_text("漢字🎉" * 500)
    assert read("x.txt") == ["漢字🎉" * 500]


def test_empty_documents_are_counted_not_kept() -> None:
    skipped: Counter[str] = Counter()
    Path("x.jsonl").write_text('{"text": ""}\n\n{"text": "a"}\n{"text": " \\n"}\n{"text": null}\n')
    assert read("x.jsonl", skipped=skipped) == ["a"]
    for name, content in (("empty.txt", ""), ("blank.txt", "  \n\n")):
        Path(name).write_text(content)
        assert read(name, skipped=skipped) == []
    assert skipped == {"empty": 5}


@pytest.mark.parametrize("content", [b"abc\xff\xfe", b"abc\0def", b"\xc3"])
def test_what_is_no_text_is_an_error_by_name_and_passed_over_in_a_folder(content: bytes) -> None:
    Path("x.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.txt is no(t UTF-8)? text: .* position"):
        read("x.txt")
    skipped: Counter[str] = Counter()
    assert read("x.txt", found=True, skipped=skipped) == []
    assert skipped == {"not UTF-8 text": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line at byte 14: this is no JSON"),
        ("x.jsonl", b"[1]\n", r"no text in the field 'text'.*fields: none: it is a list"),
        ("x.txt.gz", gzip.compress(b"some text" * 1000, mtime=0)[:-20], r"x\.txt\.gz cannot be read"),
        (
            "x.txt.zst",
            zstandard.compress(random.Random(0).randbytes(5000).hex().encode())[:-900],
            "Truncated compressed stream",
        ),
        ("x.txt.gz", b"not compressed", r"x\.txt\.gz cannot be read"),
        ("x.txt.zst", b"not compressed", r"x\.txt\.zst cannot be read"),
        ("x.parquet", b"not parquet", r"x\.parquet cannot be read"),
        ("x.arrow", b"not arrow", r"x\.arrow cannot be read"),
    ],
)
def test_a_damaged_file_is_one_message(name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(name)


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    Path("x.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert read("x.jsonl") == ["a\ufffdb"]


def test_a_file_that_is_gone_is_one_message() -> None:
    with pytest.raises(DataError, match="cannot read gone"):
        list(documents.documents(Span(Source("gone", 3), 0, 3, 3), Reading(), Counter()))


def test_the_wrong_separator_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_RECORD", 1000)
    monkeypatch.setattr(documents, "BLOCK", 100)
    Path("x.txt").write_text("a" * 2000)
    with pytest.raises(DataError, match=r"no '\\n' within"):
        read("x.txt", Reading(separator="\n"))


@pytest.mark.parametrize("frames", [1, 3])
def test_zst_files_of_several_frames_are_read_to_the_end(frames: int) -> None:
    text = "".join(f"line {n}\n" for n in range(30_000))
    size = len(text) // frames + 1
    parts = [text[n : n + size].encode() for n in range(0, len(text), size)]
    Path("x.txt.zst").write_bytes(b"".join(zstandard.compress(part) for part in parts))
    assert read("x.txt.zst") == [text]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("span", [1, 2, 3, 5, 13, 10**6])
def test_a_run_of_newlines_is_one_separator_wherever_files_are_cut(
    span: int, newline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [f"record\n{n}" for n in range(50)]
    text = "".join(record + "\n" * (2 + n % 4) for n, record in enumerate(records))
    Path("x.txt").write_bytes(text.replace("\n", newline).encode())
    monkeypatch.setattr(corpus, "SPAN", span)
    monkeypatch.setattr(documents, "BLOCK", 17)
    assert read("x.txt", Reading(separator="\n\n")) == records


@pytest.mark.parametrize("separator", ["====", "ab", "—"])
@pytest.mark.parametrize("span", [1, 3, 10, 10**6])
def test_separators_of_several_kinds(separator: str, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [f"{n} x" for n in range(40)]
    Path("x.txt").write_text(separator.join(records))
    monkeypatch.setattr(corpus, "SPAN", span)
    monkeypatch.setattr(documents, "BLOCK", 19)
    assert read("x.txt", Reading(separator=separator)) == records


def test_newlines_are_not_torn_by_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("x.txt").write_bytes(b";;\r\n" * 500)
    for span in (7, 10, 101):
        monkeypatch.setattr(corpus, "SPAN", span)
        monkeypatch.setattr(documents, "BLOCK", 50)
        assert read("x.txt") == [";;\n" * 500]


def test_a_long_row_comes_in_pieces_that_know_their_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 5000)
    text = "some words, and more. " * 1000
    Path("x.jsonl").write_text(json.dumps({"text": text}) + "\n")
    [unit] = cut([Source("x.jsonl", Path("x.jsonl").stat().st_size)])
    pieces = list(documents.documents(unit[0], PLAIN, Counter()))
    assert len(pieces) > 4
    assert max(len(piece.text) for piece in pieces) <= 5000
    assert "".join(piece.text for piece in pieces) == text
    assert {piece.digest for piece in pieces} == {hashlib.sha256(text.encode()).hexdigest()}
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    tokenizer = GPT2Tokenizer()
    ids = [i for piece in pieces for i in tokenizer.encode(piece.text).tolist()]
    assert ids == tokenizer.encode(text).tolist()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [("a", b"text", True), ("a", b"", True), ("a", b"\x89PNG\xff", False), ("a", b"a\0b", False),
     ("a", "ä".encode() * 40_000, True), ("a", b"x" + "ä".encode() * 40_000, True),
     ("a.gz", gzip.compress(b"text", mtime=0), True),
     ("a.gz", gzip.compress(b"\xff\xfe", mtime=0), False), ("a.gz", b"no gzip", False)],
)  # fmt: skip
def test_the_beginning_of_a_file_tells_whether_it_is_text(name: str, content: bytes, expected: bool) -> None:
    Path(name).write_bytes(content)
    assert documents.is_text(Source(name, len(content), found=True)) is expected
