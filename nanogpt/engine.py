"""From weights to token ids: many requests at a time, each token computed once.

A request's prompt goes through the network in one pass, all but its last token; then every step feeds each row its
newest token and draws the next. Rows come when they are added and leave when they end; neither disturbs the others.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.model import GPT
from nanogpt.sampling import Sampling, draw

_CHUNK = 512  # tokens of a text whose logits are there together: of 8,000 they would take gigabytes
# beyond block_size: forget the older half and read the newer one again, or read the whole window again for every token
Window = Literal["half", "slide"]
# a token's log-probability, and the likeliest ids in its place with theirs
Likelihood = tuple[float, list[tuple[int, float]]]


class KVCache:
    """Keys and values of every layer for a number of rows, allocated once: each (layers, rows, H_kv, length, D).

    A forward pass works on neighbouring rows. `seek` says which, and how far each has come; every layer then hands its
    new keys and values to `append`.
    """

    def __init__(self, config: GPTConfig, rows: int, length: int, dtype: torch.dtype, device: str = "cpu") -> None:
        size = (config.n_layer, rows, config.n_kv_head, length, config.head_size)
        # Zeros: masked positions are multiplied by 0, so they must not be NaN.
        self.keys, self.values = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.rows, self.length = rows, length

    def seek(self, first: int, starts: Sequence[int], T: int) -> None:
        """Announce a pass over T tokens of rows first, first + 1, ..., which hold `starts` tokens each."""
        self._rows = slice(first, first + len(starts))
        self._common = starts[0] if len(set(starts)) == 1 else None  # all rows at one position: no index is needed
        self._end = max(starts) + T
        device = self.keys.device
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        # (B, 1, T, end): which positions each token sees; None where plain causal attention says the same.
        self.mask = None
        if self._common is None or (T > 1 and self._common > 0):
            self.mask = (torch.arange(self._end, device=device) <= self.positions[..., None])[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer (B, H_kv, T, D); return all so far, (B, H_kv, end, D)."""
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
        """Copy the first `length` tokens of row `source` to row `target`."""
        for part in (self.keys, self.values):
            part[:, target, :, :length] = part[:, source, :, :length]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: Sequence[int]  # at least one token
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0  # of the request's own random stream: what others draw at the same time changes nothing
    stop: frozenset[int] = frozenset()  # ids that end it, such as that of the end of a text
    alternatives: int | None = None  # also tell log-probabilities: of the token, and of so many likeliest ones


@dataclass(eq=False)
class Row:
    """A request under way."""

    request: Request
    tokens: list[int]  # prompt and continuation
    stream: random.Random
    begin: int = 0  # where the window that the network sees begins
    seen: int = 0  # how many tokens of the window are in the cache
    end: str = ""  # why it ended: "length", "stop", "cancelled", or "error": the model's output was not a number; empty
    # while it goes on
    alternatives: list[Likelihood] = field(default_factory=list)  # per new token, if the request asks for them

    @property
    def new_tokens(self) -> list[int]:
        """What has been drawn."""
        return self.tokens[len(self.request.prompt) :]


