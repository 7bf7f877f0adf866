"""A prepared data set on disk: token ids as raw little-endian numbers, and one JSON file that says what they are.

data/NAME/train.bin, val.bin   ids, uint16 or uint32, nothing else
data/NAME/dataset.json         dtype, counts, sources with hashes, tokenizer
data/NAME/meta.pkl             character sets only: the original's vocabulary file
"""

import io
import json
import pickle
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.data.tokenizer import CharTokenizer, GPT2Tokenizer, Ids, Tokenizer, from_description
from nanogpt.errors import DataError
from nanogpt.files import atomic_write, write_json

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Dataset:
    """A data set, opened: its splits as memory maps of ids, shape (tokens,)."""

    folder: Path
    train: Ids
    val: Ids
    tokenizer: Tokenizer

    def split(self, name: str) -> Ids:
        """The ids of `train` or `val`."""
        return self.train if name == "train" else self.val

    def check_tokenizer(self, tokenizer: Tokenizer, model: str) -> None:
        """Raise `DataError` unless the ids mean to `model` what they meant when it was trained with `tokenizer`."""
        if self.tokenizer.describe() != tokenizer.describe():
            raise DataError(
                f"data set {self.folder.name} holds the ids of {self.tokenizer}, but {model} knows those of "
                f"{tokenizer}; prepare the data set with the model's tokenizer"
            )


def write_dataset(
    folder: Path, splits: dict[str, Iterable[Ids]], tokenizer: Tokenizer, sources: list[dict[str, Any]]
) -> None:
    """Write a data set whose splits come as pieces of ids.

    The description is there before the ids take their names: whatever is interrupted, ids are never read with
    a tokenizer that is not theirs.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    counts = dict.fromkeys(splits, 0)
    with ExitStack() as stack:
        for name, pieces in splits.items():
            file = stack.enter_context(atomic_write(folder / f"{name}.bin"))
            for ids in pieces:
                file.write(ids.astype(dtype).tobytes())
                counts[name] += len(ids)
            print(f"{name} has {counts[name]:,} tokens")
        description = {"version": 1, "dtype": dtype.name, "tokens": counts}
        write_json(folder / "dataset.json", {**description, "tokenizer": tokenizer.describe(), "sources": sources})
        if isinstance(tokenizer, CharTokenizer):
            write_meta(folder / "meta.pkl", tokenizer)


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds both splits."""
    return all((folder / f"{name}.bin").exists() for name in SPLITS)


def open_dataset(folder: Path) -> Dataset:
    """Open a data set, prepared here or by the original (which writes no `dataset.json`).

    Raises `DataError` if it is missing, incomplete or damaged.
    """
    description = _read_description(folder)
    if description is None:
        tokenizer = tokenizer_of_original(folder)
        print(f"{folder} has no dataset.json: taken as uint16 ids of the {tokenizer}")
        dtype = np.dtype("<u2")
    else:
        tokenizer = from_description(description.get("tokenizer"))
        if description.get("dtype") not in ("uint16", "uint32"):
            raise DataError(f"{folder / 'dataset.json'}: dtype is {description.get('dtype')!r}, not uint16 or uint32")
        dtype = np.dtype(description["dtype"]).newbyteorder("<")
    maps = {name: _map(folder / f"{name}.bin", dtype) for name in SPLITS}
    if description is not None:
        for name, ids in maps.items():
            if len(ids) != description.get("tokens", {}).get(name):
                raise DataError(
                    f"{folder / name}.bin holds {len(ids):,} tokens, but dataset.json promises "
                    f"{description.get('tokens', {}).get(name)}: prepare the data set again"
                )
    return Dataset(folder, maps["train"], maps["val"], tokenizer)


def _read_description(folder: Path) -> dict[str, Any] | None:
    path = folder / "dataset.json"
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): prepare the data set again") from error
    if not isinstance(description, dict) or not isinstance(description.get("tokens"), dict):
        raise DataError(f"{path} does not describe a data set: prepare it again")
    return description


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


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers; anything that would import or run code is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to run {module_name}.{global_name}")


def read_meta(path: Path) -> CharTokenizer:
    """Read the original's `meta.pkl` without running pickled code. Raises `DataError` if it is anything else."""
    try:
        meta = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        characters = [meta["itos"][i] for i in range(meta["vocab_size"])]
        if any(len(character) != 1 for character in characters):
            raise ValueError("its tokens are not single characters")
        return CharTokenizer("".join(characters))
    except Exception as error:  # a hostile or broken pickle can raise anything
        raise DataError(f"{path} is not a character vocabulary ({error}): prepare the data set again") from error
