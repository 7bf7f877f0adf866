"""Every knob of the programs that take a trained model, or text, and give something back; see config.py."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from nanogpt.config import Machine, TrainConfig, init_from_problems, is_hub_name
from nanogpt.settings import Settings, out_of_range


@dataclass
class _ModelConfig(Settings):
    """Where a trained model comes from, but for the run."""

    # --- model ---
    init_from: str = "resume"  # resume: the run in out_dir; gpt2, gpt2-medium, gpt2-large, gpt2-xl; ORGANISATION/NAME
    # on the Hugging Face hub, a folder in its format (GPT-2, Llama, Qwen3), or a checkpoint
    checkpoint: str = "auto"  # best (lowest validation loss), last, or a file; auto: best, else last

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from init_from_problems(self.init_from)


@dataclass
class SourceConfig(_ModelConfig):
    """Where a trained model comes from."""

    # --- model ---
    out_dir: str = "out"  # run folder to load from


@dataclass
class TrainedModelConfig(SourceConfig, Machine):
    """A trained model at work."""

    # --- machine ---
    compile: bool | Literal["auto"] = False  # torch.compile: starts later, and pays for long work only


@dataclass
class ExportConfig(SourceConfig):
    """Write a trained model as other programs read it: transformers and vLLM, llama.cpp, the original nanoGPT."""

    # --- export ---
    to: Literal["hf", "gguf", "flat"] = "hf"  # hf: a folder for transformers and what reads its format; gguf: a file
    # for llama.cpp; flat: the original's ckpt.pt
    output: str = ""  # folder or file to write
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"  # of the matrices; q8_0, gguf only: 8 bits
    force: bool = False  # replace what is there, where it is an earlier export

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.output:
            yield "where to? name the folder or file to write: --output=PATH"
        if self.dtype == "q8_0" and self.to != "gguf":
            yield f"dtype=q8_0 is for --to=gguf; --to={self.to} takes float32, float16 and bfloat16"
        if self.dtype != "float32" and self.to == "flat":
            yield f"dtype={self.dtype}: the original's checkpoints hold float32"


@dataclass
class SampleConfig(TrainedModelConfig):
    """Generate text with a trained model."""

    # --- generation ---
    start: str = "\n"  # prompt; FILE:prompt.txt reads one, <|endoftext|> starts a document where the tokenizer has it
    num_samples: int = 10  # drawn side by side; the first is shown while it grows
    max_new_tokens: int = 500  # length of each sample
    temperature: float = 0.8  # 1: the model's own distribution, lower: safer, 0: always the likeliest token
    top_k: int = 200  # draw from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # draw from the fewest likeliest tokens that have this probability together; 1: from all
    min_p: float = 0.0  # leave out tokens with less than this share of the likeliest one's probability
    stop: list[str] = field(default_factory=list)  # text that ends a sample, and is left out; such as '\n\n'
    ignore_end: bool = False  # go on past <|endoftext|>, where a model was trained on several documents
    window: Literal["half", "slide"] = "half"  # beyond block_size; half: forget the older half now and then; slide: see
    # the last block_size tokens every time, as the original does, which is slow: all are computed for every token
    logprobs: int = -1  # list every new token with its log-probability and so many of the likeliest ones; -1: no

    # --- machine ---
    int8: bool = False  # weights in 8 bits, with a factor per row: half of what bfloat16 takes; dtype stays that of the
    # products
    compile: bool | Literal["auto"] = False  # only for the original's sake: decoding is faster without

    @classmethod
    def passed_over(cls, names: Collection[str]) -> set[str]:
        """Of a training run's recipe: what sampling does not know, and what the run in its out_dir began with."""
        known, training = ({each.name for each in fields(config)} for config in (cls, TrainConfig))
        others = (training - known).intersection(names)
        return others | {"init_from"} if others and "out_dir" in names else others

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from out_of_range(self, ">= 1", "num_samples")
        yield from out_of_range(self, ">= 0", "max_new_tokens temperature top_k")
        if not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p}: expected a value above 0, up to 1"
        if not 0 <= self.min_p <= 1:
            yield f"min_p={self.min_p}: expected a value from 0 to 1"
        if self.temperature == 0 and (self.top_p < 1 or self.min_p > 0):
            yield "temperature=0 always takes the likeliest token: top_p and min_p have no say then"
        for text in self.stop:
            try:
                unescaped(text)
            except ValueError as error:
                yield f"stop={text!r}: {error}"
        if "" in self.stop:
            yield "stop='': expected a text"


