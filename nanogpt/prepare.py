"""From text to a data set folder: files, folders or the Hugging Face hub, in parallel and in bounded memory.

This process reads documents and hands out units of work, some megabytes of text each. Worker processes encode units,
and each writes its part whole into data/NAME/.preparing/, so that the same command resumes after a kill. At the end the
parts are joined. The only journal, plan.json, says what is being made and which shards of the hub are done.
"""

import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sysconfig
import threading
import time
import urllib.request
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from nanogpt.config import TrainConfig, mixture
from nanogpt.errors import ConfigError, DataError
from nanogpt.files import atomic_write, locked, read_json, sync_folder, write_json
from nanogpt.settings import PrepareConfig, recipe_for_text, unescape
from nanogpt.tokenizer import (
    TOKENIZER_FILES,
    CharTokenizer,
    Tokenizer,
    from_description,
    make_tokenizer,
    well_formed,
    write_meta,
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Text = tuple[str, str, bool]  # its split, itself, and whether the document ends with it

SPLITS, COUNTED = ("train", "val"), ("tokens", "documents", "bytes")
UNIT = 1 << 22  # characters of a unit of work
BLOCK = 1 << 20  # characters that are encoded at once; a longer document comes in pieces
LONGEST_LINE = 1 << 28  # characters of a JSON line; a longer one is skipped
BPE_TEXT = 1 << 28  # characters, at most, that a vocabulary is learned from
# Why a JSON line has no text, by the type of what is in its place.
WHAT: dict[type, str] = {type(None): "null", KeyError: "missing", json.JSONDecodeError: "in no JSON"}
ENOUGH = 10  # documents to expect in validation; where there are fewer, the end of the text is validation

# What is known by name, with the settings that differ from the defaults. Shakespeare is one text, as in the original.
DATASETS: dict[str, dict[str, Any]] = {
    "pystdlib": {"tokenizer": "byte"},
    "shakespeare_char": {"tokenizer": "char", "val_fraction": 0.1},
    "shakespeare": {"val_fraction": 0.1},
    "openwebtext": {"input": ["Skylion007/openwebtext"], "val_fraction": 0.0005},
    "tinystories": {"input": ["karpathy/tinystories-gpt4-clean"], "val_fraction": 0.01},
    "fineweb-edu": {"input": ["HuggingFaceFW/fineweb-edu:sample/10BT/"], "val_fraction": 0.001},
    "climbmix": {"input": ["karpathy/climbmix-400b-shuffle"], "val_fraction": 0.0005},
}
NEEDS_NO_NETWORK = {"pystdlib"}
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare(config: PrepareConfig) -> None:
    """Build the data set `config.name`, or describe it.

    Raises `ConfigError` for settings that can't work, `DataError` for text that can't be used.
    """
    folder = Path(config.data_dir) / config.name
    if config.describe:
        describe(folder)
        return
    if config.name not in DATASETS and not config.input:
        raise ConfigError(
            f"no data set is known as {config.name!r}; for your own text: nanogpt prepare {config.name} --input=PATH "
            f"(known without --input: {', '.join(DATASETS)})"
        )
    known = {"input": [], "tokenizer": "gpt2", "val_fraction": 0.05, **DATASETS.get(config.name, {})}
    config = replace(
        config,
        input=config.input or known["input"],
        tokenizer=config.tokenizer or known["tokenizer"],
        val_fraction=known["val_fraction"] if config.val_fraction == "auto" else config.val_fraction,
    )
    with locked(folder / ".lock", f"the data set {folder}"):
        try:
            about = build(folder, config, find_sources(config.input) or known_sources(config.name, folder))
        finally:
            with suppress(OSError):  # nothing is left of a refused request
                (folder / ".lock").unlink()
                folder.rmdir()
    for split in SPLITS:
        log.info(f"{split} has {about['tokens'][split]:,} tokens in {about['documents'][split]:,} documents")
    for reason, count in about["skipped"].items():
        log.info(f"skipped: {count:,} ({reason})")
    print(f"wrote {folder}/train.bin, val.bin and dataset.json")


def prepare_missing(config: TrainConfig) -> None:
    """Prepare what a run trains on, if that is not there and needs no network. Raises `DataError` if it needs one."""
    for name in mixture(config.dataset):
        folder = Path(config.data_dir, name)
        files = [folder / f"{split}.bin" for split in SPLITS]
        changed = os.path.getmtime(config.text) if config.text else 0.0
        if all(file.exists() and file.stat().st_mtime > changed for file in files):
            continue
        chosen = PrepareConfig(name=name, data_dir=config.data_dir)
        if config.text:
            chosen = replace(chosen, input=[config.text], tokenizer=recipe_for_text(config.text)[0])
        elif name not in NEEDS_NO_NETWORK:
            command = f"python -m nanogpt prepare {name} --data_dir={config.data_dir}"
            command += "" if name in DATASETS else " --input=PATH"
            raise DataError(f"{folder} holds no train.bin and val.bin; prepare the data set with: {command}")
        log.info(f"preparing the data set {folder}")
        prepare(chosen)


def describe(folder: Path) -> None:
    """Print what a data set is, where it comes from, and the beginning of its splits in tokens."""
    from nanogpt.data import open_dataset  # with torch, which building does without

    dataset = open_dataset(folder)
    print(f"{folder}: {dataset.tokenizer}")
    for split in SPLITS:
        ids = dataset.split(split)[:24].tolist()
        print(f"{split} begins: " + " ".join(f"{i}:{dataset.tokenizer.decode([i])!r}" for i in ids))
    about = {"tokens": {split: len(dataset.split(split)) for split in SPLITS}, **dataset.description}
    for key in ("dtype", *COUNTED, "skipped", "source_files", "sources"):
        print(f"{key}: {str(about.get(key, 'unknown'))[:300]}")


# ---------------------------------------------------------------------------------------------------
# Published files


def mirrored(name: str) -> Path:
    """Return where a file or a repository would lie in the folder `$NANOGPT_DOWNLOADS`."""
    return Path(os.environ.get("NANOGPT_DOWNLOADS") or "/nowhere", name)


def download(path: Path, name: str, url: str, sha256: str, option: str = "input") -> Path:
    """Return `path` with a published file: there already, from `$NANOGPT_DOWNLOADS/name`, or from the network.

    option: the setting that takes such a file. Raises `DataError`, with what to do instead, if it can't be had.
    """
    instead = f"get {url} by other means and name it, --{option}=FILE, or put it as {name} into $NANOGPT_DOWNLOADS"
    origin = next((file for file in (path, mirrored(name)) if file.is_file()), None)
    if origin:
        content = origin.read_bytes()
    else:
        content = with_retries(url, lambda: urllib.request.urlopen(url, timeout=30).read(), instead)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{origin or url} is not the file expected: {len(content):,} bytes, sha256 {found}; {instead}")
    if origin != path:
        with atomic_write(path) as file:
            file.write(content)
    return path


def hub_folder(repository: str, patterns: list[str], option: str = "init_from") -> Path:
    """Return a folder with a model's files: `$NANOGPT_DOWNLOADS/ORGANISATION/NAME`, or from the Hugging Face hub.

    option: the setting that takes such a folder. Raises `DataError` with what to do instead.
    """
    from huggingface_hub import snapshot_download

    if mirrored(repository).is_dir():
        return mirrored(repository)
    instead = f"put its files ({', '.join(patterns)}) into $NANOGPT_DOWNLOADS/{repository}/, or name --{option}=FOLDER"
    return Path(with_retries(repository, lambda: snapshot_download(repository, allow_patterns=patterns), instead))


def with_retries(what: str, get: Callable[[], Result], instead: str) -> Result:
    """Return what `get` returns. Raises `DataError` if `what` is refused, or the network fails three times."""
    for pause in (1, 3, 0):
        try:
            return get()
        except Exception as error:  # each library has its own
            response: Any = getattr(error, "response", error)  # of httpx; urllib's errors are responses
            status = getattr(response, "status_code", None) or getattr(response, "code", None) or 500
            if not pause or (400 <= status < 500 and status != 429):
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise DataError(f"{what} could not be downloaded ({reason}); {instead}") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


# ---------------------------------------------------------------------------------------------------
# Where text comes from: paths of files, or hf://ORGANISATION/NAME/PATH, each with its size in bytes


def find_sources(inputs: Iterable[str]) -> dict[str, int]:
    """Return the files behind paths, folders, patterns and names of data sets. Raises `DataError` for what is none.

    Of a folder that is all but hidden files, in the order of their paths.
    """
    sources: dict[str, int] = {}
    for name in inputs:
        path = os.path.expanduser(name).rstrip("/")
        if os.path.isfile(path):
            found = {path: os.path.getsize(path)}
        elif os.path.isdir(path) or re.search(r"[*?\[]", name):
            paths = glob.glob(f"{glob.escape(path)}/**" if os.path.isdir(path) else path, recursive=True)
            found = {each: os.path.getsize(each) for each in sorted(paths) if os.path.isfile(each)}
        elif re.fullmatch(r"(hf:)?[\w.-]+/[\w.-]+(:.+)?", name):
            found = hub_sources(name)
        else:
            raise DataError(f"--input={name}: there is no such file or folder")
        if not found:
            raise DataError(f"--input={name}: no file there")
        sources |= found
    return sources


def known_sources(name: str, folder: Path) -> dict[str, int]:
    """Return the text of a known data set without an input: Python's library, or `folder`/input.txt.

    Raises `DataError` if it can't be had.
    """
    if name == "pystdlib":
        root = sysconfig.get_path("stdlib")
        left_out = re.compile(re.escape(root) + r"(/.*)?/(site-packages|dist-packages|test|tests|idle_test)/")
        return {path: size for path, size in find_sources([f"{root}/**/*.py"]).items() if not left_out.match(path)}
    path = folder / "input.txt"  # where the original keeps it, and where people put a text of their own
    is_shakespeare = name in ("shakespeare_char", "shakespeare")
    if is_shakespeare and not path.is_file():
        download(path, "tinyshakespeare.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256)
    elif is_shakespeare and hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        log.warning(f"{path} is not Tiny Shakespeare as published: it is used as it is")
    return find_sources([str(path)])


def hub_sources(name: str) -> dict[str, int]:
    """Return the training files of a data set: ORGANISATION/NAME, or ORGANISATION/NAME:START of the files' paths.

    They lie in `$NANOGPT_DOWNLOADS/ORGANISATION/NAME` or on the Hugging Face hub. Parquet files are preferred to JSON
    lines, and these to text. Raises `DataError`.
    """
    repository, _, start = name.removeprefix("hf:").partition(":")

    def listing() -> dict[str, int]:
        from huggingface_hub import HfApi

        below = start.rpartition("/")[0] or None
        tree = HfApi().list_repo_tree(repository, below, recursive=True, repo_type="dataset")
        return {f"hf://{repository}/{each.path}": getattr(each, "size", 0) for each in tree}

    root = f"{mirrored(repository)}/" if mirrored(repository).is_dir() else f"hf://{repository}/"
    instead = "get its parquet or jsonl files by other means, and pass their folder as --input=FOLDER"
    what = f"there is no {name} on this machine, and the data set of that name"
    sizes = with_retries(what, listing, instead) if root.startswith("hf://") else find_sources([root])
    held_out = r"(?<![a-z])(test|val|valid|validation|dev|eval)(?![a-z])"
    for kind in (r".+\.parquet", r".+\.(jsonl|ndjson)(\.gz|\.zst)?", r".+\.txt(\.gz|\.zst)?"):
        paths = [path for path in sorted(sizes) if path.startswith(root + start) and re.fullmatch(kind, path)]
        if paths := [path for path in paths if not re.search(held_out, path.removeprefix(root), re.IGNORECASE)]:
            return {path: sizes[path] for path in paths}
    return {}


def local_path(source: str, work: Path) -> Path:
    """Return the file of a source; one of the hub is downloaded. Raises `DataError`."""
    if not source.startswith("hf://"):
        return Path(source)
    from huggingface_hub import hf_hub_download

    organisation, name, path = source.removeprefix("hf://").split("/", 2)
    get = functools.partial(hf_hub_download, f"{organisation}/{name}", path, repo_type="dataset")
    instead = "what is finished is kept: the same command resumes"
    return Path(with_retries(source, lambda: str(get(local_dir=work / "shards")), instead))


# ---------------------------------------------------------------------------------------------------
# From files to documents: `(text, ends)`, where a long document comes in pieces, of which only the last ends


def documents(source: str, config: PrepareConfig, work: Path, skipped: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Yield the documents of a file, but blank ones; `skipped` counts by reason what is left out.

    Raises `DataError` for what can't be read. A file that is no text is left out, unless it is named in the settings.
    """
    path, begins = local_path(source, work), True
    try:
        for text, ends in read_pieces(path, config, skipped):
            if begins and ends and not text.strip():
                skipped["empty"] += 1
            else:
                yield text, ends
            begins = ends
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if not isinstance(error, UnicodeError):
            raise DataError(f"{path} cannot be read: {error}") from error
        if source in config.input or not begins:
            raise DataError(f"{path} is not UTF-8 text: {error}") from error
        skipped["not UTF-8 text"] += 1


def read_pieces(path: Path, config: PrepareConfig, skipped: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Yield the documents of a file, of the kind that its name says."""
    packing = path.suffix.lower() if path.suffix.lower() in (".gz", ".zst") else ""
    kind = Path(path.name.lower().removesuffix(packing)).suffix
    if kind == ".parquet":
        for row in parquet_rows(path, config.field, skipped):
            yield from in_pieces([row])
        return
    file: Any = gzip.open(path) if packing == ".gz" else path.open("rb")
    if packing == ".zst":
        import pyarrow

        file = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    # Without a byte-order mark, and with all kinds of newlines as \n, as in Python's text mode.
    with io.TextIOWrapper(file, encoding="utf-8-sig") as reader:
        if kind in (".jsonl", ".ndjson"):
            for row in json_rows(reader, config.field, skipped):
                yield from in_pieces([row])
        elif config.separator:
            yield from separated(blocks(reader), unescape(config.separator))
        else:
            yield from in_pieces(blocks(reader))


def blocks(reader: TextIO) -> Iterator[str]:
    """Yield a text in blocks. Raises `UnicodeError` where it is none."""
    while text := reader.read(BLOCK):
        if "\0" in text:
            raise UnicodeError("it holds a zero byte")
        yield text


def in_pieces(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield one document in pieces, cut between a letter and a blank, where no usual tokenizer joins anything."""
    rest = ""
    for text in texts:
        rest += text
        while len(rest) > BLOCK:
            cuts = [match.end() for match in re.finditer(r"[^\W_](?=[ \n])", rest[:BLOCK][-4096:])]
            cut = BLOCK - min(BLOCK, 4096) + cuts[-1] if cuts else BLOCK
            yield rest[:cut], False
            rest = rest[cut:]
    yield rest, True


def separated(texts: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Yield the documents between separators; one that repeats a character, as two newlines do, takes all in a row."""
    run = f"(?:{re.escape(separator[0])}){{{len(separator)},}}"
    pattern, rest = re.compile(run if len(set(separator)) == 1 else re.escape(separator)), ""
    for text in itertools.chain(texts, [""]):
        rest, start = rest + text, 0
        for match in pattern.finditer(rest):
            if match.end() == len(rest) and text:
                break  # it may go on in the next block
            yield rest[start : match.start()], True
            start = match.end()
        rest = rest[start:]
        if len(rest) > 2 * BLOCK:
            yield rest[:BLOCK], False
            rest = rest[BLOCK:]
    if rest:
        yield rest, True


def parquet_rows(path: Path, field: str, skipped: Counter[str]) -> Iterator[str]:
    """Yield the texts of a column. Raises `DataError`, with the names of the columns, if it is none of text."""
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    kinds = {column.name: str(column.type) for column in file.schema_arrow}
    if not re.match(r"(dictionary<values=)?(large_)?string", kinds.get(field, "")):
        names = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise DataError(f"{path}: no column {field!r} of text; choose one with --field=NAME (columns: {names})")
    for batch in file.iter_batches(100, columns=[field]):
        texts = batch.column(0).to_pylist()
        skipped.update(f"{field!r} is null" for text in texts if text is None)
        yield from (text for text in texts if text is not None)


def json_rows(reader: TextIO, field: str, skipped: Counter[str]) -> Iterator[str]:
    """Yield the texts in a field of JSON lines. Raises `DataError` if the first 1,000 lines have none."""
    without = 0.0  # counted until there is a text
    while line := reader.readline(LONGEST_LINE):
        try:
            text = json.loads(line)[field]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            text = error
        if isinstance(text, str):
            yield well_formed(text)
            without = -math.inf
        elif not line.isspace():
            skipped[f"{field!r} is {WHAT.get(type(text), type(text).__name__)}"] += 1
            without += 1
        if without == 1000:
            raise DataError(f"{field!r} is no text in 1,000 lines such as {line[:300]!r}; --field=NAME takes another")
        while line and not line.endswith("\n"):  # the rest of a line that is too long
            line = reader.readline(BLOCK)


# ---------------------------------------------------------------------------------------------------
# Building


def build(folder: Path, config: PrepareConfig, sources: dict[str, int]) -> dict[str, Any]:
    """Build the data set in `folder`, or resume it, and return its description. Raises `DataError`.

    The data set that was there stays until the new one is complete.
    """
    work = folder / ".preparing"
    times = [os.stat(path).st_mtime_ns for path in sources if not path.startswith("hf://")]
    settings = [2, config.tokenizer, config.field, config.separator, config.limit, config.val_fraction]
    request = hashlib.sha256(json.dumps([settings, sources, times]).encode()).hexdigest()
    plan = read_json(work / "plan.json")
    if plan.get("request") == request:
        log.info(f"resuming from what {work} holds")
    else:
        shutil.rmtree(work, ignore_errors=True)
        plan = {"request": request, **make_plan(work, config, sources)}
        write_json(work / "plan.json", plan)
    tokenizer = from_description(read_json(work / "tokenizer.json"))
    try:
        if not plan.get("complete"):  # else it was interrupted while its files took their names
            encode(work, config, plan, sources, dtype_of(tokenizer).itemsize)
            write_json(work / "plan.json", {**plan, "complete": True})
    except (OSError, BrokenProcessPool) as error:  # a full disk; a worker killed for want of memory
        raise DataError(f"{error}; what is finished in {work} is kept: the same command resumes") from error
    tokens = plan["counts"]["tokens"]
    if min(tokens.values()) < 2:
        shutil.rmtree(work)
        raise DataError(
            f"the text is too small to split: {tokens['train']} training and {tokens['val']} validation tokens; use "
            "more text, or another --val_fraction"
        )
    listed = [{"path": path, "bytes": size} for path, size in sources.items()]
    return finish_dataset(folder, work, tokenizer, {**plan["counts"], "skipped": plan["start"]["skipped"]}, listed)


def make_plan(work: Path, config: PrepareConfig, sources: dict[str, int]) -> dict[str, Any]:
    """Write the tokenizer to `work`, and return a plan: with where validation begins, and with nothing done."""

    def texts(paths: Iterable[str], skipped: Counter[str], most: float = math.inf) -> Iterator[tuple[str, bool]]:
        for text, ends in itertools.chain.from_iterable(documents(path, config, work, skipped) for path in paths):
            most -= len(text)
            if most < 0:
                return
            yield text, ends

    enough = ENOUGH / float(config.val_fraction)
    count, size, characters, skipped = 0, 0, set[str](), Counter[str]()
    for text, ends in texts(sources, skipped):
        count, size = count + ends, size + len(text)
        if config.tokenizer == "char":
            characters.update(text)
        if count == (config.limit or -1) or (count >= enough and config.tokenizer != "char"):
            break
    if not size:
        raise DataError(f"there is no text to read; skipped: {dict(skipped) or 'nothing'}; see --field and --input")
    setting = config.tokenizer
    if not Path(setting).exists() and not re.fullmatch(r"char|byte|gpt2|bpe:\d+", setting):
        setting = str(hub_folder(setting, TOKENIZER_FILES, option="tokenizer"))
    # Files of one language or subject often lie side by side: a vocabulary is learned from files in any order.
    shuffled = random.Random(0).sample(list(sources), len(sources))
    sample = (text for text, _ in texts(shuffled, Counter(), BPE_TEXT))
    tokenizer = make_tokenizer(setting, characters, sample)
    log.info(f"{tokenizer}")
    write_json(work / "tokenizer.json", tokenizer.describe())
    cut = None if count >= enough else int(size * (1 - float(config.val_fraction)))
    start: dict[str, Any] = {"sources": 0, "units": 0, "documents": 0, "characters": 0, "skipped": {}}
    counts = {key: dict.fromkeys(SPLITS, 0) for key in COUNTED}
    return {"cut": cut, "start": start, "units": 0, "counts": counts}


def read_units(
    work: Path, config: PrepareConfig, plan: dict[str, Any], sources: list[str]
) -> Iterator[tuple[list[Text], dict[str, Any] | None]]:
    """Yield the texts of each unit, and where it ends a source, what is read with it: a run may resume from there."""
    start, limit = plan["start"], config.limit or -1
    skipped, count, position = Counter[str](start["skipped"]), start["documents"], start["characters"]
    batch, room, split = list[Text](), UNIT, ""
    for number, source in enumerate(sources[start["sources"] :], start["sources"] + 1):
        begins = True
        for text, ends in documents(source, config, work, skipped):
            if plan["cut"] is not None:
                at, split = plan["cut"] - position, "train" if position < plan["cut"] else "val"
                if 0 < at < len(text):
                    batch.append(("train", text[:at], False))
                    position, text, split = plan["cut"], text[at:], "val"
            elif begins:
                share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
                split = "val" if share < float(config.val_fraction) else "train"
            batch.append((split, text, ends))
            begins, position, count, room = ends, position + len(text), count + ends, room - len(text)
            if count == limit:
                break
            if room <= 0:
                yield batch, None
                batch, room = [], UNIT
        # Small files share a unit.
        if count == limit or number == len(sources) or source.startswith("hf://") or room < UNIT / 2:
            after = {"sources": number, "documents": count, "characters": position, "skipped": dict(skipped)}
            yield batch, {**after, "shard": source}
            batch, room = [], UNIT
        if count == limit:
            return


def encode(work: Path, config: PrepareConfig, plan: dict[str, Any], sources: dict[str, int], itemsize: int) -> None:
    """Encode the units that are not done, and append their ids in order; `plan` and plan.json say how far that is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_proc = config.num_proc or cores
    # Shakespeare is one text without end, as in the original.
    setting = str(work / "tokenizer.json"), config.name not in ("shakespeare", "shakespeare_char")
    pending = deque[tuple[Future[Any], dict[str, Any] | None]]()
    pool: Executor = ThreadPoolExecutor(1)
    if num_proc > 1 and sum(sources.values()) > UNIT:  # for less, processes start longer than they work
        # Not fork: the libraries that encode have threads of their own.
        pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), start_worker)
    from tqdm import tqdm  # what only reads prepared data does without

    with ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        bar = stack.enter_context(tqdm(unit="B", unit_scale=True, disable=None, desc="encoding"))
        files = {split: stack.enter_context(open(work / f"{split}.bin", "ab")) for split in SPLITS}
        for split, file in files.items():
            file.truncate(plan["counts"]["tokens"][split] * itemsize)

        def append_next() -> None:
            future, start = pending.popleft()
            ids, counts = future.result()
            for split, file in files.items():
                file.write(ids[split])
                file.flush()
                os.fsync(file.fileno())
                for key in COUNTED:
                    plan["counts"][key][split] += counts[key][split]
            plan["units"] += 1
            plan["start"] = {**start, "units": plan["units"]} if start else plan["start"]
            write_json(work / "plan.json", plan)
            if start and start["shard"].startswith("hf://"):
                local_path(start["shard"], work).unlink()
            bar.update(sum(counts["bytes"].values()))

        done = plan["units"] - plan["start"]["units"]
        for batch, start in itertools.islice(read_units(work, config, plan, list(sources)), done, None):
            pending.append((pool.submit(encode_unit, batch, *setting), start))
            if len(pending) > 2 * num_proc:
                append_next()
        while pending:
            append_next()


def start_worker() -> None:
    """Make a process a worker that leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        assert parent
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


@functools.lru_cache(maxsize=1)
def tokenizer_of(path: str, time: int) -> Tokenizer:
    """Return the tokenizer described in a file, which a worker reads once."""
    return from_description(json.loads(Path(path).read_bytes()))


def encode_unit(
    batch: list[Text], tokenizer_file: str, end_documents: bool
) -> tuple[dict[str, bytes], dict[str, dict[str, int]]]:
    """Return the ids of each split, and how much that is."""
    tokenizer = tokenizer_of(tokenizer_file, os.stat(tokenizer_file).st_mtime_ns)
    dtype, closing = dtype_of(tokenizer), b""
    if end_documents and tokenizer.end_of_text is not None:
        closing = np.array(tokenizer.end_of_text, dtype).tobytes()
    ids = dict.fromkeys(SPLITS, b"")
    counts = {key: dict.fromkeys(SPLITS, 0) for key in COUNTED}
    for split in SPLITS:
        texts = [(text, ends) for each, text, ends in batch if each == split]
        parts = [tokenizer.encode(text).astype(dtype, copy=False).tobytes() + closing * ends for text, ends in texts]
        ids[split] = b"".join(parts)
        counts["tokens"][split] = len(ids[split]) // dtype.itemsize
        counts["documents"][split] = sum(ends for _, ends in texts)
        counts["bytes"][split] = sum(len(text.encode()) for text, _ in texts)
    return ids, counts


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Return the number format of a tokenizer's ids on disk."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def finish_dataset(
    folder: Path, work: Path, tokenizer: Tokenizer, counts: dict[str, Any], sources: list[dict[str, Any]]
) -> dict[str, Any]:
    """Move the finished ids from `work` to `folder`, describe them in dataset.json, and return the description.

    Old ids go first, then comes the description, then the new ids: so ids are never read with a tokenizer that is not
    theirs. Interrupted, it completes its work when called again.
    """
    finished = [split for split in SPLITS if (work / f"{split}.bin").exists()]
    for old in [path for split in finished for path in (folder / f"{split}.bin", *folder.glob(f"{split}-*.bin"))]:
        old.unlink(missing_ok=True)
    about = {
        "version": 1,
        "dtype": dtype_of(tokenizer).name,
        **{key: {split: counts[key].get(split, 0) for split in SPLITS} for key in COUNTED},
        "skipped": counts["skipped"],
        "tokenizer": tokenizer.describe(),
        "source_files": len(sources),
        "sources": sources[:1000],
    }
    write_json(folder / "dataset.json", about)
    (folder / "meta.pkl").unlink(missing_ok=True)  # of an earlier data set
    if isinstance(tokenizer, CharTokenizer) and tokenizer.kind == "char":
        write_meta(folder / "meta.pkl", tokenizer)
    for split in finished:
        os.replace(work / f"{split}.bin", folder / f"{split}.bin")
    sync_folder(folder)
    shutil.rmtree(work)
    return about
