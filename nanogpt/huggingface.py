"""Models in Hugging Face's format: GPT-2, Llama and Qwen3, from the hub, a mirror folder or a folder, and into one.

Reads and writes `config.json` and safetensors directly; transformers is not needed.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nanogpt.config import GPT2_NAMES, GPTConfig, is_hub_name
from nanogpt.errors import CheckpointError, ConfigError, DataError
from nanogpt.files import parse_json, write_json
from nanogpt.model import GPT
from nanogpt.prepare import hub_folder
from nanogpt.tokenizer import TOKENIZER_FILES, GPT2Tokenizer, Tokenizer, read_tokenizer

log = logging.getLogger(__name__)

_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}
# what `save_pretrained` writes
FOLDER = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
          "README.md"}  # fmt: skip
# their names for fields of GPTConfig, and what they take where the file says nothing
_NAMES = {
    "gpt2": {
        "vocab_size": "vocab_size", "n_positions": "block_size", "n_embd": "n_embd", "n_layer": "n_layer",
        "n_head": "n_head", "n_inner": "n_hidden", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied_head",
    },
    "llama": {
        "vocab_size": "vocab_size", "max_position_embeddings": "block_size", "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
        "head_dim": "head_size", "intermediate_size": "n_hidden", "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tied_head", "attention_bias": "bias", "mlp_bias": "mlp_bias",
    },
}  # fmt: skip
_NAMES["qwen3"] = {theirs: ours for theirs, ours in _NAMES["llama"].items() if theirs != "mlp_bias"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "attention_bias": False, "mlp_bias": False},
}  # fmt: skip
_DEFAULTS["qwen3"] = _DEFAULTS["llama"]
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Pretrained:
    """A model that was trained elsewhere, in evaluation mode."""

    model: GPT
    tokenizer: Tokenizer


def load_pretrained(name: str, device: str = "cpu", *, dropout: float = 0.0) -> Pretrained:
    """The model `name` on `device`: gpt2, gpt2-medium, gpt2-large, gpt2-xl, ORGANISATION/NAME on the hub, or a folder.

    Weights become float32, and go to `device` one at a time. Raises `CheckpointError` if the model can't be had, is
    damaged or is none of the three architectures.
    """
    folder = folder_of(name)
    log.info(f"loading {folder}")
    shape = replace(shape_of(folder), dropout=dropout)
    tokenizer = tokenizer_of(folder, shape)
    try:
        model = GPT.from_weights(shape, _read_weights(folder, shape, device))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return Pretrained(model.eval(), tokenizer)


def folder_of(name: str) -> Path:
    """Where the files of `name` lie on this machine, downloaded if need be."""
    if name not in GPT2_NAMES and (Path(name).is_dir() or not is_hub_name(name)):
        return Path(name)
    repository = f"openai-community/{name}" if name in GPT2_NAMES else name
    return hub_folder(repository, [*TOKENIZER_FILES, "config.json", "*.safetensors", "*.safetensors.index.json"])


# ---------------------------------------------------------------------------------------------------
# The shape


def shape_of(folder: Path) -> GPTConfig:
    """The shape that `config.json` in `folder` describes. Raises `CheckpointError` for what can't be rebuilt here."""
    if folder.suffix == ".gguf":
        raise CheckpointError(f"{folder} is for llama.cpp; name the run or folder that it was made from")
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; name the folder that has it beside its config.json")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected {', '.join(GPT2_NAMES)}, ORGANISATION/NAME on the hub, or a folder")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has neither the checkpoint of a run nor the config.json of a model")
    try:
        config = parse_json((folder / "config.json").read_bytes())
        shape = _gpt2_shape(config) if config.get("model_type") == "gpt2" else _llama_shape(config)
        if problems := list(shape.problems()):
            raise ValueError("; ".join(problems))
        return shape
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{folder}: its config.json describes no model that can be built here: {what}") from error


