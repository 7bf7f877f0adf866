"""From files to documents. What a document is depends on the kind of file:

    .jsonl .ndjson      a line: one field of its object
    .parquet .arrow     a row: one column
    any other text      the file, or what stands between two separators where one is given

`.gz` and `.zst` behind any of the first and last is unpacked while reading.
"""

import functools
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from nanogpt.corpus import Source, Span, load_published, opened, parquet_file
from nanogpt.errors import DataError
from nanogpt.tokenizer import well_formed

BLOCK = 1 << 20  # bytes read at a time; a longer text is handed on in pieces of about this size
LONGEST_RECORD = 1 << 28  # bytes between two separators: more is no record but the wrong separator
# behind a letter and before a blank: no usual pretokenizer joins these
_CUT = re.compile(r"[^\W_](?=[ \n])")
_CUT_IN_BYTES = re.compile(rb"(?:[A-Za-z0-9]|[\xc2-\xf4][\x80-\xbf]{1,3})(?=[ \r\n])")


@dataclass(frozen=True)
class Reading:
    """How documents are told apart."""

    field: str = "text"  # of a JSON object, or a column
    separator: str = ""  # between the documents of a text file; empty: the file is one document


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one."""

    text: str
    ends: bool = True  # with it the document ends
    digest: str = ""  # SHA-256 of the whole document, where this is a part of a row or record


def documents(span: Span, reading: Reading, skipped: Counter[str]) -> Iterator[Piece]:
    """The documents of a span; those of more than `BLOCK` bytes in pieces.

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
        if type(error).__module__.startswith("pyarrow"):
            raise DataError(f"{span.source.path} cannot be read: {error}") from error
        raise


def size_of(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def is_text(source: Source) -> bool:
    """Whether a file begins as UTF-8 text does."""
    with opened(source) as file:
        try:
            begin = file.read(1 << 16)
        except (OSError, EOFError, zlib.error):  # not packed as its name says
            return False
    try:
        begin.decode()
    except UnicodeDecodeError as error:
        return error.start >= (1 << 16) - 3  # a character that goes on behind
    return b"\0" not in begin


def _documents(span: Span, reading: Reading, skipped: Counter[str]) -> Iterator[Piece]:
    source = span.source
    if source.kind == "text" and not reading.separator:
        yield from _whole_text(span, skipped)
        return
    if source.kind in ("parquet", "arrow"):
        texts = _rows(span, reading.field)
    elif source.kind == "jsonl":
        texts = _json_lines(span, reading.field)
    else:
        texts = (_decoded(record, source, at) for at, record in _records(span, reading.separator))
    for text in texts:
        if not text.strip():
            skipped["empty"] += 1
        elif len(text) <= BLOCK:
            yield Piece(text)
        else:
            yield from _cut_up(text)


def _cut_up(text: str) -> Iterator[Piece]:
    digest = hashlib.sha256(text.encode()).hexdigest()
    while len(text) > BLOCK:
        end = max((match.end() for match in _CUT.finditer(text, BLOCK - 4096, BLOCK)), default=BLOCK)
        yield Piece(text[:end], ends=False, digest=digest)
        text = text[end:]
    yield Piece(text, digest=digest)


def _whole_text(span: Span, skipped: Counter[str]) -> Iterator[Piece]:
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
        yield Piece(before, ends=False)
        before, is_first = text, False
    if is_first and span.is_whole and not before.strip():
        skipped["empty"] += 1
    else:
        yield Piece(before, ends=span.stop == source.size)


def _text_pieces(span: Span) -> Iterator[str]:
    with opened(span.source) as file:
        start = _cut_position(file, span.start, span.source)
        stop = None if span.source.packing else _cut_position(file, span.stop, span.source)
        if start:
            file.seek(start)
        rest, position = b"", start
        while True:
            block = file.read(BLOCK if stop is None else min(BLOCK, stop - position - len(rest)))
            rest += block
            if not block:
                break
            if len(rest) >= BLOCK:
                end = max(_safe_cuts(rest, len(rest) - 4096), default=0) or _character_before(rest, len(rest) - 1)
                yield _decoded(rest[:end], span.source, position)
                rest, position = rest[end:], position + end
        if rest:
            yield _decoded(rest, span.source, position)


def _safe_cuts(data: bytes, start: int) -> Iterator[int]:
    """Where a text may be cut, from `start` on."""
    for match in _CUT_IN_BYTES.finditer(data, max(start, 0)):
        if match[0].decode(errors="replace")[-1].isalnum():
            yield match.end()


def _character_before(data: bytes, position: int) -> int:
    """The last place up to `position` at which a character begins, and no second half of a newline."""
    while position > 0 and (data[position] & 0xC0 == 0x80 or data[position - 1 : position + 1] == b"\r\n"):
        position -= 1
    return position


def _cut_position(file: IO[bytes], position: int, source: Source) -> int:
    """A place from byte `position` on where a text may be cut: the same for both spans that meet there."""
    if position in (0, source.size) or source.packing:
        return position
    file.seek(position)
    data = file.read(BLOCK)
    found = next(_safe_cuts(data, 0), None)
    if found is None:
        found = len(data) if position + len(data) == source.size else _character_before(data, len(data) - 1)
    file.seek(0)
    return position + found


@functools.lru_cache(maxsize=8)
def _pattern(separator: str) -> re.Pattern[bytes]:
    """What matches a separator. One that repeats a character takes all of them in a row; newlines are as they come."""
    characters = [rb"\r?\n" if character == "\n" else re.escape(character.encode()) for character in separator]
    if len(set(characters)) == 1:
        return re.compile(rb"(?:%s){%d,}" % (characters[0], len(characters)))
    return re.compile(b"".join(characters))


def _records(span: Span, separator: str) -> Iterator[tuple[int, bytes]]:
    """`(position, bytes)` of what stands between separators and begins in the span."""
    pattern, longest = _pattern(separator), 4 * len(separator.encode())
    stop = None if span.source.packing else span.stop
    with opened(span.source) as file:
        position = max(span.start - longest, 0)
        if position:
            file.seek(position)
        belongs = span.start == 0  # else the first record is the end of one that begins before the span
        rest, searched = b"", 0
        while True:
            block = file.read(BLOCK)
            data, begin = rest + block, 0
            for match in pattern.finditer(data, searched):
                searched = match.start()
                if match.end() > len(data) - 2 and block:
                    break  # it may go on, with the second half of a newline
                if stop is not None and position + begin >= stop:
                    return
                if belongs:
                    yield position + begin, data[begin : match.start()]
                begin = searched = match.end()
                belongs = belongs or position + begin >= span.start
            else:
                searched = max(len(data) - longest, begin)
            rest, position, searched = data[begin:], position + begin, searched - begin
            if not block:
                break
            if len(rest) > LONGEST_RECORD:
                raise DataError(f"{span.source.path}: no {separator!r} within {len(rest):,} bytes from {position:,} on")
        if rest and belongs and (stop is None or position < stop):
            yield position, rest


def _json_lines(span: Span, field: str) -> Iterator[str]:
    for position, line in _records(span, "\n"):
        if not line.strip():
            continue
        where = f"{span.source.path}, line at byte {position:,}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: this is no JSON: {error}") from error
        yield _field_of(row, field, where)


def _field_of(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if text is None and isinstance(row, dict) and field in row:
        return ""
    if isinstance(text, str):
        return well_formed(text)
    names = ", ".join(row) if isinstance(row, dict) else f"none: it is a {type(row).__name__}"
    raise DataError(f"{where}: no text in the field {field!r}; choose one with --field=NAME (fields: {names})")


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
