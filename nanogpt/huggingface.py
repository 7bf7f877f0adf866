"""Models in Hugging Face's format, in and out: `config.json` and safetensors, read and written without transformers.

GPT-2, Llama and Qwen3; also Mistral without a sliding window, which is a Llama, and Qwen2, which is one with biases on
queries, keys and values.
"""

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanogpt.config import GPT2_NAMES, GPTConfig, is_hub_name
from nanogpt.errors import CheckpointError, ConfigError
from nanogpt.files import read_json, write_json
from nanogpt.model import GPT
from nanogpt.prepare import hub_folder
from nanogpt.tokenizer import TOKENIZER_FILES, GPT2Tokenizer, Tokenizer, read_tokenizer

log = logging.getLogger(__name__)

# Hugging Face's names of activations, and ours. An export writes the last name of each.
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Our fields, and their names in the config.json of GPT-2 and of the others.
OURS = """vocab_size block_size n_embd n_layer n_head n_hidden norm_eps tied_head
    n_kv_head head_size bias mlp_bias""".split()
GPT2 = "vocab_size n_positions n_embd n_layer n_head n_inner layer_norm_epsilon tie_word_embeddings".split()
LLAMA = """vocab_size max_position_embeddings hidden_size num_hidden_layers num_attention_heads intermediate_size
    rms_norm_eps tie_word_embeddings num_key_value_heads head_dim attention_bias mlp_bias""".split()
