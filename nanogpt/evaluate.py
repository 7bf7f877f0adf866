"""The loss of a trained model over a whole split: a number without noise, for comparisons."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanogpt.config import EvalConfig
from nanogpt.data.batches import check_length, document_ids_of
from nanogpt.data.tokens import Tokens, open_dataset
from nanogpt.device import Device, choose
from nanogpt.errors import ConfigError, DataError
from nanogpt.model import GPT
from nanogpt.trained import load_trained


@torch.no_grad()
def whole_split_loss(
    model: GPT, tokens: Tokens, block_size: int, batch_size: int, device: Device, end_of_text: int | None = None
) -> tuple[float, int]:
    """Mean cross-entropy in nats per token, and the number of tokens predicted.

    The split is cut into windows of `block_size` that do not overlap (the last may be shorter), so every token
    but the first is predicted exactly once. Given `end_of_text`, from its own document only. The model's mode is
    left as it was.
    """
    was_training = model.training
    model.eval()
    n_targets = len(tokens) - 1
    n_windows = -(-n_targets // block_size)
    total = 0.0
    for first in tqdm(range(0, n_windows, batch_size), unit="batch", disable=None, leave=False):
        start = first * block_size
        ids = tokens[start : start + batch_size * block_size + 1].astype(np.int64)
        if ids.max() >= model.config.vocab_size:
            raise DataError(
                f"the data holds token {ids.max()}, but the vocabulary ends at {model.config.vocab_size - 1}"
            )
        missing = -(len(ids) - 1) % block_size  # fill up the last window; -1 does not count
        x = np.concatenate([ids[:-1], np.zeros(missing, np.int64)]).reshape(-1, block_size)
        y = np.concatenate([ids[1:], np.full(missing, -1)]).reshape(-1, block_size)
        inputs, targets = device.put(torch.from_numpy(x)), device.put(torch.from_numpy(y))
        document_ids = None if end_of_text is None else document_ids_of(inputs, end_of_text)
        with device.autocast():
            _, loss = model(inputs, targets, document_ids=document_ids, return_logits=False)
        total += loss.item() * (len(ids) - 1)
    model.train(was_training)
    return total / n_targets, n_targets


def evaluate(config: EvalConfig) -> float:
    """The program behind `nanogpt eval`; prints loss and perplexity, then one line of JSON."""
    device = choose(config.device, config.dtype, config.compile)
    trained = load_trained(config, device)
    model, name = trained.model, config.dataset or trained.dataset
    if not name:
        raise ConfigError(f"on which data set? {trained.name} does not say; for example --dataset=shakespeare")
    folder = Path(config.data_dir or trained.data_dir) / name
    dataset = open_dataset(folder)
    dataset.check_tokenizer(trained.tokenizer, trained.name)
    tokens = dataset.split(config.split)
    block_size = config.block_size or model.config.block_size
    if block_size > model.config.block_size:
        raise ConfigError(f"block_size={block_size} exceeds the model's {model.config.block_size}")
    check_length(tokens, 1, f"the {config.split} split of {name}")
    end_of_text = dataset.tokenizer.end_of_text if trained.mask_documents else None
    loss, n_tokens = whole_split_loss(model, tokens, block_size, config.batch_size, device, end_of_text)
    size = dataset.description.get("bytes", {}).get(config.split, 0)
    bits_per_byte = loss * n_tokens / math.log(2) / size if size else None
    print(f"{trained.name}, on all {n_tokens:,} targets of {folder} ({config.split})")
    per_byte = f", {bits_per_byte:.4f} bits per byte" if bits_per_byte else ""
    print(f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}{per_byte} (windows of {block_size})")
    result = {"model": trained.name, "dataset": name, "split": config.split, "block_size": block_size}
    result |= {"tokens": n_tokens, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte}
    print(json.dumps(result))
    return loss
