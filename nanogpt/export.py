"""The program behind `nanogpt export`: a trained model as other programs read it."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nanogpt import __version__
from nanogpt.checkpoint import TrainedModel, load_trained, original_arguments, write_file
from nanogpt.device import Device
from nanogpt.errors import ConfigError, UserError
from nanogpt.files import atomic_write, sync_folder
from nanogpt.gguf import MARK, save_gguf
from nanogpt.huggingface import FOLDER, save_pretrained
from nanogpt.model import GPT
from nanogpt.settings import ExportConfig
from nanogpt.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer

log = logging.getLogger(__name__)


def export(config: ExportConfig) -> None:
    """Write `output`, whole or not at all. Raises `UserError` if it is there, or can't hold this model."""
    output = Path(config.output).resolve()
    _check_free(output, config)
    trained = load_trained(config, Device("cpu", "cpu", torch.float32, compile=False))
    model, tokenizer = trained.model, trained.tokenizer
    if config.to == "hf":
        with new_folder(output) as folder:
            save_pretrained(folder, model, tokenizer, getattr(torch, config.dtype), model_card(trained, output.name))
    elif config.to == "gguf":
        with atomic_write(output) as file:
            save_gguf(Path(file.name), output.stem, model, tokenizer, config.dtype)
    else:
        progress = trained.state
        save_original(output, model, tokenizer, _public(trained.config), progress.step, progress.best_val_loss)
        if model.config.activation != "gelu":
            log.warning(
                "the original computes the exact GELU in place of this model's tanh form: losses differ slightly"
            )
    use = {
        "hf": f'AutoModelForCausalLM.from_pretrained("{config.output}")',
        "gguf": f"llama-cli -m {config.output}",
        "flat": "the original's sample.py reads it as out_dir/ckpt.pt; characters need data/NAME/meta.pkl there",
    }
    print(f"wrote {output} from {trained.name}: {use[config.to]}")


def _check_free(output: Path, config: ExportConfig) -> None:
    """Refuse to overwrite anything but an earlier export, and that without `force`."""
    if not output.exists():
        return
    if output.is_dir() != (config.to == "hf"):
        raise ConfigError(
            f"output={output} is a {'folder' if output.is_dir() else 'file'}, --to={config.to} makes the other"
        )
    if output.is_dir() and not any(output.iterdir()):
        return
    if not _is_export(output):
        raise ConfigError(f"output={output} is there already, and not an earlier export; choose another name")
    if not config.force:
        raise ConfigError(f"output={output} is there already; --force replaces it")


def _is_export(output: Path) -> bool:
    """Whether what is there was written by an export, so that it can be written again."""
    if output.is_dir():
        names = {path.name for path in output.iterdir()}
        return "model.safetensors" in names and names <= FOLDER
    with open(output, "rb") as file:
        if (start := file.read(256)).startswith(b"GGUF"):
            return MARK.encode() in start
    try:
        content = torch.load(output, weights_only=True, mmap=True)
    except Exception:  # a file of another kind: torch has many ways to say so
        return False
    config = content.get("config") if isinstance(content, dict) and content.get("optimizer", "") is None else None
    return isinstance(config, dict) and "model_args" in content and "out_dir" not in config  # as `_public` leaves it


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that takes its name, in place of what has it, when the block ends well, and is gone when it doesn't."""
    work, old = (path.with_name(f"{path.name}.{ending}.tmp") for ending in ("new", "old"))
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        for written in (*work.iterdir(), work):
            sync_folder(written)  # and file
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # of an export that was killed here
            path.rename(old)
        try:
            work.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run without what tells of its machine: folders, and names in trackers."""
    private = ("out_dir", "data_dir", "wandb_project", "wandb_run_name")
    public = {key: value for key, value in config.items() if key not in private}
    if (source := str(public.get("init_from", ""))) and (Path(source).is_absolute() or source.startswith(("~", "."))):
        public["init_from"] = Path(source).name
    return public


def model_card(trained: TrainedModel, name: str) -> str:
    """The README.md of an exported model: what it is and how it was trained."""
    shape, progress = trained.model.config, trained.state
    facts = {
        "parameters": f"{trained.model.get_num_params(non_embedding=False):,}",
        "architecture": f"{shape.architecture}, {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels",
        "context": f"{shape.block_size:,} tokens",
        "tokenizer": str(trained.tokenizer),
    }
    config = _public(trained.config)
    if config:
        facts |= {
            "started from": config.get("init_from", "scratch"),
            "data set": config.get("dataset", "unknown"),
            "steps": f"{progress.step:,}",
            "tokens seen": f"{progress.tokens:,}",
            "training time": f"{progress.seconds / 3600:.2f} hours",
            "best validation loss": f"{progress.best_val_loss:.4f} nats per token",
        }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [nanogpt]\n---\n\n"
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")\n'
        'ids = tokenizer("Once", return_tensors="pt").input_ids\n'
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0]))\n"
    )
    settings = "".join(f"    {key} = {value!r}\n" for key, value in config.items())
    recipe = f"\nThe settings of the run:\n\n{settings}" if settings else ""
    return (
        f"{front}# {name}\n\nTrained with nanoGPT {__version__}, from {Path(trained.name).name}.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n```python\n{code}```\n{recipe}"
    )


def save_original(path: Path, model: GPT, tokenizer: Tokenizer, config: dict[str, Any], step: int, loss: float) -> None:
    """Write what the original's sample.py loads. config: the training run's; loss: its best.

    Raises `ConfigError` for a model or a tokenizer that the original does not know.
    """
    arguments, unknown = original_arguments(model.config)
    if unknown:
        raise ConfigError(
            f"the original nanoGPT has no {', '.join(unknown)}; it knows GPT-2's shape only; try --to=hf or --to=gguf"
        )
    if not isinstance(tokenizer, (CharTokenizer, GPT2Tokenizer)):
        raise ConfigError(f"the original nanoGPT knows characters and GPT-2's tokens, not the {tokenizer}")
    content = {"model": model.state_dict(), "model_args": arguments, "iter_num": step}
    write_file(path, {**content, "optimizer": None, "best_val_loss": loss, "config": config})