def _fields(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The fields of a shape that a config.json names. Raises `KeyError` for one that it must."""
    values = {**_DEFAULTS[architecture], **config}
    return {ours: values[theirs] for theirs, ours in _NAMES[architecture].items()}


def _gpt2_shape(config: dict[str, Any]) -> GPTConfig:
    usual = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in usual.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}, not {value!r}")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation_function is {activation!r}; known: {', '.join(_ACTIVATIONS)}")
    return GPTConfig(bias=True, activation=_ACTIVATIONS[activation], **_fields(config, "gpt2"))


def _llama_shape(config: dict[str, Any]) -> GPTConfig:
    kind = config.get("model_type")
    if kind not in ("llama", "qwen3"):
        ours = "it is of a run that has no checkpoint yet" if "dataset" in config else ""
        raise ValueError(ours or f"model_type is {kind!r}; known: gpt2, llama, qwen3")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act is {activation!r}, not 'silu'")
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window: attention over a window is not supported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_type is {rope_type!r}; known: default, llama3")
    return GPTConfig(
        architecture=kind,
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
        rope_scaling=[float(rope[key]) for key in _SCALING] if rope_type == "llama3" else [],
        **_fields(config, kind),
    )


# ---------------------------------------------------------------------------------------------------
# The weights


@dataclass(frozen=True)
class Part:
    """A tensor of theirs, and where it lies in ours."""

    theirs: str
    ours: str
    rows: slice = field(default_factory=lambda: slice(None))  # of ours
    transposed: bool = False  # GPT-2 stores matrices as (inputs, outputs), torch's Linear as (outputs, inputs)


def layout(shape: GPTConfig) -> Iterator[Part]:
    """All tensors of a model, in both worlds' names."""
    if shape.is_gpt2:
        yield from _gpt2_layout(shape)
    else:
        yield from _llama_layout(shape)
    if not shape.tied_head:
        yield Part("lm_head.weight", "lm_head.weight")


def _gpt2_layout(shape: GPTConfig) -> Iterator[Part]:
    yield Part("transformer.wte.weight", "transformer.wte.weight")
    yield Part("transformer.wpe.weight", "transformer.wpe.weight")
    norms = [f"h.{n}.{norm}" for n in range(shape.n_layer) for norm in ("ln_1", "ln_2")] + ["ln_f"]
    matrices = [f"h.{n}.{name}" for n in range(shape.n_layer)
                for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    for name in norms + matrices:
        weight = f"transformer.{name}.weight"
        yield Part(weight, weight, transposed=name in matrices)
        if shape.bias:
            yield Part(f"transformer.{name}.bias", f"transformer.{name}.bias")


def _llama_layout(shape: GPTConfig) -> Iterator[Part]:
    q, kv, hidden = shape.n_head * shape.head_size, shape.n_kv_head * shape.head_size, shape.n_hidden
    yield Part("model.embed_tokens.weight", "transformer.wte.weight")
    yield Part("model.norm.weight", "transformer.ln_f.weight")
    for n in range(shape.n_layer):
        theirs, ours = f"model.layers.{n}", f"transformer.h.{n}"
        yield Part(f"{theirs}.input_layernorm.weight", f"{ours}.ln_1.weight")
        yield Part(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ln_2.weight")
        if shape.architecture == "qwen3":
            yield Part(f"{theirs}.self_attn.q_norm.weight", f"{ours}.attn.q_norm.weight")
            yield Part(f"{theirs}.self_attn.k_norm.weight", f"{ours}.attn.k_norm.weight")
        for kind in ("weight", "bias") if shape.bias else ("weight",):
            yield Part(f"{theirs}.self_attn.q_proj.{kind}", f"{ours}.attn.c_attn.{kind}", slice(0, q))
            yield Part(f"{theirs}.self_attn.k_proj.{kind}", f"{ours}.attn.c_attn.{kind}", slice(q, q + kv))
            yield Part(f"{theirs}.self_attn.v_proj.{kind}", f"{ours}.attn.c_attn.{kind}", slice(q + kv, q + 2 * kv))
            yield Part(f"{theirs}.self_attn.o_proj.{kind}", f"{ours}.attn.c_proj.{kind}")
        for kind in ("weight", "bias") if shape.mlp_bias else ("weight",):
            yield Part(f"{theirs}.mlp.gate_proj.{kind}", f"{ours}.mlp.c_fc.{kind}", slice(0, hidden))
            yield Part(f"{theirs}.mlp.up_proj.{kind}", f"{ours}.mlp.c_fc.{kind}", slice(hidden, 2 * hidden))
            yield Part(f"{theirs}.mlp.down_proj.{kind}", f"{ours}.mlp.c_proj.{kind}")


def _read_weights(folder: Path, shape: GPTConfig, device: str) -> dict[str, torch.Tensor]:
    """The weights in `folder` under our names, in float32. Raises `ValueError` unless just those are there."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = ": its weights are pickled, and a pickle can run any code" if list(folder.glob("*.bin")) else ""
        raise ValueError(f"no *.safetensors there{pickled}; safetensors are what transformers' save_pretrained writes")
    found: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path.name} is damaged: {error}") from error

    def read(part: Part) -> torch.Tensor:
        # the oldest files of GPT-2 have no prefix
        name = next((n for n in (part.theirs, part.theirs.partition(".")[2]) if n in found), None)
        if name is None:
            raise ValueError(f"the weights lack {part.theirs}")
        with safe_open(found.pop(name), "pt") as file:  # opened anew: what was mapped for the last one is let go
            tensor: torch.Tensor = file.get_tensor(name).float()
        if part.rows.stop and tensor.shape[:1] != (expected := part.rows.stop - part.rows.start,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but config.json says {expected} rows")
        return tensor.t() if part.transposed else tensor

    parts_of = itertools.groupby(layout(shape), key=lambda part: part.ours)
    weights = {ours: torch.cat([read(part) for part in parts]).to(device) for ours, parts in parts_of}
    ignored = (".attn.bias", ".attn.masked_bias", "lm_head.weight", "rotary_emb.inv_freq")  # computed, or tied
    if unknown := [name for name in found if not name.endswith(ignored)]:
        raise ValueError(f"{len(unknown)} tensors of the weights have no place in the model, {unknown[0]} for one")
    if shape.tied_head:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def tensors_of(model: GPT, vocab_size: int) -> Iterator[tuple[Part, torch.Tensor]]:
    """The tensors of `model` as others cut and name them, in our orientation: rows are outputs.

    Embedding and head lose the rows that only pad the vocabulary. Where GPT-2 has biases and we have none, they are 0.
    Raises `ConfigError` for a shape of which others would build another network.
    """
    weights, shape = model.state_dict(), model.config
    described = (_gpt2_shape if shape.is_gpt2 else _llama_shape)(config_of(shape))
    of_no_effect = ("dropout", *(("bias", "mlp_bias", "rope_theta") if shape.is_gpt2 else ("activation",)))
    for name, value in vars(shape).items():
        if name not in of_no_effect and value != getattr(described, name):
            raise ConfigError(
                f"{name}={value}: others' {shape.architecture} has no such thing, so it can't be exported"
            )
    for part in layout(replace(shape, bias=True) if shape.is_gpt2 else shape):
        if part.ours in weights:
            tensor = weights[part.ours][part.rows]
        else:
            weight = weights[part.ours.removesuffix("bias") + "weight"]
            tensor = weight.new_zeros(len(weight))
        yield part, tensor[:vocab_size] if part.ours in ("transformer.wte.weight", "lm_head.weight") else tensor


# ---------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_of(folder: Path, shape: GPTConfig) -> Tokenizer:
    """The tokenizer that lies beside a model. Raises `CheckpointError` if there is none."""
    gpt2 = GPT2Tokenizer()
    if not (folder / "tokenizer.json").exists() and shape.is_gpt2 and shape.vocab_size == gpt2.vocab_size:
        return gpt2
    try:
        tokenizer = read_tokenizer(folder)
    except DataError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if tokenizer.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} entries, but the model knows {shape.vocab_size}"
        )
    return tokenizer


# ---------------------------------------------------------------------------------------------------
# Out


def save_pretrained(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype, card: str) -> None:
    """Write what transformers' `AutoModelForCausalLM` and `AutoTokenizer` load. `card` is the text of README.md.

    Raises `DataError` for a tokenizer that has no such form.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shape = replace(model.config, vocab_size=tokenizer.vocab_size)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text)
    write_json(folder / "config.json", {**config_of(shape), **ends, "torch_dtype": str(dtype).removeprefix("torch.")})
    write_json(folder / "generation_config.json", {**ends, "pad_token_id": tokenizer.end_of_text})
    (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.block_size}
    if tokenizer.end_of_text is not None:
        settings |= dict.fromkeys(("bos_token", "eos_token"), tokenizer.decode([tokenizer.end_of_text]))
    write_json(folder / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})
    (folder / "README.md").write_text(card, encoding="utf-8")
    tensors = {}
    for part, tensor in tensors_of(model, tokenizer.vocab_size):
        tensors[part.theirs] = (tensor.t() if part.transposed else tensor).to(dtype).contiguous()
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(str(error)) from error


def config_of(shape: GPTConfig) -> dict[str, Any]:
    """The `config.json` that describes `shape`."""
    config: dict[str, Any] = {
        "architectures": [
            {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[shape.architecture]
        ],
        "model_type": shape.architecture,
        **{theirs: getattr(shape, ours) for theirs, ours in _NAMES[shape.architecture].items()},
    }
    if shape.is_gpt2:
        names = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
        if shape.activation not in names:
            raise ConfigError(f"other engines do not know the activation {shape.activation!r}: it can't be exported")
        config["activation_function"] = names[shape.activation]
        return config | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout)
    scaling: dict[str, Any] | None = None
    if shape.rope_scaling:
        *factors, context = shape.rope_scaling
        scaling = {"rope_type": "llama3", **dict(zip(_SCALING, [*factors, int(context)], strict=True))}
    config |= {"hidden_act": "silu", "rope_theta": shape.rope_theta, "rope_scaling": scaling, "attention_dropout": 0.0}
    return config | ({"use_sliding_window": False} if shape.architecture == "qwen3" else {})
