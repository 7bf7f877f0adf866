"""Every knob of training: its name, its type, its default and the reason for it. Those of other programs: programs.py.

This is the only place where a setting is declared: command line, config files, `--help`, validation and the
saved `config.json` are derived from it (see settings.py). The comment behind a field is its help text.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanogpt.settings import Settings, out_of_range
from nanogpt.shape import GPT2_NAMES, PRESETS, GPTConfig, Shape

__all__ = ["PRESETS", "GPTConfig"]  # which people import from here


@dataclass
class Machine(Settings):
    """Where a program computes; shared by all programs that run a model."""

    # --- machine ---
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes the first there is of cuda, mps, cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products; weights stay float32;
    # auto: bfloat16 where that is fast (CUDA GPUs from 2020 on, CPUs with AMX), float16 on older GPUs, else float32
    compile: bool | Literal["auto"] = "auto"  # torch.compile: a minute at first, then faster; auto: for long runs
    seed: int = 1337  # of everything random
    verbosity: Literal["quiet", "normal", "debug"] = "normal"  # of log lines; quiet: results and warnings only

    def problems(self) -> Iterator[str]:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            yield f"device={self.device!r}: expected auto, cpu, mps, cuda or cuda:N"
        if not 0 <= self.seed < 2**63:
            yield f"seed={self.seed}: expected a value from 0 to 2**63 - 1"


@dataclass
class _Network(Shape, Machine):
    """A new network; shared by all programs that train one."""

    # --- model ---
    model: str = ""  # a shape by name, which sets what differs below: gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    # llama-3.2-1b, llama-3.2-3b, llama-2-7b, llama-3.1-8b, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b
    bias: bool = False  # in Linears and LayerNorms; GPT-2 has them, without is a bit better and faster
    zero_init: bool = False  # c_proj starts at zero, so every block as if it were not there; helps Muon
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: far less memory, a third more time

    @classmethod
    def implied(cls, name: str, value: object, before: object) -> dict[str, Any]:
        """What setting `name` to `value` sets as well: a model's name stands for its shape."""
        return PRESETS.get(str(value), {}) if name == "model" else {}

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The shape of a new network for a vocabulary of `vocab_size` entries."""
        names = {each.name for each in dataclasses.fields(GPTConfig)}
        settings = {name: value for name, value in vars(self).items() if name in names}
        return GPTConfig(vocab_size=vocab_size, **settings)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.model and self.model not in PRESETS:
            yield f"model={self.model!r}: expected one of {', '.join(PRESETS)}"
        yield from self.model_config(vocab_size=1).problems()


_FILES = (".pt", ".safetensors", ".gguf", ".json")


def is_hub_name(text: str) -> bool:
    """Whether `text` reads like the name of a repository on the Hugging Face hub, and not like a path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text)) and not text.endswith(_FILES)


def init_from_problems(init_from: str, *others: str) -> Iterator[str]:
    """What is wrong with a setting `init_from`."""
    words = [*others, "resume", *GPT2_NAMES]
    if init_from in words or Path(init_from).exists() or is_hub_name(init_from):
        return
    if "/" in init_from or init_from.endswith(_FILES):
        yield f"init_from={init_from!r}: there is no such file or folder"
    else:
        yield (
            f"init_from={init_from!r}: expected {', '.join(words)}, ORGANISATION/NAME of a model on the Hugging Face "
            "hub, or an existing folder or checkpoint"
        )


def updates_and_seconds(interval: str) -> tuple[int, float] | None:
    """What `500` (updates) or `30m` (minutes) stands for, the other being 0; None if it is neither."""
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", interval)
    return (int(found[1] or 0), 60 * float(found[2] or 0)) if found else None


_MUON = {
    "learning_rate": 0.0, "muon_momentum": 0.0, "beta1": 0.8, "weight_decay": 0.0,
    "schedule": "wsd", "decay_share": 0.9, "warmup_iters": 0, "min_lr": 0.0,
}  # fmt: skip


