"""From files to documents. What a document is depends on the kind of file:

    .jsonl .ndjson      a line: one field of its object
    .parquet .arrow     a row: one column
    any other text      the file, or what stands between two separators where one is given

`.gz` and `.zst` behind any of the first and last is unpacked while reading.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from nanogpt.data.corpus import Source, Span, load_published, parquet_file
from nanogpt.data.tokenizer import well_formed
from nanogpt.errors import DataError

BLOCK = 1 << 20  # bytes read at a time; a longer text is handed on in pieces of about this size
LONGEST_RECORD = 1 << 28  # bytes between two separators: more is no record but the wrong separator
# behind a letter and before a blank: no usual pretokenizer joins these. The second half: not behind a wide blank
_SAFE_CUT = re.compile(
    rb"[A-Za-z0-9\x80-\xff](?=[ \r\n])"
    rb"(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)"
)


@dataclass(frozen=True)
class Reading:
    """How documents are told apart."""

    field: str = "text"  # of a JSON object, or a column
    separator: str = ""  # between the documents of a text file; empty: the file is one document


def documents(span: Span, reading: Reading, skipped: Counter[str]) -> Iterator[tuple[str, bool]]:
    """The documents of a span as `(text, ends)`: long texts in several pieces, of which the last one ends.

    Empty documents are left out, and so are files of a folder that are no UTF-8 text; `skipped` counts both by
    reason. Raises `DataError` for what can't be read otherwise.
    """
    try:
        yield from _documents(span, reading, skipped)
    except DataError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{span.source.path} cannot be read: {error}") from error
    except Exception as error:  # each format's library has its own for a damaged file
        if type(error).__module__.startswith(("pyarrow", "zstandard")) or type(error).__name__ == "ZstdError":
            raise DataError(f"{span.source.path} cannot be read: {error}") from error
        raise


def size_of(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _documents(span: Span, reading: Reading, skipped: Counter[str]) -> Iterator[tuple[str, bool]]:
    source = span.source
    if source.kind in ("parquet", "arrow"):
        texts = _rows(span, reading.field)
    elif source.kind == "jsonl":
        texts = _json_lines(span, reading.field)
    elif reading.separator:
        separator = reading.separator.encode()
        texts = (_decoded(record, source, at) for at, record in _records(span, separator))
    else:
        yield from _whole_text(span, skipped)
        return
    for text in texts:
        if text.strip():
            yield text, True
        else:
            skipped["empty"] += 1


def _whole_text(span: Span, skipped: Counter[str]) -> Iterator[tuple[str, bool]]:
    """A file that is one document, or the part of it that belongs to `span`."""
    source = span.source
    pieces = _text_pieces(span)
    if source.found and span.is_whole and not source.packing:
        try:
            pieces = iter(list(pieces))  # all of it is in memory before any of it is used
        except DataError:
            skipped["not UTF-8 text"] += 1
            return
    before, is_first = next(pieces, ""), True
    for text in pieces:
        yield before, False
        before, is_first = text, False
    if is_first and span.is_whole and not before.strip():
        skipped["empty"] += 1
    else:
        yield before, span.stop == source.size


def _text_pieces(span: Span) -> Iterator[str]:
    with _opened(span.source) as file:
        start = _cut_position(file, span.start, span.source)
        stop = None if span.source.packing else _cut_position(file, span.stop, span.source)
        file.seek(start)
        rest, position = b"", start
        while True:
            block = file.read(BLOCK if stop is None else min(BLOCK, stop - position - len(rest)))
            rest += block
            if not block:
                break
            if len(rest) >= BLOCK and (end := _last_cut(rest)):
                yield _decoded(rest[:end], span.source, position)
                rest, position = rest[end:], position + end
        if rest:
            yield _decoded(rest, span.source, position)


def _last_cut(data: bytes) -> int:
    """Where to end a piece of text: before the last blank that follows a letter, else before the last character."""
    tail = max(len(data) - 4096, 0)
    end = max((match.end() for match in _SAFE_CUT.finditer(data, tail)), default=0)
    if not end:
        end = len(data) - 1
        while end and data[end] & 0xC0 == 0x80:  # in the midst of a character
            end -= 1
    return end


def _cut_position(file: IO[bytes], position: int, source: Source) -> int:
    """The first place from byte `position` on where a text may be cut: the same for both spans that meet there."""
    if position in (0, source.size):
        return position
    before = min(position, 4)  # bytes, for the pattern to look back
    file.seek(position - before)
    data = file.read(before + BLOCK)
    if match := _SAFE_CUT.search(data, before - 1):
        return position - before + match.end()
    if position + BLOCK >= source.size:
        return source.size
    return position + next((n for n, byte in enumerate(data[before:]) if byte & 0xC0 != 0x80), 0)


def _records(span: Span, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """`(position, bytes)` of what stands between separators and begins in the span."""
    with _opened(span.source) as file:
        position = max(span.start - len(separator), 0)
        belongs = span.start == 0  # else the first record is the end of one that begins before the span
        stop = None if span.source.packing else span.stop
        file.seek(position)
        rest = b""
        while block := file.read(BLOCK):
            *records, rest = (rest + block).split(separator)
            for record in records:
                if stop is not None and position >= stop:
                    return
                if belongs:
                    yield position, record
                belongs = True
                position += len(record) + len(separator)
            if len(rest) > LONGEST_RECORD:
                raise DataError(f"{span.source.path}: no {separator!r} within {len(rest):,} bytes from {position:,} on")
        if rest and belongs and (stop is None or position < stop):
            yield position, rest


def _json_lines(span: Span, field: str) -> Iterator[str]:
    for position, line in _records(span, b"\n"):
        if not line.strip():
            continue
        where = f"{span.source.path}, line at byte {position:,}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: this is no JSON: {error}") from error
        yield _field_of(row, field, where)


def _field_of(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if isinstance(text, str):
        return text if text.isascii() or _is_well_formed(text) else well_formed(text)
    names = ", ".join(row) if isinstance(row, dict) else f"none: it is a {type(row).__name__}"
    raise DataError(f"{where}: no text in the field {field!r}; choose one with --field=NAME (fields: {names})")


def _is_well_formed(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(span: Span, field: str) -> Iterator[str]:
    if span.source.kind == "parquet":
        file = parquet_file(span.source)
        names = file.schema_arrow.names
        batches = file.iter_batches(1000, row_groups=range(span.start, span.stop), columns=[field])
    else:
        import pyarrow

        stream = pyarrow.ipc.open_stream(pyarrow.memory_map(span.source.path))
        names = stream.schema.names
        batches = (batch.select([field]) for batch in stream)
    if field not in names:
        raise DataError(
            f"{span.source.path}: no column {field!r}; choose one with --field=NAME (columns: {', '.join(names)})"
        )
    for batch in batches:
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str | None):
                raise DataError(f"{span.source.path}: column {field!r} holds {type(text).__name__}, not text")
            yield text or ""


def _opened(source: Source, unpack: bool = True) -> IO[bytes]:
    try:
        if unpack and source.packing == ".gz":
            return cast(IO[bytes], gzip.open(source.path))
        if unpack and source.packing == ".zst":
            return _zstandard(source)
        return open(source.path, "rb")
    except OSError as error:
        raise DataError(f"cannot read {source.path}: {error.strerror}") from error


def _zstandard(source: Source) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{source.path}: unpacking .zst needs zstandard: pip install zstandard") from None
    stream: IO[bytes] = zstandard.open(source.path, "rb")
    return stream


def _decoded(data: bytes, source: Source, position: int) -> str:
    """UTF-8 as text, all newlines alike, without a byte-order mark at the start of the file."""
    if position == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source.path} is not UTF-8 text: byte 0x{data[error.start]:02x} at position {position + error.start:,}"
        ) from error
    if "\0" in text:
        raise DataError(f"{source.path} is no text: it holds a zero byte at position {position + text.index(chr(0)):,}")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def first_published_documents(name: str, field: str, limit: int) -> Iterator[str]:
    """The first `limit` documents of a data set on the Hugging Face hub, without downloading the rest."""
    for row in load_published(name, streaming=True).take(limit):
        yield _field_of(row, field, f"--input={name}")
