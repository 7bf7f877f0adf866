"""From text to a data set folder: files, folders or the Hugging Face hub, in parallel and in bounded memory.

This process reads documents and hands out units of work, some megabytes of text each, to a pool of processes. It
appends their ids in order to files in data/NAME/.preparing/, and the journal plan.json there says how far it is, so
that the same command resumes after a kill. A complete data set moves to data/NAME/.
"""

import codecs
import copy
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from nanogpt.chats import BEGINS, COUNTS, conversation_ids, with_template
from nanogpt.config import GPT2_NAMES, TrainConfig
from nanogpt.errors import ConfigError, DataError
from nanogpt.files import atomic_write, locked, read_json, sync_folder, write_json
from nanogpt.pydocs import pydoc_chats
from nanogpt.settings import PrepareConfig, recipe_for_text
from nanogpt.tokenizer import Tokenizer, from_description, make_tokenizer, mirrored, unescape, well_formed, write_meta

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Piece = tuple[str, bool] | str  # text, and whether a document ends with it; or why one is skipped
Unit = list[tuple[str, str, bool]]  # split, text, and whether a document ends with it
State = dict[str, Any]  # how far reading is, as JSON

SPLITS = ("train", "val")
UNIT = 1 << 22  # characters of a unit of work
BLOCK = 1 << 20  # characters that are encoded at once; a longer document comes in pieces
JSON_LINES = r"(?i)\.(jsonl|jsonlines|jl|ndjson)(\.gz|\.zst)?$"
JSON = r"(?i)\.json(\.gz|\.zst)?$"  # lines as well, or one array, or no data at all
ENOUGH = 10  # documents to expect in validation; where there are fewer, the end of the text is validation

# What is known by name, with the settings that differ from the defaults. Shakespeare is one text, as in the original.
DATASETS: dict[str, dict[str, Any]] = {
    "pystdlib": {"tokenizer": "byte"},
    "pydoc": {"tokenizer": "byte", "chat": True},
    "shakespeare_char": {"tokenizer": "char", "val_fraction": 0.1},
    "shakespeare": {"val_fraction": 0.1},
    "openwebtext": {"input": ["Skylion007/openwebtext"], "val_fraction": 0.0005},
    "tinystories": {"input": ["karpathy/tinystories-gpt4-clean"], "val_fraction": 0.01},
    "fineweb-edu": {"input": ["HuggingFaceFW/fineweb-edu:sample/10BT/"], "val_fraction": 0.001},
    "climbmix": {"input": ["karpathy/climbmix-400b-shuffle"], "val_fraction": 0.0005},
}
SHAKESPEARE = ("shakespeare", "shakespeare_char")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare(config: PrepareConfig) -> None:
    """Build the data set `config.name`. Raises `ConfigError` and `DataError`."""
    folder = Path(config.data_dir, config.name)
    if config.name not in DATASETS and not config.input and not (folder / "input.txt").is_file():
        known = f"{config.name!r} is no known data set ({', '.join(DATASETS)})"
        raise ConfigError(f"{known}; for your own text, add --input=PATH, or put it there as {folder / 'input.txt'}")
    defaults = {"input": [], "tokenizer": "gpt2", "val_fraction": 0.05, "chat": False, **DATASETS.get(config.name, {})}
    unset = {key: value for key, value in defaults.items() if getattr(config, key) in ([], "", "auto", False)}
    config = replace(config, **unset)
    sources = find_sources(config.input) or known_sources(config.name, folder)
    with locked(folder / ".lock", f"the data set {folder}"):
        about = build(folder, config, sources)
    for split in SPLITS:
        tokens, count = about["tokens"][split], about["documents"][split]
        log.info(f"{split} has {tokens:,} tokens; documents that end there: {count:,}")
    for reason, count in about["skipped"].items():
        log.info(f"skipped {count:,} x {reason}")
    print(f"wrote {folder}/train.bin, val.bin and dataset.json")


