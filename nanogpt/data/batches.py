"""From token ids to batches. A batch is a pure function of (seed, stream, step): no iterator state anywhere.

Resuming, evaluating in between or changing the number of processes can therefore not change the data.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanogpt.data.tokenizer import Ids
from nanogpt.errors import DataError

TRAINING, EVALUATION = 0, 1  # streams of random numbers that never meet


def window_starts(
    n_tokens: int, block_size: int, *, seed: int, stream: int, step: int, rows: int
) -> npt.NDArray[np.int64]:
    """Where the windows of one batch begin: `rows` independent draws with replacement, shape (rows,).

    Row i depends on (seed, stream, step, i) alone, not on `rows`. The generator is counter-based (Philox,
    Salmon et al. 2011), so that any step's numbers can be had without drawing those before it.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, stream]))
    return generator.integers(n_tokens - block_size, size=rows)


def gather(tokens: Ids, starts: npt.NDArray[np.int64], block_size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, block_size), int64, of the windows at `starts`; targets are one token ahead.

    Raises `DataError` for an id outside the vocabulary: on a GPU it would surface as an unreadable crash.
    """
    windows = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[starts]  # (rows, block_size + 1)
    if (largest := int(windows.max())) >= vocab_size:
        raise DataError(f"the data holds token {largest}, but the model's vocabulary ends at {vocab_size - 1}")
    ids = torch.from_numpy(windows.astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def check_length(tokens: Ids, block_size: int, name: str) -> None:
    """Raise `DataError` unless at least one window fits."""
    if len(tokens) <= block_size:
        raise DataError(
            f"{name} has {len(tokens):,} tokens, too few for one window of block_size={block_size} and its target; "
            f"use a block_size of at most {max(len(tokens) - 1, 0)}, or more data"
        )
