"""The original nanoGPT's ckpt.pt: one flat dictionary."""

from pathlib import Path
from typing import Any

import torch

from nanogpt.data.tokenizer import Tokenizer
from nanogpt.errors import ConfigError
from nanogpt.files import atomic_write
from nanogpt.model import GPT
from nanogpt.shape import GPTConfig

_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def model_args(shape: GPTConfig) -> dict[str, Any]:
    """Exactly the seven fields that the original's GPTConfig takes."""
    return {name: getattr(shape, name) for name in _MODEL_ARGS}


def save_flat(path: Path, model: GPT, tokenizer: Tokenizer, config: dict[str, Any], step: int, loss: float) -> None:
    """Write what the original's sample.py and train.py load. config: the training run's; loss: its best.

    Raises `ConfigError` for a model that the original can't rebuild.
    """
    shape = model.config
    if shape != GPTConfig(**model_args(shape), activation=shape.activation):
        raise ConfigError(
            "the original nanoGPT knows GPT-2's shape only: LayerNorm, learned positions, a hidden layer of 4 n_embd, "
            "a tied head; --to=hf and --to=gguf carry this model"
        )
    content = {"model": model.state_dict(), "model_args": model_args(shape), "iter_num": step}
    with atomic_write(path) as file:
        torch.save({**content, "optimizer": None, "best_val_loss": loss, "config": config}, file)
