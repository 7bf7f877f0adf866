"""Which parameter is updated how, and how the learning rate goes."""

import math

import torch
from torch import nn

from nanogpt.config import TrainConfig


def adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices and embeddings, none on biases and norms (two groups, in this order).

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # one kernel for all tensors instead of a dozen for each; mps got it later than the others
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused or None)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step` (from 0): linear warm-up, cosine down to min_lr, min_lr ever after."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    progress = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)
