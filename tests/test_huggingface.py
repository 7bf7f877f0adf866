"""Models as transformers saves them, read, run and trained here."""

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
from nanogpt.errors import CheckpointError, ConfigError, DataError
from nanogpt.evaluate import evaluate
from nanogpt.export import export
from nanogpt.huggingface import DEFAULTS, FIELDS, load_pretrained, read_config
from nanogpt.model import GPT
from nanogpt.sample import sample
from nanogpt.settings import EvalConfig, ExportConfig, SampleConfig
from nanogpt.tokenizer import GPT2Tokenizer, read_tokenizer, train_bpe
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
        theirs = transformers.AutoConfig.for_model(kind, **json.loads(json.dumps(config))).to_dict()
        left_out = {"tie_word_embeddings", *(DEFAULTS if kind in ("gpt2", "llama") else ())}
        sizes_of_all = {name: theirs.get(name) for name in FIELDS[kind] if name not in left_out}
        assert read_config({**sizes_of_all, **config, "model_type": kind}) == read_config(theirs)


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

    write_model(Path("m"), "llama", vocab_size=TOKENIZER.vocab_size)
    engine = tokenizers.Tokenizer.from_str(TOKENIZER.definition)
    engine.add_special_tokens(["<pad>"])
    engine.save("m/tokenizer.json")
    _, tokenizer = load_pretrained("m")
    assert "its tokenizer has 290 entries, the model knows 289 of them" in caplog.text
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


def test_of_several_chat_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    import transformers

    write_model(tmp_path / "m", "llama")
    templates = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "{{ bos_token }}x"}]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": templates}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert load_pretrained(str(tmp_path / "m"))[1].chat_template == theirs.get_chat_template()


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


def test_rotary_positions_reach_further(recipe: Recipe, tmp_path: Path) -> None:
    train.train(recipe(architecture="llama", max_iters=1))
    longer = recipe(init_from=str(tmp_path / "out"), out_dir=str(tmp_path / "longer"), block_size=32, max_iters=1)
    train.train(longer)
    assert load_checkpoint(tmp_path / "longer" / "ckpt.pt").model_config.block_size == 32
    result = evaluate(EvalConfig(out_dir=longer.out_dir, data_dir=longer.data_dir, block_size=64, device="cpu"))
    assert result["block_size"] == 64


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


def test_finetuning_and_evaluating(recipe: Recipe, data_dir: Path, folder: Path) -> None:
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
    with pytest.raises(DataError, match=r"tiny holds ids of the char tokenizer \(28 .* uses the gpt2 tokenizer"):
        train.train(recipe(init_from=str(folder), dataset="tiny"))
    with pytest.raises(ConfigError, match="on which data set"):
        evaluate(EvalConfig(init_from=str(folder), device="cpu"))
