"""How the next token is chosen."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What to choose from, and how boldly. The limits apply in this order, each to what the one before it left."""

    temperature: float = 1.0  # 1: the model's own distribution; lower: safer; 0: always the likeliest token
    top_k: int = 0  # the k likeliest tokens; 0: all
    top_p: float = 1.0  # the fewest likeliest tokens that have this probability together (Holtzman et al. 2020)
    min_p: float = 0.0  # tokens that have this share of the likeliest one's probability (Nguyen et al. 2024)

    @property
    def kind(self) -> str:
        """Which way of drawing this is; a row's way must not depend on its neighbours."""
        if self.temperature == 0:
            return "greedy"
        return "ranked" if self.top_k or self.top_p < 1 else "plain"


def draw(logits: Tensor, settings: Sequence[Sampling], streams: Sequence[random.Random]) -> list[int]:
    """Choose one id per row of logits (B, V), each as its settings say and from its own random stream.

    For a row whose logits are no numbers, that is -1.
    """
    kinds = [each.kind for each in settings]
    if len(set(kinds)) > 1:
        drawn = [0] * len(kinds)
        for kind in set(kinds):
            rows = [row for row, other in enumerate(kinds) if other == kind]
            chosen = draw(logits[rows], [settings[row] for row in rows], [streams[row] for row in rows])
            for row, token in zip(rows, chosen, strict=True):
                drawn[row] = token
        return drawn
    bad = ~logits.amax(dim=-1).isfinite()
    if kinds[0] == "greedy":
        return logits.argmax(dim=-1).masked_fill(bad, -1).tolist()
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    V, ids = logits.shape[-1], None
    if kinds[0] == "ranked":
        most = max(min(each.top_k or V, V) for each in settings)
        logits, ids = logits.topk(most) if most < V else logits.sort(descending=True)
    logits = logits.double()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / column([each.temperature for each in settings])
    p = scaled.softmax(dim=-1)
    if kinds[0] == "ranked":
        rank = torch.arange(p.shape[-1], device=p.device)
        p = p.masked_fill(rank >= column([each.top_k or V for each in settings]), 0.0)
        before = (p.cumsum(dim=-1) - p) / p.sum(dim=-1, keepdim=True)  # what the likelier ones have together
        p = p.masked_fill((before >= column([each.top_p for each in settings])) & (rank > 0), 0.0)
    if any(each.min_p for each in settings):
        p = p.masked_fill(p < p.amax(dim=-1, keepdim=True) * column([each.min_p for each in settings]), 0.0)
    total = p.cumsum(dim=-1)
    # below the total, also when rounded
    place = column([stream.getrandbits(32) / 2**32 for stream in streams]) * total[:, -1:]
    index = torch.searchsorted(total, place, right=True).clamp(max=p.shape[-1] - 1)
    return (index if ids is None else ids.gather(1, index))[:, 0].masked_fill(bad.to(index.device), -1).tolist()
