"""From a corpus to a data set folder: in parallel, in bounded memory, and without losing work when killed.

The corpus is cut into units of work. Worker processes turn each into a part: its ids, split into training and
validation. The main process appends the parts in their order. All this happens in `NAME/.preparing/`:

    plan.json        what is being made: the request, the units, the tokenizer
    parts-…/00017.*  a finished unit: .train and .val ids, then .json, which says that they are whole
    train.bin …      the parts appended so far
    progress.json    how many those are, and how many ids: what is longer is cut off when work goes on

The same request finds its plan and goes on; another one starts afresh. Only at the end do the files take the
names under which training looks for them.
"""

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from nanogpt.corpus import Source, Span
from nanogpt.data import SPLITS, shards_of
from nanogpt.documents import Reading, documents, size_of
from nanogpt.errors import DataError
from nanogpt.files import atomic_write, locked, read_json, sync_folder, write_json
from nanogpt.prepare_plan import Recipe, discard, make_plan, stamps
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, write_meta
from nanogpt.tokenizer_json import from_description
from nanogpt.workers import cores, parallel_map

BATCH = 1 << 16  # characters that are encoded together


@dataclass(frozen=True)
class Division:
    """Which text is validation."""

    val_fraction: float
    cut: int | None  # bytes of text before validation begins; None: a hash of each document decides

    def split_of(self, digest: str) -> str:
        """The split of the document whose content has this SHA-256."""
        return "val" if int(digest[:8], 16) < self.val_fraction * 2**32 else "train"

    def divide(self, text: str, digest: str, position: int) -> Iterator[tuple[str, str]]:
        """`(split, text)` of the parts of a text that begins at byte `position` of the corpus.

        digest: of the whole document's content; may be empty where this text is all of it.
        """
        if self.cut is None:
            yield self.split_of(digest or hashlib.sha256(text.encode()).hexdigest()), text
            return
        content = text.encode()
        at = self.cut - position
        if not 0 < at < len(content):
            yield "train" if at >= len(content) else "val", text
            return
        while at < len(content) and content[at] & 0xC0 == 0x80:  # in the midst of a character
            at += 1
        yield "train", content[:at].decode()
        yield "val", content[at:].decode()


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time, and all that it must know for it."""

    number: int
    spans: list[Span]
    digests: list[str]  # SHA-256 of what is in each span's source
    position: int  # in bytes of the corpus's text; counts only for a division by cut
    division: Division
    reading: Reading
    tokenizer: Path  # of its description; the name says what it holds
    end_documents: bool
    folder: Path  # where the parts go


def build(folder: Path, recipe: Recipe, num_proc: int = 0) -> dict[str, Any]:
    """Make the data set in `folder`, or go on making it, with `num_proc` processes (0: one per core).

    Returns its description. Raises `ConfigError` and `DataError`; nothing that existed is touched then.
    """
    with locked(folder / ".lock", f"the data set {folder}"):
        try:
            return _build(folder, recipe, num_proc)
        finally:
            with suppress(OSError):  # nothing is left of a refused request
                (folder / ".lock").unlink()
                folder.rmdir()


def _build(folder: Path, recipe: Recipe, num_proc: int) -> dict[str, Any]:
    num_proc = num_proc or cores()
    work = folder / ".preparing"
    plan = make_plan(work, recipe, num_proc)
    sources = [Source(*fields) for fields in plan["sources"]]
    tokenizer = _tokenizer(work / plan["tokenizer"])
    division = Division(recipe.val_fraction, plan["cut"])
    units = [
        Unit(
            number=n,
            spans=[Span(sources[i], *where) for i, *where in spans],
            digests=[plan["contents"][i] for i, *_ in spans],
            position=plan["positions"][n],
            division=division,
            reading=Reading(**plan["reading"]),
            tokenizer=work / plan["tokenizer"],
            end_documents=recipe.end_documents,
            folder=work / plan["parts"],
        )
        for n, spans in enumerate(plan["units"])
    ]
    if not (work / "progress.json").exists():
        _check_disk(folder, sources, tokenizer)
    try:
        tally = _tokenize_all(work, units, num_proc, dtype_of(tokenizer).itemsize)
    except OSError as error:
        raise DataError(
            f"cannot write in {work}: {error.strerror or error}; what is finished is kept, the same command goes on"
        ) from error
    tally["skipped"] = dict(Counter(tally["skipped"]) + Counter(plan["skipped"]))
    try:
        before = plan["request"]["files"]
        now = stamps([Source(path, size) for path, size, _ in before])
        if changed := [old[0] for old, new in zip(before, now, strict=True) if old != new]:
            raise DataError(f"{changed[0]} has changed while it was read; the same command begins anew")
        _check_splits(tally, recipe)
    except DataError:
        discard(work)
        raise
    listed = [
        {"path": source.path, "bytes": source.size, "sha256": digest}
        for source, digest in zip(sources, plan["digests"], strict=True)
    ]
    if recipe.limit:
        listed = [{"path": str(name), "first_documents": recipe.limit} for name in recipe.inputs]
    description = finish_dataset(folder, work, tokenizer, tally, listed)
    discard(work)
    return description


def tokenize(unit: Unit) -> None:
    """Write the part of one unit of work: two files of ids, and then what they hold."""
    tokenizer = _tokenizer(unit.tokenizer)
    dtype = dtype_of(tokenizer)
    end = b""
    if unit.end_documents and tokenizer.end_of_text is not None:
        end = np.array([tokenizer.end_of_text], dtype).tobytes()
    tally = {what: dict.fromkeys(SPLITS, 0) for what in ("tokens", "documents", "bytes")}
    skipped = Counter[str]()
    stem = unit.folder / f"{unit.number:05}"
    with atomic_write(f"{stem}.train") as train, atomic_write(f"{stem}.val") as val:
        files: dict[str, IO[bytes]] = {"train": train, "val": val}
        for batch in _batches(_divided(unit, end, skipped)):
            encoded = tokenizer.encode_batch([text for _, text, _ in batch])
            for (split, text, closing), ids in zip(batch, encoded, strict=True):
                files[split].write(ids.astype(dtype, copy=False).data)
                tally["tokens"][split] += len(ids)
                tally["bytes"][split] += size_of(text)
                if closing is not None:
                    files[split].write(closing)
                    tally["tokens"][split] += bool(closing)
                    tally["documents"][split] += 1
    write_json(f"{stem}.json", {**tally, "skipped": skipped})


Text = tuple[str, str, bytes | None]  # its split, itself, and what closes the document; None: the document goes on


def _divided(unit: Unit, end: bytes, skipped: Counter[str]) -> Iterator[Text]:
    """The texts of a unit; `end` closes a document."""
    position = unit.position
    for span, digest in zip(unit.spans, unit.digests, strict=True):
        is_one_document = span.source.kind == "text" and not unit.reading.separator
        for piece in documents(span, unit.reading, skipped):
            parts = list(unit.division.divide(piece.text, digest if is_one_document else piece.digest, position))
            for split, part in parts[:-1]:
                yield split, part, b""  # the document goes on in the other split
            yield *parts[-1], end if piece.ends else None
            position += size_of(piece.text)


def _batches(texts: Iterator[Text]) -> Iterator[list[Text]]:
    """Texts in groups that fit into a processor's cache."""
    batch, room = list[Text](), BATCH
    for item in texts:
        batch.append(item)
        room -= len(item[1])
        if room <= 0:
            yield batch
            batch, room = [], BATCH
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return from_description(json.loads(path.read_bytes()))