@dataclass
class TrainConfig(_Network):
    """Train a GPT from scratch, continue a run, or finetune GPT-2.

    The defaults train GPT-2 (124M) on OpenWebText; config/ holds smaller recipes.
    """

    # --- run ---
    out_dir: str = "out"  # run folder: config.json, metrics.jsonl, ckpt.pt (newest), best.pt (lowest validation loss)
    init_from: str = "scratch"  # scratch; resume: continue the run in out_dir; gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    # ORGANISATION/NAME on the Hugging Face hub or a folder in its format (GPT-2, Llama, Qwen3), another run's folder or
    # checkpoint: finetune those
    resume: Literal["never", "auto"] = "never"  # auto: go on with the run in out_dir if there is one, else start as
    # init_from says; one command for restart loops and job arrays
    max_iters: int = 600_000  # number of updates
    eval_interval: int = 2000  # evaluate, and perhaps save, every so many updates; once more at the end in any case
    eval_iters: int = 200  # batches of each split per evaluation; the same ones every time
    eval_only: bool = False  # evaluate once, write nothing, exit
    log_interval: int = 1  # print and record every so many updates; reading the loss makes a GPU wait
    always_save_checkpoint: bool = True  # write ckpt.pt at every evaluation; False: when it improved, and at the end
    checkpoint_interval: str = "30m"  # also write ckpt.pt every so many updates (500), or minutes (30m); 0: do not
    keep_checkpoints: int = 2  # ckpt.pt and those before it, ckpt.prev.pt, ckpt.prev2.pt, …: if one is damaged, the
    # one before it counts
    max_bad_steps: int = 20  # updates in a row that may be skipped because loss or gradient is not finite
    health_interval: int = 200  # record clipping, gradients and updates by layer, largest activations, memory every so
    # many updates; 0: never
    sample_interval: int = 1  # show a little text of the model at every so many-th evaluation; 0: never
    plot: bool = True  # draw the curves into loss.png at the end, where matplotlib is installed
    dry_run: bool = False  # print the resolved config and what follows from it, then exit

    # --- Weights & Biases ---
    wandb_log: bool = False  # also send the metrics there
    wandb_project: str = "owt"  # project that the run is shown in
    wandb_run_name: str = "gpt2"  # name of the run

    # --- TensorBoard ---
    tensorboard_log: bool = False  # also write the metrics to out_dir/tensorboard

    # --- several processes (torchrun) ---
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # how they talk; auto: nccl on CUDA, gloo elsewhere
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"  # ddp: each holds the whole model; fsdp: each holds a share of
    # it; auto: ddp, unless weights, gradients and AdamW's averages would fill more than half of a GPU
    dist_timeout: float = 10.0  # minutes that one waits for the others before it gives up; at least 1 at the start

    # --- data ---
    data_dir: str = "data"  # folder of the data sets
    dataset: str = "openwebtext"  # folder below data_dir that holds train.bin and val.bin
    gradient_accumulation_steps: int = 5 * 8  # micro-batches per update, over all processes together
    batch_size: int = 12  # rows of a micro-batch; as many as fit into memory
    sampling: Literal["random", "epoch"] = "random"  # of windows: drawn anew every time, or each once per epoch
    mask_documents: bool = False  # a token sees only its own document, and positions restart with it; on CUDA fast
    # where the model is compiled and its attention has no dropout

    # --- optimizer ---
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, with adamw for the rest; sets
    # learning_rate=0 muon_momentum=0 beta1=0.8 weight_decay=0 schedule=wsd decay_share=0.9 warmup_iters=0 min_lr=0
    learning_rate: float = 6e-4  # peak, of AdamW; 0 with muon: follows from n_embd
    weight_decay: float = 1e-1  # on matrices only
    beta1: float = 0.9  # how slowly the average of the gradient forgets
    beta2: float = 0.95  # the same for its square; 0.99 where few tokens make a batch
    muon_lr: float = 0.025  # peak, of Muon, good at any width; warms up and decays like the other
    muon_momentum: float = 0.0  # how slowly Muon's average of the gradient forgets; 0: follows from lr_decay_iters
    grad_clip: float = 1.0  # clip gradients at this total norm; 0: never

    # --- learning-rate schedule ---
    decay_lr: bool = True  # warm up and decay; False: learning_rate throughout
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm up, stay at the peak, decay in a straight line at the end
    decay_share: float = 0.3  # wsd: the share of lr_decay_iters in which it decays
    warmup_iters: int = 2000  # updates of linear warm-up
    lr_decay_iters: int = 600_000  # updates until min_lr is reached; usually max_iters (Chinchilla)
    min_lr: float = 6e-5  # floor of the decay; usually learning_rate / 10 (Chinchilla)

    @classmethod
    def implied(cls, name: str, value: object, before: object) -> dict[str, Any]:
        """What setting `name` to `value` sets as well: Muon wants other rates than AdamW, and takes them with it."""
        if name != "optimizer":
            return super().implied(name, value, before)
        if value == before:
            return {}
        return _MUON if value == "muon" else {each: getattr(cls, each) for each in _MUON}

    @property
    def rows(self) -> int:
        """Rows of the global batch: one update sees this many windows of `block_size` tokens."""
        return self.gradient_accumulation_steps * self.batch_size

    def with_derived_rates(self) -> "TrainConfig":
        """The same with what follows from shape and length where it says 0: Muon's momentum, AdamW's rate beside it.

        Measured from 64 to 256 channels and from 165 to 500 updates (docs/LOG.md), carried on from there. Muon's own
        rate needs no rule: whatever the width, an update has the same singular values.
        """
        if self.optimizer != "muon":
            return self
        rate = round(1e-2 * (128 / self.n_embd) ** 0.5, 4)
        # a short run cannot wait for a long memory: what it remembers is a share of its length
        momentum = round(min(0.95, 1 - max(self.lr_decay_iters, 1) ** -0.37), 2)
        return dataclasses.replace(
            self, learning_rate=self.learning_rate or rate, muon_momentum=self.muon_momentum or momentum
        )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.out_dir:
            yield "out_dir is empty: expected a folder"
        counts = "eval_interval eval_iters log_interval gradient_accumulation_steps batch_size"
        yield from out_of_range(self, ">= 1", f"{counts} keep_checkpoints max_bad_steps")
        if not 0 < self.dist_timeout <= 1e6:
            yield f"dist_timeout={self.dist_timeout}: expected minutes"
        rates = "learning_rate min_lr muon_lr weight_decay grad_clip"
        yield from out_of_range(
            self, ">= 0", f"max_iters warmup_iters lr_decay_iters {rates} health_interval sample_interval"
        )
        if not updates_and_seconds(self.checkpoint_interval):
            yield f"checkpoint_interval={self.checkpoint_interval!r}: expected updates, as 500, or minutes, as 30m"
        yield from out_of_range(self, "in [0, 1)", "beta1 beta2 muon_momentum")
        if not 0 < self.decay_share <= 1:
            yield f"decay_share={self.decay_share}: expected a value above 0, up to 1"
        yield from init_from_problems(self.init_from, "scratch")
        if self.optimizer == "adamw" and not self.learning_rate:
            yield "learning_rate=0 follows from the shape with optimizer=muon only; set --learning_rate=6e-4 or another"
        rate = self.with_derived_rates().learning_rate if self.n_embd > 0 else 0.0
        if self.decay_lr and 0 < rate < self.min_lr:
            yield (
                f"min_lr={self.min_lr:g} is above learning_rate={rate:g}, so the rate would rise; "
                f"set --min_lr={rate / 10:g} or --decay_lr=False"
            )


