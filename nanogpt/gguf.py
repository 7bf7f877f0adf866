"""Models as GGUF, the file of llama.cpp: opened, dequantized, and written.

The library `gguf` reads and writes the container, knows the names and quantizes; the tensors are Hugging Face's under
other names. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import __version__
from nanogpt.config import GPTConfig
from nanogpt.errors import CheckpointError, ConfigError, DataError
from nanogpt.huggingface import Part, Pretrained, model_type, put_together, tensors_of
from nanogpt.model import GPT, rotary_frequencies
from nanogpt.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    from_definition,
    keep_generation_config,
)

log = logging.getLogger(__name__)

MARK = "nanogpt.version"  # a key at the start of our files, by which an export is known
LLAMA = {  # keys of our fields, below the name of the architecture
    "block_size": "context_length", "n_embd": "embedding_length", "n_layer": "block_count",
    "n_hidden": "feed_forward_length", "n_head": "attention.head_count", "n_kv_head": "attention.head_count_kv",
    "head_size": "attention.key_length", "norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
}  # fmt: skip
GPT2 = {**dict(list(LLAMA.items())[:6]), "norm_eps": "attention.layer_norm_epsilon"}
ENDS = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
CONFIG = {  # keys of what is in a generation config
    "bos_token_id": "tokenizer.ggml.bos_token_id", "pad_token_id": "tokenizer.ggml.padding_token_id",
    "temperature": "general.sampling.temp", "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p", "min_p": "general.sampling.min_p",
}  # fmt: skip

# How byte-level tokenizers cut text, by llama.cpp's names: normalizer, steps, whether whole words go before merges.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_LLAMA3 = {**_SPLIT, "pattern": {"Regex": _LETTERS + r"|\p{N}{1,3}" + _MARKS}}
_QWEN2 = {**_SPLIT, "pattern": {"Regex": _LETTERS + r"|\p{N}" + _MARKS}}
_DIGITS = {"type": "Digits", "individual_digits": True}
CUTS: dict[str, tuple[str | None, list[dict[str, Any]], bool]] = {
    "gpt-2": (None, [{**_BYTES, "use_regex": True}], False),
    "llama-bpe": (None, [_LLAMA3, _BYTES], True),
    "qwen2": ("NFC", [_QWEN2, _BYTES], False),
    "smollm": (None, [_DIGITS, {**_BYTES, "use_regex": True}], False),
}
SAME_CUTS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "starcoder": "smollm"}


# ---------------------------------------------------------------------------------------------------
# In


def load_gguf(path: str | Path, device: str = "cpu", *, dropout: float = 0.0) -> Pretrained:
    """Return the model in a GGUF file, its weights dequantized to float32.

    Raises `CheckpointError` if the file is damaged, or of a model or a tokenizer that is not known here.
    """
    import gguf

    log.info(f"loading {path}")
    try:
        reader = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        shape = replace(read_shape(keys, tensors), dropout=dropout)
        if problems := list(shape.problems()):
            raise ValueError("; ".join(problems))
        tokenizer = read_tokenizer(keys)
        kind = model_type(shape)
        names = tensor_names(kind, min(shape.n_layer, len(tensors)))

        def read(part: Part) -> Tensor:
            name = names.get_name(part.theirs, (".weight", ".bias"))
            if name not in tensors:
                raise ValueError(f"the weights lack {name or part.theirs}")
            found = tensors.pop(name)
            tensor = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type))
            return swap_channels(tensor, shape.head_size // 2, 2) if is_paired(kind, part) else tensor

        model = GPT.from_weights(shape, put_together(shape, read, device))
        tensors.pop("rope_freqs.weight", None)
        if tensors:
            raise ValueError(f"{len(tensors)} tensors have no place in the model, {min(tensors)} for one")
    except Exception as error:  # the library raises many kinds
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} cannot be read: {what}") from error
    return Pretrained(model.eval(), tokenizer)


def tensor_names(kind: str, n_layer: int) -> Any:
    """Return the library's table from Hugging Face's names to GGUF's."""
    import gguf

    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == kind)
    return gguf.get_tensor_name_map(architecture, n_layer)


