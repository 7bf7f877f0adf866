"""GPT-2 weights in Hugging Face's format: from the hub, a mirror folder, or a folder of one's own.

Reads `config.json` and `model.safetensors` directly; transformers is not needed.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanogpt.config import GPT2_SIZES, GPTConfig
from nanogpt.errors import CheckpointError
from nanogpt.model import GPT

# GPT-2 stores these as (inputs, outputs), torch's Linear as (outputs, inputs)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def load_gpt2(name: str, device: str = "cpu", *, dropout: float = 0.0) -> GPT:
    """The model `name` (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder), in evaluation mode, on `device`.

    Raises `CheckpointError` if it can't be had, is damaged or is no GPT-2.
    """
    folder = _folder_of(name)
    print(f"loading {name} from {folder}")
    shape = replace(gpt2_shape(folder), dropout=dropout)
    try:
        weights = _weights(folder / "model.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no GPT-2 as config.json and model.safetensors: {error}") from error
    try:
        model = GPT.from_weights(shape, weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {error}") from error
    return model.to(device).eval()


def _folder_of(name: str) -> Path:
    """Where the files of `name` lie on this machine, downloaded if need be."""
    if name not in GPT2_SIZES:
        return Path(name)
    repository = f"openai-community/{name}"
    if (mirror := os.environ.get("NANOGPT_DOWNLOADS")) and (folder := Path(mirror, repository)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # offline, no such repository, disk full, …: the library has many ways
        raise CheckpointError(
            f"{repository} could not be downloaded ({type(error).__name__}: {error}); bring its config.json and "
            f"model.safetensors by other means and name their folder, --init_from=FOLDER, or put them into "
            f"$NANOGPT_DOWNLOADS/{repository}/"
        ) from error


def gpt2_shape(folder: Path) -> GPTConfig:
    """The shape that `config.json` in `folder` describes. Raises `CheckpointError` if that is no GPT-2."""
    try:
        return _shape(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no GPT-2 as config.json and model.safetensors: {error}") from error


def _shape(config: dict[str, Any]) -> GPTConfig:
    if config.get("model_type") != "gpt2":
        raise ValueError(f"model_type is {config.get('model_type')!r}, not 'gpt2'")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation_function is {activation!r}; known: {', '.join(_ACTIVATIONS)}")
    width = config["n_embd"]
    if config.get("layer_norm_epsilon", 1e-5) != 1e-5 or config.get("n_inner") not in (None, 4 * width):
        raise ValueError("layer_norm_epsilon or n_inner differ from GPT-2's 1e-5 and 4 * n_embd")
    shape = GPTConfig(
        block_size=config["n_positions"],
        vocab_size=config["vocab_size"],
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=width,
        bias=True,
        activation="gelu" if _ACTIVATIONS[activation] == "gelu" else "gelu_tanh",
    )
    if problems := list(shape.problems()):
        raise ValueError("; ".join(problems))
    return shape


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors under our names. Older files lack the prefix, and carry attention masks that are no weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        weights[full] = (tensor.t() if name.endswith(_TRANSPOSED) else tensor).float().contiguous()
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    return weights
