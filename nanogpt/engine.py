"""From weights to token ids: many requests at a time, each token computed once.

A prompt is prefilled in one pass, all but its last token; then every step decodes: it feeds each row its newest token
and draws the next one. Rows join between any two steps and leave when they end, and neither disturbs the others.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.config import GPTConfig
from nanogpt.model import GPT

_CHUNK = 512  # tokens of a scored text whose logits exist at the same time: those of 8,000 would take gigabytes
NOT_FINITE = "the model's output is not a number; its weights may be damaged"
Window = Literal["half", "slide"]  # a full context loses its older half, or one token (a prefill for every token)
Logprobs = tuple[float, list[tuple[int, float]]]  # a token's logprob; the top-k ids in its place with theirs


@dataclass(frozen=True)
class Sampling:
    """What to draw from. The limits apply in this order, each to the tokens that the one before it left."""

    temperature: float = 1.0  # 1: the model's own distribution; lower: fewer surprises; 0: greedy
    top_k: int = 0  # the k most probable tokens; 0: all
    top_p: float = 1.0  # the fewest most probable tokens that together have this probability (Holtzman et al. 2020)
    min_p: float = 0.0  # tokens with at least this share of the highest probability (Nguyen et al. 2024)


def draw(logits: Tensor, settings: Sequence[Sampling], points: Sequence[float]) -> list[int]:
    """Return one id per row of logits (B, V): the one at a random point in [0, 1) of its distribution.

    For a row whose logits are not finite it is -1.
    """
    kinds = ["greedy" if s.temperature == 0 else "ranked" if s.top_k or s.top_p < 1 else "plain" for s in settings]
    drawn = torch.empty(len(kinds), dtype=torch.long)
    for kind in set(kinds):  # in groups, because the algorithm of a row must not depend on its neighbours
        rows = [n for n, other in enumerate(kinds) if other == kind]
        part = logits if len(rows) == len(kinds) else logits[rows]
        drawn[rows] = _draw(kind, part, [settings[n] for n in rows], [points[n] for n in rows]).cpu()
    return drawn.where(logits.amax(dim=-1).isfinite().cpu(), -1).tolist()


def _draw(kind: str, logits: Tensor, settings: Sequence[Sampling], points: Sequence[float]) -> Tensor:
    """Return the drawn ids (B,) of rows of one kind."""
    if kind == "greedy":
        return logits.argmax(dim=-1)
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    V, ids = logits.shape[-1], None
    top_ks = [min(s.top_k or V, V) for s in settings]
    values = [[s.temperature for s in settings], top_ks, [s.top_p for s in settings], [s.min_p for s in settings]]
    columns = torch.tensor([*values, points], dtype=torch.float64, device=logits.device)[..., None]
    temperature, top_k, top_p, min_p, point = columns  # (B, 1) each
    if kind == "ranked":
        logits, ids = logits.topk(max(top_ks)) if max(top_ks) < V else logits.sort(descending=True)
    # The maximum goes first, because a tiny temperature would make infinities of any number but 0.
    p = ((logits - logits.amax(dim=-1, keepdim=True)).double() / temperature).softmax(dim=-1)
    if kind == "ranked":
        rank = torch.arange(p.shape[-1], device=p.device)
        p = p.masked_fill(rank >= top_k, 0.0)
        before = (p.cumsum(dim=-1) - p) / p.sum(dim=-1, keepdim=True)  # the probability of all higher ranks
        # Where probabilities add up to top_p, rounding must not let another one in.
        p = p.masked_fill((before >= top_p - 1e-6) & (top_p < 1) & (rank > 0), 0.0)
    if any(s.min_p for s in settings):
        p = p.masked_fill(p < p.amax(dim=-1, keepdim=True) * min_p, 0.0)
    total = p.cumsum(dim=-1)
    index = torch.searchsorted(total, point * total[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    return (index if ids is None else ids.gather(1, index))[:, 0]


class KVCache:
    """Keys and values of every layer, allocated once: each (layers, rows, H_kv, length, D).

    `prefill` or `decode` announces a forward pass; then every layer hands its new keys and values to `append`.
    """

    def __init__(self, config: GPTConfig, rows: int, length: int, dtype: torch.dtype, device: str = "cpu") -> None:
        size = (config.n_layer, rows, config.n_kv_head, length, config.head_size)
        # Zeros: masked positions are multiplied by 0, so they must not be NaN.
        self.keys, self.values = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.rows, self.length, self.device = rows, length, device

    def prefill(self, rows: Sequence[int], T: int) -> None:
        """Announce the first T tokens of each of `rows`."""
        self._rows, self._end = torch.tensor(rows, device=self.device)[:, None], 0
        self.positions = torch.arange(T, device=self.device)[None]  # (1, T)
        self.mask: Tensor | None = None

    def decode(self, positions: Tensor, end: int, same_length: bool = False) -> None:
        """Announce one more token for rows 0 to B - 1, at `positions` (B, 1), all below `end`."""
        self._rows, self._end = torch.arange(len(positions), device=self.device)[:, None], end
        self.positions, self.mask = positions, None
        if not same_length:  # (B, 1, 1, end): which positions each token sees; None is faster
            self.mask = (torch.arange(end, device=self.device) <= positions)[:, None, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer, (B, H_kv, T, D); return all that their tokens may see."""
        self.keys[layer][self._rows, :, self.positions] = k.transpose(1, 2)
        self.values[layer][self._rows, :, self.positions] = v.transpose(1, 2)
        B, end = len(k), self._end
        return (self.keys[layer, :B, :, :end], self.values[layer, :B, :, :end]) if end else (k, v)

    def copy(self, source: int, target: int, length: int) -> None:
        for part in (self.keys, self.values):
            part[:, target, :, :length] = part[:, source, :, :length]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: Sequence[int]  # at least one token
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0  # of the request's own random stream, which makes it independent of other requests
    stop: frozenset[int] = frozenset()  # ids that end it: the model's end tokens
    logprobs: int | None = None  # also record the logprob of each new token, and this many top-k ids in its place


