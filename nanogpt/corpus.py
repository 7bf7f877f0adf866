"""Where text comes from: files, folders, patterns and published data sets.

A corpus is a list of `Source`s. It is cut into `Span`s, parts that can be read on their own, side by side and in
bounded memory.
"""

import glob
import gzip
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from nanogpt.errors import DataError

log = logging.getLogger(__name__)

SPAN = 1 << 25  # bytes of a unit of work, where a file can be cut: so much is done again when work is interrupted
SMALLEST_SPAN = 1 << 20  # less is not worth sharing out


@dataclass(frozen=True)
class Source:
    """A file of a corpus."""

    path: str
    size: int  # bytes on disk
    found: bool = False  # in a folder: then it is passed over if it is no text

    @property
    def kind(self) -> str:
        """`jsonl`, `parquet`, `arrow` or `text`."""
        suffix = Path(self.path.removesuffix(self.packing)).suffix.lower()
        return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}.get(suffix, "text")

    @property
    def packing(self) -> str:
        """`.gz`, `.zst` or nothing."""
        return next((suffix for suffix in (".gz", ".zst") if self.path.lower().endswith(suffix)), "")


@dataclass(frozen=True)
class Span:
    """A part of a source: of text and JSON lines what begins in bytes [start, stop), of parquet row groups."""

    source: Source
    start: int
    stop: int
    size: int  # bytes on disk

    @property
    def is_whole(self) -> bool:
        """Whether this is all of its source."""
        return self.size == self.source.size


# ---------------------------------------------------------------------------------------------------
# Finding


def find_sources(inputs: list[str], num_proc: int) -> list[Source]:
    """The files behind paths, folders, patterns (`*.txt`, `**`) and names of published data sets.

    Folders are read with all that is in them, except hidden files. Raises `DataError` for what leads nowhere.
    """
    sources: list[Source] = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            found = [source_of(file, found=True) for file in files_below(path)]
        elif path.is_file():
            found = [source_of(path)]
        elif path.exists():
            raise DataError(f"--input={name}: this is neither a file nor a folder")
        elif any(character in name for character in "*?["):
            found = [source_of(match, found=True) for match in _matches(path)]
        elif is_published(name):
            log.info(f"no file {name} here: asking the Hugging Face hub for a data set of that name")
            found = published_data_set(name, num_proc)
        else:
            raise DataError(f"--input={name}: there is no such file or folder")
        if not found:
            raise DataError(f"--input={name}: no file there")
        sources += found
    return sources


def source_of(path: Path, found: bool = False) -> Source:
    """A file as a source. Raises `OSError` if it isn't there."""
    return Source(str(path), path.stat().st_size, found)


def _matches(pattern: Path) -> list[Path]:
    """The files that a pattern stands for; like a shell's, without hidden ones."""
    return sorted(path for path in map(Path, glob.glob(str(pattern), recursive=True)) if path.is_file())


def files_below(folder: Path) -> list[Path]:
    """All files of a folder, sorted, except hidden ones."""
    paths = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted((path for path in paths if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())


def is_published(name: str) -> bool:
    """Whether an input names a data set on the Hugging Face hub, and no file or folder here."""
    return bool(re.match(r"hf:[\w.-]", name)) or (
        bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()
    )


def load_published(name: str, **options: Any) -> Any:
    """The training split of a data set on the Hugging Face hub, as the `datasets` library loads it."""
    import datasets

    repository, _, config = name.removeprefix("hf:").partition(":")
    no_file = "" if name.startswith("hf:") else "there is no such file or folder, and "
    try:
        return datasets.load_dataset(repository, config or None, split="train", **options)
    except Exception as error:  # network, unknown name, several configurations, loading scripts: each its own
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"--input={name}: {no_file}as a data set of the Hugging Face hub it could not be loaded ({first_line}); "
            "give ORGANISATION/NAME or hf:ORGANISATION/NAME:CONFIGURATION, or download its parquet or jsonl files and "
            "pass their folder"
        ) from error


def published_data_set(name: str, num_proc: int) -> list[Source]:
    """The files of a data set on the Hugging Face hub, as the `datasets` library keeps them in its cache."""
    dataset = load_published(name, num_proc=num_proc if num_proc > 1 else None)
    return [source_of(Path(file["filename"])) for file in dataset.cache_files]


# ---------------------------------------------------------------------------------------------------
# Cutting


def cut(sources: list[Source]) -> list[list[Span]]:
    """The corpus in units of work, in order: parts of large files, groups of small ones.

    Units have up to `SPAN` bytes; of a small corpus less, so that there are some to share out.
    """
    size = min(SPAN, max(SMALLEST_SPAN, sum(source.size for source in sources) // 16))
    units: list[list[Span]] = []
    room = -1
    for source in sources:
        for span in _spans(source, size):
            if span.size > room:
                units.append([])
                room = size
            units[-1].append(span)
            room -= span.size
    return units


def _spans(source: Source, size: int) -> Iterator[Span]:
    if source.kind == "parquet":
        yield from _row_groups(source, size)
    elif source.kind == "arrow" or source.packing or source.size <= size:
        yield Span(source, 0, source.size, source.size)
    else:
        for start in range(0, source.size, size):
            stop = min(start + size, source.size)
            yield Span(source, start, stop, stop - start)


def _row_groups(source: Source, size: int) -> Iterator[Span]:
    metadata = parquet_file(source).metadata
    sizes = [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]
    packed = source.size / max(sum(sizes), 1)  # bytes on disk for each of the content
    start, content = 0, 0
    for n, group in enumerate(sizes, start=1):
        content += group
        if n == len(sizes) or content + sizes[n] > size:
            yield Span(source, start, n, int(content * packed))
            start, content = n, 0


def digests_of(source: Source) -> tuple[str, str]:
    """The SHA-256 of a file's bytes, and of what is packed in it; in hexadecimal."""
    with opened(source, unpack=False) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if not source.packing:
        return digest, digest
    content = hashlib.sha256()
    with opened(source) as file:
        while block := file.read(1 << 20):
            content.update(block)
    return digest, content.hexdigest()


def opened(source: Source, unpack: bool = True) -> IO[bytes]:
    """A source to read bytes from, by default what is packed in it. Raises `DataError` if it can't be had."""
    try:
        if unpack and source.packing == ".gz":
            return cast(IO[bytes], gzip.open(source.path))
        if unpack and source.packing == ".zst":
            import pyarrow

            return cast(IO[bytes], pyarrow.input_stream(source.path, "zstd", buffer_size=1 << 20))
        return open(source.path, "rb")
    except OSError as error:
        raise DataError(f"cannot read {source.path}: {error.strerror or error}") from error


def parquet_file(source: Source) -> Any:
    """A parquet file, opened. Raises `DataError` if it can't be read."""
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(source.path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{source.path} cannot be read as parquet: {error}") from error
