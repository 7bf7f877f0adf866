"""The settings of the programs beside training, and which settings imply others; training has its own in config.py."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from nanogpt.config import CHECKS, PRESETS, Machine, Settings, TrainConfig, is_there

CHECKS |= {
    **dict.fromkeys("top_p min_p mfu".split(), CHECKS["decay_share"]),
    **dict.fromkeys("num_samples steps gpus rows queue timeout max_body".split(), CHECKS["batch_size"]),
    "port": (lambda v: 0 <= v <= 65535, "0 to 65535"),
    "tokenizer": (
        lambda v: v in ("char", "byte", "gpt2") or (re.fullmatch(r"bpe:\d+", v) and int(v[4:]) > 256) or is_there(v),
        "char, byte, gpt2, bpe:N (from 257), a tokenizer.json, a folder with one, or ORGANISATION/NAME",
    ),
    "val_fraction": (lambda v: v != "auto" and 0 < v < 1, "auto or a value between 0 and 1"),
}


class PlanConfig(TrainConfig):
    """Estimate what a training run needs: memory by part, time, and what to change if it does not fit."""

    gpu: str = ""  # H100, H200, A100, RTX 4090, …; empty: this machine
    gpus: int = 1  # on all nodes together
    gpu_memory: float = 0.0  # GB per GPU; 0: as in its data sheet
    mfu: float = 0.4  # share of the peak FLOP/s that training reaches; 0.3 to 0.5 is usual on GPUs


class BenchConfig(TrainConfig):
    """Time the training step."""

    real_data: bool = True  # batches of the data set; False: random tokens, to leave out the loader
    warmup_steps: int = 10  # not timed: allocation, compilation, clock speeds
    steps: int = 20  # timed
    profile: bool = False  # profile 5 more steps: a table of operators, a trace in bench_log/ for chrome://tracing
    gradient_accumulation_steps: int = 1  # micro-batches per step


class SourceConfig(Settings):
    """Where a trained model comes from."""

    # --- model ---
    out_dir: str = "out"  # run folder
    init_from: str = "resume"  # resume: the run in out_dir; gpt2 (-medium, -large, -xl), ORGANISATION/NAME on the
    # Hugging Face hub, a folder in its format, a checkpoint, or a .gguf file
    checkpoint: str = "auto"  # best (lowest validation loss), last, or a file; auto: best, else last
    add_bos: bool | Literal["auto"] = "auto"  # begin prompts with the start token; auto: as the model's own tokenizer


class SampleConfig(SourceConfig, Machine):
    """Generate text with a trained model."""

    start: str = "\n"  # prompt; FILE:prompt.txt reads it from a file; <|endoftext|> stands for the special token
    num_samples: int = 10  # drawn in one batch; the first is printed while it grows
    max_new_tokens: int = 500  # length of each sample
    temperature: float = 0.8  # 1: the model's own distribution, lower: fewer surprises, 0: greedy
    top_k: int = 200  # draw from the k most probable tokens; 0: from all
    top_p: float = 1.0  # draw from the most probable tokens that together reach this probability; 1: from all
    min_p: float = 0.0  # drop tokens less probable than this share of the highest probability
    stop: list[str] = field(default_factory=list)  # texts that end a sample and are left out, such as '\n\n'
    stop_at_eos: bool = True  # end a sample at the model's end token, such as <|endoftext|>
    window: Literal["half", "slide"] = "half"  # a full context loses its older half; slide: one token (slow, exact)
    logprobs: int = -1  # list the logprob of each new token and of this many alternatives; -1: no
    int8: bool = False  # quantize weights to 8 bits with a scale per row
    cuda_graph: bool = False  # run each decoding step as one CUDA graph; not measured yet; only slower without CUDA
    compile: bool = False  # has no effect: decoding is faster without; the original's command lines have it


class ChatConfig(SourceConfig, Machine):
    """Talk to a chat model in the terminal."""

    system: str = ""  # what the model is told before the conversation; empty: what its template says
    max_new_tokens: int = 1000  # of an answer
    temperature: float = 0.7  # 1: the model's own distribution, lower: fewer surprises, 0: greedy
    top_k: int = 0  # draw from the k most probable tokens; 0: from all
    top_p: float = 0.9  # draw from the most probable tokens that together reach this probability; 1: from all
    min_p: float = 0.0  # drop tokens less probable than this share of the highest probability
    int8: bool = False  # quantize weights to 8 bits with a scale per row


class ServeConfig(SourceConfig, Machine):
    """Serve a trained model: OpenAI's API, and a page to play with."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all addresses; then set an api_key
    port: int = 8000  # 0: any free one
    api_key: str = ""  # what clients must send; better in the environment as NANOGPT_API_KEY; empty: nothing
    allow_host: list[str] = field(default_factory=list)  # other names of this machine, such as a proxy's
    name: str = ""  # of the model; empty: its folder's
    rows: int = 16  # completions computed in one batch
    queue: int = 256  # completions that may wait for a row; more are answered with 429
    max_new_tokens: int = 4096  # per completion
    timeout: int = 300  # seconds that a completion may wait, and as many that it may run
    max_body: int = 1_000_000  # bytes per request
    block_size: int = 0  # context length, to make it shorter than the model's; 0: the model's
    cuda_graph: bool = False  # run each decoding step as one CUDA graph; not measured yet; only slower without CUDA
    int8: bool = False  # quantize weights to 8 bits with a scale per row


