"""How good a trained model is: its loss over a whole split, a number without noise, and benchmarks."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt.checkpoint import TrainedModel, load_trained
from nanogpt.data import Ids, document_ids_of, open_dataset
from nanogpt.device import Device, choose_device
from nanogpt.errors import ConfigError, DataError
from nanogpt.metrics import with_progress
from nanogpt.model import GPT
from nanogpt.settings import EvalConfig
from nanogpt.tasks import TASKS, Scorer, examples_of

log = logging.getLogger(__name__)

LONGEST = 2048  # windows of models that come from elsewhere, unless asked for longer: their contexts may be huge


@torch.no_grad()
def whole_split_loss(
    model: GPT, tokens: Ids, block_size: int, batch_size: int, device: Device, end_of_text: int | None = None
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
    for first in with_progress(range(0, n_windows, batch_size)):
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


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """The program behind `nanogpt eval`; prints a table, then one line of JSON, which it returns."""
    device = choose_device(config)
    data_dir = config.data_dir or "data"
    files = {
        name: examples_of(name, getattr(config, name), data_dir, config.limit) for name in TASKS if name in config.tasks
    }
    trained = load_trained(config, device)
    log.info(trained.name)
    result: dict[str, Any] = {"model": trained.name}
    for task in config.tasks or ["loss"]:
        if task == "loss":
            found = split_measures(config, trained, device)
            result |= found
            of = f"{found['tokens']:,} targets of {found['dataset']}/{found['split']}, {found['block_size']} at a time"
            names = {"loss": "nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
        else:
            scorer = Scorer(trained.model, trained.tokenizer, device, config.batch_size)
            result[task] = found = TASKS[task](scorer, files[task])
            of = f"{len(files[task]):,} examples"
            names = {name: name.replace("_", ", ") for name in found if name != "examples"}
        for name, shown in names.items():
            if found[name] is not None:
                variance = found[name] * (1 - found[name]) / found["examples"] if "accuracy" in name else 0
                error = f"± {math.sqrt(variance):.4f}" if variance else ""
                print(f"{task:10} {shown:21} {found[name]:>12.4f} {error:9} {of}", flush=True)
    print(json.dumps(result))
    return result


def split_measures(config: EvalConfig, trained: TrainedModel, device: Device) -> dict[str, Any]:
    """Loss, perplexity and bits per byte over a whole split of a data set."""
    model, name = trained.model, config.dataset or str(trained.config.get("dataset", ""))
    if not name:
        raise ConfigError(f"on which data set? {trained.name} does not say; for example --dataset=shakespeare")
    if "," in name:
        raise ConfigError(f"the data set {name} is a mixture: name one of its parts with --dataset=NAME")
    folder = Path(config.data_dir or trained.config.get("data_dir", "data")) / name
    dataset = open_dataset(folder)
    dataset.check_tokenizer(trained.tokenizer, trained.name)
    tokens = dataset.split(config.split)
    dataset.check_length(1)
    own = model.config.block_size if trained.config else min(model.config.block_size, LONGEST)
    block_size = min(config.block_size or own, len(tokens) - 1)
    if block_size > model.config.block_size:
        model.crop_block_size(block_size)  # rotary positions reach further, learned ones do not
    end_of_text = dataset.tokenizer.end_of_text if trained.config.get("mask_documents") else None
    loss, n_tokens = whole_split_loss(model, tokens, block_size, config.batch_size, device, end_of_text)
    size = dataset.description.get("bytes", {}).get(config.split, 0)
    result = {"dataset": name, "split": config.split, "block_size": block_size, "tokens": n_tokens, "loss": loss}
    bits_per_byte = loss * n_tokens / math.log(2) / size if size else None
    return {**result, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte}
