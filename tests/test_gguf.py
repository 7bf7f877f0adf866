"""GGUF files, read back by the library, and run by llama.cpp where it is at hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt.config import GPTConfig
from nanogpt.errors import ConfigError, DataError
from nanogpt.gguf import _CUTS, _cut_of, save_gguf
from nanogpt.model import GPT
from nanogpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, train_bpe

gguf = pytest.importorskip("gguf")
TEXT = "the quick brown fox jumps over the lazy dog\n" * 50
CHAR, BPE = CharTokenizer(sorted(set(TEXT + "é\\"))), train_bpe([TEXT], 300)
SCALED = [8.0, 1.0, 4.0, 16.0]


def make(architecture: str, tokenizer: Tokenizer, **changes: Any) -> GPT:
    """A random model; two groups of keys and values, and stretched positions in Llama."""
    if architecture != "gpt2":
        changes = {"n_kv_head": 2, "head_size": 16, "bias": False, **changes}
    if architecture == "llama":
        changes = {"rope_scaling": SCALED, **changes}
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            block_size=64,
            vocab_size=tokenizer.padded_vocab_size,
            n_layer=2,
            n_head=4,
            n_embd=32,
            architecture=architecture,
            **changes,
        )
    ).eval()  # type: ignore[arg-type]


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
    assert reader.fields["qwen3.attention.head_count_kv"].contents() == 2
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == BPE.vocab_size
    assert "output.weight" not in tensors  # tied


def test_rows_that_q8_0_cannot_cut_become_float16(tmp_path: Path) -> None:
    save_gguf(
        tmp_path / "m.gguf",
        "m",
        GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=24)),
        CHAR,
        "q8_0",
    )
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")
    assert kinds["position_embd.weight"] == "F32"


def test_characters_are_escaped_bytes(tmp_path: Path) -> None:
    save_gguf(tmp_path / "m.gguf", "m", make("gpt2", CHAR), CHAR, "float32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[CHAR.encode("é")[0]] == r"\xc3\xa9"
    assert tokens[CHAR.encode("\\")[0]] == r"\x5c"


def test_how_llama_3_and_qwen_cut_text_has_a_name() -> None:
    for expression, name in _CUTS.items():
        split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        cut = {"type": "Sequence", "pretokenizers": [split, level]}
        definition = {"model": {"type": "BPE", "ignore_merges": name == "llama-bpe"}, "pre_tokenizer": cut}
        assert _cut_of(definition) == name
        assert _cut_of({**definition, "normalizer": {"type": "Lowercase"}}) is None
        split["pattern"]["Regex"] += "|x"  # type: ignore[index]
        assert _cut_of(definition) is None


def test_what_llama_cpp_cannot_run_is_refused(tmp_path: Path) -> None:
    definition = json.loads(BPE.definition)
    definition["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True}
    with pytest.raises(DataError, match=r"llama\.cpp can't cut text as the BPE"):
        save_gguf(tmp_path / "m.gguf", "m", make("gpt2", BPE), BPETokenizer(json.dumps(definition), 0), "float32")
    with pytest.raises(ConfigError, match="Qwen3 has no biases"):
        save_gguf(tmp_path / "m.gguf", "m", make("qwen3", BPE, bias=True), BPE, "float32")


# ---------------------------------------------------------------------------------------------------
# llama.cpp itself


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
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
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
    prompt = tokenizer.encode(TEXT[40:50]).tolist()
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
