"""The settings of all programs. Each is declared once, as a dataclass field; the comment behind it is its help text.

Command line, config files, --help, checks and a run's config.json follow from them (see cli.py). No torch in here:
--help has to answer at once.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, dataclass_transform, get_args

# The published models that people train again: all of their shape except vocabulary and context length.
_COLUMNS = "architecture n_layer n_head n_embd n_kv_head head_size n_hidden bias tied_head rope_theta".split()
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(_COLUMNS, shape, strict=True))
    for name, *shape in [
        ("gpt2", "gpt2", 12, 12, 768, 0, 0, 0, True, True, 1e4),  # 124M parameters
        ("gpt2-medium", "gpt2", 24, 16, 1024, 0, 0, 0, True, True, 1e4),  # 355M
        ("gpt2-large", "gpt2", 36, 20, 1280, 0, 0, 0, True, True, 1e4),  # 774M
        ("gpt2-xl", "gpt2", 48, 25, 1600, 0, 0, 0, True, True, 1e4),  # 1558M
        ("llama-3.2-1b", "llama", 16, 32, 2048, 8, 0, 8192, False, True, 5e5),
        ("llama-3.2-3b", "llama", 28, 24, 3072, 8, 128, 8192, False, True, 5e5),
        ("llama-2-7b", "llama", 32, 32, 4096, 32, 0, 11008, False, False, 1e4),
        ("llama-3.1-8b", "llama", 32, 32, 4096, 8, 0, 14336, False, False, 5e5),
        ("qwen3-0.6b", "qwen3", 28, 16, 1024, 8, 128, 3072, False, True, 1e6),
        ("qwen3-1.7b", "qwen3", 28, 16, 2048, 8, 128, 6144, False, True, 1e6),
        ("qwen3-4b", "qwen3", 36, 32, 2560, 8, 128, 9728, False, True, 1e6),
        ("qwen3-8b", "qwen3", 36, 32, 4096, 8, 128, 12288, False, False, 1e6),
    ]
}
GPT2_NAMES = [name for name in PRESETS if name.startswith("gpt2")]  # checkpoints that OpenAI has released
Architecture = Literal["gpt2", "llama", "qwen3"]
Activation = Literal["gelu", "gelu_tanh"]


def is_hub_name(text: str) -> bool:
    """Return whether `text` reads like ORGANISATION/NAME on the Hugging Face hub rather than like a path."""
    is_file = text.endswith((".pt", ".safetensors", ".gguf", ".json"))
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text)) and not is_file


def steps_and_seconds(interval: int | str) -> tuple[int, float] | None:
    """Return (500, 0.0) for "500", steps, and (0, 1800.0) for "30m", minutes; None for anything else."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", str(interval))
    return (int(match[1] or 0), 60 * float(match[2] or 0)) if match else None


def is_there(name: str) -> bool:
    """Return whether `name` is a path that exists, or may be a name on the hub."""
    return bool(name) and (Path(name).exists() or is_hub_name(name))


# What a setting must be, by its name, in every program: a test, and words for the message. Defaults are not tested.
CHECKS: dict[str, tuple[Callable[[Any], object], str]] = {
    **dict.fromkeys(
        "dropout beta1 beta2 muon_momentum context_warmup".split(), (lambda v: 0 <= v < 1, "a value in [0, 1)")
    ),
    **dict.fromkeys(
        """block_size vocab_size n_layer n_head n_embd n_kv_head head_size n_hidden rope_theta batch_size eval_interval
        eval_iters log_interval gradient_accumulation_steps keep_checkpoints max_bad_steps""".split(),
        (lambda v: v >= 1, "a value >= 1"),
    ),
    "activation": (lambda v: v in get_args(Activation), " or ".join(get_args(Activation))),
    "architecture": (lambda v: v in get_args(Architecture), " or ".join(get_args(Architecture))),
    **dict.fromkeys(("decay_share", "activation_memory_budget"), (lambda v: 0 < v <= 1, "a value above 0, up to 1")),
    "checkpoint_interval": (steps_and_seconds, "steps, such as 500, or minutes, such as 30m"),
    "device": (lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v), "auto, cpu, mps, cuda or cuda:N"),
    "init_from": (
        lambda v: v in ("resume", *GPT2_NAMES) or is_there(v),
        f"scratch (train only), resume, {', '.join(GPT2_NAMES)}, ORGANISATION/NAME, an existing folder or checkpoint "
        "(.pt or .gguf)",
    ),
    "model": (lambda v: v in PRESETS, f"one of {', '.join(PRESETS)}"),
    "optimizer": (lambda v: v.isidentifier() and v.islower(), "adamw, muon, or a class of torch.optim in lower case"),
}
_NOT_NEGATIVE = (lambda v: not isinstance(v, int | float) or v >= 0, "a value >= 0")


