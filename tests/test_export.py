"""Exported models, as transformers, the original and we ourselves read them back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanogpt import export as module
from nanogpt import train
from nanogpt.checkpoint import load_checkpoint
from nanogpt.config import GPTConfig
from nanogpt.errors import ConfigError, UserError
from nanogpt.export import export
from nanogpt.gguf import save_gguf
from nanogpt.huggingface import load_pretrained, tensors_of
from nanogpt.model import GPT
from nanogpt.settings import ExportConfig
from tests.conftest import Recipe, full_disk, random_ids, write_dataset
from tests.test_huggingface import TOKENIZER, write_gpt2, write_model

FOX = TOKENIZER.encode("the quick brown fox jumps over the lazy dog " * 60)
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 with biases": {"bias": True},
    "llama": {"architecture": "llama", "n_kv_head": 1, "tied_head": False},
    "qwen3": {"architecture": "qwen3", "n_kv_head": 1, "head_size": 8},
    "qwen3 by the fast recipe": {
        "architecture": "qwen3", "tied_head": False, "zero_init": True, "optimizer": "muon", "learning_rate": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_goes_on_as_we_do(shape: str, recipe: Recipe, tmp_path: Path) -> None:
    import transformers

    config = recipe(**SHAPES[shape], max_iters=30, lr_decay_iters=30, eval_interval=30)
    train.train(config)
    export(ExportConfig(out_dir=config.out_dir, output=str(tmp_path / "m")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert type(theirs).__name__.lower().startswith(shape.split()[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tokenizer("the quick", return_tensors="pt").input_ids
    loaded = load_checkpoint(Path(config.out_dir, "best.pt"))
    model = loaded.build_model()
    assert ids.tolist() == [loaded.tokenizer.encode("the quick").tolist()]
    torch.testing.assert_close(theirs(ids).logits, model(ids, ids)[0], atol=1e-5, rtol=1e-5)
    ours = model.generate(ids, 7, temperature=0)[0, ids.shape[1] :].tolist()
    assert theirs.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :].tolist() == ours
    assert tokenizer.decode(ours) == loaded.tokenizer.decode(ours)
    assert "| dataset | tiny |" in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_in_and_out_and_in_again_changes_no_bit(kind: str, tied: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"vocab_size": TOKENIZER.vocab_size, "tie_word_embeddings": tied}
    if kind == "gpt2":
        write_gpt2(tmp_path / "a", **changes)
        (tmp_path / "a" / "tokenizer.json").write_text(TOKENIZER.definition)
    else:
        write_model(tmp_path / "a", kind, **changes, **({} if kind == "qwen2" else {"attention_bias": True}))
    for source, target in ("ab", "bc"):
        export(ExportConfig(init_from=str(tmp_path / source), output=str(tmp_path / target)))
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    for others in tensors[1:]:
        assert set(others) == set(tensors[0])
        assert all(torch.equal(others[name], tensor) for name, tensor in tensors[0].items())
    (first, its_tokenizer), (last, the_same) = (load_pretrained(str(tmp_path / name)) for name in "ac")
    assert first.config == last.config
    assert its_tokenizer.describe() == the_same.describe()
    assert (tmp_path / "b" / "config.json").read_bytes() == (tmp_path / "c" / "config.json").read_bytes()


def test_an_exported_run_goes_on_training(trained: Path, recipe: Recipe, tmp_path: Path) -> None:
    export(ExportConfig(out_dir=str(trained), output="m", dtype="bfloat16"))
    assert json.loads(Path("m/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert Path("m/model.safetensors").stat().st_size < 80_000  # 27,000 parameters of two bytes
    modes = {path.stat().st_mode for path in Path("m").iterdir()}
    Path("file").touch()
    assert modes == {Path("file").stat().st_mode}  # whom the umask lets can read them
    # the data set's tokenizer and the model's are the same again
    assert train.train(recipe(init_from=str(tmp_path / "m"), out_dir="tuned")) == 0
    export(ExportConfig(out_dir="tuned", output="again"))
    assert str(tmp_path) not in Path("again/README.md").read_text()


def test_rows_that_only_pad_the_vocabulary_stay_behind(tmp_path: Path) -> None:
    shape = GPTConfig(block_size=16, vocab_size=TOKENIZER.padded_vocab_size, n_layer=1, n_head=2, n_embd=16)
    for architecture in ("gpt2", "llama"):
        model = GPT(replace(shape, architecture=architecture, tied_head=False, activation="gelu_tanh"))
        (tmp_path / architecture).mkdir()
        module.save_pretrained(tmp_path / architecture, model, TOKENIZER, torch.float32)
        again, _ = load_pretrained(str(tmp_path / architecture))
        assert again.config.vocab_size == TOKENIZER.vocab_size < TOKENIZER.padded_vocab_size
        assert again.config.activation == "gelu_tanh" or architecture == "llama"
        x = random_ids(1, 16, vocab_size=TOKENIZER.vocab_size)
        torch.testing.assert_close(again(x, x)[0], model(x, x)[0][..., : TOKENIZER.vocab_size])


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_only_an_earlier_export_is_ever_replaced(to: str, trained: Path) -> None:
    def run(output: str, **settings: Any) -> None:
        export(ExportConfig(**{"out_dir": str(trained), "output": output, "to": to, **settings}))

    run("m")
    with pytest.raises(ConfigError, match="is there already; --force replaces it"):
        run("m")
    run("m", force=True)
    Path("notes.txt").write_text("years of work")
    torch.save({"model": {}, "config": {"out_dir": "out"}}, "original.pt")
    Path("other.gguf").write_bytes(b"GGUF\3" + bytes(300))
    Path("thesis").mkdir()
    Path("thesis", "README.md").write_text("years of work")
    if to == "hf":
        Path("m", "thesis.tex").write_text("years of work")
    for precious in ("notes.txt", "out/ckpt.pt", "original.pt", "other.gguf", "thesis", *["m"] * (to == "hf")):
        before = list(map(str, Path(precious).rglob("*"))) or Path(precious).read_bytes()
        with pytest.raises(ConfigError, match="no earlier export"):
            run(precious, force=True)
        assert before == (list(map(str, Path(precious).rglob("*"))) or Path(precious).read_bytes())


def test_what_others_lack_is_refused(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"block_size": 8, "vocab_size": 20, "n_layer": 1, "n_head": 2, "n_embd": 8}
    model = GPT(GPTConfig(architecture="qwen3", mlp_bias=True, **shape))
    with pytest.raises(ConfigError, match="mlp_bias=True: others' qwen3 has no such thing"):
        list(tensors_of(model, 20))
    with pytest.raises(ConfigError, match="Qwen3 has no biases"):
        save_gguf(
            tmp_path / "m.gguf", "m", GPT(GPTConfig(architecture="qwen3", bias=True, **shape)), TOKENIZER, "float32"
        )


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_full_disk_is_one_message_and_leaves_what_was_there(to: Any, trained: Path, tmp_path: Path) -> None:
    for force in (False, True):  # at first nothing is there, then an earlier export
        settings = ExportConfig(out_dir=str(trained), to=to, output=str(tmp_path / "m"), force=force)
        if force:
            export(settings)
        before = {path: path.read_bytes() for path in tmp_path.glob("m*/*")}
        with full_disk(), pytest.raises(UserError, match=r"cannot write .*m"):
            export(settings)
        assert {path: path.read_bytes() for path in tmp_path.glob("m*/*")} == before
        assert {path.suffix for path in tmp_path.glob("m*")} <= {"", ".Modelfile"}


def test_a_chat_models_end_tokens_and_template_travel(recipe: Recipe, data_dir: Path, tmp_path: Path) -> None:
    """From one folder through a run into another."""
    import transformers

    write_model(tmp_path / "a", "llama", vocab_size=TOKENIZER.vocab_size)
    config = {"bos_token_id": 7, "eos_token_id": [9, 5], "temperature": 0.7}
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(config))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "a" / "chat_template.jinja").write_text(template)
    tokenizer = load_pretrained(str(tmp_path / "a"))[1]
    assert (tokenizer.end_tokens, tokenizer.chat_template) == ({TOKENIZER.end_of_text, 5, 9}, template)
    assert tokenizer.has_ids_of(TOKENIZER)
    write_dataset(data_dir / "fox", tokenizer, FOX[:500], FOX[500:])
    train.train(recipe(init_from=str(tmp_path / "a"), dataset="fox"))
    export(ExportConfig(out_dir=recipe().out_dir, output=str(tmp_path / "b")))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    chat = theirs.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == f"{TOKENIZER.decode([7])}the{TOKENIZER.decode([9])}"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "b")
    assert (generation.eos_token_id, generation.temperature, generation.bos_token_id) == ([9, 5], 0.7, 7)
    assert load_pretrained(str(tmp_path / "b"))[1].describe() == tokenizer.describe()