def prepare_missing(config: TrainConfig) -> None:
    """Prepare what a run trains on, if that is not there and needs no network. Raises `DataError` if it needs one."""
    from nanogpt.data import is_prepared  # with torch, which building does without

    # What a resumed run trains on stays, also if its text has changed since.
    has_run = Path(config.out_dir, "config.json").exists()
    resumes = config.init_from == "resume" or (config.resume == "auto" and has_run)
    name, folder = config.dataset, Path(config.data_dir, config.dataset)
    # pydoc is made anew for each run, since its tokenizer is the model's.
    is_current = is_made_of(folder, config.text) if config.text else name != "pydoc"
    if is_prepared(folder) and (resumes or is_current):
        if config.text and not is_current:
            log.warning(f"{config.text} has changed; this run resumes with the text as it was")
        return
    if not config.text and name not in ("pystdlib", "pydoc"):
        own = "" if name in DATASETS else " --input=PATH"
        command = f"python -m nanogpt prepare {name} --data_dir={config.data_dir}{own}"
        raise DataError(f"{folder} holds no train.bin and val.bin; prepare the data set with: {command}")
    log.info(f"preparing the data set {folder}")
    chosen = PrepareConfig(name=name, data_dir=config.data_dir)
    if config.text:
        chosen = replace(chosen, input=[config.text], tokenizer=recipe_for_text(config.text)[0])
    if name == "pydoc" and config.init_from not in ("scratch", "resume"):
        chosen = replace(chosen, tokenizer="gpt2" if config.init_from in GPT2_NAMES else config.init_from)
    prepare(chosen)


def is_made_of(folder: Path, text: str) -> bool:
    """Return whether a data set was made of this text, as it is now: notes.txt and notes.md have the same folder."""
    sources = [source["path"] for source in read_json(folder / "dataset.json").get("sources", [])]
    return sources == [text] and os.path.getmtime(folder / "train.bin") > os.path.getmtime(text)


def with_retries(what: str, get: Callable[[], Result], instead: str, pauses: Sequence[float] = (1, 3)) -> Result:
    """Return what `get` returns. Raises `DataError` if `what` is refused, or `get` fails again after all pauses."""
    try:
        return get()
    except Exception as error:  # each library has its own
        status = getattr(getattr(error, "response", error), "status_code", getattr(error, "code", 500))
        if not pauses or (400 <= status < 500 and status != 429):
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"{what} could not be read ({reason}); {instead}") from error
    time.sleep(pauses[0])
    return with_retries(what, get, instead, pauses[1:])


def download(path: Path, name: str, url: str, sha256: str, option: str = "input") -> Path:
    """Return `path` with a published file: there already, from `$NANOGPT_DOWNLOADS/name`, or from the network."""
    instead = f"get {url} by other means and name it, --{option}=FILE, or put it as {name} into $NANOGPT_DOWNLOADS"
    source = next((file.resolve().as_uri() for file in (path, mirrored(name)) if file.is_file()), url)
    content = with_retries(source, lambda: urllib.request.urlopen(source, timeout=30).read(), instead)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{source} has {len(content):,} bytes that are not the file expected; {instead}")
    if not path.is_file():
        with atomic_write(path) as file:
            file.write(content)
    return path


def hub_folder(repository: str, patterns: list[str], option: str = "init_from") -> Path:
    """Return a folder with a model's files: `$NANOGPT_DOWNLOADS/ORGANISATION/NAME`, or from the Hugging Face hub."""
    from huggingface_hub import snapshot_download

    if mirrored(repository).is_dir():
        return mirrored(repository)
    instead = f"put its files ({', '.join(patterns)}) into $NANOGPT_DOWNLOADS/{repository}/, or name --{option}=FOLDER"
    return Path(with_retries(repository, lambda: snapshot_download(repository, allow_patterns=patterns), instead))


def find_sources(inputs: Iterable[str]) -> dict[str, int]:
    """Return the files, and their sizes, of paths, folders, patterns and data sets (hf://…). Raises `DataError`."""
    sources: dict[str, int] = {}
    for name in inputs:
        path = os.path.expanduser(name).rstrip("/")
        pattern = f"{glob.escape(path)}/**" if os.path.isdir(path) else path
        paths = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
        # A link to a folder above would give every file 40 times: of its paths, the shortest counts.
        files = {os.path.realpath(path): path for path in sorted(paths, key=len, reverse=True) if os.path.isfile(path)}
        found = {path: os.path.getsize(path) for path in sorted(files.values())}
        if not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", name):
            found = hub_sources(name)
        if not found:
            raise DataError(f"--input={name}: there is no such file, and no folder with files of text")
        sources |= found
    return sources


