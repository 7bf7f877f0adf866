"""What a network remembers of the tokens that it has seen, so that a step of decoding computes the new ones only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt.shape import GPTConfig


class Cache:
    """Keys and values of every layer for a number of rows, allocated once.

    A pass of the network works on neighbouring rows, each of which goes on where it ended: `seek` says where that is,
    then every layer hands its new keys and values to `append`.

    keys, values: (layers, rows, H_kv, length, D).
    """

    def __init__(self, config: GPTConfig, rows: int, length: int, dtype: torch.dtype, device: str = "cpu") -> None:
        size = (config.n_layer, rows, config.n_kv_head, length, config.head_size)
        # zeros: what is masked still is multiplied, by zero, and must be a number
        self.keys, self.values = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.rows, self.length = rows, length

    def seek(self, first: int, starts: Sequence[int], T: int) -> None:
        """The next pass is over T tokens of rows first, first + 1, …, which have seen `starts` tokens each."""
        self._rows = slice(first, first + len(starts))
        self._starts = torch.tensor(starts, device=self.keys.device)
        self._common = starts[0] if len(set(starts)) == 1 else None  # one place for all rows: no index is needed
        self._end = max(starts) + T
        # (B, T) the place of each token in its row
        self.positions = self._starts[:, None] + torch.arange(T, device=self.keys.device)
        # (B, 1, T, end) who sees whom; None where plain causal attention, or all, says the same
        self.mask = None
        if self._common is None or (T > 1 and self._common > 0):
            self.mask = (torch.arange(self._end, device=self.keys.device) <= self.positions[..., None])[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember a layer's new keys and values (B, H_kv, T, D); returns all so far, (B, H_kv, end, D)."""
        keys, values = self.keys[layer, self._rows], self.values[layer, self._rows]
        if self._common is not None:
            keys[:, :, self._common : self._end] = k
            values[:, :, self._common : self._end] = v
        else:
            rows = torch.arange(len(k), device=k.device)[:, None]
            keys[rows, :, self.positions] = k.transpose(1, 2)
            values[rows, :, self.positions] = v.transpose(1, 2)
        return keys[:, :, : self._end], values[:, :, : self._end]

    def copy(self, source: int, target: int, length: int) -> None:
        """Let row `target` remember the first `length` tokens of row `source`."""
        for part in (self.keys, self.values):
            part[:, target, :, :length] = part[:, source, :, :length]
