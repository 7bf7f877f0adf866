"""Models as GGUF, the file of llama.cpp: opened, dequantized, and written.

The library `gguf` reads and writes the container, knows the names and quantizes; the tensors are Hugging Face's under
other names. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import __version__
from nanogpt.config import GPTConfig
from nanogpt.errors import CheckpointError, ConfigError, DataError
from nanogpt.huggingface import Part, build_model, model_type, tensors_of
from nanogpt.model import GPT, rotary_frequencies
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, from_definition, keep_generation_config

log = logging.getLogger(__name__)

MARK = "nanogpt.version"  # a key at the start of the files that we write, so that `--force` replaces no others
KEYS = {  # below the name of the architecture, and our fields
    "context_length": "block_size", "embedding_length": "n_embd", "block_count": "n_layer",
    "feed_forward_length": "n_hidden", "attention.head_count": "n_head", "attention.head_count_kv": "n_kv_head",
}  # fmt: skip
GPT2_KEYS = {**KEYS, "attention.layer_norm_epsilon": "norm_eps"}
LLAMA_KEYS = {
    **KEYS, "attention.layer_norm_rms_epsilon": "norm_eps", "rope.freq_base": "rope_theta",
    "rope.dimension_count": "head_size", "attention.value_length": "head_size", "attention.key_length": "head_size",
}  # fmt: skip
BOS, PAD = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id"
ENDS = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
SUFFIXES = (".weight", ".bias")  # which the library's table of names leaves out
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}

# How byte-level tokenizers cut text, by llama.cpp's names: normalizer, steps, whether whole words go before merges.
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_WORDS = {**_BYTES, "use_regex": True}
# How Llama 3 and Qwen 2 split text: they differ in how many digits stay together.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = _LETTERS + r"|\p{N}{1,3}" + _MARKS
_QWEN2_PATTERN = _LETTERS + r"|\p{N}" + _MARKS
_LLAMA3 = [{**_SPLIT, "pattern": {"Regex": _LLAMA3_PATTERN}}, _BYTES]
_QWEN2 = [{**_SPLIT, "pattern": {"Regex": _QWEN2_PATTERN}}, _BYTES]
CUTS: dict[str, tuple[dict[str, str] | None, list[dict[str, Any]], bool]] = {
    "gpt-2": (None, [_WORDS], False),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (None, _LLAMA3, True)),
    "qwen2": ({"type": "NFC"}, _QWEN2, False),
    "deepseek-r1-qwen": (None, _QWEN2, False),
    **dict.fromkeys(("smollm", "starcoder"), (None, [{"type": "Digits", "individual_digits": True}, _WORDS], False)),
}


def load_gguf(path: str | Path, device: str = "cpu", *, dropout: float = 0.0) -> tuple[GPT, Tokenizer]:
    """Return the model in a GGUF file, dequantized to float32, and its tokenizer. Raises `CheckpointError`."""
    import gguf

    log.info(f"loading {path}")
    try:
        # llama.cpp splits large models into NAME-00001-of-00003.gguf, …; the first file has all keys.
        files = [Path(path)]
        if split := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", files[0].name):
            files = [files[0].with_name(f"{split[1]}-{n:05}-of-{split[2]}.gguf") for n in range(1, int(split[2]) + 1)]
        readers = [gguf.GGUFReader(file) for file in files]
        keys = {name: field.contents() for name, field in readers[0].fields.items()}
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        shape = replace(read_shape(keys, tensors), dropout=dropout)
        tensors.pop("rope_freqs.weight", None)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model_type(shape).upper()], min(shape.n_layer, len(tensors)))
        tokenizer = tokenizer_of_keys(keys)
        tokenizer.vocab_size = min(tokenizer.vocab_size, shape.vocab_size)  # it may know more than the model

        def read(part: Part) -> Tensor:
            stored = tensors.pop(names.get_name(part.theirs, SUFFIXES) or part.theirs)
            tensor = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
            return swap_channels(tensor, shape, part, (shape.head_size // 2, 2))

        return build_model(shape, tensors, read, device), tokenizer
    except Exception as error:  # the library raises many kinds
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} cannot be read: {what}") from error


def read_shape(keys: dict[str, Any], tensors: dict[str, Any]) -> GPTConfig:
    """Return the shape of the model in a GGUF file. Raises `KeyError` and `ValueError`."""
    kind = keys["general.architecture"]
    if kind not in ("gpt2", "llama", "qwen2", "qwen3"):
        raise ValueError(f"its architecture is {kind!r}; known: gpt2, llama, qwen2, qwen3")
    if (scaling := keys.get(f"{kind}.rope.scaling.type", "none")) != "none":
        raise ValueError(f"its positions are stretched in a way that is not known here: {scaling}")
    names = {f"{kind}.{key}": field for key, field in (GPT2_KEYS if kind == "gpt2" else LLAMA_KEYS).items()}
    values = {field: keys[name] for name, field in names.items() if name in keys}
    values["norm_eps"] = float(f"{values['norm_eps']:.6g}")  # the shortest decimal fraction; the file has float32
    shape = GPTConfig(
        architecture="llama" if kind == "qwen2" else kind,
        activation="gelu_tanh" if kind == "gpt2" else "gelu",
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        bias="blk.0.attn_qkv.bias" in tensors or "blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tied_head="output.weight" not in tensors,
        **values,
    )
    if "rope_freqs.weight" in tensors:
        # The factor by which each frequency is divided, in place of Llama 3's four parameters of RoPE scaling. Meta's
        # models and finetunes have low_freq_factor 1, high_freq_factor 4 and context 8,192; our files give the context.
        slowed = torch.tensor(tensors["rope_freqs.weight"].data)
        context = keys.get(f"{kind}.rope.scaling.original_context_length", 8192)
        scaled = replace(shape, rope_scaling=[round(slowed.max().item(), 3), 1.0, 4.0, context])
        if not torch.allclose(rotary_frequencies(shape) / rotary_frequencies(scaled), slowed, rtol=1e-3):
            raise ValueError("its positions are stretched in another way than Llama 3's (rope_freqs.weight)")
        return scaled
    return shape


def swap_channels(tensor: Tensor, shape: GPTConfig, part: Part, order: tuple[int, int]) -> Tensor:
    """Return queries or keys of Llama with rows in another order: in each head, (D / 2, 2) becomes (2, D / 2), or back.

    llama.cpp's Llama rotates channels 2 n and 2 n + 1 against each other, Hugging Face's and ours n and n + D / 2.
    """
    if model_type(shape) != "llama" or not (".q_proj." in part.theirs or ".k_proj." in part.theirs):
        return tensor
    return tensor.view(-1, *order, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def tokenizer_of_keys(keys: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a GGUF file, with its end tokens and its chat template. Raises `ValueError`."""
    texts = keys["tokenizer.ggml.tokens"]
    ends = [keys[name] for name in ENDS if keys.get(name, len(texts)) < len(texts)]  # llama.cpp ignores others, too
    if keys["tokenizer.ggml.model"] != "rwkv":
        tokenizer = from_definition(read_definition(keys), texts[ends[0]] if ends else "")
    elif not texts[-1].startswith(r"\x"):  # its end of a document; all else is escaped bytes
        tokenizer = ByteTokenizer()
    else:
        tokenizer = CharTokenizer([bytes.fromhex(text.replace("\\x", "")).decode() for text in texts])
    config = {"bos_token_id": keys.get(BOS), "pad_token_id": keys.get(PAD), "eos_token_id": ends}
    keep_generation_config(tokenizer, config, keys.get("tokenizer.chat_template"))
    # Where nothing is said, llama.cpp adds a start token for SentencePiece's vocabularies and Llama 3's.
    is_llama3 = CUTS.get(keys.get("tokenizer.ggml.pre", "")) == CUTS["llama-bpe"]
    default = keys["tokenizer.ggml.model"] == "llama" or is_llama3
    tokenizer.adds_bos = bool(keys.get("tokenizer.ggml.add_bos_token", default))
    return tokenizer