def read_shape(keys: dict[str, Any], tensors: dict[str, Any]) -> GPTConfig:
    """Return the shape of the model in a GGUF file. Raises `KeyError` and `ValueError`."""
    kind = keys["general.architecture"]
    if kind not in ("gpt2", "llama", "qwen2", "qwen3"):
        raise ValueError(f"its architecture is {kind!r}; known: gpt2, llama, qwen2, qwen3")
    if (scaling := keys.get(f"{kind}.rope.scaling.type", "none")) != "none":
        raise ValueError(f"its positions are stretched in a way that is not known here: {scaling}")
    optional = ("n_kv_head", "head_size", "rope_theta")
    names = {ours: f"{kind}.{theirs}" for ours, theirs in (GPT2 if kind == "gpt2" else LLAMA).items()}
    values = {ours: keys[name] for ours, name in names.items() if name in keys or ours not in optional}
    values["norm_eps"] = float(f"{values['norm_eps']:.6g}")  # of the shortest decimal fraction; stored in float32
    biases = {name for name in ("attn_qkv", "attn_q", "attn_output", "ffn_up") if f"blk.0.{name}.bias" in tensors}
    shape = GPTConfig(
        architecture="llama" if kind == "qwen2" else kind,
        activation="gelu_tanh" if kind == "gpt2" else "gelu",
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        bias=bool(biases & {"attn_qkv", "attn_q"}),
        out_bias="attn_output" in biases,
        mlp_bias="ffn_up" in biases,
        tied_head="output.weight" not in tensors,
        **values,
    )
    if "rope_freqs.weight" in tensors:
        shape.rope_scaling = read_scaling(torch.tensor(tensors["rope_freqs.weight"].data), shape)
    return shape


def read_scaling(slowed: Tensor, shape: GPTConfig) -> list[float]:
    """Return Llama 3's four numbers from what llama.cpp has in their place: how much each pair of channels is slowed.

    All of Meta's models have 1 and 4 in the middle. Raises `ValueError` if this is another kind of scaling.
    """
    factor, frequencies = slowed.max().item(), rotary_frequencies(shape)
    between = (slowed > 1.001) & (slowed < factor * 0.999)
    share = (1 / slowed - 1 / factor) / (1 - 1 / factor)
    contexts = (share * 3 + 1)[between] * 2 * math.pi / frequencies[between]
    context = round(contexts.median().item()) if len(contexts) else 8192
    scaling = [round(factor, 3), 1.0, 4.0, float(context)]
    if not torch.allclose(frequencies / rotary_frequencies(replace(shape, rope_scaling=scaling)), slowed, rtol=1e-3):
        raise ValueError("its positions are stretched in another way than Llama 3's (rope_freqs.weight)")
    return scaling


def is_paired(kind: str, part: Part) -> bool:
    """Return whether llama.cpp has the rows of this tensor in another order: queries and keys of its Llama."""
    return kind == "llama" and (".q_proj." in part.theirs or ".k_proj." in part.theirs)