@dataclass
class PlanConfig(TrainConfig):
    """Say what a training run would need: memory by part, time, and what to change if it does not fit."""

    # --- machines ---
    gpu: str = ""  # H100, H200, A100, RTX 4090, …; empty: this machine
    gpus: int = 1  # how many there are, on all nodes together
    nodes: int = 1  # machines
    gpu_memory: float = 0.0  # GB of each; 0: as the data sheet says
    mfu: float = 0.4  # share of the peak that the training reaches; 0.3 to 0.5 is usual for GPUs

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from out_of_range(self, ">= 1", "gpus nodes")
        yield from out_of_range(self, ">= 0", "gpu_memory")
        if not 0 < self.mfu <= 1:
            yield f"mfu={self.mfu}: expected a value above 0, up to 1"
        if self.nodes >= 1 and self.gpus % self.nodes:
            yield f"gpus={self.gpus}, all together, can't be the same number on each of {self.nodes} nodes"


@dataclass
class BenchConfig(_Network):
    """Time the training step: the very function that train.py calls."""

    # --- data ---
    real_data: bool = True  # batches of the data set; False: random tokens made once, to leave the loader out
    data_dir: str = "data"  # folder of the data sets
    dataset: str = "openwebtext"  # folder below data_dir that holds train.bin and val.bin
    batch_size: int = 12  # rows of a step

    # --- measurement ---
    warmup_steps: int = 10  # not timed: allocation, compilation, clocks
    steps: int = 20  # timed
    profile: bool = False  # also profile 5 steps: a table of operators, and a trace in bench_log/ for chrome://tracing

    def train_config(self) -> TrainConfig:
        """The training run whose step is timed."""
        shared = {field.name for field in dataclasses.fields(TrainConfig)}
        settings = {name: value for name, value in vars(self).items() if name in shared}
        return TrainConfig(**settings, gradient_accumulation_steps=1)

    def problems(self) -> Iterator[str]:
        yield from out_of_range(self, ">= 1", "steps")
        yield from out_of_range(self, ">= 0", "warmup_steps")
        yield from self.train_config().problems()
