"""A trained model for use, wherever it comes from: a run folder, a checkpoint file, or Hugging Face's format."""

from dataclasses import dataclass, field
from typing import Any

from nanogpt import checkpoint
from nanogpt.checkpoint import Progress
from nanogpt.config import SourceConfig
from nanogpt.data.tokenizer import Tokenizer
from nanogpt.device import Device
from nanogpt.interop.huggingface import load_pretrained
from nanogpt.model import GPT


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, and what one must know to use it."""

    model: GPT
    tokenizer: Tokenizer
    name: str  # for messages
    config: dict[str, Any] = field(default_factory=dict)  # of its training run; empty if unknown
    progress: Progress = field(default_factory=Progress)  # of its training run


def load_trained(config: SourceConfig, device: Device) -> TrainedModel:
    """The model that `init_from`, `out_dir` and `checkpoint` name, on `device`, compiled if that was asked for.

    Raises `CheckpointError` if it can't be had.
    """
    if config.init_from == "resume":
        loaded = checkpoint.load(checkpoint.find(config.out_dir, config.checkpoint))
        name = f"{loaded.path}, {loaded.progress.step} updates"
        trained = TrainedModel(loaded.model(device), loaded.tokenizer, name, loaded.config, loaded.progress)
    else:
        pretrained = load_pretrained(config.init_from, device.name)
        trained = TrainedModel(pretrained.model, pretrained.tokenizer, config.init_from)
    if device.compile:
        trained.model.compile()
    return trained
