"""The original nanoGPT's ckpt.pt: one flat dictionary."""

from pathlib import Path
from typing import Any

import torch

from nanogpt.errors import ConfigError
from nanogpt.files import atomic_write
from nanogpt.model import GPT
from nanogpt.shape import GPTConfig
from nanogpt.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, VocabularyTokenizer

_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


def model_args(shape: GPTConfig) -> dict[str, Any]:
    """Exactly the seven fields that the original's GPTConfig takes."""
    return {name: getattr(shape, name) for name in _MODEL_ARGS}


def unknown_to_the_original(shape: GPTConfig) -> list[str]:
    """What makes another network of `shape` than the original would build of its `model_args`."""
    known = GPTConfig(**model_args(shape), activation=shape.activation, rope_theta=shape.rope_theta)
    return [f"{name}={value}" for name, value in vars(shape).items() if value != getattr(known, name)]


def save_flat(path: Path, model: GPT, tokenizer: Tokenizer, config: dict[str, Any], step: int, loss: float) -> None:
    """Write what the original's sample.py loads. config: the training run's; loss: its best.

    All rows of the embedding stay: the original, too, has such that only pad. Raises `ConfigError` for a model or a
    tokenizer that the original doesn't know.
    """
    shape = model.config
    if differing := unknown_to_the_original(shape):
        raise ConfigError(
            f"the original nanoGPT has no {', '.join(differing)}; it knows GPT-2's shape only; try --to=hf or --to=gguf"
        )
    if not isinstance(tokenizer, (CharTokenizer, GPT2Tokenizer, VocabularyTokenizer)):
        raise ConfigError(f"the original nanoGPT knows characters and GPT-2's tokens, not the {tokenizer}")
    content = {"model": model.state_dict(), "model_args": model_args(shape), "iter_num": step}
    save_tensors(path, {**content, "optimizer": None, "best_val_loss": loss, "config": config})


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """`torch.save`, atomically. Raises `UserError` when the operating system refuses."""
    with atomic_write(path) as file:
        try:
            torch.save(content, file.name)  # by name torch writes past Python, with half the work
        except RuntimeError as error:  # what torch makes of a full disk, and of Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise OSError(str(error).splitlines()[0]) from error
