"""From a corpus to a data set folder: in parallel, in bounded memory, and without losing work when killed.

The corpus is cut into units of work. Worker processes turn each into a part: its ids, split into training and
validation. The main process appends the parts in their order. All this happens in `NAME/.preparing/`:

    plan.json        what is being made: the request, the units, the tokenizer
    parts/00017.*    a finished unit: .train and .val ids, then .json, which says that they are whole
    train.bin …      the parts appended so far
    progress.json    how many those are, and how many ids: what is longer is cut off when work goes on

The same request finds its plan and goes on; another one starts afresh. Only at the end do the files take the
names under which training looks for them.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from nanogpt.data.corpus import Source, Span, cut, find_sources, is_published, sha256_of
from nanogpt.data.documents import Reading, documents, first_published_documents
from nanogpt.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    from_description,
    read_tokenizer,
    train_bpe,
)
from nanogpt.data.tokens import SPLITS, dtype_of, finish_dataset
from nanogpt.data.workers import cores, parallel_map
from nanogpt.errors import ConfigError, DataError
from nanogpt.files import atomic_write, write_json

ENOUGH = 10  # documents to expect in validation; where there are fewer, the end of the text is validation
BPE_TEXT = 1 << 28  # bytes of text, at most, that a vocabulary is learned from
DEFAULT_READING = Reading()
VERSION = 1  # of the files in .preparing


@dataclass(frozen=True)
class Recipe:
    """What a data set is made of, and how."""

    inputs: Sequence[str | Source]
    tokenizer: str = "gpt2"  # char, byte, gpt2, bpe:N, or the path of a tokenizer.json or a model's folder
    val_fraction: float = 0.05
    reading: Reading = DEFAULT_READING
    end_documents: bool = True  # with the end-of-text token, where the tokenizer has one
    limit: int = 0  # documents to take from the start; 0: all


@dataclass(frozen=True)
class Division:
    """Which text is validation."""

    val_fraction: float
    cut: int | None  # bytes of text before validation begins; None: a hash of each document decides

    def split_of(self, digest: str) -> str:
        """The split of the document whose content has this SHA-256."""
        return "val" if int(digest[:8], 16) < self.val_fraction * 2**32 else "train"

    def divide(self, text: str, digest: str | None, position: int) -> Iterator[tuple[str, str]]:
        """`(split, text)` of the parts of a text that begins at byte `position` of the corpus.

        digest: of the document's content, if it is more than this text.
        """
        if self.cut is None:
            yield self.split_of(digest or hashlib.sha256(text.encode()).hexdigest()), text
            return
        content = text.encode()
        at = min(max(self.cut - position, 0), len(content))
        while at < len(content) and content[at] & 0xC0 == 0x80:  # in the midst of a character
            at += 1
        if at:
            yield "train", content[:at].decode()
        if at < len(content):
            yield "val", content[at:].decode()


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time, and all that it must know for it."""

    number: int
    spans: list[Span]
    digests: list[str]  # SHA-256 of the span's source
    position: int  # in bytes of the corpus's text; counts only for a division by cut
    division: Division
    reading: Reading
    tokenizer: str  # description, as JSON
    end_documents: bool
    folder: Path  # where the parts go


def build(folder: Path, recipe: Recipe, num_proc: int = 0) -> dict[str, Any]:
    """Make the data set in `folder`, or go on making it, with `num_proc` processes (0: one per core).

    Returns its description. Raises `ConfigError` and `DataError`; nothing that existed is touched then.
    """
    num_proc = num_proc or cores()
    work = folder / ".preparing"
    plan = _plan(work, recipe, num_proc)
    sources = [Source(*fields) for fields in plan["sources"]]
    digests = plan["digests"]
    tokenizer = from_description(plan["tokenizer"])
    division = Division(recipe.val_fraction, plan["cut"])
    reading = recipe.reading if not recipe.limit else DEFAULT_READING
    units = [
        Unit(
            number=n,
            spans=[Span(sources[i], *where) for i, *where in spans],
            digests=[digests[i] for i, *_ in spans],
            position=plan["positions"][n],
            division=division,
            reading=reading,
            tokenizer=json.dumps(plan["tokenizer"]),
            end_documents=recipe.end_documents,
            folder=work / "parts",
        )
        for n, spans in enumerate(plan["units"])
    ]
    _check_disk(folder, sum(source.size for source in sources), tokenizer)
    tally = _tokenize_all(work, units, num_proc, dtype_of(tokenizer).itemsize)
    try:
        _check_splits(tally, recipe)
    except DataError:
        shutil.rmtree(work)
        raise
    listed = [
        {"path": source.path, "bytes": source.size, "sha256": digest}
        for source, digest in zip(sources, digests, strict=True)
    ]
    if recipe.limit:
        listed = [{"path": str(name), "first_documents": recipe.limit} for name in recipe.inputs]
    description = finish_dataset(folder, work, tokenizer, tally, listed)
    shutil.rmtree(work)
    return description