def known_sources(name: str, folder: Path) -> dict[str, int]:
    """Return the text of a known data set that names no input: Python's library, or `folder`/input.txt."""
    if name == "pystdlib":
        root = sysconfig.get_path("stdlib")
        left_out = re.compile(re.escape(root) + r"(/.*)?/(site-packages|dist-packages|test|tests|idle_test)/")
        return {path: size for path, size in find_sources([f"{root}/**/*.py"]).items() if not left_out.match(path)}
    if name == "pydoc":
        with atomic_write(folder / "chats.jsonl") as file:
            file.writelines(json.dumps({"messages": messages}).encode() + b"\n" for messages in pydoc_chats())
        return find_sources([str(folder / "chats.jsonl")])
    path = folder / "input.txt"  # where the original keeps it, and where people put a text of their own
    if name in SHAKESPEARE and not path.is_file():
        download(path, "tinyshakespeare.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256)
    return find_sources([str(path)])


def hub_sources(name: str) -> dict[str, int]:
    """Return the training files of ORGANISATION/NAME[:START], a data set of the mirror or of the Hugging Face hub."""
    repository, _, start = name.partition(":")
    root = f"{mirrored(repository)}/"
    if os.path.isdir(root):
        sizes = find_sources([root])
    else:
        from huggingface_hub import HfApi

        root, below = f"hf://{repository}/", start.rpartition("/")[0] or None
        instead = "get its parquet or jsonl files by other means, and pass their folder as --input=FOLDER"
        what = f"there is no {name} on this machine, and the data set of that name"
        tree = functools.partial(HfApi().list_repo_tree, repository, below, recursive=True, repo_type="dataset")
        listed = with_retries(what, lambda: list(tree()), instead, pauses=())  # The library itself tries again.
        sizes = {root + each.path: getattr(each, "size", 0) for each in listed}
    held_out = re.compile(r"(?<![a-z])(test|val|valid|validation|dev|eval|dataset_infos)(?![a-z])", re.IGNORECASE)
    root += start  # Who asks for START by name means it, also if it is called test.
    paths = [path for path in sorted(sizes) if path.startswith(root) and not held_out.search(path, len(root))]
    for kind in (r"\.parquet$", JSON_LINES, JSON, r"\.txt(\.gz|\.zst)?$"):
        if found := [path for path in paths if re.search(kind, path)]:
            return {path: sizes[path] for path in found}
    return {}


def local_path(source: str, work: Path) -> Path:
    """Return the file of a source; one of the hub is downloaded to `work`. Raises `DataError`."""
    if not source.startswith("hf://"):
        return Path(source)
    from huggingface_hub import hf_hub_download

    organisation, name, path = source.removeprefix("hf://").split("/", 2)
    folder = work / "shards" / organisation / name
    if not (folder / path).exists():
        get = functools.partial(hf_hub_download, f"{organisation}/{name}", path, repo_type="dataset", local_dir=folder)
        with_retries(source, get, "what is finished is kept: the same command resumes")
    return folder / path


def documents(source: str, config: PrepareConfig, work: Path) -> Iterator[Piece]:
    """Yield the documents of a file; one that is no text is skipped, unless it is named in the settings."""
    path, piece = local_path(source, work), None
    try:
        for piece in read_pieces(path, config):
            yield piece
    except UnicodeError as error:
        if piece or source in config.input:
            raise DataError(
                f"{path} is not UTF-8 text ({error}); iconv converts it, such as with -f latin1 -t utf-8"
            ) from error
        yield "file without UTF-8 text"
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_pieces(path: Path, config: PrepareConfig) -> Iterator[Piece]:
    """Yield the documents of a file, of the kind that its name says."""
    if path.suffix.lower() == ".parquet":
        for row in parquet_rows(path, config):
            yield from chat_of(row) if config.chat else field_of(row, config.field)
        return
    reader, begin = open_text(path)
    has_array, has_lines = re.match(r"\s*\[\s*\{", begin), re.match(r'\s*\{[ \t]*"[^"\n]*"[ \t]*:', begin)
    with reader:
        if re.search(JSON_LINES, path.name) or (re.search(JSON, path.name) and (has_array or has_lines)):
            for row in json.loads(reader.read()) if has_array else json_rows(reader):
                yield from chat_of(row) if config.chat else field_of(row, config.field)
        elif config.chat:
            yield "file without JSON lines"
        else:
            yield from in_pieces(iter(lambda: reader.read(BLOCK), ""), unescape(config.separator))


def open_text(path: Path) -> tuple[TextIO, str]:
    """Return a file as text, unpacked and without a byte-order mark, and its beginning. Raises `UnicodeError`."""
    file: Any = path.open("rb")
    if path.suffix.lower() == ".gz" or file.peek(2).startswith(b"\x1f\x8b"):  # Downloads often lack the .gz.
        file = gzip.open(path)
    if path.suffix.lower() == ".zst":
        import pyarrow

        file = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    begin = file.peek(1 << 13)
    is_utf16 = begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell writes text
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    text = begin.decode(encoding, "ignore")
    if "\0" in text:
        raise UnicodeError("it holds a zero byte")
    return io.TextIOWrapper(file, encoding), text  # which reads all kinds of newlines as \n


def in_pieces(texts: Iterable[str], separator: str = "") -> Iterator[Piece]:
    """Yield the documents between separators, or the only one, in pieces where they are long.

    Pieces are cut between a letter and a blank, where no usual tokenizer joins anything.
    """
    rest, is_begun = "", False
    for text in texts:
        *whole, rest = (rest + text).split(separator) if separator else [rest + text]
        for document in whole:
            yield (document, True) if is_begun or document.strip() else "empty document"
            is_begun = False
        while len(rest) > BLOCK + len(separator):  # What may begin a separator stays in `rest`.
            found = re.match(r"(?s).*[^\W_](?=[ \n])", rest[:BLOCK])  # the last one: it looks back from the end
            cut = found.end() if found else BLOCK
            yield rest[:cut], False
            rest, is_begun = rest[cut:], True
    if rest or not separator:
        yield (rest, True) if is_begun or rest.strip() else "empty document"


def parquet_rows(path: Path, config: PrepareConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of a column, for chats of all. Raises `DataError`, with their names, if it is none of text."""
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    kinds = {column.name: str(column.type) for column in file.schema_arrow}
    if not config.chat and not re.match(r"(dictionary<values=)?(large_)?string", kinds.get(config.field, "")):
        names = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise DataError(f"{path}: no column {config.field!r} of text; choose one with --field=NAME (columns: {names})")
    for batch in file.iter_batches(100, columns=None if config.chat else [config.field]):
        yield from batch.to_pylist()


def json_rows(reader: TextIO) -> Iterator[Any]:
    """Yield the values of JSON lines, and None for what is none."""
    for line in reader:
        if not line.isspace():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def field_of(row: Any, field: str) -> Iterator[Piece]:
    """Yield the text in a field of a row, or why there is none."""
    if not isinstance(row, dict):
        yield "row without a JSON object"
    elif isinstance(row.get(field), str):
        yield from in_pieces([well_formed(row[field])])
    else:
        yield f"row without text in its field {field!r} (another one: --field=NAME)"


def chat_of(row: Any) -> Iterator[Piece]:
    """Yield the messages of a row as JSON, or why there are none: OpenAI's form, or a prompt and its completion."""
    try:
        if "messages" not in row:
            said = {"user": row["prompt"], "assistant": row["completion"]}
            row = {"messages": [{"role": role, "content": content} for role, content in said.items()]}
        is_text = all(isinstance(each["role"], str) and isinstance(each["content"], str) for each in row["messages"])
        is_chat = is_text and "assistant" in [each["role"] for each in row["messages"]]
    except (KeyError, TypeError):  # another shape
        is_chat = False
    yield (json.dumps(row["messages"]), True) if is_chat else "row: no conversation with an answer"


def build(folder: Path, config: PrepareConfig, sources: dict[str, int]) -> dict[str, Any]:
    """Build the data set in `folder`, or resume it, and return its description. An earlier one stays until then."""
    work = folder / ".preparing"
    times = [os.stat(path).st_mtime_ns for path in sources if not path.startswith("hf://")]
    settings = [4, config.chat, config.tokenizer, config.field, config.separator, config.limit, config.val_fraction]
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
        encode(work, config, plan, sources, tokenizer)
    except (OSError, BrokenProcessPool) as error:  # a full disk; a worker killed for want of memory
        raise DataError(f"{error}; what is finished in {work} is kept: the same command resumes") from error
    tokens, skipped = plan["counts"]["tokens"], plan["state"]["skipped"]
    if min(tokens.values()) < 2:
        reasons = "".join(f"; skipped {count:,} x {reason}" for reason, count in skipped.items())
        counts = f"{tokens['train']} in train and {tokens['val']} in val"
        raise DataError(f"too few tokens, {counts}: take more text, or prepare it with another val_fraction{reasons}")
    (work / "plan.json").unlink()
    listed = [{"path": path, "bytes": size} for path, size in itertools.islice(sources.items(), 1000)]
    about = {"version": 1, "dtype": tokenizer.dtype.name, **plan["counts"], "chat": config.chat, "skipped": skipped}
    about |= {"source_files": len(sources), "sources": listed, "tokenizer": tokenizer.describe()}
    write_json(work / "dataset.json", about)  # This also makes it durable that the journal is gone.
    if tokenizer.kind == "char":
        write_meta(work / "meta.pkl", tokenizer)
    # The description goes first: ids that are not its own have another number than it says.
    for name in ("dataset.json", "meta.pkl", "train.marks", "val.marks", "train.bin", "val.bin"):
        (folder / name).unlink(missing_ok=True)
        if (work / name).exists():
            os.replace(work / name, folder / name)
    sync_folder(folder)
    shutil.rmtree(work)
    return about


def make_plan(work: Path, config: PrepareConfig, sources: dict[str, int]) -> dict[str, Any]:
    """Write the tokenizer to `work`, and return a plan: with where validation begins, and with nothing done."""
    enough, is_char = ENOUGH / float(config.val_fraction), config.tokenizer == "char"
    count, size, characters = 0, 0, set[str]()
    pieces = (piece for path in sources for piece in documents(path, config, work))
    for text, ends in (piece for piece in pieces if isinstance(piece, tuple)):
        count, size = count + ends, size + len(text)
        if is_char:
            characters.update(text)
        if count == (config.limit or -1) or (count >= enough and not is_char):
            break
    # Files of one language or subject often lie side by side: a vocabulary is learned from files in any order.
    shuffled = random.Random(0).sample(list(sources), len(sources))
    pieces = (piece for path in shuffled for piece in documents(path, config, work))
    texts = (piece[0] for piece in pieces if isinstance(piece, tuple))
    if config.chat:
        texts = (message["content"] for text in texts for message in json.loads(text))
    setting = config.tokenizer
    if "/" in setting and not os.path.exists(setting):
        setting = str(hub_folder(setting, ["*.json", "*.jinja"], option="tokenizer"))
    if setting.endswith((".pt", ".gguf")) or Path(setting, "metrics.jsonl").exists():  # a run
        from nanogpt.checkpoint import load_model  # with torch, which building does without

        tokenizer = load_model(setting).tokenizer
    else:
        tokenizer = make_tokenizer(setting, characters, texts)
    if config.chat:
        tokenizer = with_template(tokenizer)
    log.info(f"{tokenizer}")
    write_json(work / "tokenizer.json", tokenizer.describe())
    cut = None if count >= enough or config.chat else int(size * (1 - float(config.val_fraction)))
    state = {"sources": 0, "pieces": 0, "documents": 0, "characters": 0, "split": "", "skipped": {}}
    counts = {key: dict.fromkeys(SPLITS, 0) for key in ("tokens", "documents", "bytes")}
    return {"cut": cut, "state": state, "counts": counts}


def read_units(work: Path, config: PrepareConfig, plan: State, sources: list[str]) -> Iterator[tuple[Unit, State]]:
    """Yield units of work from `plan["state"]` on, each with the state behind it."""
    state, cut, unit, size = copy.deepcopy(plan["state"]), plan["cut"], Unit(), 0
    while state["sources"] < len(sources) and state["documents"] != (config.limit or -1):
        pieces = documents(sources[state["sources"]], config, work)
        for piece in itertools.islice(pieces, state["pieces"], None):
            state["pieces"] += 1
            if isinstance(piece, str):
                state["skipped"][piece] = state["skipped"].get(piece, 0) + 1
                continue
            text, ends = piece
            if cut is not None:
                if 0 < (before := cut - state["characters"]) < len(text):
                    unit.append(("train", text[:before], False))
                    state["characters"], text = cut, text[before:]
                state["split"] = "train" if state["characters"] < cut else "val"
            elif not state["split"]:  # A hash decides, of the first piece of a document.
                share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
                state["split"] = "val" if share < float(config.val_fraction) else "train"
            unit.append((state["split"], text, ends))
            size += len(text)
            state["characters"] += len(text)
            if ends:
                state |= {"documents": state["documents"] + 1, "split": ""}
                if state["documents"] == config.limit:
                    break
            if size >= UNIT:
                yield unit, copy.deepcopy(state)
                unit, size = [], 0
        state |= {"sources": state["sources"] + 1, "pieces": 0}
    yield unit, state


def encode(work: Path, config: PrepareConfig, plan: State, sources: dict[str, int], tokenizer: Tokenizer) -> None:
    """Encode the units that are not done, and append their ids in order; `plan` and plan.json say how far that is."""
    from tqdm import tqdm  # not on bare machines, where only training runs

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_proc = config.num_proc or cores
    pool: Executor = ThreadPoolExecutor(1)
    if num_proc > 1 and sum(sources.values()) > UNIT:  # for less, processes start longer than they work
        # Not fork: the libraries that encode have threads of their own.
        pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), start_worker)
    # Shakespeare is one text without end, as in the original.
    end_of_text = None if config.name in SHAKESPEARE else tokenizer.end_of_text
    setting = json.dumps(tokenizer.describe()), end_of_text, config.chat
    names, counts, pending = list(sources), plan["counts"], deque[tuple[Future[dict[str, bytearray]], Unit, State]]()
    units = read_units(work, config, plan, names)
    with pool, tqdm(unit="B", unit_scale=True, disable=None, desc="encoding") as bar:
        while True:
            for unit, state in itertools.islice(units, 2 * num_proc + 1 - len(pending)):  # read only so far ahead
                pending.append((pool.submit(encode_unit, unit, *setting), unit, state))
            if not pending:
                return
            future, unit, state = pending.popleft()
            for name, content in future.result().items():  # marks come before ids, which are counted
                split, kind = name.split(".")
                itemsize = tokenizer.dtype.itemsize if kind == "bin" else 1
                with open(work / name, "ab") as file:
                    file.truncate(counts["tokens"][split] * itemsize)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if kind == "bin":
                    counts["tokens"][split] += len(content) // itemsize
            for split, text, ends in unit:
                counts["documents"][split] += ends
                counts["bytes"][split] += len(text.encode())
            finished = names[plan["state"]["sources"] : state["sources"]]
            plan["state"] = state
            write_json(work / "plan.json", plan)
            for source in finished:
                if source.startswith("hf://"):
                    local_path(source, work).unlink()
            bar.update(sum(counts["bytes"].values()) - bar.n)


