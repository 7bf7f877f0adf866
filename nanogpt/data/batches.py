"""From token ids to batches. A batch is a pure function of (seed, stream, step): no iterator state anywhere.

Resuming, evaluating in between or changing the number of processes can therefore not change the data.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanogpt.data.tokens import Tokens
from nanogpt.errors import DataError

TRAINING, EVALUATION = 0, 1  # streams of random numbers that never meet
_PERMUTATION, _OFFSET = 2, 3  # two more: the keys of an epoch's order, and where its windows begin
_DROPOUT = 4
_CHUNK = 4096  # windows of an epoch whose places are computed together

Starts = npt.NDArray[np.int64]
Batch = TypeVar("Batch")


def window_starts(n_tokens: int, block_size: int, *, seed: int, step: int, rows: int, stream: int = TRAINING) -> Starts:
    """Where the windows of one batch begin: `rows` independent draws with replacement, shape (rows,).

    Row i depends on (seed, stream, step, i) alone, not on `rows`.
    """
    return _generator(seed, step, stream).integers(n_tokens - block_size, size=rows)


def epoch_window_starts(n_tokens: int, block_size: int, *, seed: int, step: int, rows: int) -> Starts:
    """The same for windows that tile the text: each comes once per epoch, in an order of its own, shape (rows,).

    The order is not a list that must be held, but a keyed bijection of the windows' numbers. What the tiling
    leaves over at the ends differs from epoch to epoch.
    """
    first = step * rows
    chunks = range(first // _CHUNK, (first + rows - 1) // _CHUNK + 1)
    starts = np.concatenate([_chunk_of_starts(n_tokens, block_size, seed, chunk) for chunk in chunks])
    return starts[first % _CHUNK :][:rows]


@functools.lru_cache(maxsize=2)
def _chunk_of_starts(n_tokens: int, block_size: int, seed: int, chunk: int) -> Starts:
    """The starts of a chunk's windows: a memory for `epoch_window_starts`, for which single steps are too small."""
    n_windows = (n_tokens - 1) // block_size
    epochs, places = np.divmod(chunk * _CHUNK + np.arange(_CHUNK), n_windows)
    starts = np.empty(_CHUNK, np.int64)
    for epoch in np.unique(epochs).tolist():
        mine = epochs == epoch
        offset = _generator(seed, epoch, _OFFSET).integers((n_tokens - 1) % block_size + 1)
        starts[mine] = offset + block_size * permute(places[mine], n_windows, seed=seed, epoch=epoch)
    return starts


def _generator(seed: int, step: int, stream: int) -> np.random.Generator:
    """Counter-based (Philox, Salmon et al. 2011): any step's numbers can be had without drawing those before it."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, stream]))


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """What the random stream of process `rank` begins with at `step`."""
    return int(_generator(seed, step, _DROPOUT).integers(2**63, size=rank + 1)[-1])


def permute(numbers: Starts, n: int, *, seed: int, epoch: int) -> Starts:
    """Where a permutation of range(n) that belongs to (seed, epoch) sends `numbers`; same shape, constant memory.

    A Feistel network over the next power of four; what falls outside range(n) goes through it again until it is
    inside. Source: Black and Rogaway 2002, Ciphers with arbitrary finite domains.
    """
    half = max((n - 1).bit_length() + 1, 2) // 2  # bits
    mask = np.uint64((1 << half) - 1)
    keys = _generator(seed, epoch, _PERMUTATION).integers(2**64, size=6, dtype=np.uint64)
    result = numbers.astype(np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half), result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        result[outside] = left << np.uint64(half) | right
        outside = result >= n
    return result.astype(np.int64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A hash of 64 bits, element by element (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def gather(tokens: Tokens, starts: Starts, block_size: int, vocab_size: int) -> Tensor:
    """The windows at `starts` (rows,), each with the token behind it: (rows, block_size + 1) ids, int64.

    Inputs are the first block_size ids, targets the last. Raises `DataError` for an id outside the vocabulary:
    on a GPU it would surface as an unreadable crash.
    """
    windows = tokens.windows(starts, block_size + 1)
    if (largest := int(windows.max())) >= vocab_size:
        raise DataError(f"the data holds token {largest}, but the model's vocabulary ends at {vocab_size - 1}")
    return torch.from_numpy(windows.astype(np.int64))


def document_ids_of(ids: Tensor, end_of_text: int) -> Tensor:
    """Which document of its row each token belongs to, counted from 0; ids and result (B, T).

    The token that ends a document opens the next one, as it does in a prompt: what follows it is predicted from
    it alone.
    """
    return (ids == end_of_text).cumsum(dim=1)


def check_length(tokens: Tokens, block_size: int, name: str) -> None:
    """Raise `DataError` unless at least one window fits."""
    if len(tokens) <= block_size:
        raise DataError(
            f"{name} has {len(tokens):,} tokens, too few for one window of block_size={block_size} and its target; "
            f"use a block_size of at most {max(len(tokens) - 1, 0)}, or more data"
        )


class Ahead(Generic[Batch]):
    """Calls `make(step)` in the background for the steps to come, so that they are there when asked for."""

    def __init__(self, make: Callable[[int], Batch], depth: int = 2) -> None:
        self._make, self._depth = make, depth
        self._thread = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """What `make(step)` returns."""
        wanted = range(step, step + 1 + self._depth)
        self._coming = {n: self._coming[n] if n in self._coming else self._thread.submit(self._make, n) for n in wanted}
        return self._coming.pop(step).result()
