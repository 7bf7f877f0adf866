"""From weights to token ids: the sampling loop."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt.model import GPT


def next_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw one id per row. logits: (B, V) in any float type; returns (B, 1).

    temperature 0 takes the likeliest. top_k keeps the k likeliest, None or 0 all.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the largest is 0: no overflow, however cold
    if top_k and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, [-1]]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


@torch.no_grad()
def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue each row of idx (B, T >= 1), yielding the next ids (B, 1) one step at a time.

    The model sees the last `block_size` tokens. Ids from `vocab_size` on are never drawn: they only pad the
    embedding to a round size and stand for no text.
    """
    if idx.shape[1] == 0:
        raise ValueError("a prompt needs at least one token")
    for _ in range(max_new_tokens):
        idx = idx[:, -model.config.block_size :]
        logits, _ = model(idx)
        token = next_token(logits[:, -1, :vocab_size], temperature, top_k, generator)
        yield token
        idx = torch.cat([idx, token], dim=1)