# ---------------------------------------------------------------------------------------------------
# The plan


def _plan(work: Path, recipe: Recipe, num_proc: int) -> dict[str, Any]:
    """The plan in `work` if it is for the same request, else a new one."""
    request, sources = _request(recipe, num_proc)
    path = work / "plan.json"
    if path.exists() and (plan := json.loads(path.read_bytes()))["request"] == request:
        print(f"going on with what {work} holds")
        return dict(plan)
    if work.exists():
        shutil.rmtree(work)
    if recipe.limit:
        sources = [_first_documents(work / "first.jsonl", recipe, sources)]
    reading = recipe.reading if not recipe.limit else DEFAULT_READING
    units = cut(sources)
    few = _are_few(units, reading, ENOUGH / recipe.val_fraction)
    survey = _survey(units, reading, recipe.tokenizer == "char", num_proc) if few or recipe.tokenizer == "char" else []
    tokenizer = _make_tokenizer(recipe.tokenizer, units, reading, "".join(characters for _, characters in survey))
    positions = [0, *itertools.accumulate(size for size, _ in survey)] if few else [0] * len(units)
    cut_at = int(positions[-1] * (1 - recipe.val_fraction)) if few else None
    if few:
        print(f"few documents: the last {recipe.val_fraction:.2%} of the text are validation")
    index = {source: n for n, source in enumerate(sources)}
    plan = {
        "request": request,
        "sources": [[source.path, source.size, source.found] for source in sources],
        "digests": list(parallel_map(sha256_of, sources, num_proc if sum(s.size for s in sources) > 1 << 28 else 1)),
        "units": [[[index[span.source], span.start, span.stop, span.size] for span in unit] for unit in units],
        "positions": positions,
        "cut": cut_at,
        "tokenizer": tokenizer.describe(),
    }
    write_json(path, plan)
    return plan


def _request(recipe: Recipe, num_proc: int) -> tuple[dict[str, Any], list[Source]]:
    """What is asked for, as JSON that changes when the request or a file changes; and the files."""
    named = [name for name in recipe.inputs if isinstance(name, str)]
    sources = [source for source in recipe.inputs if isinstance(source, Source)]
    wanted = [name for name in named if not (recipe.limit and is_published(name))]  # a few rows need no download
    sources += find_sources(wanted, num_proc) if wanted else []
    tokenizer = recipe.tokenizer
    if Path(tokenizer).exists():
        tokenizer = json.dumps(read_tokenizer(Path(tokenizer)).describe())
    request = {
        **dataclasses.asdict(recipe),
        "version": VERSION,
        "inputs": named,
        "files": [[source.path, source.size, os.stat(source.path).st_mtime_ns] for source in sources],
        "tokenizer": tokenizer,
    }
    return json.loads(json.dumps(request)), sources


def _first_documents(path: Path, recipe: Recipe, sources: list[Source]) -> Source:
    """The first documents of a corpus as one file of JSON lines."""

    def texts() -> Iterator[str]:
        for name in recipe.inputs:
            if isinstance(name, str) and is_published(name):
                yield from first_published_documents(name, recipe.reading.field, recipe.limit)
        for unit in cut(sources):
            yield from whole_documents(unit, recipe.reading)

    with atomic_write(path) as file:
        for text in itertools.islice(texts(), recipe.limit):
            file.write(json.dumps({"text": text}).encode() + b"\n")
    return Source(str(path), path.stat().st_size)


def whole_documents(unit: list[Span], reading: Reading) -> Iterator[str]:
    """The documents of a unit, each in one piece."""
    pieces: list[str] = []
    for span in unit:
        for text, ends in documents(span, reading, Counter()):
            pieces.append(text)
            if ends:
                yield "".join(pieces)
                pieces = []
    if pieces:
        yield "".join(pieces)


def _are_few(units: list[list[Span]], reading: Reading, enough: float) -> bool:
    """Whether the corpus has fewer than `enough` documents."""
    count = 0
    for span in itertools.chain(*units):
        if span.source.kind == "text" and not reading.separator:
            count += span.start == 0  # one document, not to be read for that
        else:
            count += sum(1 for _ in itertools.islice(documents(span, reading, Counter()), int(enough) + 1))
        if count >= enough:
            return False
    return True


def _survey(units: list[list[Span]], reading: Reading, characters: bool, num_proc: int) -> list[tuple[int, str]]:
    """For each unit the bytes of its text and, if asked for, the characters that occur in it."""
    return list(parallel_map(functools.partial(_survey_unit, reading=reading, characters=characters), units, num_proc))