def read_definition(keys: dict[str, Any]) -> str:
    """Return the tokenizer.json of a GGUF file with byte-level BPE or SentencePiece's. Raises `ValueError`."""
    from gguf import TokenType

    kind, texts = keys["tokenizer.ggml.model"], keys["tokenizer.ggml.tokens"]
    types = keys.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(texts)
    vocabulary = {text: i for i, text in enumerate(texts) if types[i] != TokenType.UNUSED}
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": text, "special": types[i] == TokenType.CONTROL, **plain}
        for text, i in vocabulary.items()
        if types[i] in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    definition: dict[str, Any] = {"model": model, "added_tokens": added}
    if kind == "gpt2":
        # Old files do not say how: GPT-2's cut in one way, others in several.
        name = keys.get("tokenizer.ggml.pre", "gpt-2" if keys["general.architecture"] == "gpt2" else "default")
        if name not in CUTS:
            raise ValueError(f"it cuts text in a way that is not known here: {name}; known: {', '.join(CUTS)}")
        definition["normalizer"], steps, model["ignore_merges"] = CUTS[name]
        definition |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "decoder": _BYTES}
        model["merges"] = [merge.split(" ") for merge in keys.get("tokenizer.ggml.merges", [])]
    elif kind == "llama":
        # SentencePiece joins what makes the token of the highest score.
        normal = [i for i in vocabulary.values() if types[i] == TokenType.NORMAL]
        for text in (texts[i] for i in sorted(normal, key=lambda i: -keys["tokenizer.ggml.scores"][i])):
            cuts = ((text[:n], text[n:]) for n in range(1, len(text)))
            pairs = [(vocabulary[a], vocabulary[b]) for a, b in cuts if a in vocabulary and b in vocabulary]
            model["merges"] += [(texts[a], texts[b]) for a, b in sorted(pairs)]
        unknown = texts[keys.get("tokenizer.ggml.unknown_token_id", 0)]
        model |= {"byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
        has_prefix = keys.get("tokenizer.ggml.add_space_prefix", True)
        before = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        after = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                 {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
        definition["normalizer"] = {"type": "Sequence", "normalizers": before if has_prefix else before[1:]}
        definition["decoder"] = {"type": "Sequence", "decoders": after if has_prefix else after[:-1]}
    else:
        raise ValueError(f"its tokenizer is of the kind {kind!r}; known: gpt2 (byte-level BPE), llama (SentencePiece)")
    return json.dumps(definition)


def save_gguf(path: Path, name: str, model: GPT, tokenizer: Tokenizer, dtype: str) -> None:
    """Write `model` to a GGUF file. dtype: float32, float16, bfloat16 or q8_0, of the matrices; all else is float32.

    Raises `ConfigError` and `DataError` for what llama.cpp can't run.
    """
    import gguf

    shape, kind = model.config, model_type(model.config)
    if kind == "qwen3" and shape.bias:
        raise ConfigError("llama.cpp's Qwen3 has no biases, and this model has; --to=hf carries them")
    writer = gguf.GGUFWriter(path, kind)
    writer.add_string(MARK, __version__)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if TYPES[dtype] == "F32" else "MOSTLY_") + TYPES[dtype]])
    for key, field in (GPT2_KEYS if kind == "gpt2" else LLAMA_KEYS).items():
        add = writer.add_float32 if field in ("norm_eps", "rope_theta") else writer.add_uint32
        add(f"{kind}.{key}", getattr(shape, field))
    if shape.rope_scaling:
        slowed = rotary_frequencies(replace(shape, rope_scaling=[])) / rotary_frequencies(shape)
        writer.add_tensor("rope_freqs.weight", slowed.numpy())
        writer.add_rope_scaling_orig_ctx_len(int(shape.rope_scaling[3]))
    add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], shape.n_layer)
    for part, tensor in tensors_of(model, tokenizer.vocab_size):
        array = swap_channels(tensor, shape, part, (2, shape.head_size // 2)).float().numpy()
        kept = "F32" if array.ndim == 1 or "wpe" in part.theirs else TYPES[dtype]
        # Q8_0 has blocks of 32 values of a row.
        stored = gguf.GGMLQuantizationType["F16" if kept == "Q8_0" and array.shape[-1] % 32 else kept]
        theirs = names.get_name(part.theirs, SUFFIXES) or part.theirs
        writer.add_tensor(theirs, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """Write a tokenizer, with its end tokens and chat template. Raises `DataError` for one that llama.cpp has not."""
    from gguf import TokenType

    if tokenizer.kind in ("char", "byte"):
        # llama.cpp has no model for these but RWKV's, which matches the longest entry; entries are bytes, escaped.
        escaped = ["".join(rf"\x{byte:02x}" for byte in entry) for entry in tokenizer.token_bytes]
        entries = {i: (text, TokenType.NORMAL) for i, text in enumerate(escaped)}
        if tokenizer.end_of_text is not None:
            entries[tokenizer.end_of_text] = (tokenizer.decode([tokenizer.end_of_text]), TokenType.CONTROL)
        writer.add_tokenizer_model("rwkv")
    else:
        definition = json.loads(tokenizer.definition)
        model, cut = definition["model"], definition["pre_tokenizer"] or {}
        steps = cut.get("pretokenizers", [cut])
        steps = [{**step, "trim_offsets": True} if "trim_offsets" in step else step for step in steps]
        how = (definition["normalizer"], steps, bool(model.get("ignore_merges")))
        names = [name for name, known in CUTS.items() if known == how and model["type"] == "BPE"]
        if not names:
            raise DataError(f"llama.cpp can't cut text as the {tokenizer} does; --to=hf carries it")
        entries = {i: (text, TokenType.NORMAL) for text, i in model["vocab"].items()}
        for token in definition["added_tokens"]:
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            entries[token["id"]] = (token["content"], kind)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(names[0])
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    listed = [entries.get(i, (f"[unused {i}]", TokenType.UNUSED)) for i in range(tokenizer.vocab_size)]
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_add_bos_token(tokenizer.adds_bos)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    config = tokenizer.full_generation_config
    ends = config["eos_token_id"]
    ids = [config["bos_token_id"], config["pad_token_id"], *(ends if isinstance(ends, list) else [ends])]
    for key, i in zip([BOS, PAD, *ENDS], ids, strict=False):
        if i is not None:
            writer.add_uint32(key, i)
