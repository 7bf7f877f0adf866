"""A trained model for use, wherever it comes from: a run folder, a checkpoint file, or Hugging Face's format."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt import checkpoint
from nanogpt.checkpoint import Progress
from nanogpt.device import Device
from nanogpt.interop.huggingface import Pretrained, load_pretrained
from nanogpt.model import GPT
from nanogpt.programs import SourceConfig
from nanogpt.shape import GPT2_NAMES
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, and what one must know to use it."""

    model: GPT
    tokenizer: Tokenizer
    name: str  # for messages
    config: dict[str, Any] = field(default_factory=dict)  # of its training run; empty if unknown
    progress: Progress = field(default_factory=Progress)  # of its training run


def load_model(init_from: str, device: Device, *, dropout: float = 0.0, data_dir: str = "data") -> Pretrained:
    """A model to start from: of a run folder, of a checkpoint file (ours or the original's), or Hugging Face's.

    `data_dir` is where the original's character vocabularies lie. Raises `CheckpointError` if it can't be had.
    """
    if (path := checkpoint_of(init_from)) is None:
        return load_pretrained(init_from, device.name, dropout=dropout)
    log.info(f"loading {path}")
    loaded = checkpoint.load(path, data_dir)
    return Pretrained(loaded.model(device, dropout=dropout), loaded.tokenizer)


def checkpoint_of(init_from: str) -> Path | None:
    """The checkpoint that `init_from` names, as a file or as a run's folder; None if it names something else."""
    path = Path(init_from)
    if init_from in GPT2_NAMES or path.name.endswith((".safetensors", ".gguf")):
        return None
    if path.is_dir() and not list(path.glob("*.safetensors")) and list(path.glob("*.pt")):
        return checkpoint.find(init_from, "auto")
    return path if path.is_file() else None


def load_trained(config: SourceConfig, device: Device) -> TrainedModel:
    """The model that `init_from`, `out_dir` and `checkpoint` name, on `device`, compiled if that was asked for.

    Raises `CheckpointError` if it can't be had.
    """
    data_dir = getattr(config, "data_dir", "") or "data"
    if config.init_from == "resume":
        loaded = checkpoint.load(checkpoint.find(config.out_dir, config.checkpoint), data_dir)
        name = f"{loaded.path}, {loaded.progress.step} updates"
        trained = TrainedModel(loaded.model(device), loaded.tokenizer, name, loaded.config, loaded.progress)
    else:
        pretrained = load_model(config.init_from, device, data_dir=data_dir)
        trained = TrainedModel(pretrained.model, pretrained.tokenizer, config.init_from)
    if device.compile:
        trained.model.compile()
    return trained
