"""The loss of a head with a large vocabulary, in chunks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ON_CPU, CHUNK = 2048, 8192  # rows whose logits are there together


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of logits x @ weight.T: x (N, C), weight (V, C), targets (N,), -1: don't count.

    Equal to `F.cross_entropy` of these logits, in less memory: at GPT-2's vocabulary they need more than all blocks.
    """
    loss: Tensor = _HeadLoss.apply(x, weight, targets, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """What `head_loss` computes. The gradients are made while a chunk's logits are there, so nothing is computed twice.

    They lack one factor, which only the backward pass knows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, has_gradients: bool) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        chunk = part = CHUNK
        if device == "cpu":
            chunk, part = CHUNK_ON_CPU, max(2**21 // len(weight), 1)  # rows that stay in the processor's cache
        head, total = weight.to(dtype), torch.zeros((), device=x.device)
        shrink = 2.0**-10 if dtype == torch.float16 else 1.0  # a sum over so many rows may leave the range of float16
        grad_x, grad_head = torch.empty_like(x) if has_gradients else None, None
        for n in range(0, len(x), chunk):
            rows = x[n : n + chunk].to(dtype)
            logits = rows @ head.T  # (N, V), in place of which come their gradients
            for z, y in zip(logits.split(part), targets[n : n + chunk, None].split(part), strict=True):  # type: ignore[no-untyped-call]
                counts, y = y >= 0, y.clamp(min=0)
                # in float32 whatever the matrix products run in: a sum over V terms needs the digits
                log_p = F.log_softmax(z, dim=1, dtype=torch.float32)
                total -= (log_p.gather(1, y) * counts).sum()
                if has_gradients:
                    z.copy_(log_p.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=torch.float32)).mul_(counts))
            if grad_x is not None:
                grad_x[n : n + chunk] = logits @ head
                product = (logits.T @ (rows * shrink if shrink < 1 else rows)).to(weight.dtype)
                grad_head = product if grad_head is None else grad_head.add_(product)
        count = (targets >= 0).sum()
        ctx.shrink = shrink
        ctx.save_for_backward(grad_x, grad_head, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_head, count = ctx.saved_tensors
        factor = grad / count
        return grad_x * factor, grad_head.mul_(factor / ctx.shrink), None, None
