"""A trained model for use, wherever it comes from: a run folder, a checkpoint file, or Hugging Face's format."""

from dataclasses import dataclass

from nanogpt import checkpoint
from nanogpt.config import TrainedModelConfig
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
    dataset: str  # that it was trained on; empty if unknown
    data_dir: str  # where that data set lay
    mask_documents: bool  # whether it was trained to see one document at a time


def load_trained(config: TrainedModelConfig, device: Device) -> TrainedModel:
    """The model that `init_from`, `out_dir` and `checkpoint` name, on `device`, compiled if that was asked for.

    Raises `CheckpointError` if it can't be had.
    """
    if config.init_from == "resume":
        loaded = checkpoint.load(checkpoint.find(config.out_dir, config.checkpoint))
        name = f"{loaded.path}, {loaded.progress.step} updates"
        dataset, data_dir = (str(loaded.config.get(key, "")) for key in ("dataset", "data_dir"))
        masked = bool(loaded.config.get("mask_documents"))
        trained = TrainedModel(loaded.model(device), loaded.tokenizer, name, dataset, data_dir or "data", masked)
    else:
        pretrained = load_pretrained(config.init_from, device.name)
        trained = TrainedModel(pretrained.model, pretrained.tokenizer, config.init_from, "", "data", False)
    if device.compile:
        trained.model.compile()
    return trained
