"""Low-rank adapters: finetuning a model by a small change to each of its matrices (LoRA, Hu et al. 2021).

The weights W of the base are frozen and need neither gradients nor moments. An adapter adds B A x to W x, where A has
`rank` rows and B as many columns. Queries, keys and values share a matrix here, and so do the two halves of SwiGLU;
each of these linear maps gets an A and a B of its own, as in models where they lie apart.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.config import TrainConfig, is_hub_name
from nanogpt.errors import ConfigError
from nanogpt.files import write_json
from nanogpt.huggingface import layout
from nanogpt.model import GPT, linear_maps
from nanogpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Adapter:
    """What a checkpoint says of its adapters."""

    rank: int
    alpha: float
    targets: str  # attention, mlp or all
    base: str  # as --init_from names it
    sha256: str  # of the base's weights


class LoRALinear(nn.Module):
    """A Linear with an adapter for each of the linear maps in it; `cuts`: the rows of each."""

    def __init__(self, base: nn.Linear, cuts: list[int], rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.cuts, self.scale = base.weight, base.bias, cuts, scale
        self.lora_a = nn.Parameter(self.weight.new_empty(len(cuts) * rank, self.weight.shape[1]))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.weight.shape[0], rank))  # starts as the base
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as in the paper's code and in PEFT

    def maps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield A (rank, inputs) and B (outputs, rank) of each linear map."""
        return zip(self.lora_a.chunk(len(self.cuts)), self.lora_b.split(self.cuts), strict=True)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + scale B A x."""
        change = torch.cat([F.linear(F.linear(x, a), b) for a, b in self.maps()], dim=-1)
        return F.linear(x, self.weight, self.bias) + self.scale * change


def adapt(model: GPT, config: TrainConfig, before: Tokenizer, after: Tokenizer) -> None:
    """Make `model` ready for finetuning: with rows for tokens that only the tokenizer `after` has, with new adapters.

    New tokens begin near the mean of the others.
    """
    sha256 = digest(model) if config.lora_rank else ""
    if after.vocab_size > model.config.vocab_size:
        grow_vocab(model, after.padded_vocab_size)
    if config.lora_rank:
        alpha = config.lora_alpha or 2.0 * config.lora_rank
        base = str(Path(config.init_from).resolve()) if Path(config.init_from).exists() else config.init_from
        adapter = Adapter(config.lora_rank, alpha, config.lora_targets, base, sha256)
        add_adapters(model, adapter, after.vocab_size > before.vocab_size)


@torch.no_grad()
def grow_vocab(model: GPT, vocab_size: int) -> None:
    """Append rows to embedding and head, up to `vocab_size`."""
    embedding, head = model.transformer.wte, model.lm_head
    modules: list[Any] = [embedding] if model.config.tied_head else [embedding, head]
    for module in modules:
        new = module.weight.mean(dim=0, keepdim=True).expand(vocab_size - len(module.weight), -1)
        module.weight = nn.Parameter(torch.cat([module.weight, new + 0.02 * torch.randn_like(new)]))
    model.tie_weights()
    embedding.num_embeddings = head.out_features = model.config.vocab_size = vocab_size


def add_adapters(model: GPT, adapter: Adapter, has_new_tokens: bool = False) -> None:
    """Freeze `model`, and give the matrices of its blocks that `adapter` names new adapters.

    has_new_tokens: embedding and head have rows to be learned, so they are trained, too.
    """
    model.requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(has_new_tokens)
    model.lm_head.weight.requires_grad_(has_new_tokens)
    model.adapter = adapter
    for block in model.transformer.h:
        for name, cuts in linear_maps(model.config).items():
            kind = "attention" if name.startswith("attn.") else "mlp"
            if adapter.targets in ("all", kind):
                parent, _, last = name.rpartition(".")
                linear: Any = block.get_submodule(name)
                adapted = LoRALinear(linear, cuts, adapter.rank, adapter.alpha / adapter.rank)
                setattr(block.get_submodule(parent), last, adapted)


@torch.no_grad()
def merge_adapters(model: GPT) -> GPT:
    """Return a model with plain Linears, in whose weights the adapters are added."""
    weights = {name: weight for name, weight in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            weights[f"{name}.weight"] = layer.weight + layer.scale * torch.cat([b @ a for a, b in layer.maps()])
    return GPT.from_weights(model.config, weights)


def digest(model: GPT) -> str:
    """Return the SHA-256 of a model's weights, by which an adapter knows its base."""
    total = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        total.update(name.encode())
        total.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_peft(folder: Path, model: GPT) -> None:
    """Write the adapters of `model` as the library peft loads them, onto their base in transformers.

    What lies in one matrix there too, as GPT-2's queries, keys and values, gets one adapter of higher rank. Raises
    `ConfigError` if there are none, or if the embedding was trained as well.
    """
    from safetensors.torch import save_file

    if not model.adapter or model.lm_head.weight.requires_grad:
        raise ConfigError("--to=peft: this model has no adapters, or its embedding was trained with them; use --to=hf")
    parts = dict[str, tuple[Tensor, Tensor]]()
    for ours, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        theirs = [part.theirs.removesuffix(".weight") for part in layout(model.config) if part.ours == f"{ours}.weight"]
        maps = list(layer.maps())
        if len(theirs) < len(maps):
            maps = [(layer.lora_a, torch.block_diag(*(b for _, b in maps)))]  # type: ignore[no-untyped-call]
        parts |= zip(theirs, maps, strict=True)
    rank, base = max(len(a) for a, _ in parts.values()), model.adapter.base
    base = base if is_hub_name(base) else Path(base).name  # no path of this machine
    tensors = {}
    for name, (a, b) in parts.items():
        zeros = rank - len(a)  # which fill up the others
        tensors[f"base_model.model.{name}.lora_A.weight"] = F.pad(a.detach(), (0, 0, 0, zeros)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = F.pad(b.detach(), (0, zeros)).contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": rank, "lora_alpha": rank * model.adapter.alpha / model.adapter.rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name if model.config.is_gpt2 else name.rpartition(".")[2] for name in parts}),
        "fan_in_fan_out": model.config.is_gpt2,  # its matrices are (inputs, outputs)
        "inference_mode": True,
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
