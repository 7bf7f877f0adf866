"""From files of token ids to batches. A batch is a pure function of (seed, step): there is no iterator state.

Resuming, evaluating in between or another number of processes can therefore not change which text a step sees.

A data set is a folder:
    train.bin, val.bin  the ids, raw little-endian uint16 or uint32; or train-0.bin, train-1.bin, ... as one sequence
    dataset.json        number format, counts, sources and the tokenizer; folders of the original have none
    meta.pkl            the vocabulary of a character data set, as the original writes it
"""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from nanogpt.errors import DataError
from nanogpt.tokenizer import GPT2Tokenizer, Tokenizer, read_meta
from nanogpt.tokenizer_json import from_description

if TYPE_CHECKING:
    from nanogpt.config import TrainConfig

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
TRAINING, EVALUATION, PERMUTATION, OFFSET, DROPOUT = range(5)  # streams of random numbers, independent of each other
Starts = npt.NDArray[np.int64]


class Tokens:
    """The ids of one split, in one memory-mapped file or several, as one sequence of length `len(tokens)`."""

    def __init__(self, shards: Sequence[npt.NDArray[Any]], vocab_size: int = 2**32) -> None:
        self.shards = [np.asarray(shard) for shard in shards]  # slices of the class memmap are slow
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> npt.NDArray[Any]:
        """The ids of a slice without step, shape (stop - start,)."""
        start, stop, _ = where.indices(len(self))
        parts = [
            shard[max(start - (end - len(shard)), 0) : max(stop - (end - len(shard)), 0)]
            for shard, end in zip(self.shards, self.ends.tolist(), strict=True)
            if end - len(shard) < stop and start < end
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([self.shards[0][:0], *parts])

    def windows(self, starts: Starts, length: int) -> Tensor:
        """The windows of `length` ids that begin at `starts` (rows,), as int64 of shape (rows, length).

        Raises `DataError` for an id outside the vocabulary, which on a GPU would end in an unreadable assertion.
        """
        if len(self.shards) == 1:
            ids = sliding_window_view(self.shards[0], length)[starts]
        else:
            ids = np.stack([self[start : start + length] for start in starts.tolist()])
        if (largest := int(ids.max())) >= self.vocab_size:
            raise DataError(f"the data holds token {largest}, but the vocabulary ends at {self.vocab_size - 1}")
        return torch.from_numpy(ids.astype(np.int64))


@dataclass(frozen=True)
class Dataset:
    """A data set, opened."""

    folder: Path
    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    description: dict[str, Any]  # dataset.json; empty where there is none

    def split(self, name: str) -> Tokens:
        """Return the ids of `train` or `val`."""
        return self.train if name == "train" else self.val

    def check_tokenizer(self, tokenizer: Tokenizer, model: str) -> None:
        """Raise `DataError` unless the ids mean to `model` what they meant when it was trained with `tokenizer`."""
        if self.tokenizer.describe() != tokenizer.describe():
            raise DataError(
                f"data set {self.folder.name} holds ids of the {self.tokenizer}, but {model} was trained with the "
                f"{tokenizer}; prepare the data set again with --tokenizer=PATH of the model or of its data set"
            )

    def check_length(self, block_size: int) -> None:
        """Raise `DataError` unless each split holds at least one window and the token behind it."""
        for name in SPLITS:
            if (n_tokens := len(self.split(name))) <= block_size:
                raise DataError(
                    f"{self.folder}: the {name} split has {n_tokens:,} tokens, too few for block_size={block_size} and "
                    f"its target; use --block_size={max(n_tokens - 1, 1)} or less, or more text"
                )


def shards_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split: `train.bin`, or `train-*.bin` in the order of their names."""
    path = folder / f"{split}.bin"
    return [path] if path.exists() else sorted(folder.glob(f"{split}-*.bin"))


def is_prepared(folder: Path) -> bool:
    """Return whether `folder` holds both splits."""
    return all(shards_of(folder, split) for split in SPLITS)


def open_dataset(folder: Path) -> Dataset:
    """Open a data set, prepared here or by the original, which writes no `dataset.json`.

    Raises `DataError` if it is missing, incomplete or damaged.
    """
    path = folder / "dataset.json"
    description: dict[str, Any] = {}
    if path.exists():
        try:
            description = json.loads(path.read_bytes())
            tokenizer = from_description(description["tokenizer"])
            dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[description["dtype"]]
            expected = {split: description["tokens"][split] for split in SPLITS}
        except (OSError, ValueError, LookupError, TypeError, RecursionError, DataError) as error:
            raise DataError(f"{path} cannot be read ({error}): prepare the data set again") from error
        if description.get("version", 1) != 1:
            raise DataError(f"{path} was written by a newer version of nanoGPT")
    else:
        tokenizer, dtype, expected = tokenizer_of_original(folder), np.dtype("<u2"), {}
        log.info(f"{folder} has no dataset.json: reading uint16 ids of the {tokenizer}")
    splits = {}
    for split in SPLITS:
        shards = []
        for file in shards_of(folder, split) or [folder / f"{split}.bin"]:
            size = file.stat().st_size if file.exists() else 0
            if not size or size % dtype.itemsize:
                raise DataError(f"{file} has {size} bytes: no whole number of {dtype} ids; prepare the data set again")
            shards.append(np.memmap(file, dtype, "r"))
        splits[split] = Tokens(shards, tokenizer.vocab_size)
        if len(splits[split]) != expected.get(split, len(splits[split])):
            raise DataError(
                f"{folder}: the {split} split holds {len(splits[split]):,} tokens, but dataset.json says "
                f"{expected[split]}: prepare the data set again"
            )
    return Dataset(folder, splits["train"], splits["val"], tokenizer, description)


def tokenizer_of_original(folder: Path) -> Tokenizer:
    """Return what the original's folders imply: the vocabulary in meta.pkl, or GPT-2's where there is none."""
    return read_meta(folder / "meta.pkl") if (folder / "meta.pkl").exists() else GPT2Tokenizer()


# ---------------------------------------------------------------------------------------------------
# Batches


def generator(seed: int, step: int, stream: int) -> np.random.Generator:
    """Return the random numbers of one step. Philox counts, so none before them have to be drawn.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, stream]))