def start_worker() -> None:
    """Make a process a worker that leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_with_parent(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, args=[multiprocessing.parent_process()], daemon=True).start()


@functools.lru_cache(maxsize=1)
def tokenizer_of(description: str) -> Tokenizer:
    """Return the tokenizer of a description in JSON, which a worker builds once."""
    return from_description(json.loads(description))


def encode_unit(unit: Unit, description: str, end_of_text: int | None, chat: bool) -> dict[str, bytearray]:
    """Return what to append to each file: ids, and of conversations which of them count and where one begins."""
    tokenizer = tokenizer_of(description)
    dtype, kinds = tokenizer.dtype, ["marks", "bin"] if chat else ["bin"]
    files = {f"{split}.{kind}": bytearray() for kind in kinds for split in SPLITS}
    closing = b"" if end_of_text is None else end_of_text.to_bytes(dtype.itemsize, "little")
    for split, text, ends in unit:
        if chat:
            try:
                ids, counted = conversation_ids(tokenizer, json.loads(text))
            except DataError as error:
                log.warning(f"left out, {error}: {text[:100]}")
                continue
            files[f"{split}.bin"] += np.array(ids, dtype).tobytes()
            files[f"{split}.marks"] += bytes([BEGINS | COUNTS * counted[0], *(COUNTS * each for each in counted[1:])])
        else:
            files[f"{split}.bin"] += tokenizer.encode(text).astype(dtype, copy=False).tobytes() + closing * ends
    return files
