"""From files of token ids to batches. A batch is a pure function of (seed, step): there is no iterator state.

Resuming, evaluating in between or another number of processes can therefore not change which text a step sees.

A data set is a folder:
    train.bin, val.bin  the ids, raw little-endian uint16 or uint32
    dataset.json        number format, counts, sources and the tokenizer; folders of the original have none
    meta.pkl            the vocabulary of a character data set, as the original writes it
    train.marks, …      of conversations, a byte per id: whether it counts in the loss, and where one begins
"""

import functools
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from nanogpt.chats import Chats, with_template
from nanogpt.config import TrainConfig
from nanogpt.errors import DataError
from nanogpt.tokenizer import GPT2Tokenizer, Tokenizer, from_description, read_meta

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
# Independent streams of random numbers.
TRAINING, EVALUATION, PERMUTATION, OFFSET, DROPOUT = range(5)
Ids = npt.NDArray[Any]  # uint16 or uint32
Starts = npt.NDArray[np.int64]
Batch = tuple[Tensor, ...]  # inputs x and targets y (-1: does not count); of conversations, also document ids: (B, T)


@dataclass(frozen=True)
class Dataset:
    """A data set, opened: the memory-mapped ids of its two splits, and what they mean."""

    folder: Path
    train: Ids
    val: Ids
    tokenizer: Tokenizer
    description: dict[str, Any]  # dataset.json; empty where there is none
    chats: dict[str, Chats] = field(default_factory=dict)  # by split, if it consists of conversations

    def match_tokenizer(self, tokenizer: Tokenizer, owner: str) -> None:
        """Raise `DataError` unless this data set's ids are those of `tokenizer`, which `owner` uses.

        What concerns the model of `owner` is taken over: its prompts' start token, and how many ids it knows.
        """
        expected = with_template(tokenizer) if self.chats else tokenizer  # with the tokens of conversations
        if not self.tokenizer.has_ids_of(expected):
            raise DataError(
                f"data set {self.folder.name} holds ids of the {self.tokenizer}, but {owner} uses the {tokenizer}; "
                "prepare the data set again with --tokenizer=PATH of the model or of its data set"
            )
        self.tokenizer.adds_bos = tokenizer.adds_bos
        self.tokenizer.vocab_size = min(self.tokenizer.vocab_size, expected.vocab_size)

    def check_length(self, block_size: int) -> None:
        """Raise `DataError` unless each split holds at least one window and the token behind it."""
        for name in () if self.chats else SPLITS:  # rows of conversations are filled up
            if (n := len(getattr(self, name))) <= block_size:
                hint = f"use --block_size={max(n - 1, 1)} or less, or more text"
                raise DataError(f"the {name} split has {n:,} tokens, too few for block_size={block_size}: {hint}")


def is_prepared(folder: Path) -> bool:
    """Return whether `folder` holds both splits."""
    return all((folder / f"{split}.bin").exists() for split in SPLITS)


def open_dataset(folder: Path) -> Dataset:
    """Open a data set, prepared here or by the original, which writes no `dataset.json`.

    Raises `DataError` if it is missing, incomplete or damaged.
    """
    if not is_prepared(folder):
        raise DataError(f"{folder} holds no train.bin and val.bin: prepare it, or name another (--dataset, --data_dir)")
    description: dict[str, Any] = {}
    splits, chats = dict[str, Ids](), dict[str, Chats]()
    try:
        if (path := folder / "dataset.json").exists():
            description = json.loads(path.read_bytes())
            tokenizer = from_description(description["tokenizer"])
            dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[description["dtype"]])
        else:
            tokenizer, dtype = tokenizer_of_original(folder), np.dtype("<u2")
            log.info(f"{folder} has no dataset.json: reading uint16 ids of the {tokenizer}")
        for split in SPLITS:
            ids = np.asarray(np.memmap(folder / f"{split}.bin", dtype, "r"))  # slices of the class memmap are slow
            if description and len(ids) != (expected := description["tokens"][split]):
                raise DataError(f"{split}.bin holds {len(ids):,} ids, not {expected:,}")
            splits[split] = ids
            if description.get("chat"):
                chats[split] = Chats(ids, np.fromfile(folder / f"{split}.marks", np.uint8))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, DataError) as error:
        raise DataError(f"{folder} cannot be read ({error}): prepare the data set again") from error
    return Dataset(folder, splits["train"], splits["val"], tokenizer, description, chats)


def open_if_prepared(config: TrainConfig) -> Dataset | None:
    """Return the data set of a run, or None if it is not there yet."""
    folder = Path(config.data_dir, config.dataset)
    return open_dataset(folder) if is_prepared(folder) else None


def tokenizer_of_original(folder: Path) -> Tokenizer:
    """Return what the original's folders imply: the vocabulary in meta.pkl, or GPT-2's where there is none."""
    return read_meta(folder / "meta.pkl") if (folder / "meta.pkl").exists() else GPT2Tokenizer()


# ---------------------------------------------------------------------------------------------------
# Batches


