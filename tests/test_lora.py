"""Low-rank adapters: what they add, what stays frozen, what merging gives."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt.chats import BEGINS, conversation_ids, with_template
from nanogpt.checkpoint import load_checkpoint, load_model
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.errors import CheckpointError
from nanogpt.files import read_json, write_json
from nanogpt.lora import Adapter, add_adapters, merge_adapters
from nanogpt.model import GPT
from nanogpt.tokenizer import ByteTokenizer
from nanogpt.train import train
from tests.conftest import random_ids, save_model, write_dataset

TINY: dict[str, Any] = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}


def adapted(targets: str = "all", **shape: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, **shape)).eval()
    add_adapters(model, Adapter(3, 6.0, targets, "", ""))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):  # which starts as zero
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("shape", [{}, {"architecture": "qwen3", "n_kv_head": 2, "bias": False}])
def test_merged_and_unmerged_are_equal(shape: dict[str, Any]) -> None:
    model, ids = adapted(**shape), random_ids(2, 16)
    before = model(ids, ids)[0]
    names = set(GPT(GPTConfig(**TINY, **shape)).state_dict())
    merged = merge_adapters(model)
    torch.testing.assert_close(merged(ids, ids)[0], before, atol=1e-5, rtol=0)
    assert set(merged.state_dict()) == names


@pytest.mark.parametrize(("targets", "count"), [("all", 8), ("attention", 4), ("mlp", 4)])
def test_only_adapters_are_trained(targets: str, count: int) -> None:
    model, ids = adapted(targets), random_ids(2, 16)
    model(ids, ids)[1].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * count


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A data set of conversations in bytes, `chats`, that any model of bytes can be finetuned on."""
    tokenizer = with_template(ByteTokenizer())
    ids, marks = list[int](), list[int]()
    for n in range(40):
        question = {"role": "user", "content": f"What is {n % 7}?"}
        found, counted = conversation_ids(tokenizer, [question, {"role": "assistant", "content": "seven" * (n % 3)}])
        ids += found
        marks += [BEGINS | counted[0], *map(int, counted[1:])]
    write_dataset(tmp_path / "data" / "chats", tokenizer, np.array(ids), np.array(ids))
    for split in ("train", "val"):
        np.array(marks, np.uint8).tofile(tmp_path / "data" / "chats" / f"{split}.marks")
    about = read_json(tmp_path / "data" / "chats" / "dataset.json")
    write_json(tmp_path / "data" / "chats" / "dataset.json", about | {"chat": True})
    return tmp_path / "data"


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A folder with a tiny model of bytes, in Hugging Face's format."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**TINY, "vocab_size": 257, "block_size": 128}, architecture="llama", bias=False))
    save_model(tmp_path / "base", model, ByteTokenizer())
    return str(tmp_path / "base")


def test_a_run_of_adapters_resumes_bit_for_bit(
    chats: Path, base: str, recipe: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    settings = {"dataset": "chats", "data_dir": str(chats), "block_size": 128, "lora_rank": 2, "init_from": base,
                "always_save_checkpoint": True, "max_iters": 6, "eval_interval": 3}  # fmt: skip
    assert train(recipe(**settings, out_dir=str(tmp_path / "whole"))) == 0
    assert train(recipe(**{**settings, "max_iters": 3}, out_dir=str(tmp_path / "parts"))) == 0
    assert train(recipe(**{**settings, "init_from": "resume"}, out_dir=str(tmp_path / "parts"))) == 0
    whole, parts = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole.weights[name], parts.weights[name]) for name in whole.weights)
    # Only what was trained is there: adapters, and the embedding that has got the two tokens of ChatML.
    assert {name for name in whole.weights if ".lora_" not in name} == {"transformer.wte.weight", "lm_head.weight"}
    trained, before = whole.build_model(), load_model(base).model
    assert trained.config.vocab_size == 320
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(trained.get_parameter(name), before.get_parameter(name))
    assert torch.equal(whole.build_model(merge=False).get_parameter(name), before.get_parameter(name))


def test_adapters_keep_their_settings_and_their_bases_folder(
    chats: Path, base: str, recipe: Callable[..., TrainConfig]
) -> None:
    config = recipe(dataset="chats", data_dir=str(chats), block_size=128, lora_rank=2, init_from=base, max_iters=1)
    assert train(config) == 0
    assert train(replace(config, init_from="resume", lora_rank=5, max_iters=2)) == 0
    assert load_checkpoint(Path(config.out_dir, "ckpt.pt")).config["lora_rank"] == 2
    inside = replace(config, init_from=str(Path(config.out_dir, "best.pt")))
    assert "is where the adapters' model lies" in "".join(inside.problems())


def test_a_base_that_has_changed_is_named(chats: Path, base: str, recipe: Callable[..., TrainConfig]) -> None:
    config = recipe(dataset="chats", data_dir=str(chats), block_size=128, lora_rank=2, init_from=base, max_iters=1)
    assert train(config) == 0
    source = load_model(base)
    model, tokenizer = source.model, source.tokenizer
    torch.nn.init.zeros_(model.transformer.wte.weight)
    save_model(Path(base), model, tokenizer)
    with pytest.raises(CheckpointError, match="have changed since"):
        load_checkpoint(Path(config.out_dir, "ckpt.pt")).build_model()