@dataclass
class ServeConfig(_ModelConfig, Machine):
    """Serve a trained model: an API that OpenAI's clients speak, and a page to play with."""

    # --- runs ---
    out_dir: list[str] = field(default_factory=lambda: ["out"])  # run folders whose curves the page shows; the model is
    # the first one's, unless init_from names another

    # --- address ---
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: all of this machine, then choose an api_key
    port: int = 8000  # 0: any that is free
    api_key: str = ""  # what callers must show; better in the environment as NANOGPT_API_KEY; empty: nothing
    allow_host: list[str] = field(default_factory=list)  # names under which others know this machine, such as a proxy's
    name: str = ""  # of the model; empty: that of its folder

    # --- limits ---
    rows: int = 16  # continuations that are computed side by side
    queue: int = 256  # continuations that may wait for a free row; more are answered with 429
    max_new_tokens: int = 4096  # length of a continuation at most
    timeout: int = 300  # seconds that a continuation may wait for a row, and then as many until it ends
    max_body: int = 1_000_000  # bytes of a request
    block_size: int = 0  # context length, if it is to be shorter than the model's; 0: the model's

    # --- machine ---
    int8: bool = False  # weights in 8 bits, with a factor per row; dtype stays that of the products
    compile: bool | Literal["auto"] = False  # only for the sake of uniformity: decoding is faster without

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.out_dir:
            yield "out_dir is empty: expected run folders"
        yield from out_of_range(self, ">= 1", "rows queue max_new_tokens timeout max_body")
        yield from out_of_range(self, ">= 0", "block_size")
        if not 0 <= self.port <= 65535:
            yield f"port={self.port}: expected 0 to 65535"
        if not (self.api_key.isascii() and self.api_key.isprintable()) or self.api_key != self.api_key.strip():
            yield "api_key, or NANOGPT_API_KEY: expected ASCII characters without line breaks, or blanks around them"


@dataclass
class EvalConfig(TrainedModelConfig):
    """Measure a trained model: its exact loss over a whole split, and public benchmarks."""

    # --- measures ---
    tasks: list[str] = field(default_factory=list)  # of: loss, over all windows of a split that do not overlap;
    # lambada, the last word of a passage; hellaswag, the likeliest of four endings; none named: loss
    lambada: str = ""  # a file like lambada_test.jsonl; empty: OpenAI's, downloaded once
    hellaswag: str = ""  # a file like hellaswag_val.jsonl; empty: the published one, downloaded once
    limit: int = 0  # only the first so many examples of a benchmark; 0: all

    # --- data ---
    data_dir: str = ""  # folder of the data sets; empty: where the run had it
    dataset: str = ""  # empty: the one that the run was trained on
    split: Literal["train", "val"] = "val"  # which part of the data
    batch_size: int = 32  # windows or examples at a time; changes the speed, not the result
    block_size: int = 0  # window length; 0: the model's

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from out_of_range(self, ">= 1", "batch_size")
        yield from out_of_range(self, ">= 0", "block_size limit")
        for task in set(self.tasks) - {"loss", "lambada", "hellaswag"}:
            yield f"tasks={task!r}: expected loss, lambada or hellaswag; for others see docs/models.md"


