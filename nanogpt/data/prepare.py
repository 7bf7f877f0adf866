"""The program behind `nanogpt prepare`: from text to a data set folder."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.config import PrepareConfig
from nanogpt.data.corpus import read_or_fetch_shakespeare, standard_library
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Ids, Tokenizer
from nanogpt.data.tokens import write_dataset
from nanogpt.errors import ConfigError, DataError


def prepare(config: PrepareConfig) -> None:
    """Build the data set `config.name`. Raises `ConfigError` for an unknown name, `DataError` for unusable text."""
    if config.name not in DATASETS:
        hint = f"; for your own text: shakespeare_char --input={config.name}" if Path(config.name).is_file() else ""
        raise ConfigError(f"unknown data set {config.name!r}; known: {', '.join(DATASETS)}{hint}")
    folder = Path(config.data_dir) / config.name
    DATASETS[config.name](folder, config.input)
    print(f"wrote {folder}/train.bin, val.bin and dataset.json")


def prepare_pystdlib(folder: Path, input_file: str = "") -> None:
    """The Python standard library of this machine, byte by byte; one file in twenty is validation."""
    if input_file:
        raise ConfigError("pystdlib reads the Python library of this machine; --input does not apply")
    files = list(standard_library())
    tokenizer = ByteTokenizer()
    sources = []
    members: dict[str, list[bytes]] = {"train": [], "val": []}
    for path, content in files:
        digest = hashlib.sha256(content).hexdigest()
        split = "val" if int(digest[:8], 16) % 20 == 0 else "train"  # by content: stable on every machine
        sources.append({"path": path, "bytes": len(content), "sha256": digest, "split": split})
        members[split].append(content)

    def tokens(contents: list[bytes]) -> Iterator[Ids]:
        for content in contents:
            yield np.frombuffer(content, dtype=np.uint8)
            yield np.array([tokenizer.end_of_text], dtype=np.uint16)

    write_dataset(folder, {name: tokens(contents) for name, contents in members.items()}, tokenizer, sources)


def prepare_shakespeare_char(folder: Path, input_file: str = "") -> None:
    """Tiny Shakespeare, one token per character; the first 90 % are training."""
    text, sources = _shakespeare(folder, input_file)
    tokenizer = CharTokenizer.from_text(text)
    print(f"vocabulary of {tokenizer.vocab_size} characters")
    _write_two_parts(folder, text, tokenizer, sources)


def prepare_shakespeare(folder: Path, input_file: str = "") -> None:
    """Tiny Shakespeare in GPT-2's tokens, for finetuning; the first 90 % are training."""
    text, sources = _shakespeare(folder, input_file)
    _write_two_parts(folder, text, GPT2Tokenizer(), sources)


def _shakespeare(folder: Path, input_file: str) -> tuple[str, list[dict[str, Any]]]:
    content = read_or_fetch_shakespeare(input_file, folder)
    try:
        # newlines as the original reads them, in text mode
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{input_file or 'the download'} is not UTF-8 text: {error}") from error
    if len(text) < 20:
        raise DataError(f"{input_file or 'the download'} holds {len(text)} characters: too few to split and train on")
    digest = hashlib.sha256(content).hexdigest()
    return text, [{"path": input_file or "input.txt", "bytes": len(content), "sha256": digest}]


def _write_two_parts(folder: Path, text: str, tokenizer: Tokenizer, sources: list[dict[str, Any]]) -> None:
    cut = int(len(text) * 0.9)
    splits = {"train": [tokenizer.encode(text[:cut])], "val": [tokenizer.encode(text[cut:])]}
    write_dataset(folder, dict(splits), tokenizer, sources)


DATASETS: dict[str, Callable[..., None]] = {
    "pystdlib": prepare_pystdlib,
    "shakespeare_char": prepare_shakespeare_char,
    "shakespeare": prepare_shakespeare,
}
NEEDS_NO_NETWORK = {"pystdlib"}