def swap_channels(tensor: Tensor, first: int, second: int) -> Tensor:
    """Return the rows of queries or keys in another order: within each head, (first, second) becomes (second, first).

    llama.cpp's Llama rotates channels 2 n and 2 n + 1 against each other, Hugging Face's and ours n and n + D / 2.
    """
    return tensor.view(-1, first, second, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def read_tokenizer(keys: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a GGUF file, with its end tokens and its chat template. Raises `ValueError`."""
    texts, ends = keys["tokenizer.ggml.tokens"], [keys[name] for name in ENDS if name in keys]
    tokenizer: Tokenizer
    if keys["tokenizer.ggml.model"] != "rwkv":
        tokenizer = from_definition(json.dumps(read_definition(keys)), texts[ends[0]] if ends else "")
    elif texts[-1] == END_OF_TEXT:
        tokenizer = ByteTokenizer()
    else:
        tokenizer = CharTokenizer([bytes.fromhex(text.replace("\\x", "")).decode() for text in texts])
    config = {name: keys[key] for name, key in CONFIG.items() if key in keys}
    config = {name: round(value, 6) if isinstance(value, float) else value for name, value in config.items()}
    keep_generation_config(tokenizer, {**config, "eos_token_id": ends}, keys.get("tokenizer.chat_template"))
    return tokenizer


def read_definition(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of a GGUF file with byte-level BPE or SentencePiece's. Raises `ValueError`."""
    from gguf import TokenType

    kind, texts = keys["tokenizer.ggml.model"], keys["tokenizer.ggml.tokens"]
    types = keys.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(texts)
    added = [i for i, each in enumerate(types) if each in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocabulary = {text: i for i, text in enumerate(texts) if types[i] != TokenType.UNUSED}
    definition: dict[str, Any] = {
        "added_tokens": [
            {"id": i, "content": texts[i], "special": types[i] == TokenType.CONTROL, **plain} for i in added
        ],
        "model": {"type": "BPE", "vocab": vocabulary},
    }
    if kind == "gpt2":
        # Old files do not say how: GPT-2's cut in one way, others in several.
        name = keys.get("tokenizer.ggml.pre", "gpt-2" if keys["general.architecture"] == "gpt2" else "default")
        if (cut := CUTS.get(SAME_CUTS.get(name, name))) is None:
            raise ValueError(f"it cuts text in a way that is not known here: {name}; known: {', '.join(CUTS)}")
        normalizer, steps, ignores_merges = cut
        merges = [merge.split(" ") for merge in keys["tokenizer.ggml.merges"]]
        definition["model"] |= {"merges": merges, "ignore_merges": ignores_merges}
        definition["normalizer"] = {"type": normalizer} if normalizer else None
        definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        return definition | {"decoder": _BYTES}
    if kind != "llama":
        raise ValueError(f"its tokenizer is of the kind {kind!r}; known: gpt2 (byte-level BPE), llama (SentencePiece)")
    # SentencePiece joins what makes the token of the highest score.
    normal = [i for i, each in enumerate(types) if each == TokenType.NORMAL]
    merges = []
    for text in (texts[i] for i in sorted(normal, key=lambda i: -keys["tokenizer.ggml.scores"][i])):
        pairs = [(text[:n], text[n:]) for n in range(1, len(text)) if text[:n] in vocabulary and text[n:] in vocabulary]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = texts[keys.get("tokenizer.ggml.unknown_token_id", 0)]
    definition["model"] |= {"merges": merges, "byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = [{"type": "Prepend", "prepend": "▁"}] if keys.get("tokenizer.ggml.add_space_prefix", True) else []
    definition["normalizer"] = {"type": "Sequence", "normalizers": [*prefix, blank]}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return definition | {"decoder": {"type": "Sequence", "decoders": decoders}}


# ---------------------------------------------------------------------------------------------------
# Out


def save_gguf(path: Path, name: str, model: GPT, tokenizer: Tokenizer, dtype: str) -> None:
    """Write `model` to a GGUF file. dtype: float32, float16, bfloat16 or q8_0, of the matrices; all else is float32.

    Matrices whose rows are no multiple of 32 become float16 in place of q8_0. Raises `ConfigError` and `DataError` for
    what llama.cpp can't run.
    """
    import gguf

    shape, kind = model.config, model_type(model.config)
    if kind == "qwen3" and shape.bias:
        raise ConfigError("llama.cpp's Qwen3 has no biases, and this model has; --to=hf carries them")
    writer = gguf.GGUFWriter(path, kind)
    wanted = gguf.GGMLQuantizationType[TYPES[dtype]]
    writer.add_string(MARK, __version__)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if wanted.name == "F32" else "MOSTLY_") + wanted.name])
    for ours, key in (GPT2 if kind == "gpt2" else LLAMA).items():
        value = getattr(shape, ours)
        add = writer.add_float32 if ours in ("norm_eps", "rope_theta") else writer.add_uint32
        add(f"{kind}.{key}", value)
    if kind != "gpt2":
        writer.add_value_length(shape.head_size)
        writer.add_rope_dimension_count(shape.head_size)
    if shape.rope_scaling:
        slowed = rotary_frequencies(replace(shape, rope_scaling=[])) / rotary_frequencies(shape)
        writer.add_tensor("rope_freqs.weight", slowed.numpy())
    add_tokenizer(writer, tokenizer)
    names = tensor_names(kind, shape.n_layer)
    for part, tensor in tensors_of(model, tokenizer.vocab_size):
        array = (swap_channels(tensor, 2, shape.head_size // 2) if is_paired(kind, part) else tensor).float().numpy()
        stored = wanted if array.ndim == 2 and "wpe" not in part.theirs else gguf.GGMLQuantizationType.F32
        if stored.name.startswith("Q") and array.shape[-1] % 32:
            stored = gguf.GGMLQuantizationType.F16
        theirs = names.get_name(part.theirs, try_suffixes=(".weight", ".bias"))
        assert theirs, part.theirs
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
        entries = dict(enumerate((text, TokenType.NORMAL) for text in escaped))
        if tokenizer.end_of_text is not None:
            entries[tokenizer.end_of_text] = (END_OF_TEXT, TokenType.CONTROL)
        writer.add_tokenizer_model("rwkv")
    else:
        definition = json.loads(tokenizer.definition)
        cut = cut_of(definition)
        if cut is None:
            raise DataError(
                f"llama.cpp can't cut text as the {tokenizer} does: it knows GPT-2's, Llama 3's, Qwen's and SmolLM's "
                "byte-level BPE, characters and bytes; --to=hf carries this tokenizer"
            )
        entries = {i: (token, TokenType.NORMAL) for token, i in definition["model"]["vocab"].items()}
        for token in definition["added_tokens"]:
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            entries[token["id"]] = (token["content"], kind)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut)
        writer.add_token_merges([" ".join(merge) for merge in definition["model"]["merges"]])
    listed = [entries.get(i, (f"[unused {i}]", TokenType.UNUSED)) for i in range(tokenizer.vocab_size)]
    writer.add_token_list([text for text, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    config = tokenizer.full_generation_config
    ends = config["eos_token_id"]
    named = dict(zip(ENDS, ends if isinstance(ends, list) else [ends], strict=False))
    named |= {key: config.get(name) for name, key in CONFIG.items()}
    for key, value in named.items():
        if value is not None:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)


def cut_of(definition: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the way in which a tokenizer.json cuts text into pieces; None if it has none."""
    model, cut = definition["model"], definition["pre_tokenizer"] or {}
    steps = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    steps = [{**step, "trim_offsets": True} if "trim_offsets" in step else step for step in steps]
    normalizer = (definition["normalizer"] or {}).get("type")
    for name, (usual, known, ignores_merges) in CUTS.items():
        is_like = steps == known and normalizer in (None, usual) and bool(model.get("ignore_merges")) == ignores_merges
        if model["type"] == "BPE" and is_like:
            return name
    return None


def modelfile(path: Path, shape: GPTConfig, tokenizer: Tokenizer) -> str:
    """Return what Ollama has to know of the GGUF file at `path`: `ollama create NAME -f MODELFILE`."""
    config = tokenizer.generation_config
    lines = [f"FROM ./{path.name}", f"PARAMETER num_ctx {min(shape.block_size, 4096)}"]
    lines += [f"PARAMETER {name} {config[name]}" for name in ("temperature", "top_k", "top_p") if name in config]
    lines += [f"PARAMETER stop {json.dumps(tokenizer.decode([i]))}" for i in sorted(tokenizer.end_tokens)]
    # Ollama has Go's templates, not Jinja's, and recognises the usual ones; a model without any continues a text.
    template = "" if tokenizer.chat_template else "{{ .Prompt }}"
    if "<|im_start|>" in tokenizer.chat_template:
        turn = "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
        template = f"{{{{ range .Messages }}}}{turn}{{{{ end }}}}<|im_start|>assistant\n"
    return "\n".join([*lines, f'TEMPLATE """{template}"""' if template else "", ""])