@dataclass(eq=False)
class Row:
    """A request under way."""

    request: Request
    tokens: list[int]  # prompt and completion
    stream: random.Random
    begin: int = 0  # the token with which the window that the model sees begins
    seen: int = 0  # tokens of the window that are in the cache
    end: str = ""  # "length", "stop", "cancelled" or "error" (see NOT_FINITE); empty: under way
    logprobs: list[Logprobs] = field(default_factory=list)  # of each new token, if the request asks for them

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]


class Engine:
    """Completes up to `rows` requests side by side, each within a window of block_size tokens.

    length: tokens to allocate per row. dtype: of the keys and values that the model computes, if it is not that of the
    embedding. Ids from `vocab_size` on are never drawn: they only pad the embedding to a round size. static: decode all
    rows over the whole cache in every step, so that shapes never change; on CUDA as a graph, launched at once.
    """

    def __init__(self, model: GPT, rows: int, *, length: int | None = None, vocab_size: int | None = None,
                 dtype: torch.dtype | None = None, window: Window = "half", static: bool = False) -> None:  # fmt: skip
        self.model, self.vocab_size, self.window = model, vocab_size, window
        embedding = model.transformer.wte.weight
        self.device, self.block_size = embedding.device, model.config.block_size
        length = min(length or self.block_size, self.block_size)
        self.cache = KVCache(model.config, rows, length, dtype or embedding.dtype, str(self.device))
        self.rows: list[Row] = []  # under way; the n-th has the n-th row of the cache
        self.inputs = (
            torch.zeros(2, rows, 1, dtype=torch.long, device=self.device) if static else None
        )  # ids, positions
        self.graph: Any = None

    @property
    def room(self) -> int:
        return self.cache.rows - len(self.rows)

    def add(self, requests: Sequence[Request]) -> list[Row]:
        """Start requests, at most `room`; equal prompts are prefilled once. Raises `ValueError`."""
        if len(requests) > self.room:
            raise ValueError(f"{len(requests)} requests for {self.room} free rows")
        if not all(each.prompt and each.max_new_tokens >= 0 for each in requests):
            raise ValueError("a prompt needs at least one token, and max_new_tokens can't be negative")
        added = [Row(each, list(each.prompt), random.Random(each.seed % 2**64)) for each in requests]
        for row in added:
            row.begin = max(0, len(row.tokens) - self.block_size)
            row.end = "" if row.request.max_new_tokens else "length"
        started = [row for row in added if not row.end]
        self.rows += started
        self._prefill(started)
        return added

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Draw one token for every row under way; return those rows, of which some may have ended with it."""
        full = [row for row in self.rows if len(row.tokens) - row.begin > self.block_size]
        for row in full:
            row.begin = len(row.tokens) - (self.block_size if self.window == "slide" else max(1, self.block_size // 2))
        self._prefill(full)
        rows = list(self.rows)
        if not rows:
            return rows
        logits = self._decode([row.tokens[-1] for row in rows], [row.seen for row in rows])
        points = [row.stream.getrandbits(32) / 2**32 for row in rows]
        drawn = draw(logits, [row.request.sampling for row in rows], points)
        for row in rows:
            row.seen += 1
        for row, token, of_row in zip(rows, drawn, logits, strict=True):
            if token < 0:
                self.finish(row, "error")
                continue
            row.tokens.append(token)
            if row.request.logprobs is not None:
                row.logprobs.append(_logprobs(of_row, token, row.request.logprobs))
            if token in row.request.stop:
                self.finish(row, "stop")
            elif len(row.tokens) - len(row.request.prompt) >= row.request.max_new_tokens:
                self.finish(row, "length")
        return rows

    def complete(self, requests: Sequence[Request]) -> list[Row]:
        """Run requests, at most `room`, to their ends, with the model in evaluation mode."""
        training = self.model.training
        self.model.eval()
        try:
            rows = self.add(requests)
            while self.rows:
                self.step()
        finally:
            self.model.train(training)
        return rows

    def finish(self, row: Row, reason: str = "cancelled") -> None:
        """End a row that is under way. The last row takes its place."""
        row.end = reason
        place = self.rows.index(row)
        if reason == "error":  # Masked positions are multiplied by 0, so that the next row here would inherit a NaN.
            self.cache.keys[:, place], self.cache.values[:, place] = 0, 0
        last = self.rows.pop()
        if last is not row:
            self.cache.copy(len(self.rows), place, last.seen)
            self.rows[place] = last

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], count: int) -> list[Logprobs]:
        """Return the logprobs of tokens[1:], each after those before it; at most block_size tokens. Uses no row."""
        parts = self.model.transformer(torch.tensor([tokens], device=self.device))[0].split(_CHUNK)
        logits = (row for part in parts for row in self.model.lm_head(part)[:, : self.vocab_size])  # (V,) each
        return [_logprobs(row.float(), token, count) for token, row in zip(tokens[1:], logits, strict=False)]

    def _decode(self, tokens: list[int], starts: list[int]) -> Tensor:
        """Return the logits (B, V) after one more token of each row, where row n holds starts[n] tokens."""
        inputs = torch.tensor([tokens, starts], device=self.device)[..., None]  # (2, B, 1)
        if self.inputs is None:
            return self._logits(inputs, max(starts) + 1, same_length=min(starts) == max(starts))
        self.inputs[:, : len(tokens)] = inputs
        if self.device.type != "cuda":
            return self._logits(self.inputs, self.cache.length)[: len(tokens)]
        if self.graph is None:
            self._logits(self.inputs, self.cache.length)  # what libraries allocate at first must not be captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self.logits = self._logits(self.inputs, self.cache.length)
            self.graph = graph
        self.graph.replay()
        return self.logits[: len(tokens)]

    def _logits(self, inputs: Tensor, end: int, same_length: bool = False) -> Tensor:
        """Return the logits (B, V) after ids (B, 1) at positions (B, 1), all below `end`."""
        self.cache.decode(inputs[1], end, same_length)
        x = self.model.transformer(inputs[0], cache=self.cache)[:, -1]
        return self.model.lm_head(x)[:, : self.vocab_size].float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _prefill(self, rows: Sequence[Row]) -> None:
        """Fill the cache with the windows of `rows`, up to the newest token but one; equal ones are computed once."""
        windows = {row: tuple(row.tokens[row.begin : -1]) for row in rows}
        first = {windows[row]: row for row in reversed(rows)}  # of each window
        T = max(map(len, first), default=0)
        if T:  # Shorter windows are padded at the end, where no token looks; decoding overwrites what that leaves.
            idx = torch.tensor([[*window, *[0] * (T - len(window))] for window in first], device=self.device)
            self.cache.prefill([self.rows.index(row) for row in first.values()], T)
            self.model.transformer(idx, cache=self.cache)
        for row, window in windows.items():
            row.seen = len(window)
            if first[window] is not row:
                self.cache.copy(self.rows.index(first[window]), self.rows.index(row), row.seen)


def _logprobs(logits: Tensor, token: int, count: int) -> Logprobs:
    """Return the logprob of a token by logits (V,), and the `count` top ids with theirs."""
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(count, len(logprobs)))
    return float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def generate(model: GPT, idx: Tensor, max_new_tokens: int, temperature: float, top_k: int | None) -> Tensor:
    """Return idx (B, T >= 1) with `max_new_tokens` more ids in each row; torch's random stream gives the seeds.

    The model sees the last `block_size` tokens. Raises `FloatingPointError` if its logits are not finite.
    """
    (B, T), seed, sampling = idx.shape, int(torch.randint(2**62, ())), Sampling(temperature, top_k or 0)
    engine = Engine(model, B, length=T + max_new_tokens, window="slide")
    rows = engine.complete([Request(row, max_new_tokens, sampling, seed + n) for n, row in enumerate(idx.tolist())])
    if any(row.end == "error" for row in rows):
        raise FloatingPointError(NOT_FINITE)
    return torch.tensor([row.tokens for row in rows], device=idx.device)


class QuantizedLinear(nn.Module):
    """A Linear with its weight (R, C) in `dtype`, or in int8 with a scale per row; it computes in `dtype`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, int8: bool) -> None:
        super().__init__()
        self.dtype, self.scale, weight = dtype, None, linear.weight.detach()
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.is_fast = weight.device.type == "cpu" and dtype == torch.bfloat16  # what the two special kernels are for
        if int8:
            scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            self.weight, self.scale = (weight / scale).round().to(torch.int8), scale[:, 0].to(dtype)
        elif self.is_fast and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # type: ignore[no-untyped-call]
            # oneDNN reads its own layout of bfloat16 half as fast again; torch has no public function for it.
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), 1)
        else:
            self.weight = weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        if self.is_fast and x.shape[:-1].numel() <= 32:  # the kernel is for few rows
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(self.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantize(model: GPT, dtype: torch.dtype, int8: bool = False) -> None:
    """Replace the matmuls of `model`, in place, by ones that compute in `dtype`; `int8`: with weights of 8 bits.

    Embeddings, norms and the residual stream stay as they are. With one row, decoding is as fast as the weights can be
    read: half the bytes give twice the speed.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, QuantizedLinear(child, dtype, int8))