def get_batch(
    dataset: Dataset, step: int, config: TrainConfig, rows: range, put: Callable[[Tensor], Tensor] = lambda ids: ids
) -> Batch:
    """Return `rows` of the training batch of `step`, where `put` puts them.

    Row n of the global batch depends on the data, the settings and (seed, step, n), not on the process that asks.
    """
    # Early in a run, short contexts teach more: the same tokens as more rows (sequence length warm-up, Li et al. 2022).
    share = 1.0 if dataset.chats else step / max(config.lr_decay_iters, 1)
    pieces = 4 if 3 * share < 2 * config.context_warmup else 2 if share < config.context_warmup else 1
    part, block_size = slice(rows.start * pieces, rows.stop * pieces), config.block_size // pieces
    draw: dict[str, Any] = {"seed": config.seed, "step": step, "rows": config.global_batch_size * pieces}
    if dataset.chats:
        numbers, _ = in_epochs(len(dataset.chats["train"].rows(block_size)), **draw)
        batch = tuple(map(torch.from_numpy, dataset.chats["train"].batch(numbers[part], block_size)))
    else:
        starts_of = epoch_window_starts if config.sampling == "epoch" else window_starts
        batch = windows(dataset, "train", starts_of(len(dataset.train), block_size, **draw)[part], block_size)
    return tuple(put(tensor) for tensor in batch)


def evaluation_batch(dataset: Dataset, split: str, k: int, block_size: int, batch_size: int) -> Batch:
    """Return batch `k` of an evaluation: the same at every evaluation of every run."""
    if dataset.chats:
        chats, draw = dataset.chats[split], generator(0, k, EVALUATION)
        numbers = draw.integers(len(chats.rows(block_size)), size=batch_size)
        return tuple(map(torch.from_numpy, chats.batch(numbers, block_size)))
    n_tokens = len(getattr(dataset, split))
    starts = window_starts(n_tokens, block_size, seed=0, step=k, rows=batch_size, stream=EVALUATION)
    return windows(dataset, split, starts, block_size)


def windows(dataset: Dataset, split: str, starts: Starts, block_size: int) -> Batch:
    """Return the windows that begin at `starts` (rows,) and the tokens to predict, both (rows, block_size) int64.

    Raises `DataError` for an id outside the vocabulary, which on a GPU would end in an unreadable assertion.
    """
    ids = sliding_window_view(getattr(dataset, split), block_size + 1)[starts]
    if (largest := int(ids.max())) >= dataset.tokenizer.vocab_size:
        last = dataset.tokenizer.vocab_size - 1
        raise DataError(f"{dataset.folder / split}.bin holds token {largest}, but the vocabulary ends at {last}")
    tokens = torch.from_numpy(ids.astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]


def generator(seed: int, step: int, stream: int) -> np.random.Generator:
    """Return a generator for one step, or epoch. Philox is counter-based: no step's numbers depend on those before it.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, stream]))


def window_starts(n_tokens: int, block_size: int, *, seed: int, step: int, rows: int, stream: int = TRAINING) -> Starts:
    """Return where the windows of a batch begin: `rows` independent draws with replacement, shape (rows,)."""
    return generator(seed, step, stream).integers(n_tokens - block_size, size=rows)


def epoch_window_starts(n_tokens: int, block_size: int, *, seed: int, step: int, rows: int) -> Starts:
    """Return where the windows begin if they tile the text: each is seen once per epoch, in a new order; (rows,).

    The tiling begins at another offset in each epoch, so that what it leaves over at the ends differs.
    """
    numbers, epochs = in_epochs((n_tokens - 1) // block_size, seed=seed, step=step, rows=rows)
    last = (n_tokens - 1) % block_size + 1
    offsets = {epoch: generator(seed, epoch, OFFSET).integers(last) for epoch in set(epochs.tolist())}
    return numbers * block_size + np.array([offsets[epoch] for epoch in epochs.tolist()], np.int64)


def in_epochs(count: int, *, seed: int, step: int, rows: int) -> tuple[Starts, Starts]:
    """Return which of `count` items the rows of a batch are, if each is seen once per epoch, and in which epoch."""
    epochs, places = np.divmod(step * rows + np.arange(rows), count)
    numbers = np.empty(rows, np.int64)
    for epoch in set(epochs.tolist()):
        numbers[epochs == epoch] = epoch_order(count, seed, epoch)[places[epochs == epoch]]
    return numbers, epochs


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def epoch_order(count: int, seed: int, epoch: int) -> Starts:
    """Return the order of an epoch's items. OpenWebText has 8.8M windows of 1,024 tokens: 70 MB."""
    return generator(seed, epoch, PERMUTATION).permutation(count)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's random numbers for one step of one process."""
    return int(generator(seed, step, DROPOUT).integers(2**63, size=rank + 1)[-1])


def document_ids_of(ids: Tensor, end_of_text: int) -> Tensor:
    """Return the number of each token's document within its row, (B, T); an end-of-text token begins the next one."""
    return (ids == end_of_text).cumsum(dim=1)


class Prefetcher:
    """Calls `make(step)`, which returns a batch, in a thread for the next steps, so that a GPU need not wait for it."""

    def __init__(self, make: Callable[[int], Batch], depth: int = 2) -> None:
        self.make, self.depth = make, depth
        self.thread, self.pending = ThreadPoolExecutor(1), dict[int, Future[Batch]]()

    def __call__(self, step: int) -> Batch:
        """Return the batch of `step`, and begin with those of the next steps."""
        wanted = range(step, step + 1 + self.depth)
        self.pending = {n: self.pending.get(n) or self.thread.submit(self.make, n) for n in wanted}
        return self.pending.pop(step).result()
