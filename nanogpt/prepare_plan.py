"""Before a data set is built: what it is made of, its units of work, its tokenizer, and where validation begins.

A plan is a JSON object that says all of it. It is kept, so that the work can go on after an interruption.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanogpt.corpus import Source, Span, cut, digests_of, find_sources, is_published
from nanogpt.documents import Reading, documents, first_published_documents, is_text, size_of
from nanogpt.download import hub_folder
from nanogpt.errors import DataError
from nanogpt.files import atomic_write, read_json, write_json
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from nanogpt.tokenizer_json import TOKENIZER_FILES, read_tokenizer, train_bpe
from nanogpt.workers import parallel_map

log = logging.getLogger(__name__)

ENOUGH = 10  # documents to expect in validation; where there are fewer, the end of the text is validation
BPE_TEXT = 1 << 28  # bytes of text, at most, that a vocabulary is learned from
DEFAULT_READING = Reading()
VERSION = 1  # of the files in .preparing


@dataclass(frozen=True)
class Recipe:
    """What a data set is made of, and how."""

    inputs: Sequence[str | Source] = ()
    tokenizer: str = "gpt2"  # char, byte, gpt2, bpe:N, or the path of a tokenizer.json or a model's folder
    val_fraction: float = 0.05
    reading: Reading = DEFAULT_READING
    end_documents: bool = True  # with the end-of-text token, where the tokenizer has one
    limit: int = 0  # documents to take from the start; 0: all


def make_plan(work: Path, recipe: Recipe, num_proc: int) -> dict[str, Any]:
    """The plan in `work` if it is for the same request, else a new one."""
    request, sources = _request(recipe, num_proc)
    path = work / "plan.json"
    plan = read_json(path)
    if plan.get("request") == request:
        log.info(f"going on with what {work} holds")
        return plan
    discard(work)
    readable = [source for source in sources if not source.found or source.kind != "text" or is_text(source)]
    skipped = Counter({"not UTF-8 text": len(sources) - len(readable)})
    sources = readable
    if recipe.limit:
        sources = [_first_documents(work / "first.jsonl", recipe, sources, skipped)]
    reading = recipe.reading if not recipe.limit else DEFAULT_READING
    units = cut(sources)
    few = _are_few(units, reading, ENOUGH / recipe.val_fraction)
    survey = _survey(units, reading, recipe.tokenizer == "char", num_proc) if few or recipe.tokenizer == "char" else []
    tokenizer = _make_tokenizer(recipe.tokenizer, units, reading, "".join(characters for _, characters in survey))
    positions = [0, *itertools.accumulate(size for size, _ in survey)] if few else [0] * len(units)
    cut_at = int(positions[-1] * (1 - recipe.val_fraction)) if few else None
    if few:
        log.info(f"few documents: the last {recipe.val_fraction * 100:g} % of the text is validation")
    description = json.dumps(tokenizer.describe())
    described = f"tokenizer-{hashlib.sha256(description.encode()).hexdigest()[:16]}.json"
    with atomic_write(work / described) as file:
        file.write(description.encode())
    index = {source: n for n, source in enumerate(sources)}
    is_large = sum(source.size for source in sources) > 1 << 28
    passes = parallel_map(digests_of, sources, num_proc if is_large else 1)
    digests = list(tqdm(passes, "checksums", len(sources), unit="file", disable=None, leave=False))
    plan = {
        "request": request,
        "sources": [[source.path, source.size, source.found] for source in sources],
        "digests": [packed for packed, _ in digests],
        "contents": [content for _, content in digests],
        "skipped": {reason: count for reason, count in skipped.items() if count},
        "parts": f"parts-{hashlib.sha256(json.dumps(request).encode()).hexdigest()[:8]}",
        "units": [[[index[span.source], span.start, span.stop, span.size] for span in unit] for unit in units],
        "positions": positions,
        "cut": cut_at,
        "reading": dataclasses.asdict(reading),
        "tokenizer": described,
    }
    write_json(path, plan)
    return plan


def stamps(sources: Sequence[Source]) -> list[list[Any]]:
    """Path, size and time of the last change of each file: equal as long as nobody writes there."""
    try:
        stats = [os.stat(source.path) for source in sources]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return [[source.path, stat.st_size, stat.st_mtime_ns] for source, stat in zip(sources, stats, strict=True)]


def discard(work: Path) -> None:
    """Remove what was made so far; the plan first, so that nobody goes on with the half of it."""
    if work.exists():
        (work / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(work)


def _request(recipe: Recipe, num_proc: int) -> tuple[dict[str, Any], list[Source]]:
    """What is asked for, as JSON that changes when the request or a file changes; and the files."""
    named = [name for name in recipe.inputs if isinstance(name, str)]
    sources = [source for source in recipe.inputs if isinstance(source, Source)]
    wanted = [name for name in named if not (recipe.limit and is_published(name))]  # a few rows need no download
    sources += find_sources(wanted, num_proc) if wanted else []
    tokenizer = recipe.tokenizer
    if not re.fullmatch(r"char|byte|gpt2|bpe:\d+", tokenizer):
        tokenizer = json.dumps(_named_tokenizer(tokenizer).describe())
    request = {
        **dataclasses.asdict(recipe),
        "version": VERSION,
        "inputs": named,
        "files": stamps(sources),
        "tokenizer": tokenizer,
    }
    return json.loads(json.dumps(request)), sources


def _first_documents(path: Path, recipe: Recipe, sources: list[Source], skipped: Counter[str]) -> Source:
    """The first documents of a corpus as one file of JSON lines."""

    def texts() -> Iterator[str]:
        for name in recipe.inputs:
            if isinstance(name, str) and is_published(name):
                yield from first_published_documents(name, recipe.reading.field, recipe.limit)
        yield from whole_documents(itertools.chain(*cut(sources)), recipe.reading, skipped)

    with atomic_write(path) as file:
        for text in itertools.islice(texts(), recipe.limit):
            file.write(json.dumps({"text": text}).encode() + b"\n")
    return Source(str(path), path.stat().st_size)


def whole_documents(spans: Iterable[Span], reading: Reading, skipped: Counter[str]) -> Iterator[str]:
    """The documents of consecutive spans, each in one piece."""
    pieces: list[str] = []
    for span in spans:
        for piece in documents(span, reading, skipped):
            pieces.append(piece.text)
            if piece.ends:
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
    one = functools.partial(_survey_unit, reading=reading, characters=characters)
    passes = parallel_map(one, units, num_proc)
    return list(tqdm(passes, "reading", len(units), unit="part", disable=None, leave=False))


def _survey_unit(unit: list[Span], reading: Reading, characters: bool) -> tuple[int, str]:
    size, seen = 0, set[str]()
    for span in unit:
        for piece in documents(span, reading, Counter()):
            size += size_of(piece.text)
            if characters:
                seen.update(piece.text)
    return size, "".join(sorted(seen))


def _at_most(size: int, texts: Iterable[str]) -> Iterator[str]:
    """The first texts, of so many characters together."""
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def _make_tokenizer(setting: str, units: list[list[Span]], reading: Reading, characters: str) -> Tokenizer:
    if setting == "byte":
        return ByteTokenizer()
    if setting == "gpt2":
        return GPT2Tokenizer()
    if setting == "char":
        if not characters:
            raise DataError("there is no text in the corpus: every file is empty, or none is text")
        chars = CharTokenizer.from_text(characters)
        log.info(f"vocabulary of {chars.vocab_size} characters")
        return chars
    if setting.startswith("bpe:"):
        size = sum(span.size for unit in units for span in unit)
        chosen = units[:: -(-size // BPE_TEXT) or 1]  # evenly over the corpus
        log.info("learning a vocabulary from the text")
        spans = (span for unit in chosen for span in unit)
        pieces = (piece.text for span in spans for piece in documents(span, reading, Counter()))
        tokenizer = train_bpe(_at_most(BPE_TEXT, pieces), int(setting.removeprefix("bpe:")))
        log.info(f"vocabulary of {tokenizer.vocab_size} entries")
        return tokenizer
    return _named_tokenizer(setting)


def _named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a file, a folder, or a model on the Hugging Face hub."""
    path = Path(name)
    return read_tokenizer(path if path.exists() else hub_folder(name, TOKENIZER_FILES, option="tokenizer"))