def _tokenize_all(work: Path, units: list[Unit], num_proc: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Tokenize what is left to do, append it in order, and return the sums over all units."""
    parts, journal = units[0].folder if units else work, work / "progress.json"
    parts.mkdir(parents=True, exist_ok=True)
    progress: dict[str, Any] = {"appended": 0, "tokens": {}, "documents": {}, "bytes": {}, "skipped": {}}
    progress |= read_json(journal)
    first = progress["appended"]
    if first == len(units):
        return progress
    missing = {unit.number: unit for unit in units[first:] if not (parts / f"{unit.number:05}.json").exists()}
    made = parallel_map(tokenize, list(missing.values()), num_proc)
    total, before = sum(span.size for unit in units for span in unit.spans), 0
    with (
        open(work / "train.bin", "ab") as train,
        open(work / "val.bin", "ab") as val,
        tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="tokenizing") as bar,
    ):
        files = {"train": train, "val": val}
        for split, file in files.items():
            file.truncate(progress["tokens"].get(split, 0) * itemsize)
            before += progress["tokens"].get(split, 0)
        bar.update(bar_start := sum(span.size for unit in units[:first] for span in unit.spans))
        bar.initial = bar_start  # so that the speed shown is that of today's work
        for unit in units[first:]:
            stem = parts / f"{unit.number:05}"
            if unit.number in missing:
                next(made)
            for split, file in files.items():
                with open(stem.with_suffix(f".{split}"), "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            part_tally = json.loads(stem.with_suffix(".json").read_bytes())
            for what, counts in part_tally.items():
                progress[what] = dict(Counter(progress[what]) + Counter(counts))
            progress["appended"] += 1
            write_json(journal, progress)
            for suffix in (".json", ".train", ".val"):
                stem.with_suffix(suffix).unlink()
            bar.update(sum(span.size for span in unit.spans))
            if seconds := bar.format_dict["elapsed"]:
                bar.set_postfix_str(f"{(sum(progress['tokens'].values()) - before) / seconds:,.0f} tokens/s")
    next(made, None)  # nothing comes, but the processes end
    return progress


def _check_disk(folder: Path, sources: list[Source], tokenizer: Tokenizer) -> None:
    """Refuse before the work what could not be stored after it."""
    size = sum(source.size * (2 if source.packing or source.kind == "parquet" else 1) for source in sources)
    per_byte = dtype_of(tokenizer).itemsize / (1 if isinstance(tokenizer, ByteTokenizer | CharTokenizer) else 4)
    free = shutil.disk_usage(folder).free
    if free < size * per_byte:
        raise DataError(
            f"the ids of {size / 1e6:,.0f} MB of text take about {size * per_byte / 1e6:,.0f} MB, but the disk of "
            f"{folder} has only {free / 1e6:,.0f} MB left; make room, or choose another disk with --data_dir=…"
        )


def _check_splits(tally: dict[str, dict[str, int]], recipe: Recipe) -> None:
    """Raise `DataError` unless there is something to train on and something to validate with."""
    counts = [tally["tokens"].get(split, 0) for split in SPLITS]
    if not any(counts):
        skipped = ", ".join(f"{count} {reason}" for reason, count in tally["skipped"].items())
        raise DataError(f"there is no text in the corpus{f' (passed over: {skipped})' if skipped else ''}")
    if min(counts) < 2:
        raise DataError(
            f"the corpus is too small to split: {counts[0]:,} training and {counts[1]:,} validation tokens; use more "
            f"text, or a --val_fraction other than {recipe.val_fraction}"
        )


MOST_SOURCES = 1000  # that a description lists by name


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The number format of a tokenizer's ids on disk."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def finish_dataset(
    folder: Path, work: Path, tokenizer: Tokenizer, tally: dict[str, Any], sources: list[dict[str, Any]]
) -> dict[str, Any]:
    """Give the finished files of ids in `work` their names in `folder`, and return their description.

    Old ids go, then comes the description, then the new ids: whatever is interrupted, ids are never read with a
    tokenizer that is not theirs. Called again after an interruption, it completes its work.
    """
    finished = [split for split in SPLITS if (work / f"{split}.bin").exists()]
    for split in finished:
        for old in shards_of(folder, split) + sorted(folder.glob(f"{split}-*.bin")):
            old.unlink(missing_ok=True)
    description = {
        "version": 1,
        "dtype": dtype_of(tokenizer).name,
        **{what: {split: tally[what].get(split, 0) for split in SPLITS} for what in ("tokens", "documents", "bytes")},
        "skipped": tally["skipped"],
        "tokenizer": tokenizer.describe(),
        "source_files": len(sources),
        "sources": sources[:MOST_SOURCES],
    }
    write_json(folder / "dataset.json", description)
    if isinstance(tokenizer, CharTokenizer):
        write_meta(folder / "meta.pkl", tokenizer)
    else:
        (folder / "meta.pkl").unlink(missing_ok=True)  # of an earlier data set
    for split in finished:
        os.replace(work / f"{split}.bin", folder / f"{split}.bin")
    sync_folder(folder)  # before `work` may go
    return description
