"""GPT-2 folders written by transformers itself, read without it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanogpt import train
from nanogpt.checkpoint import load_checkpoint
from nanogpt.errors import CheckpointError, ConfigError, DataError
from nanogpt.evaluate import evaluate
from nanogpt.huggingface import load_pretrained
from nanogpt.model import GPT
from nanogpt.sample import sample
from nanogpt.settings import EvalConfig, SampleConfig
from nanogpt.tokenizer import GPT2Tokenizer
from tests.conftest import Recipe, write_dataset
from tests.test_shapes import write_model

SHAPE = {"vocab_size": 50257, "max_position_embeddings": 32, "hidden_size": 16, "num_attention_heads": 2}


def write_gpt2(folder: Path, **changes: Any) -> Any:
    """A random GPT-2 as transformers saves it, without a tokenizer; returns transformers' model."""
    model = write_model(folder, "gpt2", **{**SHAPE, **changes})
    (folder / "tokenizer.json").unlink()
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_gpt2(tmp_path / "gpt")
    return tmp_path / "gpt"


@pytest.mark.parametrize(
    "prefix", ["", "module.transformer.", "_orig_mod.transformer.", "module._orig_mod.transformer."]
)
def test_names_are_understood_with_more_or_less_in_front(prefix: str, folder: Path) -> None:
    """OpenAI's files on the hub have no `transformer.`, but attention masks; DDP and torch.compile add prefixes."""
    expected = load_pretrained(str(folder))[0].state_dict()
    tensors = load_file(folder / "model.safetensors")
    renamed = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    renamed[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(renamed, folder / "model.safetensors")
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": True, "vocab_size": 50257}
    weights = {prefix.removesuffix("transformer.") + name: tensor for name, tensor in expected.items()}
    progress = {"iter_num": 1, "best_val_loss": 1.0, "config": {"dataset": "openwebtext"}, "optimizer": None}
    torch.save({"model": weights, "model_args": arguments, **progress}, "ckpt.pt")
    for loaded in (load_pretrained(str(folder))[0], load_checkpoint(Path("ckpt.pt")).build_model()):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_gpt2_by_name_comes_from_the_mirror(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mirror" / "openai-community").mkdir(parents=True)
    folder.rename(tmp_path / "mirror" / "openai-community" / "gpt2")
    monkeypatch.setenv("NANOGPT_DOWNLOADS", str(tmp_path / "mirror"))
    model = GPT.from_pretrained("gpt2", {"dropout": 0.1})
    assert (model.config.activation, model.config.dropout, model.config.bias) == ("gelu_tanh", 0.1, True)
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(ConfigError, match="override_args: block_size can't be overridden; dropout can"):
        GPT.from_pretrained("gpt2", {"dropout": 0.2, "block_size": 8})


def test_without_a_network_it_says_what_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.delenv("NANOGPT_DOWNLOADS", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr("nanogpt.prepare.time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"openai-community/gpt2-xl could not be read.*--init_from=FOLDER"):
        load_pretrained("gpt2-xl")


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.rename(f.with_name("gone")), "no checkpoint of a run, and no config.json of a model"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "a pickle can run any code"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors is damaged"),
        (change_config(quantization_config={"quant_method": "fp8"}), "it has a quantization_config"),
        (lambda f: save_file({"wte.weight": torch.ones(9).char()}, f / "model.safetensors"), "quantized (torch.int8)"),
        (change_config(model_type="bert"), "model_type is 'bert'; known: gpt2, llama, mistral, qwen2, qwen3"),
        (change_config(vocab_size=50000), "transformers writes one with AutoTokenizer"),
        (change_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True, not False"),
        (change_config(n_layer=3), "'h.2.ln_1.weight' is missing"),
        (change_config(n_layer=1), "have no place in the model"),
    ],
)
def test_an_unusable_folder_is_one_message(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(str(folder))
    assert message in str(caught.value)


def test_finetuning_evaluating_and_sampling(
    recipe: Recipe, data_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode("First Citizen: Before we proceed any further, hear me speak.\n" * 50)
    write_dataset(data_dir / "bard", tokenizer, ids[:500], ids[500:])
    config = recipe(init_from=str(folder), dataset="bard", decay_lr=False, max_iters=20, learning_rate=1e-2)
    of_folder = EvalConfig(init_from=str(folder), data_dir=config.data_dir, dataset="bard", dtype="float32")
    before = evaluate(of_folder)["loss"]
    assert train.train(config) == 0
    shape = load_checkpoint(Path(config.out_dir, "best.pt")).model_config
    assert (shape.block_size, shape.activation) == (16, "gelu_tanh")  # cropped to the recipe's 16
    after = evaluate(EvalConfig(out_dir=config.out_dir, data_dir=config.data_dir, dtype="float32"))["loss"]
    assert after < before - 1
    capsys.readouterr()
    sample(SampleConfig(init_from=str(folder), start="What is", num_samples=2, max_new_tokens=5, device="cpu"))
    assert capsys.readouterr().out.count("What is") == 2
    with pytest.raises(DataError, match=r"tiny holds ids of the char tokenizer \(28 .* uses the gpt2 tokenizer"):
        train.train(recipe(init_from=str(folder), dataset="tiny"))
    with pytest.raises(ConfigError, match="on which data set"):
        evaluate(EvalConfig(init_from=str(folder), device="cpu"))
