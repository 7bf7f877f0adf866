"""Models in Hugging Face's format, from the hub, a mirror folder or a folder, and into one.

GPT-2, Llama and Qwen3; also Mistral without a sliding window, which is a Llama, and Qwen2, which is one with biases on
queries, keys and values. Reads and writes `config.json` and safetensors directly, without transformers.
"""

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanogpt.config import GPT2_NAMES, GPTConfig, is_hub_name
from nanogpt.errors import CheckpointError, ConfigError, DataError
from nanogpt.files import parse_json, read_json, write_json
from nanogpt.model import GPT
from nanogpt.prepare import hub_folder
from nanogpt.tokenizer import TOKENIZER_FILES, GPT2Tokenizer, Tokenizer, read_tokenizer

log = logging.getLogger(__name__)

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # theirs: ours
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
LLAMA = {
    "vocab_size": "vocab_size", "max_position_embeddings": "block_size", "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
    "head_dim": "head_size", "intermediate_size": "n_hidden", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_head",
}  # fmt: skip
FIELDS = {  # for each model_type, the names in config.json of our fields
    "gpt2": {"vocab_size": "vocab_size", "n_positions": "block_size", "n_embd": "n_embd", "n_layer": "n_layer",
             "n_head": "n_head", "n_inner": "n_hidden", "layer_norm_epsilon": "norm_eps",
             "tie_word_embeddings": "tied_head"},
    "llama": {**LLAMA, "attention_bias": "bias", "mlp_bias": "mlp_bias"},
    "mistral": LLAMA, "qwen2": LLAMA, "qwen3": {**LLAMA, "attention_bias": "bias"},
}  # fmt: skip
IMPLIED: dict[str, dict[str, Any]] = {  # what the name alone says about the shape
    "gpt2": {"bias": True}, "llama": {"architecture": "llama"}, "mistral": {"architecture": "llama", "bias": False},
    "qwen2": {"architecture": "llama", "bias": True, "out_bias": False, "mlp_bias": False},
    "qwen3": {"architecture": "qwen3"},
}  # fmt: skip
REQUIRED: dict[str, dict[str, Any]] = {  # what config.json must say, where it says anything
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    "llama": {"hidden_act": "silu"}, "mistral": {"hidden_act": "silu", "sliding_window": None},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "qwen3": {"hidden_act": "silu", "use_sliding_window": False},
}  # fmt: skip


class Pretrained(NamedTuple):
    """A model that was trained elsewhere, in evaluation mode."""

    model: GPT
    tokenizer: Tokenizer