class EvalConfig(SourceConfig, Machine):
    """Measure a trained model: its exact loss over a whole split, and public benchmarks."""

    tasks: list[str] = field(default_factory=list)  # loss, pydoc (held-out answers about Python's library), lambada,
    # hellaswag; any other name is a task of lm-eval (pip install lm-eval): --tasks=arc_easy,piqa; none: loss
    lambada: str = ""  # a file like lambada_test.jsonl; empty: OpenAI's, downloaded once
    hellaswag: str = ""  # a file like hellaswag_val.jsonl; empty: the published one, downloaded once
    limit: int = 0  # only the first so many examples of a benchmark; 0: all
    include_path: str = ""  # folder with more tasks in the format of lm-eval
    data_dir: str = ""  # folder of the data sets; empty: as in training
    dataset: str = ""  # empty: as in training
    split: Literal["train", "val"] = "val"  # part of the data set
    compile: bool = False  # torch.compile
    batch_size: int = 32  # windows or examples at a time; changes the speed, not the result
    block_size: int = 0  # window length; 0: the model's


class ExportConfig(SourceConfig):
    """Write a trained model for other programs: transformers and vLLM, llama.cpp, peft."""

    to: Literal["hf", "gguf", "peft"] = "hf"  # folder for transformers, file for llama.cpp, folder of adapters for peft
    output: str = ""  # folder or file to write
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"  # of matrices; q8_0: 8 bits, only for gguf
    force: bool = False  # replace an earlier export

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.output:
            yield "output is missing: name the folder or file to write, --output=PATH"
        if self.dtype == "q8_0" and self.to != "gguf":
            yield f"dtype={self.dtype}: --to={self.to} cannot hold it; --dtype=float32 always works"


class PrepareConfig(Settings):
    """Turn text into a data set: train.bin, val.bin and dataset.json in data_dir/NAME.

    NAME is a known data set (pystdlib, the Python library of this machine, and pydoc, conversations about it, need no
    network; shakespeare_char; shakespeare; tinystories; openwebtext; fineweb-edu; climbmix), or any name together with
    --input.
    """

    name: str = ""  # of the data set; also the first word after `prepare`
    input: list[str] = field(default_factory=list)  # files, folders, 'patterns*', or ORGANISATION/NAME of a data set on
    # the Hugging Face hub; any text, .jsonl or .parquet, also .gz and .zst
    field: str = "text"  # jsonl field or parquet column that holds the text
    chat: bool = False  # conversations: jsonl rows with OpenAI's `messages`, or with a `prompt` and its `completion`
    separator: str = ""  # what separates documents in a text file, such as '\n\n'; empty: a file is one document
    limit: int = 0  # only the first so many documents; 0: all
    data_dir: str = "data"  # folder of the data sets
    tokenizer: str = ""  # char, byte, gpt2, bpe:N (trained on this text), a tokenizer.json, a folder with one, a model
    # (a run, a .pt or a .gguf file), or ORGANISATION/NAME on the Hugging Face hub; empty: the known data set's, gpt2
    # for your own text
    val_fraction: float | Literal["auto"] = "auto"  # share for validation; auto: the known data set's, 0.05 for yours
    num_proc: int = 0  # processes that tokenize; 0: one per core
    verbosity: Literal["quiet", "normal", "debug"] = "normal"  # of log lines; quiet: only results and warnings

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.chat and self.tokenizer == "char":
            yield "tokenizer=char: templates of conversations need other characters, too; use --tokenizer=byte"
        if not self.name:
            yield "which data set? for example: nanogpt prepare pystdlib"


