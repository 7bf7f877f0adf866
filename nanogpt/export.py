"""The program behind `nanogpt export`: a trained model as other programs read it."""

import logging
import os
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
from nanogpt.gguf import MARK, modelfile, save_gguf
from nanogpt.huggingface import save_pretrained
from nanogpt.settings import ExportConfig
from nanogpt.tokenizer import CharTokenizer, GPT2Tokenizer

log = logging.getLogger(__name__)

FILES = "README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json".split()
PRIVATE = ("out_dir", "data_dir", "text", "wandb_project", "wandb_run_name")  # settings that tell of a machine


def export(config: ExportConfig) -> None:
    """Write `output`, whole or not at all; upload it. Raises `UserError` if it is there, or can't hold the model."""
    output = Path(config.output).resolve()
    check_output(output, config)
    trained = load_trained(config, Device("cpu", "cpu", torch.float32, compile=False))
    model, tokenizer, written = trained.model, trained.tokenizer, [output]
    if config.to == "hf":
        use = f'AutoModelForCausalLM.from_pretrained("{config.output}")'
        with atomic_folder(output) as folder:
            save_pretrained(folder, model, tokenizer, getattr(torch, config.dtype), model_card(trained, output.name))
    elif config.to == "gguf":
        with atomic_write(output) as file:
            save_gguf(Path(file.name), output.stem, model, tokenizer, config.dtype)
        written.append(output.with_suffix(".Modelfile"))
        with atomic_write(written[1]) as file:
            file.write(modelfile(output, model.config, tokenizer).encode())
        use = f"llama-cli -m {config.output}, or ollama create {output.stem.lower()} -f {written[1]}"
    else:
        use = "the original's sample.py reads it as out_dir/ckpt.pt; characters need data/NAME/meta.pkl there"
        save_original(output, trained)
    print(f"wrote {output} from {trained.name}: {use}")
    if config.push:
        push(config.push, written)


def check_output(output: Path, config: ExportConfig) -> None:
    """Raise `ConfigError` if `output` has anything but an earlier export, or if that is not to be replaced."""
    if not output.exists() or (output.is_dir() and config.to == "hf" and not any(output.iterdir())):
        return
    if output.is_dir() != (config.to == "hf"):
        there = "folder" if output.is_dir() else "file"
        raise ConfigError(f"output={output} is a {there}, --to={config.to} makes the other")
    marked = output / "README.md" if output.is_dir() else output
    start = open(marked, "rb").read(4096) if marked.exists() else b""
    is_export = MARK.encode() in start or (output.is_dir() and b"tags: [nanogpt]" in start)
    if not is_export or (output.is_dir() and not {path.name for path in output.iterdir()} <= set(FILES)):
        raise ConfigError(f"output={output} is there already, and not an earlier export; choose another name")
    if not config.force:
        raise ConfigError(f"output={output} is there already; --force replaces it")


def push(repository: str, written: list[Path]) -> None:
    """Upload a folder, or files, to the Hugging Face hub, into a repository that is made if need be."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        for path in written:
            if path.is_dir():
                api.upload_folder(repo_id=repository, folder_path=path)
            else:
                api.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name)
    except Exception as error:  # the library and its network layer have many kinds
        raise UserError(
            f"{written[0]} is written, but not uploaded to {repository} ({error}); `hf auth login` with a token that "
            f"may write there, then `hf upload {repository} {written[0]}`"
        ) from error
    print(f"uploaded to https://huggingface.co/{repository}")


def public_settings(trained: TrainedModel) -> dict[str, Any]:
    """Return the settings of a run without what tells of its machine: folders, and names in trackers."""
    public = {key: value for key, value in trained.config.items() if key not in PRIVATE}
    source = str(public.get("init_from", ""))
    return public | ({"init_from": Path(source).name} if source.startswith(("/", "~", ".")) else {})


def model_card(trained: TrainedModel, name: str) -> str:
    """Return the README.md of an exported model: what it is and how it was trained."""
    shape, state, config = trained.model.config, trained.state, public_settings(trained)
    facts = {
        "parameters": f"{trained.model.get_num_params(non_embedding=False):,}",
        "architecture": f"{shape.architecture}, {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels",
        "context": f"{shape.block_size:,} tokens",
        "tokenizer": str(trained.tokenizer),
    }
    if config:
        facts |= {
            "started from": config.get("init_from", "scratch"),
            "data set": config.get("dataset", "unknown"),
            "steps": f"{state.step:,}",
            "tokens seen": f"{state.tokens:,}",
            "training time": f"{state.seconds / 3600:.2f} hours",
            "best validation loss": f"{state.best_val_loss:.4f} nats per token",
        }
    table = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    settings = "".join(f"    {key} = {value!r}\n" for key, value in config.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanogpt]
---

# {name}

Trained with nanoGPT {__version__}, from {Path(trained.name).name}.

| | |
|---|---|
{table}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0]))
```
""" + (f"\nThe settings of the run:\n\n{settings}" if settings else "")


def save_original(path: Path, trained: TrainedModel) -> None:
    """Write what the original's sample.py loads. Raises `ConfigError` for a model or a tokenizer that it lacks."""
    model, tokenizer, state = trained.model, trained.tokenizer, trained.state
    arguments, unknown = original_arguments(model.config)
    # Only the original can have a vocabulary whose way to cut text no other program knows.
    instead = "" if tokenizer.kind == "vocabulary" else "; --to=hf carries this model"
    if unknown:
        raise ConfigError(f"the original nanoGPT has no {', '.join(unknown)}: it knows GPT-2's shape only{instead}")
    if not isinstance(tokenizer, (CharTokenizer, GPT2Tokenizer)):
        raise ConfigError(f"the original nanoGPT knows characters and GPT-2's tokens, not the {tokenizer}{instead}")
    config = {MARK: __version__, **public_settings(trained)}
    progress = {"iter_num": state.step, "best_val_loss": state.best_val_loss}
    write_file(
        path, {"config": config, "model_args": arguments, **progress, "model": model.state_dict(), "optimizer": None}
    )
    if model.config.activation != "gelu":
        log.warning("the original computes the exact GELU in place of this model's tanh form: losses differ slightly")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder that replaces `path` when the block ends well, and leaves no trace when it does not.

    Raises `UserError` when the operating system refuses.
    """
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        work.mkdir(parents=True)
        yield work
        for written in (*work.iterdir(), work):
            sync_folder(written)  # and file
        if path.exists():
            shutil.rmtree(path)
        work.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