def load_pretrained(name: str, device: str = "cpu", *, dropout: float = 0.0) -> Pretrained:
    """Return the model `name` on `device`: gpt2, gpt2-medium, …, ORGANISATION/NAME on the hub, or a folder.

    Weights become float32, and go to `device` one at a time. Raises `CheckpointError` if the model cannot be had, is
    damaged, or is of an architecture that is not known here.
    """
    folder = Path(name)
    if name in GPT2_NAMES or (is_hub_name(name) and not folder.is_dir()):
        files = [*TOKENIZER_FILES, "config.json", "model*.safetensors", "*.safetensors.index.json"]
        folder = hub_folder(f"openai-community/{name}" if name in GPT2_NAMES else name, files)
    shape = replace(shape_of(folder), dropout=dropout)
    log.info(f"loading {folder}")
    try:
        # A folder may hold the weights of GPT-2 alone.
        has_vocabulary = (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists()
        is_gpt2 = shape.is_gpt2 and shape.vocab_size == 50257 and not has_vocabulary
        tokenizer = GPT2Tokenizer() if is_gpt2 else read_tokenizer(folder)
        if tokenizer.vocab_size > shape.vocab_size:
            raise DataError(f"its tokenizer has {tokenizer.vocab_size} entries, but the model knows {shape.vocab_size}")
        model = GPT.from_weights(shape, read_weights(folder, shape, device))
    except (OSError, ValueError, KeyError, RuntimeError, DataError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return Pretrained(model.eval(), tokenizer)


# ---------------------------------------------------------------------------------------------------
# The shape


def shape_of(folder: Path) -> GPTConfig:
    """Return the shape that `config.json` in `folder` describes. Raises `CheckpointError` for one unknown here."""
    if not folder.is_dir():
        known = f"{', '.join(GPT2_NAMES)}, ORGANISATION/NAME on the hub, a folder, or a .pt or .gguf file"
        raise CheckpointError(f"{folder}: expected {known}")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has neither the checkpoint of a run nor the config.json of a model")
    try:
        shape = read_config(parse_json((folder / "config.json").read_bytes()))
        if problems := list(shape.problems()):
            raise ValueError("; ".join(problems))
        return shape
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{folder}: its config.json describes no model that can be built here: {what}") from error


def read_config(config: dict[str, Any]) -> GPTConfig:
    """Return the shape that a config.json describes. Raises `KeyError` and `ValueError`."""
    kind = config.get("model_type")
    if kind not in FIELDS:
        ours = "it is of a run that has no checkpoint yet" if "dataset" in config else ""
        raise ValueError(ours or f"model_type is {kind!r}; known: {', '.join(FIELDS)}")
    defaults = {"n_inner": None, "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
                "layer_norm_epsilon": 1e-5, "attention_bias": False, "mlp_bias": False,
                "tie_word_embeddings": kind == "gpt2", "sliding_window": 4096}  # fmt: skip
    values = {**defaults, **config}
    for name, required in REQUIRED[kind].items():
        if (value := values.get(name, required)) != required:
            raise ValueError(f"{name} is {value!r}, not {required!r}")
    shape = {**IMPLIED[kind], **{ours: values[theirs] for theirs, ours in FIELDS[kind].items()}}
    if kind == "gpt2":
        activation = config.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation_function is {activation!r}; known: {', '.join(ACTIVATIONS)}")
        return GPTConfig(**shape, activation=ACTIVATIONS[activation])  # type: ignore[arg-type]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type is {rope_type!r}; known: default, llama3")
    shape["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    return GPTConfig(**shape, rope_scaling=[float(rope[key]) for key in SCALING] if rope_type == "llama3" else [])


def model_type(shape: GPTConfig) -> str:
    """Return what others call a network of this shape."""
    is_qwen2 = shape.architecture == "llama" and shape.bias and not shape.out_bias
    return "qwen2" if is_qwen2 else shape.architecture


def config_of(shape: GPTConfig) -> dict[str, Any]:
    """Return the `config.json` that describes `shape`. Raises `ConfigError` if there is none."""
    kind = model_type(shape)
    config = {theirs: getattr(shape, ours) for theirs, ours in FIELDS[kind].items()}
    config |= {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], **REQUIRED[kind]}
    if kind == "gpt2":
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        if shape.activation not in names:
            raise ConfigError(f"other engines do not know the activation {shape.activation!r}: it can't be exported")
        config |= {"architectures": ["GPT2LMHeadModel"], "activation_function": names[shape.activation]}
        return config | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout)
    scaling = dict(zip(SCALING, shape.rope_scaling, strict=False))
    config["rope_scaling"] = (
        {"rope_type": "llama3", **scaling, SCALING[3]: int(scaling[SCALING[3]])} if scaling else None
    )
    return config | {"rope_theta": shape.rope_theta, "attention_dropout": 0.0}


# ---------------------------------------------------------------------------------------------------
# The weights


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


def llama_block(shape: GPTConfig) -> list[tuple[str, str, slice, bool]]:
    """Return the modules of a block of Llama's kind: their name, ours, which rows of ours, whether they have a bias."""
    q, kv, hidden, whole = (
        shape.n_head * shape.head_size,
        shape.n_kv_head * shape.head_size,
        shape.n_hidden,
        slice(None),
    )
    norms = [("self_attn.q_norm", "attn.q_norm", whole, False), ("self_attn.k_norm", "attn.k_norm", whole, False)]
    return [
        ("input_layernorm", "ln_1", whole, False),
        ("self_attn.q_proj", "attn.c_attn", slice(0, q), shape.bias),
        ("self_attn.k_proj", "attn.c_attn", slice(q, q + kv), shape.bias),
        ("self_attn.v_proj", "attn.c_attn", slice(q + kv, q + 2 * kv), shape.bias),
        ("self_attn.o_proj", "attn.c_proj", whole, bool(shape.out_bias)),
        ("post_attention_layernorm", "ln_2", whole, False),
        ("mlp.gate_proj", "mlp.c_fc", slice(0, hidden), bool(shape.mlp_bias)),
        ("mlp.up_proj", "mlp.c_fc", slice(hidden, 2 * hidden), bool(shape.mlp_bias)),
        ("mlp.down_proj", "mlp.c_proj", whole, bool(shape.mlp_bias)),
        *(norms if shape.architecture == "qwen3" else []),
    ]


def put_together(shape: GPTConfig, read: Callable[[Part], Tensor], device: str) -> dict[str, Tensor]:
    """Return the weights of a model under our names, in float32 on `device`; `read` reads them part by part."""
    weights: dict[str, Tensor] = {}
    for ours, parts in itertools.groupby(layout(shape), key=lambda part: part.ours):
        weights[ours] = torch.cat([read(part).float() for part in parts]).to(device)
    if shape.tied_head:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def find_tensors(folder: Path) -> dict[str, Path]:
    """Return the names of the tensors in `folder` and the file of each: of the model, not of an adapter beside it."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists() and not whole.exists():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise ValueError(f"{index.name} is damaged: it does not say which file has which tensor")
        return {name: folder / Path(str(file)).name for name, file in named.items()}
    others = ("adapter", "optimizer", "scheduler")
    paths = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(others)]
    if not paths:
        pickled = ": its weights are pickled, and a pickle can run any code" if list(folder.glob("*.bin")) else ""
        raise ValueError(f"no *.safetensors there{pickled}; safetensors are what transformers' save_pretrained writes")
    found: dict[str, Path] = {}
    for path in [whole] if whole.exists() else paths:
        with open_tensors(path) as file:
            names = dict.fromkeys(file.keys(), path)
        if twice := names.keys() & found.keys():
            raise ValueError(f"{min(twice)} is in several files: remove those that are not of this model")
        found |= names
    return found


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises `ValueError` if it, or what is read from it, is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is {'damaged' if path.exists() else 'missing'}: {error}") from error


def read_weights(folder: Path, shape: GPTConfig, device: str) -> dict[str, Tensor]:
    """Return the weights in `folder` under our names. Raises `ValueError` unless just those are there."""
    found = find_tensors(folder)

    def read(part: Part) -> Tensor:
        # The oldest files of GPT-2 have no prefix.
        name = next((n for n in (part.theirs, part.theirs.partition(".")[2]) if n in found), None)
        if name is None:
            raise ValueError(f"the weights lack {part.theirs}")
        with open_tensors(found.pop(name)) as file:  # opened anew: what was mapped for the last one is let go
            tensor: Tensor = file.get_tensor(name)
        return tensor.t() if part.transposed else tensor

    weights = put_together(shape, read, device)
    ignored = (".attn.bias", ".attn.masked_bias", "lm_head.weight", "rotary_emb.inv_freq")  # computed, or tied
    if unknown := [name for name in found if not name.endswith(ignored)]:
        raise ValueError(f"{len(unknown)} tensors of the weights have no place in the model, {unknown[0]} for one")
    return weights


# ---------------------------------------------------------------------------------------------------
# Out


def tensors_of(model: GPT, vocab_size: int) -> Iterator[tuple[Part, Tensor]]:
    """Yield the tensors of `model` as others cut and name them, in our orientation: rows are outputs.

    Embedding and head lose the rows that only pad the vocabulary. Where GPT-2 has biases and we have none, they are 0.
    Raises `ConfigError` for a shape of which others would build another network.
    """
    weights, shape = model.state_dict(), model.config
    described = read_config(config_of(shape))
    ignored = ("dropout", *(("bias", "out_bias", "mlp_bias", "rope_theta") if shape.is_gpt2 else ("activation",)))
    for name, value in vars(shape).items():
        if name not in ignored and value != getattr(described, name):
            raise ConfigError(f"{name}={value}: others' {model_type(shape)} has no such thing, so it can't be exported")
    for part in layout(replace(shape, bias=True) if shape.is_gpt2 else shape):
        if part.ours in weights:
            tensor = weights[part.ours][part.rows]
        else:
            weight = weights[part.ours.removesuffix("bias") + "weight"]
            tensor = weight.new_zeros(len(weight))
        yield part, tensor[:vocab_size] if part.ours in ("transformer.wte.weight", "lm_head.weight") else tensor


def save_pretrained(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype, card: str) -> None:
    """Write what transformers' `AutoModelForCausalLM` and `AutoTokenizer` load. `card` is the text of README.md.

    Raises `DataError` for a tokenizer that has no such form.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shape, generation = replace(model.config, vocab_size=tokenizer.vocab_size), tokenizer.full_generation_config
    ends = {name: generation[name] for name in ("bos_token_id", "eos_token_id")}
    write_json(folder / "config.json", {**config_of(shape), **ends, "torch_dtype": str(dtype).removeprefix("torch.")})
    write_json(folder / "generation_config.json", generation)
    (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.block_size}
    for name, ids in ends.items():
        if ids is not None:
            settings[name.removesuffix("_id")] = tokenizer.decode(ids[:1] if isinstance(ids, list) else [ids])
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})
    (folder / "README.md").write_text(card, encoding="utf-8")
    tensors = {}
    for part, tensor in tensors_of(model, tokenizer.vocab_size):
        tensors[part.theirs] = (tensor.t() if part.transposed else tensor).to(dtype).contiguous()
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(str(error)) from error
    # The library lets only the owner read its file; the others have the rights that the umask gives.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
