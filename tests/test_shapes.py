"""Llama and Qwen3 as transformers saves them, read, run and trained here."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from nanogpt import train
from nanogpt.checkpoint import load_checkpoint
from nanogpt.errors import CheckpointError, DataError
from nanogpt.evaluate import evaluate
from nanogpt.export import export
from nanogpt.huggingface import DEFAULTS, FIELDS, OURS, SCALING, load_pretrained, read_config
from nanogpt.sample import sample
from nanogpt.settings import EvalConfig, ExportConfig, SampleConfig
from nanogpt.tokenizer import read_tokenizer, train_bpe
from tests.conftest import Recipe, random_ids, write_dataset

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
TINY = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"num_key_value_heads": 1},
    {"num_key_value_heads": 4}, {"rope_parameters": LLAMA3}, {"rms_norm_eps": 1e-3}, {"head_dim": 8},
]  # fmt: skip
TOKENIZER = train_bpe(["the quick brown fox jumps over the lazy dog"] * 9, 300)


def write_model(folder: Path, kind: str, max_shard_size: str = "1GB", **changes: Any) -> Any:
    """A random model as transformers saves it, with a tokenizer; returns transformers' model."""
    import transformers

    changes = {"sliding_window": None, **changes} if kind == "mistral" else changes
    config = transformers.AutoConfig.for_model(kind, **{**TINY, **changes})
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text(TOKENIZER.definition)
    return theirs.eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *itertools.product(["llama", "qwen3"], VARIANTS),
        ("llama", {"mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("gpt2", {}),
        ("gpt2", {"activation_function": "gelu"}),
    ],
)
def test_logits_and_gradients_equal_transformers(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "m", kind, **changes)
    ours, _ = load_pretrained(str(tmp_path / "m"))
    assert ours.config.architecture == (kind if kind in ("gpt2", "qwen3") else "llama")
    x = random_ids(2, 100, vocab_size=300)
    y = torch.roll(x, -1, dims=1)
    logits, loss = ours(x, y)
    their_logits = theirs(x).logits
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(logits, their_logits, atol=1e-5 * their_logits.abs().max().item(), rtol=1e-5)
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    their_loss.backward()
    gradient = theirs.get_input_embeddings().weight.grad
    atol = 1e-4 * gradient.abs().max().item()
    torch.testing.assert_close(ours.transformer.wte.weight.grad, gradient, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_transformers_default(kind: str) -> None:
    import transformers

    rope = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    other = {"rope_parameters": {"rope_theta": 7.0}}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    rotary = [{}, sizes, {"rope_scaling": rope}, {"rope_scaling": rope, **other}, other, {"rope_theta": 3.0}]
    for config in [{}] if kind == "gpt2" else rotary:
        config = {**config, **({"sliding_window": None} if kind == "mistral" else {})}
        theirs = transformers.AutoConfig.for_model(kind, **json.loads(json.dumps(config)))
        left_out = {"tie_word_embeddings", *(DEFAULTS if kind in ("gpt2", "llama") else ())}
        sizes_of_all = {name: getattr(theirs, name, None) for name in FIELDS[kind] if name not in left_out}
        ours = read_config({**sizes_of_all, **config, "model_type": kind})
        for name, field in zip(FIELDS[kind], OURS, strict=False):
            if (value := getattr(theirs, name, None)) is not None:
                assert getattr(ours, field) == value, name
        if kind != "gpt2":
            expected = theirs.rope_parameters
            assert ours.rope_theta == expected["rope_theta"]
            assert ours.rope_scaling == [expected[name] for name in SCALING if name in expected]


@pytest.mark.parametrize(
    ("has_whole", "thirds", "has_index"),
    [(True, "model-{}", True), (False, "model-{}", True), (False, "model-{}", False), (False, "weights.{}", True)],
)
def test_of_a_folders_files_the_models_count(has_whole: bool, thirds: str, has_index: bool, tmp_path: Path) -> None:
    """The whole file, else of each file what the index names, else model*, else what is there; nothing beside it."""
    theirs = write_model(tmp_path / "m", "qwen3")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    wrong = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    files = dict.fromkeys(("adapter_model", "optimizer", "consolidated"), wrong)
    index: dict[str, str] = {}
    for n in range(3):
        part = {name: (wrong if has_whole else tensors)[name] for name in sorted(tensors)[n::3]}
        files[thirds.format(n)] = {**wrong, **part} if has_index else part
        index |= dict.fromkeys(part, f"{thirds.format(n)}.safetensors")
    if has_whole:
        files["model"] = tensors
    for name, content in files.items():
        save_file(content, tmp_path / "m" / f"{name}.safetensors")
    if has_index:
        (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    x = random_ids(1, 20, vocab_size=300)
    ours = load_pretrained(str(tmp_path / "m"))[0]
    torch.testing.assert_close(ours(x, x)[0], theirs(x).logits, atol=1e-4, rtol=1e-4)


def test_files_that_are_not_all_there_are_one_message() -> None:
    write_model(Path("m"), "llama", max_shard_size="20KB")
    shards = sorted(Path("m").glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=r"No such file or directory: .*model-00002"):
        load_pretrained("m")
    for path in ("m/model.safetensors.index.json", shards[0], *shards[2:]):
        os.remove(path)
    with pytest.raises(CheckpointError, match=r"no model's \*\.safetensors there"):
        load_pretrained("m")


def test_a_token_that_the_embedding_lacks_is_an_error_only_where_it_is_used(
    recipe: Recipe, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    theirs = write_model(Path("m"), "llama", vocab_size=TOKENIZER.vocab_size)
    engine = tokenizers.Tokenizer.from_str(TOKENIZER.definition)
    engine.add_special_tokens(["<pad>"])
    engine.save("m/tokenizer.json")
    model, tokenizer = load_pretrained("m")
    assert "its tokenizer has 290 entries, the model knows 289 of them" in caplog.text
    x = random_ids(1, 20, vocab_size=289)
    torch.testing.assert_close(model(x, x)[0], theirs(x).logits, atol=1e-4, rtol=1e-4)
    ids = tokenizer.encode("the quick brown fox " * 99)
    write_dataset(data_dir / "fox", read_tokenizer(Path("m")), ids, ids)
    train.train(recipe(init_from="m", dataset="fox"))
    with pytest.raises(DataError, match="the prompt has token 289, but the model knows 289"):
        sample(SampleConfig(out_dir="out", start="the <pad>", device="cpu"))
    export(ExportConfig(out_dir="out", output="again"))
    assert len(transformers.AutoTokenizer.from_pretrained("again")) == 290
    assert transformers.AutoModelForCausalLM.from_pretrained("again").config.vocab_size == 289
    ids[:] = 289
    write_dataset(data_dir / "pad", read_tokenizer(Path("m")), ids, ids)
    with pytest.raises(DataError, match="holds token 289, but the vocabulary ends at 288"):
        train.train(recipe(init_from="m", dataset="pad", out_dir="new"))


def test_a_tokenizer_config_may_have_tokens_and_templates_of_its_own(tmp_path: Path) -> None:
    import transformers

    write_model(tmp_path / "m", "llama")
    token = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    names = {str(289 + n): {"content": f"<|{name}|>", **token} for n, name in enumerate(["user", "assistant"])}
    templates = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "{{ bos_token }}x"}]
    config = {"added_tokens_decoder": names, "chat_template": templates}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_pretrained(str(tmp_path / "m"))[1], transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "the<|assistant|>quick<|user|>fox"
    assert ours.encode_prompt(text) == theirs(text).input_ids
    assert (ours.vocab_size, ours.chat_template) == (len(theirs), theirs.get_chat_template())


@pytest.mark.parametrize(
    ("change", "tied_head"),
    [(lambda tensors: tensors["lm_head.weight"].mul_(2), False), (lambda tensors: None, True),
     (lambda tensors: tensors.pop("model.embed_tokens.weight"), True)],
)  # fmt: skip
def test_a_head_beside_a_tied_embedding(change: Callable[[Any], Any], tied_head: bool, tmp_path: Path) -> None:
    import transformers

    write_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    change(tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ours = load_pretrained(str(tmp_path / "m"))[0]
    assert ours.config.tied_head == tied_head
    x = random_ids(1, 20, vocab_size=300)
    torch.testing.assert_close(ours(x, x)[0], theirs(x).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None}, "rope_type is 'yarn'"),
     ({"sliding_window": 16}, "sliding_window is 16"), ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
     ({"num_key_value_heads": 4}, "2 tensors do not fit the shape, as transformer.h.0.attn.c_attn.weight: expected")],
)  # fmt: skip
def test_what_cannot_be_rebuilt_is_one_message(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_model(tmp_path / "m", "mistral" if list(changes) == ["sliding_window"] else "qwen3")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(str(tmp_path / "m"))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["out", "out/ckpt.pt"])
def test_another_runs_folder_or_checkpoint_is_finetuned(name: str, recipe: Recipe, tmp_path: Path) -> None:
    train.train(recipe(max_iters=2))
    config = recipe(init_from=str(tmp_path / name), out_dir=str(tmp_path / "tuned"), learning_rate=0.0, min_lr=0.0)
    assert train.train(config) == 0
    before, after = (load_checkpoint(tmp_path / folder / "ckpt.pt") for folder in ("out", "tuned"))
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())
    sample(SampleConfig(init_from=str(tmp_path / name), num_samples=1, max_new_tokens=5, device="cpu"))


def test_rotary_positions_reach_further(recipe: Recipe, tmp_path: Path) -> None:
    train.train(recipe(architecture="llama", max_iters=1))
    longer = recipe(init_from=str(tmp_path / "out"), out_dir=str(tmp_path / "longer"), block_size=32, max_iters=1)
    train.train(longer)
    assert load_checkpoint(tmp_path / "longer" / "ckpt.pt").model_config.block_size == 32
    result = evaluate(EvalConfig(out_dir=longer.out_dir, data_dir=longer.data_dir, block_size=64, device="cpu"))
    assert result["block_size"] == 64