class PlotConfig(Settings):
    """Draw the curves of one or several runs, and compare them."""

    out_dir: list[str] = field(default_factory=lambda: ["out"])  # run folders
    output: str = ""  # .png, .svg or .pdf to write; empty: loss.png in the run folder, comparison.png for several
    loss: float = 0.0  # compare the time to this validation loss; 0: to the worst of the runs' best ones

    def problems(self) -> Iterator[str]:
        if self.output and not self.output.endswith((".png", ".svg", ".pdf")):
            yield f"output={self.output}: expected a name that ends in .png, .svg or .pdf"


class RunsConfig(Settings):
    """List the runs in a folder and below: state, steps, best loss, age."""

    folder: str = "."  # where to look
    previous: bool = False  # also the runs that later ones moved aside: previous-1, previous-2, …


class InspectConfig(SourceConfig):
    """Look inside a model: its parameters, and for a text the loss of each token and the attention of each head."""

    text: str = "The quick brown fox jumps over the lazy dog."  # FILE:text.txt reads it from a file
    output: str = ""  # folder for attention.png; empty: the run folder


# What optimizer=muon sets besides; 0 means: derive it from the width, or from the length of the run.
_MUON = {"learning_rate": 0.0, "muon_momentum": 0.0, "beta1": 0.8, "weight_decay": 0.0, "min_lr": 0.0,
         "schedule": "wsd", "decay_share": 0.9, "warmup_iters": 0}  # fmt: skip

# For `nanogpt train FILE`: up to so many bytes of text, with this vocabulary, a model of this shape for so many steps.
_BY_SIZE = [
    (2e4, "byte", {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 64, "max_iters": 100}),
    (2e5, "bpe:512", {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 64, "max_iters": 150}),
    (2e6, "bpe:1024", {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 128, "max_iters": 400}),
    (3e7, "bpe:4096", {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "max_iters": 2000}),
    (1e99, "bpe:16384", {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 512, "max_iters": 10_000}),
]


def recipe_for_text(path: str, max_iters: object = None) -> tuple[str, dict[str, Any]]:
    """Return the vocabulary, and the settings of a small model that suits a text file, for `max_iters` if given."""
    n_bytes = Path(path).stat().st_size if Path(path).is_file() else 0
    tokenizer, sizes = next((tokenizer, sizes) for most, tokenizer, sizes in _BY_SIZE if n_bytes <= most)
    with suppress(ValueError, OverflowError):  # None, and what convert() reports
        sizes = {**sizes, "max_iters": int(float(str(max_iters)))}
    out_dir = f"out-{Path(path).name.partition('.')[0]}"
    return tokenizer, {
        **_MUON, **sizes, "optimizer": "muon", "lr_decay_iters": sizes["max_iters"], "architecture": "qwen3",
        "zero_init": True, "out_dir": out_dir, "data_dir": out_dir, "dataset": "data", "sampling": "epoch",
        "batch_size": 32, "gradient_accumulation_steps": 1, "log_interval": 20, "eval_iters": 10,
        "eval_interval": sizes["max_iters"] // 4 or 1, "always_save_checkpoint": False,
    }  # fmt: skip


def implied_settings(found: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return what text, model and optimizer in `found` also set: a recipe, a shape, the rates that suit Muon."""
    implied = recipe_for_text(found["text"], found.get("max_iters"))[1] if found.get("text") else {}
    implied |= PRESETS.get(str(found.get("model")), {})
    optimizer = {**before, **implied}["optimizer"]
    chosen = found.get("optimizer", optimizer)
    if chosen != optimizer and "muon" in (chosen, optimizer):
        implied |= _MUON if chosen == "muon" else {name: getattr(TrainConfig, name) for name in _MUON}
    return implied