class Engine:
    """Continues up to `rows` requests side by side, each within a window of block_size tokens.

    length: tokens to make room for, per row. dtype: of the keys and values that the model computes, if another than
    its embedding's. Ids from `vocab_size` on are never drawn: they only pad the embedding to a round size.
    """

    def __init__(self, model: GPT, rows: int, *, length: int | None = None, vocab_size: int | None = None,
                 dtype: torch.dtype | None = None, window: Window = "half") -> None:  # fmt: skip
        self.model, self.vocab_size, self.window = model, vocab_size, window
        embedding = model.transformer.wte.weight
        self.device = embedding.device
        self.block_size = model.config.block_size
        length = min(length or self.block_size, self.block_size)
        self.cache = KVCache(model.config, rows, length, dtype or embedding.dtype, str(self.device))
        self.rows: list[Row] = []  # that are under way; the n-th is in row n of the cache

    @property
    def room(self) -> int:
        """How many more requests can be added."""
        return self.cache.rows - len(self.rows)

    def add(self, requests: Sequence[Request]) -> list[Row]:
        """Start requests, at most `room`; equal prompts are read once."""
        if len(requests) > self.room:
            raise ValueError(f"{len(requests)} requests for {self.room} free rows")
        for request in requests:
            if not request.prompt or request.max_new_tokens < 0:
                raise ValueError("a prompt needs at least one token, and max_new_tokens can't be negative")
            length = min(len(request.prompt) + request.max_new_tokens, self.block_size)
            if length > self.cache.length:
                raise ValueError(f"{length} tokens in a cache of {self.cache.length}")
        added = [Row(each, list(each.prompt), random.Random(each.seed % 2**64)) for each in requests]
        for row in added:
            row.begin = max(0, len(row.tokens) - self.block_size)
            row.end = "" if row.request.max_new_tokens else "length"
        # the first of each prompt, then the others, which copy what it remembers
        first: dict[tuple[int, ...], Row] = {}
        copies = [row for row in added if not row.end and first.setdefault(tuple(row.tokens), row) is not row]
        self.rows += first.values()
        self._read(len(self.rows) - len(first), list(first.values()))
        for row in copies:
            source = first[tuple(row.tokens)]
            self.cache.copy(self.rows.index(source), len(self.rows), source.seen)
            row.begin, row.seen = source.begin, source.seen
            self.rows.append(row)
        return added

    def step(self) -> list[Row]:
        """Draw one token for every row under way; returns those rows, of which some may have ended with it."""
        self._move_windows()
        rows = list(self.rows)
        if not rows:
            return rows
        logits = self._logits([row.tokens[-1] for row in rows])
        for row in rows:
            row.seen += 1
        chosen = draw(logits, [row.request.sampling for row in rows], [row.stream for row in rows])
        for n, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if token < 0:
                self.finish(row, "error")
                continue
            row.tokens.append(token)
            if row.request.alternatives is not None:
                row.alternatives.append(_alternatives(logits[n], token, row.request.alternatives))
            if token in row.request.stop:
                self.finish(row, "stop")
            elif len(row.tokens) - len(row.request.prompt) >= row.request.max_new_tokens:
                self.finish(row, "length")
        return rows

    def finish(self, row: Row, reason: str = "cancelled") -> None:
        """End a row that is under way. Its place goes to the last one."""
        row.end = reason
        place = self.rows.index(row)
        last = self.rows.pop()
        if last is not row:
            self.cache.copy(len(self.rows), place, last.seen)
            self.rows[place] = last

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], alternatives: int) -> list[Likelihood]:
        """How likely each of tokens[1:] is after those before it; at most block_size tokens. Uses no row."""
        parts = self.model.transformer(torch.tensor([tokens], device=self.device))[0].split(_CHUNK)
        logits = (row for part in parts for row in self.model.lm_head(part)[:, : self.vocab_size])  # (V,) each
        return [_alternatives(row.float(), token, alternatives) for token, row in zip(tokens[1:], logits, strict=False)]

    def _move_windows(self) -> None:
        """Make room for the next token where a window is full."""
        late = [n for n, row in enumerate(self.rows) if len(row.tokens) - row.begin > self.block_size]
        kept = self.block_size if self.window == "slide" else max(1, self.block_size // 2)
        for n in late:
            self.rows[n].begin = len(self.rows[n].tokens) - kept
        for _, run in itertools.groupby(late, key=lambda n: n - late.index(n)):  # neighbours go in one pass
            places = list(run)
            self._read(places[0], [self.rows[n] for n in places])

    @torch.inference_mode()
    def _logits(self, tokens: list[int]) -> Tensor:
        """Logits (B, V) after the newest token of every row."""
        self.cache.seek(0, [row.seen for row in self.rows], 1)
        idx = torch.tensor(tokens, device=self.device)[:, None]  # (B, 1)
        x = self.model.transformer(idx, cache=self.cache)[:, -1]
        logits: Tensor = self.model.lm_head(x)[:, : self.vocab_size]
        return logits.float()

    @torch.inference_mode()
    def _read(self, place: int, rows: list[Row]) -> None:
        """Fill the cache from row `place` on with the windows of `rows`, up to the newest token but one."""
        windows = [row.tokens[row.begin : -1] for row in rows]
        for row, window in zip(rows, windows, strict=True):
            row.seen = len(window)
        T = max(map(len, windows), default=0)
        if T:  # shorter ones are padded at the end, where nothing looks, and what that leaves is overwritten
            idx = torch.tensor([[*window, *[0] * (T - len(window))] for window in windows], device=self.device)
            self.cache.seek(place, [0] * len(rows), T)
            self.model.transformer(idx, cache=self.cache)


def _alternatives(logits: Tensor, token: int, count: int) -> Likelihood:
    """How likely a token is by logits (V,), and the `count` likeliest ones."""
    log_p = logits.log_softmax(dim=-1)
    best = log_p.topk(min(count, len(log_p)))
    return float(log_p[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Continue each row of idx (B, T >= 1), yielding the next ids (B, 1) one step at a time.

    The model sees the last `block_size` tokens. Without a `seed`, torch's random stream gives one.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    B, T = idx.shape
    engine = Engine(model, B, length=T + max_new_tokens, vocab_size=vocab_size, window="slide")
    sampling = Sampling(temperature, top_k or 0)
    training = model.training
    model.eval()
    try:
        rows = engine.add([Request(row, max_new_tokens, sampling, seed + n) for n, row in enumerate(idx.tolist())])
        while engine.step():
            if any(row.end == "error" for row in rows):
                raise FloatingPointError("the model's output is not a number; its weights may be damaged")
            yield torch.tensor([row.tokens[-1:] for row in rows], device=idx.device)
    finally:
        model.train(training)