def unescaped(text: str) -> str:
    r"""A text with its `\n`, `\t`, `\x1e` turned into what they mean. Raises `ValueError`."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


@dataclass
class PrepareConfig(Settings):
    """Turn text into a data set: train.bin, val.bin and dataset.json in data_dir/NAME.

    NAME is yours to choose, with --input; or one of the known data sets: pystdlib (the Python library on this
    machine, no network), shakespeare_char, shakespeare, openwebtext.
    """

    # --- text ---
    name: str = ""  # of the data set; also the first word after `prepare`
    input: list[str] = field(default_factory=list)  # files, folders, 'patterns*', or ORGANISATION/NAME of a data set on
    # the Hugging Face hub; .txt .md .py and other text, .jsonl, .parquet, also .gz and .zst; repeat it, or list several
    field: str = "text"  # where the text is: name of a jsonl field or a parquet column
    separator: str = ""  # what stands between the documents of a text file, such as '\n\n'; empty: a file is one
    limit: int = 0  # take only the first so many documents, for a trial; 0: all

    # --- data set ---
    data_dir: str = "data"  # folder of the data sets
    tokenizer: str = ""  # char, byte, gpt2, bpe:N (learned from this text), a tokenizer.json, the folder of a model or
    # data set, or ORGANISATION/NAME on the Hugging Face hub; empty: the known data set's own, gpt2 for your text
    val_fraction: float | Literal["auto"] = "auto"  # share of the text for validation, by documents if there are
    # enough; auto: the known data set's own, 0.05 for your text
    describe: bool = False  # show what the data set NAME is, and make nothing

    # --- machine ---
    num_proc: int = 0  # processes that tokenize; 0: one per core
    verbosity: Literal["quiet", "normal", "debug"] = "normal"  # of log lines; quiet: results and warnings only

    def problems(self) -> Iterator[str]:
        if not self.name:
            yield "which data set? for example: nanogpt prepare pystdlib"
        if self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            yield f"name={self.name!r}: expected the name of a folder below data_dir; text to read goes into --input"
        if self.val_fraction != "auto" and not 0 < self.val_fraction < 1:
            yield f"val_fraction={self.val_fraction}: expected auto or a value between 0 and 1"
        if "" in self.input:
            yield "input is empty: expected files, folders, patterns or names of data sets"
        try:
            unescaped(self.separator)
        except ValueError as error:
            yield f"separator={self.separator!r}: {error}"
        yield from out_of_range(self, ">= 0", "limit num_proc")
        words = ("", "char", "byte", "gpt2")
        if match := re.fullmatch(r"bpe:(\d+)", self.tokenizer):
            if not 257 <= int(match[1]) <= 10**6:
                yield f"tokenizer={self.tokenizer}: expected bpe:257, the 256 bytes and the end of text, to bpe:1000000"
        elif self.tokenizer not in words and not Path(self.tokenizer).exists() and not is_hub_name(self.tokenizer):
            yield (
                f"tokenizer={self.tokenizer!r}: expected char, byte, gpt2, bpe:N, the path of a tokenizer.json or of a "
                "folder with one, or ORGANISATION/NAME of a model on the Hugging Face hub"
            )


@dataclass
class PlotConfig(Settings):
    """Draw the curves of a run, or of several over each other, and compare them."""

    # --- runs ---
    out_dir: list[str] = field(default_factory=lambda: ["out"])  # run folders
    output: str = ""  # picture to write: .png, .svg or .pdf; empty: loss.png in the run's folder, of
    # several runs comparison.png in this one
    loss: float = 0.0  # of several runs, say how long each took to this validation loss; 0: to the worst of their best

    def problems(self) -> Iterator[str]:
        if self.output and not self.output.endswith((".png", ".svg", ".pdf")):
            yield f"output={self.output}: expected a name that ends in .png, .svg or .pdf"


@dataclass
class RunsConfig(Settings):
    """List the runs in and below a folder: state, updates, best loss, age."""

    # --- runs ---
    folder: str = "."  # where to look
    previous: bool = False  # also those that later runs have set aside, previous-1, previous-2, …


@dataclass
class InspectConfig(SourceConfig):
    """Look inside a model: its parameters, and for a text the loss of every token and where each head looks."""

    # --- text ---
    text: str = "The quick brown fox jumps over the lazy dog."  # FILE:text.txt reads one; not more than the context
    output: str = ""  # folder for tokens.html and attention.png; empty: the run's