@dataclass_transform(kw_only_default=True)
@dataclass(kw_only=True)
class Settings:
    """What the settings of all programs have in common. Every subclass is a dataclass."""

    def __init_subclass__(cls) -> None:
        dataclass(kw_only=True)(cls)

    def problems(self) -> Iterator[str]:
        for each in fields(self):
            value = getattr(self, each.name)
            test, expected = CHECKS.get(each.name, _NOT_NEGATIVE)
            if value != each.default and not test(value):
                yield f"{each.name}={value!r}: expected {expected}"


class Shape(Settings):
    """The part of a network's shape that can be chosen for training."""

    # --- model ---
    block_size: int = 1024  # context length in tokens
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels; a multiple of n_head
    dropout: float = 0.0  # 0 for pretraining, 0.1 or more for finetuning or several epochs over little data
    bias: bool = True  # in Linears and LayerNorms; True: like GPT-2, False: a bit better and faster
    architecture: Architecture = "gpt2"  # gpt2, llama (RMSNorm, RoPE, SwiGLU) or qwen3 (the same with QK norm)
    activation: Activation = "gelu"  # of gpt2's MLP: gelu, or gelu_tanh as in OpenAI's checkpoints
    n_kv_head: int = 0  # llama, qwen3: heads of keys and values (grouped-query attention); 0: n_head
    head_size: int = 0  # llama, qwen3: channels per head; 0: n_embd / n_head
    n_hidden: int = 0  # hidden channels of the MLP; 0: 4 n_embd, in llama and qwen3 8/3 n_embd rounded up to 64s
    tied_head: bool = True  # the output head shares the token embedding's weights: better for small models
    rope_theta: float = 10_000.0  # llama, qwen3: base of the rotary embedding; larger for long contexts


class GPTConfig(Shape):
    """The complete shape of a network: everything that the meaning of its weights depends on."""

    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for efficiency
    out_bias: bool | Literal["auto"] = "auto"  # in attention's output Linear; auto: as `bias`; Qwen2 has none there
    mlp_bias: bool | Literal["auto"] = "auto"  # in the MLP's Linears; auto: as `bias`, never in qwen3
    norm_eps: float = 1e-5  # added to the variance in LayerNorm and RMSNorm
    rope_scaling: list[float] = field(default_factory=list)  # Llama 3's: factor, low and high freq_factor, old context

    def __post_init__(self) -> None:
        """Derive the fields that are 0 or auto."""
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // max(self.n_head, 1)
        of_swiglu = 64 * math.ceil(8 * self.n_embd / (3 * 64))  # 8/3 n_embd, rounded up to a multiple of 64
        self.n_hidden = self.n_hidden or (4 * self.n_embd if self.is_gpt2 else of_swiglu)
        if self.out_bias == "auto":
            self.out_bias = self.bias
        if self.mlp_bias == "auto":
            self.mlp_bias = self.bias and self.architecture != "qwen3"

    @property
    def is_gpt2(self) -> bool:
        return self.architecture == "gpt2"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.n_head < 1 or self.n_kv_head < 1:
            return
        if self.n_embd % self.n_head and self.head_size == self.n_embd // self.n_head:
            yield f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}"
        elif self.is_gpt2 and self.head_size * self.n_head != self.n_embd:
            yield f"head_size={self.head_size}: GPT-2's heads have n_embd / n_head; others need --architecture=llama"
        if self.n_head % self.n_kv_head:
            yield f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}"
        elif self.is_gpt2 and self.n_kv_head != self.n_head:
            yield f"n_kv_head={self.n_kv_head}: GPT-2 has n_head={self.n_head}; others need --architecture=llama"
        if not self.is_gpt2 and self.head_size % 2:
            yield f"head_size={self.head_size} must be even: RoPE rotates pairs of channels"