FIELDS = {"gpt2": GPT2, "llama": LLAMA, "mistral": LLAMA[:10], "qwen2": LLAMA[:10], "qwen3": LLAMA[:11]}
IMPLIED = {"mistral": {"bias": False}, "qwen2": {"out_bias": False, "mlp_bias": False}}  # what their files never say
# What the config.json of an older model leaves out; None: derived from other fields.
DEFAULTS = {"n_inner": None, "num_key_value_heads": None, "head_dim": None, "attention_bias": False, "mlp_bias": False}
# Options of which only this value is supported.
REQUIRED = {"hidden_act": "silu", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def load_pretrained(name: str, device: str = "cpu", *, dropout: float = 0.0) -> tuple[GPT, Tokenizer]:
    """Return a model on `device`, and its tokenizer: gpt2, gpt2-medium, …, ORGANISATION/NAME on the hub, or a folder.

    Weights are converted to float32 one at a time. Raises `CheckpointError` if the model can't be loaded.
    """
    folder = Path(name)
    if name in GPT2_NAMES or (is_hub_name(name) and not folder.is_dir()):
        files = [*TOKENIZER_FILES, "config.json", "model*.safetensors", "*.safetensors.index.json"]
        folder = hub_folder(f"openai-community/{name}" if name in GPT2_NAMES else name, files)
    config = read_json(folder / "config.json")
    if "model_type" not in config:  # nor has the config.json of a run that was not saved yet
        known = f"{', '.join(GPT2_NAMES)}, ORGANISATION/NAME on the hub, a folder, or a .pt or .gguf file"
        raise CheckpointError(f"{folder} has no checkpoint of a run, and no config.json of a model; expected {known}")
    log.info(f"loading {folder}")
    try:
        shape = replace(read_config(config), dropout=dropout)
        # A folder may hold the weights of GPT-2 alone.
        is_gpt2 = shape.is_gpt2 and shape.vocab_size == 50257 and not (folder / "tokenizer.json").exists()
        tokenizer = GPT2Tokenizer() if is_gpt2 else read_tokenizer(folder)
        if tokenizer.vocab_size > shape.vocab_size:  # people add a <pad>, and leave the embedding as it is
            log.warning(f"its tokenizer has {tokenizer.vocab_size} entries, the model knows {shape.vocab_size} of them")
            tokenizer.vocab_size = shape.vocab_size
        found = find_tensors(folder)
        if shape.tied_head and (head := found.pop("lm_head.weight", None)):
            first = next(layout(shape))
            embedding = found.setdefault(short_name(first.theirs), head)
            if not torch.equal(read_tensor(first, embedding), read_tensor(first, head)):
                log.warning("config.json says that embedding and head share a matrix; there are two, and both are used")
                shape.tied_head, found["lm_head.weight"] = False, head
        model = build_model(shape, found, lambda part: read_tensor(part, found.pop(short_name(part.theirs))), device)
        return model, tokenizer
    except Exception as error:  # whatever a damaged file leads to
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{folder}: {what}") from error


def read_config(config: dict[str, Any]) -> GPTConfig:
    """Return the shape that a config.json describes. Raises `KeyError` and `ValueError`."""
    kind = config["model_type"]
    if kind not in FIELDS:
        raise ValueError(f"model_type is {kind!r}; known: {', '.join(FIELDS)}")
    if config.get("quantization_config"):
        raise ValueError("it has a quantization_config: quantized weights can't be read; take the unquantized model")
    values = {**DEFAULTS, "tie_word_embeddings": kind == "gpt2", **config}
    for name, required in REQUIRED.items():
        if config.get(name, required) != required:
            raise ValueError(f"{name} is {config[name]!r}, not {required!r}")
    if config.get("sliding_window") and config.get("use_sliding_window", kind == "mistral"):
        raise ValueError(f"sliding_window is {config['sliding_window']}, and attention to a part is not supported")
    shape = {ours: values[theirs] for theirs, ours in zip(FIELDS[kind], OURS, strict=False)}
    shape |= {"architecture": "llama" if kind in ("mistral", "qwen2") else kind, **IMPLIED.get(kind, {})}
    if kind == "gpt2":
        if (activation := config.get("activation_function", "gelu_new")) not in ACTIVATION_NAMES:
            raise ValueError(f"activation_function is {activation!r}; known: {', '.join(ACTIVATION_NAMES)}")
        return GPTConfig(**shape, activation=ACTIVATION_NAMES[activation])  # type: ignore[arg-type]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type is {rope_type!r}; known: default, llama3")
    shape["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    return GPTConfig(**shape, rope_scaling=[rope[key] for key in SCALING] if rope_type == "llama3" else [])


def model_type(shape: GPTConfig) -> str:
    """Return transformers' and llama.cpp's name of the architecture."""
    is_qwen2 = shape.architecture == "llama" and shape.bias and not shape.out_bias
    return "qwen2" if is_qwen2 else shape.architecture


def config_of(shape: GPTConfig) -> dict[str, Any]:
    """Return the `config.json` that describes `shape`, or what comes nearest to it."""
    kind = model_type(shape)
    config = {theirs: getattr(shape, ours) for theirs, ours in zip(FIELDS[kind], OURS, strict=False)}
    config |= {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"]}
    if kind == "gpt2":
        names = {ours: theirs for theirs, ours in ACTIVATION_NAMES.items()}
        config |= {"architectures": ["GPT2LMHeadModel"], "activation_function": names[shape.activation]}
        config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout)
    else:
        config |= {"hidden_act": "silu", "rope_theta": shape.rope_theta}
        if shape.rope_scaling:
            config["rope_scaling"] = {"rope_type": "llama3", **dict(zip(SCALING, shape.rope_scaling, strict=True))}
    return config


class Part(NamedTuple):
    """A tensor of theirs, and where it lies in ours."""

    theirs: str
    ours: str
    rows: slice = slice(None)  # of ours
    transposed: bool = False  # GPT-2 stores matrices as (inputs, outputs), torch's Linear as (outputs, inputs)


def layout(shape: GPTConfig) -> Iterator[Part]:
    """Yield all tensors of a model, in both worlds' names; the parts of one of ours follow one another."""
    if shape.is_gpt2:
        block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
        yield Part("transformer.wte.weight", "transformer.wte.weight")
        yield Part("transformer.wpe.weight", "transformer.wpe.weight")
        for name in [f"h.{n}.{each}" for n in range(shape.n_layer) for each in block] + ["ln_f"]:
            weight, bias = f"transformer.{name}.weight", f"transformer.{name}.bias"
            yield Part(weight, weight, transposed=".c_" in name)
            if shape.bias:
                yield Part(bias, bias)
    else:
        yield Part("model.embed_tokens.weight", "transformer.wte.weight")
        yield Part("model.norm.weight", "transformer.ln_f.weight")
        for n in range(shape.n_layer):
            for kind in ("weight", "bias"):
                for theirs, ours, rows, has_bias in llama_block(shape):
                    if kind == "weight" or has_bias:
                        yield Part(f"model.layers.{n}.{theirs}.{kind}", f"transformer.h.{n}.{ours}.{kind}", rows)
    if not shape.tied_head:
        yield Part("lm_head.weight", "lm_head.weight")


def llama_block(shape: GPTConfig) -> list[tuple[str, str, slice, object]]:
    """Return the modules of a block of Llama's kind: their name, ours, which rows of ours, whether they have a bias."""
    q, kv, whole = shape.n_head * shape.head_size, shape.n_kv_head * shape.head_size, slice(None)
    norms = [("self_attn.q_norm", "attn.q_norm", whole, False), ("self_attn.k_norm", "attn.k_norm", whole, False)]
    return [
        ("input_layernorm", "ln_1", whole, False),
        ("self_attn.q_proj", "attn.c_attn", slice(0, q), shape.bias),
        ("self_attn.k_proj", "attn.c_attn", slice(q, q + kv), shape.bias),
        ("self_attn.v_proj", "attn.c_attn", slice(q + kv, None), shape.bias),
        ("self_attn.o_proj", "attn.c_proj", whole, shape.out_bias),
        ("post_attention_layernorm", "ln_2", whole, False),
        ("mlp.gate_proj", "mlp.c_fc", slice(0, shape.n_hidden), shape.mlp_bias),
        ("mlp.up_proj", "mlp.c_fc", slice(shape.n_hidden, None), shape.mlp_bias),
        ("mlp.down_proj", "mlp.c_proj", whole, shape.mlp_bias),
        *(norms if shape.architecture == "qwen3" else []),
    ]


def build_model(shape: GPTConfig, tensors: dict[str, Any], read: Callable[[Part], Tensor], device: str) -> GPT:
    """Return the model, in evaluation mode and float32 on `device`, whose tensors `read` takes out of `tensors`.

    Raises `KeyError` or `ValueError` for too few or too many.
    """
    if problems := list(shape.problems()):
        raise ValueError("; ".join(problems))
    weights: dict[str, Tensor] = {}
    for ours, parts in itertools.groupby(layout(shape), key=lambda part: part.ours):
        weights[ours] = torch.cat([read(part).float() for part in parts]).to(device)
    if tensors:
        raise ValueError(f"{len(tensors)} tensors have no place in the model, {min(tensors)} for one")
    if shape.tied_head:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return GPT.from_weights(shape, weights).eval()


def short_name(name: str) -> str:
    """Return the name of a tensor without the network's in front, which some files lack, and the names of wrappers."""
    return name.replace("_orig_mod.", "").replace("module.", "").removeprefix("transformer.").removeprefix("model.")


def find_tensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return the file and the full name of each of the model's tensors in `folder`; other files are ignored."""
    from safetensors import SafetensorError, safe_open

    whole, others = folder / "model.safetensors", ("adapter", "optimizer", "scheduler", "consolidated")
    index = {} if whole.exists() else read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    named = {whole} if whole.exists() else {folder / file for file in index.values()}
    rest = {path for path in folder.glob("*.safetensors") if not path.name.startswith(others)}
    found: dict[str, tuple[Path, str]] = {}
    for path in sorted(named or folder.glob("model*.safetensors")) or sorted(rest):
        try:
            names: list[str] = safe_open(path, "pt").keys()  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            raise ValueError(f"{path.name} is damaged: {error}") from error
        for name in names:
            is_computed = name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))
            if is_computed or (index and folder / index.get(name, "") != path):
                continue
            if found.setdefault(short_name(name), (path, name)) != (path, name):
                raise ValueError(f"{name} is in several files: remove those that are not of this model")
    if not found:
        raise ValueError("no model's *.safetensors there (a pickle can run any code); save_pretrained writes them")
    return found


