"""Models as GGUF, the file of llama.cpp.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the library `gguf` writes the container, knows the
names and quantizes.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nanogpt import __version__
from nanogpt.config import GPTConfig
from nanogpt.errors import ConfigError, DataError
from nanogpt.huggingface import tensors_of
from nanogpt.model import GPT, rotary_frequencies
from nanogpt.tokenizer import END_OF_TEXT, Tokenizer

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how a byte-level tokenizer cuts text: its regular expression, llama.cpp's name for it
_CUTS = {_LETTERS + r"|\p{N}{1,3}" + _MARKS: "llama-bpe", _LETTERS + r"|\p{N}" + _MARKS: "qwen2"}
MARK = "nanogpt.version"  # a key at the start of our files, by which an export is known


def save_gguf(path: Path, name: str, model: GPT, tokenizer: Tokenizer, dtype: str) -> None:
    """Write `model` to a GGUF file. dtype: float32, float16, bfloat16 or q8_0, of the matrices; all else is float32.

    Matrices whose rows are no multiple of 32 become float16 in place of q8_0. Raises `ConfigError` and `DataError` for
    what llama.cpp can't run.
    """
    import gguf

    shape = model.config
    if shape.architecture == "qwen3" and shape.bias:
        raise ConfigError("llama.cpp's Qwen3 has no biases, and this model has; --to=hf carries them")
    writer = gguf.GGUFWriter(path, shape.architecture)
    wanted = gguf.GGMLQuantizationType[{"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]]
    writer.add_string(MARK, __version__)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if dtype == "float32" else "MOSTLY_") + wanted.name])
    _add_shape(writer, shape)
    _add_tokenizer(writer, tokenizer)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == shape.architecture)
    names = gguf.get_tensor_name_map(architecture, shape.n_layer)
    for part, tensor in tensors_of(model, tokenizer.vocab_size):
        if shape.architecture == "llama" and (".q_proj." in part.theirs or ".k_proj." in part.theirs):
            tensor = _in_pairs(tensor, shape.head_size)
        array = tensor.float().numpy()
        kind = wanted if array.ndim == 2 and "wpe" not in part.theirs else gguf.GGMLQuantizationType.F32
        if dtype == "q8_0" and array.shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16 if kind == wanted else kind
        theirs = names.get_name(part.theirs, try_suffixes=(".weight", ".bias"))
        assert theirs, part.theirs
        writer.add_tensor(theirs, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, shape: GPTConfig) -> None:
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_hidden)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_kv_head)
    if shape.is_gpt2:
        writer.add_layer_norm_eps(shape.norm_eps)
        return
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_theta)
    if shape.rope_scaling:
        stretched = rotary_frequencies(replace(shape, rope_scaling=[])) / rotary_frequencies(shape)
        writer.add_tensor("rope_freqs.weight", stretched.numpy())


def _in_pairs(tensor: Tensor, head_size: int) -> Tensor:
    """Rows of queries or keys for llama.cpp's Llama, which turns channels 2 n and 2 n + 1, not n and n + D / 2."""
    return tensor.view(-1, 2, head_size // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    import gguf

    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    if tokenizer.kind in ("char", "byte"):
        # llama.cpp has no model for these but RWKV's, which matches the longest entry; entries are bytes, escaped
        ids = range(tokenizer.vocab_size)
        escaped = ["".join(rf"\x{byte:02x}" for byte in tokenizer.decode_bytes([i])) for i in ids]
        kinds = [control if i == tokenizer.end_of_text else normal for i in ids]
        texts = [END_OF_TEXT if i == tokenizer.end_of_text else text for i, text in zip(ids, escaped, strict=True)]
        writer.add_tokenizer_model("rwkv")
    else:
        definition = json.loads(tokenizer.definition)
        cut = _cut_of(definition)
        if cut is None:
            raise DataError(
                f"llama.cpp can't cut text as the {tokenizer} does: it knows GPT-2's, Llama 3's and Qwen's byte-level "
                "BPE, characters and bytes; --to=hf carries every tokenizer"
            )
        entries = {i: (token, normal) for token, i in definition["model"]["vocab"].items()}
        for token in definition.get("added_tokens", []):
            kind = control if token["special"] else gguf.TokenType.USER_DEFINED
            entries[token["id"]] = (token["content"], kind)
        unused = gguf.TokenType.UNUSED
        listed = [entries.get(i, (f"[unused {i}]", unused)) for i in range(tokenizer.vocab_size)]
        texts, kinds = [text for text, _ in listed], [kind for _, kind in listed]
        merges = definition["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut)
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(False)
    if tokenizer.end_of_text is not None:
        writer.add_bos_token_id(tokenizer.end_of_text)
        writer.add_eos_token_id(tokenizer.end_of_text)


def _cut_of(definition: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way in which a tokenizer cuts text into pieces; None if it has none."""
    model, cut = definition["model"], definition.get("pre_tokenizer") or {}
    parts = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    levels = [part for part in parts if part.get("type") == "ByteLevel" and not part.get("add_prefix_space")]
    expressions = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    if model.get("type") != "BPE" or len(levels) != 1 or len(levels) + len(expressions) != len(parts):
        return None
    normalizer, cuts_itself = (definition.get("normalizer") or {}).get("type"), levels[0].get("use_regex", True)
    if not expressions:
        return "gpt-2" if cuts_itself and not normalizer and not model.get("ignore_merges") else None
    name = _CUTS.get(expressions[0]) if len(expressions) == 1 else None
    usual = {"llama-bpe": (None, True), "qwen2": ("NFC", False)}.get(name or "")
    found = (normalizer, bool(model.get("ignore_merges")))
    is_usual = usual is not None and (found == usual or found == (None, usual[1]))
    return name if is_usual and not cuts_itself and parts[0].get("behavior") == "Isolated" else None