def _survey_unit(unit: list[Span], reading: Reading, characters: bool) -> tuple[int, str]:
    size, seen = 0, set[str]()
    for span in unit:
        for text, _ in documents(span, reading, Counter()):
            size += len(text) if text.isascii() else len(text.encode())
            if characters:
                seen.update(text)
    return size, "".join(sorted(seen))


def _make_tokenizer(setting: str, units: list[list[Span]], reading: Reading, characters: str) -> Tokenizer:
    if setting == "byte":
        return ByteTokenizer()
    if setting == "gpt2":
        return GPT2Tokenizer()
    if setting == "char":
        if not characters:
            raise DataError("there is no text in the corpus: every file is empty, or none is text")
        return CharTokenizer.from_text(characters)
    if setting.startswith("bpe:"):
        size = sum(span.size for unit in units for span in unit)
        chosen = units[:: -(-size // BPE_TEXT) or 1]  # evenly over the corpus
        print(f"learning a vocabulary from {sum(span.size for unit in chosen for span in unit):,} bytes")
        texts = (text for unit in chosen for span in unit for text, _ in documents(span, reading, Counter()))
        tokenizer = train_bpe(texts, int(setting.removeprefix("bpe:")))
        print(f"vocabulary of {tokenizer.vocab_size} entries")
        return tokenizer
    if Path(setting).exists():
        return read_tokenizer(Path(setting))
    raise ConfigError(
        f"--tokenizer={setting}: expected char, byte, gpt2, bpe:N, or the path of a tokenizer.json or of a folder "
        "with one"
    )


# ---------------------------------------------------------------------------------------------------
# The work


def tokenize(unit: Unit) -> None:
    """Write the part of one unit of work: two files of ids, and then what they hold."""
    tokenizer = _tokenizer(unit.tokenizer)
    dtype = dtype_of(tokenizer)
    end = b""
    if unit.end_documents and tokenizer.end_of_text is not None:
        end = np.array([tokenizer.end_of_text], dtype).tobytes()
    position, skipped = unit.position, Counter[str]()
    tally = {what: dict.fromkeys(SPLITS, 0) for what in ("tokens", "documents", "bytes")}
    stem = unit.folder / f"{unit.number:05}"
    with atomic_write(f"{stem}.train") as train, atomic_write(f"{stem}.val") as val:
        files: dict[str, IO[bytes]] = {"train": train, "val": val}
        for span, digest in zip(unit.spans, unit.digests, strict=True):
            is_one_document = span.source.kind == "text" and not unit.reading.separator
            split = "train"
            for text, ends in documents(span, unit.reading, skipped):
                parts = list(unit.division.divide(text, digest if is_one_document else None, position))
                tally["documents"]["train"] += len(parts) == 2  # the document goes on in validation
                for split, part in parts:
                    ids = tokenizer.encode(part)
                    files[split].write(ids.astype(dtype, copy=False).data)
                    size = len(part) if part.isascii() else len(part.encode())
                    tally["tokens"][split] += len(ids)
                    tally["bytes"][split] += size
                    position += size
                if ends:
                    files[split].write(end)
                    tally["tokens"][split] += bool(end)
                    tally["documents"][split] += 1
    write_json(f"{stem}.json", {**tally, "skipped": skipped})


@functools.lru_cache(maxsize=1)
def _tokenizer(description: str) -> Tokenizer:
    return from_description(json.loads(description))


def _tokenize_all(work: Path, units: list[Unit], num_proc: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Tokenize what is left to do, append it in order, and return the sums over all units."""
    parts, journal = work / "parts", work / "progress.json"
    parts.mkdir(parents=True, exist_ok=True)
    progress: dict[str, Any] = {"appended": 0, "tokens": {}, "documents": {}, "bytes": {}, "skipped": {}}
    if journal.exists():
        progress = json.loads(journal.read_bytes())
    first = progress["appended"]
    if first == len(units):
        return progress
    missing = [unit for unit in units[first:] if not (parts / f"{unit.number:05}.json").exists()]
    made = parallel_map(tokenize, missing, num_proc)
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
            if not stem.with_suffix(".json").exists():
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
    return progress


def _check_disk(folder: Path, size: int, tokenizer: Tokenizer) -> None:
    """Refuse before the work what could not be stored after it."""
    per_byte = dtype_of(tokenizer).itemsize / (1 if isinstance(tokenizer, ByteTokenizer | CharTokenizer) else 4)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size * per_byte:
        raise DataError(
            f"the ids of {size / 1e9:.1f} GB of text take about {size * per_byte / 1e9:.1f} GB, but {folder} has only "
            f"{free / 1e9:.1f} GB left; make room, or choose another disk with --data_dir=…"
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
            f"text, or a --val_fraction other than {recipe.val_fraction:g}"
        )