def read_tensor(part: Part, place: tuple[Path, str]) -> Tensor:
    """Return a tensor in our orientation."""
    from safetensors import safe_open

    path, name = place
    with safe_open(path, "pt") as file:  # opened for each tensor, so that the mapped memory of the last one is freed
        tensor: Tensor = file.get_tensor(name)
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise ValueError(f"{name} is quantized ({tensor.dtype}), which can't be read; take the unquantized model")
    return tensor.t() if part.transposed else tensor


def tensors_of(model: GPT, vocab_size: int) -> Iterator[tuple[Part, Tensor]]:
    """Yield the tensors of `model` as others cut and name them, in our orientation, without rows that only pad.

    Biases that GPT-2 has and we have not are 0. Raises `ConfigError` if others would build another network.
    """
    weights, shape = model.state_dict(), model.config
    described = read_config(config_of(shape))
    ignored = ("dropout", *(("bias", "out_bias", "mlp_bias", "rope_theta") if shape.is_gpt2 else ("activation",)))
    for name, value in vars(shape).items():
        if name not in ignored and value != getattr(described, name):
            raise ConfigError(f"{name}={value}: others' {model_type(shape)} has no such thing, so it can't be exported")
    for part in layout(replace(shape, bias=True) if shape.is_gpt2 else shape):
        weight = weights[part.ours.replace(".bias", ".weight")]
        tensor = weights.get(part.ours, weight.new_zeros(len(weight)))[part.rows]
        yield part, tensor[:vocab_size] if part.ours in ("transformer.wte.weight", "lm_head.weight") else tensor


def save_pretrained(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Write what transformers loads. Raises `ConfigError` and `DataError` for what has no such form."""
    import tokenizers
    from safetensors.torch import save_file

    shape, generation = replace(model.config, vocab_size=tokenizer.vocab_size), tokenizer.full_generation_config
    ends = {name: generation[name] for name in ("bos_token_id", "eos_token_id")}
    write_json(folder / "config.json", {**config_of(shape), **ends, "torch_dtype": str(dtype).removeprefix("torch.")})
    write_json(folder / "generation_config.json", generation)
    engine = tokenizers.Tokenizer.from_str(tokenizer.definition)
    if tokenizer.adds_bos:
        bos = tokenizer.decode([generation["bos_token_id"]])
        special = [(bos, generation["bos_token_id"])]
        engine.post_processor = tokenizers.processors.TemplateProcessing(f"{bos} $A", special_tokens=special)
    (folder / "tokenizer.json").write_text(engine.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.block_size,
        "chat_template": tokenizer.chat_template or None, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    for name, ids in ends.items():
        if ids is not None:
            settings[name.removesuffix("_id")] = tokenizer.decode(ids[:1] if isinstance(ids, list) else [ids])
    write_json(folder / "tokenizer_config.json", settings)
    tensors = {
        part.theirs: (tensor.t() if part.transposed else tensor).to(dtype).contiguous()
        for part, tensor in tensors_of(model, tokenizer.vocab_size)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # The library lets only the owner read its file; the others have the rights that the umask gives.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
