"""A prepared data set on disk: token ids as raw little-endian numbers, and one JSON file that says what they are.

data/NAME/train.bin, val.bin   ids, uint16 or uint32, nothing else; or several: train-0.bin, train-1.bin, …
data/NAME/dataset.json         dtype, counts, sources with hashes, what was passed over, tokenizer
data/NAME/meta.pkl             character sets only: the original's vocabulary file
"""

import io
import logging
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from nanogpt.data.pieces import Ids
from nanogpt.data.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, VocabularyTokenizer
from nanogpt.data.tokenizer_json import from_description
from nanogpt.errors import DataError
from nanogpt.files import atomic_write, parse_json, sync_folder, write_json

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
MOST_SOURCES = 1000  # that a description lists by name


class Tokens:
    """The ids of a split, in one file or several, as one sequence of length `len(tokens)`."""

    def __init__(self, shards: Sequence[Ids], paths: Sequence[Path] = ()) -> None:
        self._files = [(path, path.stat().st_ino) for path in paths]
        self.shards = [np.asarray(shard) for shard in shards]  # without memmap's class, whose slices are slow
        self._ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: slice) -> Ids:
        """The ids of a slice without step, shape (stop - start,)."""
        start, stop, _ = where.indices(len(self))
        begins = self._ends - [len(shard) for shard in self.shards]
        parts = [
            shard[max(start - begin, 0) : max(stop - begin, 0)]
            for shard, begin in zip(self.shards, begins, strict=True)
            if begin < stop and start < begin + len(shard)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([self.shards[0][:0], *parts])

    def _check(self, number: int) -> None:
        """Raise `DataError` if a file has been cut off meanwhile: reading beyond its end would end the process.

        One that was deleted or replaced stays as it was for those who have it open.
        """
        if not self._files:
            return
        path, inode = self._files[number]
        try:
            status = path.stat()
        except OSError:
            return
        size = self.shards[number].nbytes
        if status.st_ino == inode and status.st_size < size:
            raise DataError(f"{path} has been cut off to {status.st_size:,} of {size:,} bytes: prepare it again")

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> Ids:
        """The windows of `length` ids at `starts` (rows,), shape (rows, length)."""
        if len(self.shards) == 1:
            self._check(0)
            windows: Ids = sliding_window_view(self.shards[0], length)[starts]
            return windows
        result = np.empty((len(starts), length), self.shards[0].dtype)
        first = np.searchsorted(self._ends, starts, "right")  # the shard where a window begins
        for number in np.unique(first).tolist():
            shard, end = self.shards[number], int(self._ends[number])
            inside = (first == number) & (starts + length <= end)
            self._check(number)
            if inside.any():
                result[inside] = sliding_window_view(shard, length)[starts[inside] - (end - len(shard))]
            for row in np.flatnonzero((first == number) & ~inside).tolist():
                result[row] = self[int(starts[row]) : int(starts[row]) + length]
        return result


@dataclass(frozen=True)
class Dataset:
    """A data set, opened."""

    folder: Path
    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    description: dict[str, Any]  # dataset.json; empty where there is none

    def split(self, name: str) -> Tokens:
        """The ids of `train` or `val`."""
        return self.train if name == "train" else self.val

    def check_tokenizer(self, tokenizer: Tokenizer, model: str) -> None:
        """Raise `DataError` unless the ids mean to `model` what they meant when it was trained with `tokenizer`."""
        if self.tokenizer.describe() != tokenizer.describe():
            raise DataError(
                f"data set {self.folder.name} holds the ids of {self.tokenizer}, but {model} knows those of "
                f"{tokenizer}; prepare the data set with the model's tokenizer (--tokenizer takes the folder of "
                "another data set, too)"
            )


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


def shards_of(folder: Path, split: str) -> list[Path]:
    """The files of a split: `train.bin`, or `train-*.bin` in the order of their names."""
    whole = folder / f"{split}.bin"
    return [whole] if whole.exists() else sorted(folder.glob(f"{split}-*.bin"))


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds both splits."""
    return all(shards_of(folder, split) for split in SPLITS)


def open_dataset(folder: Path) -> Dataset:
    """Open a data set, prepared here or by the original (which writes no `dataset.json`).

    Raises `DataError` if it is missing, incomplete or damaged.
    """
    description = _read_description(folder)
    if description is None:
        tokenizer = tokenizer_of_original(folder)
        log.info(f"{folder} has no dataset.json: taken as uint16 ids of the {tokenizer}")
        dtype = np.dtype("<u2")
    else:
        if description.get("version", 1) != 1:
            raise DataError(f"{folder} was prepared by a newer version of nanoGPT")
        try:
            tokenizer = from_description(description.get("tokenizer"))
        except DataError as error:
            raise DataError(f"{folder / 'dataset.json'}: {error}") from error
        if description.get("dtype") not in ("uint16", "uint32"):
            raise DataError(f"{folder / 'dataset.json'}: dtype is {description.get('dtype')!r}, not uint16 or uint32")
        dtype = np.dtype(description["dtype"]).newbyteorder("<")
    splits = {split: _open_split(folder, split, dtype) for split in SPLITS}
    if description is not None:
        for name, ids in splits.items():
            if len(ids) != description["tokens"].get(name):
                raise DataError(
                    f"{folder / name}.bin holds {len(ids):,} tokens, but dataset.json promises "
                    f"{description['tokens'].get(name)}: prepare the data set again"
                )
    return Dataset(folder, splits["train"], splits["val"], tokenizer, description or {})


def _read_description(folder: Path) -> dict[str, Any] | None:
    path = folder / "dataset.json"
    try:
        description = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): prepare the data set again") from error
    if not isinstance(description, dict) or not isinstance(description.get("tokens"), dict):
        raise DataError(f"{path} does not describe a data set: prepare it again")
    return description


def _open_split(folder: Path, split: str, dtype: np.dtype[Any]) -> Tokens:
    paths = shards_of(folder, split) or [folder / f"{split}.bin"]
    return Tokens([_map(path, dtype) for path in paths], paths)


def _map(path: Path, dtype: np.dtype[Any]) -> Ids:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if size == 0 or size % dtype.itemsize:
        raise DataError(f"{path} has {size} bytes, which is no whole number of {dtype.name} ids: prepare it again")
    return np.memmap(path, dtype=dtype, mode="r")


def tokenizer_of_original(folder: Path) -> Tokenizer:
    """The original's convention: the vocabulary in meta.pkl, or GPT-2's where there is none."""
    return read_meta(folder / "meta.pkl") if (folder / "meta.pkl").exists() else GPT2Tokenizer()


def write_meta(path: Path, tokenizer: CharTokenizer) -> None:
    """Write a character vocabulary as the original's `meta.pkl`, byte for byte."""
    itos = dict(enumerate(tokenizer.characters))
    meta = {"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    with atomic_write(path) as file:
        # the order of the keys and the protocol are the original's, whose files this must equal
        pickle.dump(meta, file, protocol=4)


class _PlainUnpickler(pickle._Unpickler):
    """Reads dicts, strings and numbers, numpy's too; anything that would import or run code is refused.

    It is Python's: C's takes as much memory as a few bytes tell it to, and so does either for a bytearray.
    """

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: lambda self: self.stack.pop()}
    del dispatch[pickle.BYTEARRAY8[0]]

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("numpy", "dtype"):
            return lambda name, *_: name  # what BUILD would add, byte order and sizes, follows from it
        if module_name in ("numpy.core.multiarray", "numpy._core.multiarray") and global_name == "scalar":
            return _numpy_scalar
        raise pickle.UnpicklingError(f"it wants to run {module_name}.{global_name}")


def _numpy_scalar(kind: str, content: bytes) -> Any:
    if not re.fullmatch(r"[iu][1248]|U\d+", kind):
        raise pickle.UnpicklingError(f"it holds a number of numpy's type {kind}")
    return np.frombuffer(content, kind)[0].item()


def read_meta(path: Path) -> Tokenizer:
    """Read the original's `meta.pkl` without running pickled code. Raises `DataError` if it is anything else.

    Sorted characters are a character vocabulary; of others, only `vocab_size` must be there, as for the original.
    """
    try:
        meta = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        size, itos = int(meta["vocab_size"]), meta.get("itos", {})
        if not 0 < size <= 2**16:
            raise ValueError(f"its vocab_size is {size}")
        known = itos if isinstance(itos, dict) else dict(enumerate(itos))
        tokens = [_as_text(known.get(i), i) for i in range(size)]
    except Exception as error:  # a hostile or broken pickle can raise anything
        expected = "a dictionary of plain Python objects with vocab_size, up to 65536, and itos"
        raise DataError(f"{path} is no vocabulary ({type(error).__name__}: {error}); expected {expected}") from error
    if all(len(token) == 1 for token in tokens) and tokens == sorted(set(tokens)):
        return CharTokenizer("".join(tokens))
    return VocabularyTokenizer(tokens)


def _as_text(token: Any, i: int) -> str:
    if isinstance(token, str | bytes) and len(token) > 1000:
        raise ValueError(f"its token {i} has {len(token):,} characters")
    text = token.decode(errors="replace") if isinstance(token, bytes) else token
    return str(text) if isinstance(text, str | int | float) else f"<{i}>"