class Machine(Settings):
    """Where a program computes."""

    # --- machine ---
    device: str = "auto"  # cpu, cuda, cuda:1 or mps; auto: the first available of cuda, mps, cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matmuls; auto: bfloat16 where fast,
    # float16 on older GPUs, else float32; trained weights are always float32
    seed: int = 1337  # of all random numbers
    verbosity: Literal["quiet", "normal", "debug"] = "normal"  # of log lines; quiet: only results and warnings


class TrainConfig(Shape, Machine):
    """Train a GPT from scratch, resume a run, or finetune a model. The defaults train GPT-2 (124M) on OpenWebText."""

    # --- run ---
    out_dir: str = "out"  # run folder: config.json, metrics.jsonl, ckpt.pt (newest), best.pt (lowest validation loss)
    init_from: str = "scratch"  # scratch; resume: continue the run in out_dir; to finetune: gpt2 (or -medium, -large,
    # -xl), ORGANISATION/NAME on the Hugging Face hub, a folder in its format, a .gguf file, another run or checkpoint
    resume: Literal["never", "auto"] = "never"  # auto: resume the run in out_dir if there is one; for restart loops
    max_iters: int = 600_000  # number of steps
    eval_interval: int = 2000  # evaluate every so many steps, and at the end
    eval_iters: int = 200  # batches of each split per evaluation, the same every time
    eval_only: bool = False  # evaluate once and exit; writes nothing
    log_interval: int = 1  # print and record every so many steps; reading the loss makes a GPU wait
    always_save_checkpoint: bool = True  # save at every evaluation; False: when the loss improved, and at the end
    checkpoint_interval: int | str = "30m"  # save also every so many steps (500) or minutes (30m); 0: at evaluations
    keep_checkpoints: int = 2  # how many: ckpt.pt, ckpt.prev.pt, …; an older one is used if the newest is damaged
    max_bad_steps: int = 20  # stop after so many steps in a row, at most twice as many, of non-finite loss or gradient
    sample_interval: int = 1  # print a short sample at every so many-th evaluation; 0: never
    plot: bool = True  # draw loss.png at evaluations, at most every two minutes, and at the end; needs matplotlib
    dry_run: bool = False  # print the resolved settings and what follows from them, then exit
    # --- trackers ---
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = "owt"  # project there
    wandb_run_name: str = "gpt2"  # name of the run there
    tensorboard_log: bool = False  # also log to out_dir/tensorboard
    # --- several processes (torchrun) ---
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # auto: nccl on CUDA, else gloo
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"  # auto: fsdp if weights, gradients and moments fill half a GPU
    shard_group: int = 0  # fsdp: shard within groups of so many processes, replicate between them (HSDP); 0: one group
    gather_once: bool = False  # fsdp: exchange once per step, not per micro-batch; 6 more bytes a parameter in bfloat16
    dist_timeout: float = 10.0  # minutes that a process waits for the others
    # --- data ---
    data_dir: str = "data"  # folder of the data sets
    dataset: str = "openwebtext"  # folder in data_dir with train.bin and val.bin
    text: str = ""  # train a small model on this text file, with settings that suit it; in short: nanogpt train FILE
    gradient_accumulation_steps: int = 5 * 8  # micro-batches per step, over all processes together
    batch_size: int = 12  # rows per micro-batch
    sampling: Literal["random", "epoch"] = "random"  # windows at random, or each window once per epoch
    context_warmup: float = 0.0  # share of lr_decay_iters with shorter contexts and as many more rows: 1/4, then 1/2
    mask_documents: bool = False  # attention and positions stay within a document; on CUDA fast if compiled, no dropout
    # --- optimizer ---
    optimizer: str = "adamw"  # adamw, or another class of torch.optim in lower case (adafactor, sgd, …); muon: Muon for
    # the blocks' matrices, AdamW for the rest, with its own rates, schedule and decay, which --dry_run shows
    learning_rate: float = 6e-4  # peak; 0 (muon only): derived from n_embd
    weight_decay: float = 1e-1  # of matrices only
    beta1: float = 0.9  # Adam's beta1: decay rate of the first moment
    beta2: float = 0.95  # Adam's beta2: decay rate of the second moment; 0.99 for batches of few tokens
    muon_lr: float = 0.025  # Muon's peak learning rate, the same for any width
    muon_momentum: float = 0.0  # Muon's momentum; 0: derived from lr_decay_iters
    grad_clip: float = 1.0  # clip the gradient to this norm; 0: never
    # --- learning-rate schedule ---
    decay_lr: bool = True  # warm up and decay; False: constant
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, constant, linear decay at the end
    decay_share: float = 0.3  # wsd: share of lr_decay_iters that decays
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 600_000  # step at which min_lr is reached; usually max_iters (Chinchilla)
    min_lr: float = 6e-5  # usually learning_rate / 10 (Chinchilla)
    # --- model ---
    model: str = ""  # sets the shape by name, before the other settings: gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    # llama-3.2-1b, llama-3.2-3b, llama-2-7b, llama-3.1-8b, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b
    bias: bool = False  # in Linears and LayerNorms; True: like GPT-2, False: a bit better and faster
    lora_rank: int = 0  # train low-rank adapters of this rank beside the frozen weights (LoRA); 0: all weights
    lora_alpha: float = 0.0  # their scale times the rank; 0: twice the rank
    lora_targets: Literal["all", "attention", "mlp"] = "all"  # which matrices of the blocks get adapters
    zero_init: bool = False  # c_proj starts at zero, so that each block starts as the identity; helps Muon
    low_precision_residual: bool = False  # the residual stream in the dtype of matmuls: a fifth less memory traffic
    activation_memory_budget: float = 1.0  # with torch.compile: below 1, recompute the cheapest of the activations
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    # --- machine ---
    compile: bool | Literal["auto"] = "auto"  # torch.compile: a minute to start, then faster; auto: for long runs

    @property
    def global_batch_size(self) -> int:
        """Rows of all processes together: one step sees this many windows of `block_size` tokens."""
        return self.gradient_accumulation_steps * self.batch_size

    def model_config(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(vocab_size=vocab_size, **{each.name: getattr(self, each.name) for each in fields(Shape)})

    def with_muon_rates(self) -> "TrainConfig":
        """Return a copy in which Muon's 0s are replaced by rates that fit width and length (docs/LOG.md)."""
        if self.optimizer != "muon":
            return self
        rate = self.learning_rate or round(1e-2 * (128 / self.n_embd) ** 0.5, 4)
        momentum = self.muon_momentum or round(min(0.95, 1 - max(self.lr_decay_iters, 1) ** -0.37), 2)
        return replace(self, learning_rate=rate, muon_momentum=momentum)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.model_config(vocab_size=1).problems()
        if self.text and not Path(self.text).is_file():
            yield f"text={self.text!r}: there is no such file"
        if self.context_warmup and (self.block_size % 4 or self.sampling == "epoch"):
            yield "context_warmup: expected a block_size that is a multiple of 4, and sampling=random"
        if self.lora_rank and (self.init_from == "scratch" or self.optimizer == "muon"):
            yield "lora_rank: adapters belong to a trained model, --init_from=…, and train with --optimizer=adamw"
        if self.lora_rank and Path(self.out_dir).resolve() in (base := Path(self.init_from).resolve(), *base.parents):
            yield f"out_dir={self.out_dir} is where the adapters' model lies, and would be moved aside; choose another"
        rate = self.with_muon_rates().learning_rate if self.n_embd > 0 else 0.0
        if self.decay_lr and 0 < rate < self.min_lr:
            yield f"min_lr={self.min_lr:g} is above learning_rate={rate:g}: set --min_lr={rate / 10:g} or --decay_lr=0"