def window_starts(n_tokens: int, block_size: int, *, seed: int, step: int, rows: int, stream: int = TRAINING) -> Starts:
    """Return where the windows of a batch begin: `rows` independent draws with replacement, shape (rows,)."""
    return generator(seed, step, stream).integers(n_tokens - block_size, size=rows)


def epoch_window_starts(n_tokens: int, block_size: int, *, seed: int, step: int, rows: int) -> Starts:
    """Return the same for windows that tile the text: each comes once per epoch, in a new order, shape (rows,).

    The tiling begins at another offset in each epoch, so that what it leaves over at the ends differs.
    """
    n_windows = (n_tokens - 1) // block_size
    epochs, places = np.divmod(step * rows + np.arange(rows), n_windows)
    starts = np.empty(rows, np.int64)
    for epoch in np.unique(epochs).tolist():
        mine = epochs == epoch
        offset = generator(seed, epoch, OFFSET).integers((n_tokens - 1) % block_size + 1)
        starts[mine] = offset + block_size * epoch_order(n_windows, seed, epoch)[places[mine]]
    return starts


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def epoch_order(n_windows: int, seed: int, epoch: int) -> Starts:
    """Return the order of an epoch's windows. OpenWebText: 8.8M windows of 1,024 tokens, 70 MB, 0.3 s per epoch."""
    return generator(seed, epoch, PERMUTATION).permutation(n_windows)


def get_batch(tokens: Tokens, step: int, config: "TrainConfig", rows: range) -> tuple[Tensor, Tensor]:
    """Return `rows` of the global batch of `step`: inputs x and targets y, each (rows, T); row n is the same for all.

    What a row holds depends on (seed, step, n) alone.
    """
    draw = epoch_window_starts if config.sampling == "epoch" else window_starts
    starts = draw(len(tokens), config.block_size, seed=config.seed, step=step, rows=config.rows)
    ids = tokens.windows(starts[rows.start : rows.stop], config.block_size + 1)
    return ids[:, :-1], ids[:, 1:]


def evaluation_batch(tokens: Tokens, k: int, block_size: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return batch `k` of an evaluation, x and y (B, T): the same at every evaluation of every run."""
    starts = window_starts(len(tokens), block_size, seed=0, step=k, rows=batch_size, stream=EVALUATION)
    ids = tokens.windows(starts, block_size + 1)
    return ids[:, :-1], ids[:, 1:]


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's random numbers for one step of one process."""
    return int(generator(seed, step, DROPOUT).integers(2**63, size=rank + 1)[-1])


def document_ids_of(ids: Tensor, end_of_text: int) -> Tensor:
    """Return which document of its row each token belongs to, counted from 0; ids and result (B, T).

    The token that ends a document belongs to the next one, as it opens a prompt: what follows is predicted from it.
    """
    return (ids == end_of_text).cumsum(dim=1)


class Prefetcher:
    """Calls `make(step)` in a thread for the next steps, so that a GPU does not wait for the disk."""

    def __init__(self, make: Callable[[int], Any], depth: int = 2) -> None:
        self.make, self.depth = make, depth
        self.thread = ThreadPoolExecutor(1)
        self.pending: dict[int, Future[Any]] = {}

    def __call__(self, step: int) -> Any:
        """Return what `make(step)` returns, and prepare the steps behind it."""
        wanted = range(step, step + 1 + self.depth)
        self.pending = {n: self.pending.get(n) or self.thread.submit(self.make, n) for n in wanted}
        return self.pending.pop(step).result()
