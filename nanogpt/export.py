"""The program behind `nanogpt export`: a trained model as other programs read it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nanogpt import __version__
from nanogpt.checkpoint import TrainedModel, load_trained, original_arguments, write_file
from nanogpt.config import is_hub_name
from nanogpt.device import Device
from nanogpt.errors import ConfigError, UserError
from nanogpt.files import atomic_write, sync_folder
from nanogpt.gguf import MARK, modelfile, save_gguf
from nanogpt.huggingface import save_pretrained
from nanogpt.lora import save_peft
from nanogpt.settings import ExportConfig
from nanogpt.tokenizer import CharTokenizer, GPT2Tokenizer

TAG = "tags: [nanogpt]"  # in the README.md of an exported folder
FILES = "README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json".split()
PRIVATE = ("out_dir", "data_dir", "text", "wandb_project", "wandb_run_name")  # settings that tell of a machine


def export(config: ExportConfig) -> None:
    """Write `output`, whole or not at all; upload it. Raises `UserError` if it is there, or can't hold the model."""
    output = Path(config.output).resolve()
    check_output(output, config)
    trained = load_trained(config, Device("cpu", "cpu", torch.float32, compile=False), merge=config.to != "peft")
    model, tokenizer, written = trained.model, trained.tokenizer, [output]
    # An export may be published: leave out paths and names of this machine.
    settings = {key: value for key, value in trained.config.items() if key not in PRIVATE}
    if "init_from" in settings and not is_hub_name(settings["init_from"]):
        settings["init_from"] = Path(settings["init_from"]).name
    if config.to == "hf":
        with atomic_folder(output) as folder:
            (folder / "README.md").write_text(model_card(trained, settings, output.name), encoding="utf-8")
            save_pretrained(folder, model, tokenizer, getattr(torch, config.dtype))
    elif config.to == "peft":
        with atomic_folder(output) as folder:
            (folder / "README.md").write_text(model_card(trained, settings, output.name), encoding="utf-8")
            save_peft(folder, model)
    elif config.to == "gguf":
        written.append(output.with_suffix(".Modelfile"))
        with atomic_write(output) as file:
            save_gguf(Path(file.name), output.stem, model, tokenizer, config.dtype)
        with atomic_write(written[1]) as file:
            file.write(modelfile(output, model.config, tokenizer).encode())
    else:
        save_original(output, trained, settings)
    print(f"wrote {' and '.join(map(str, written))} from {trained.name}")
    if config.push:
        push(config.push, written)


def check_output(output: Path, config: ExportConfig) -> None:
    """Raise `ConfigError` if `output` has anything but an earlier export, or if that is not to be replaced."""
    is_folder = output.is_dir()
    names = {path.name for path in output.iterdir()} if is_folder else {output.name} if output.exists() else set()
    if not names:
        if config.to == "gguf" and (file := output.with_suffix(".Modelfile")).exists():
            raise ConfigError(f"{file} would be replaced, and belongs to no earlier export; choose another output")
        return
    marked, mark = (output / "README.md", TAG) if is_folder else (output, MARK)
    is_export = marked.exists() and mark.encode() in open(marked, "rb").read(4096)
    if not is_export or is_folder != (config.to == "hf") or (is_folder and not names <= set(FILES)):
        raise ConfigError(f"output={output} is there, and no earlier export of --to={config.to}; choose another name")
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
        instead = f"`hf auth login`, then `hf upload {repository} {written[0]}`"
        raise UserError(f"{written[0]} is written, but not uploaded to {repository} ({error}); {instead}") from error
    print(f"uploaded to https://huggingface.co/{repository}")


def model_card(trained: TrainedModel, settings: dict[str, Any], name: str) -> str:
    """Return the README.md of an exported model: its shape, how far it was trained, and with which settings."""
    facts = {"parameters": f"{trained.model.get_num_params(non_embedding=False):,}", "tokenizer": trained.tokenizer}
    facts |= {**(vars(trained.state) if settings else {}), **settings, **vars(trained.model.config)}
    table = "".join(f"| {fact} | {value} |\n" for fact, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{TAG}
---

# {name}

Trained with nanoGPT {__version__}, from {Path(trained.name).name}.

| | |
|---|---|
{table}"""


def save_original(path: Path, trained: TrainedModel, settings: dict[str, Any]) -> None:
    """Write what the original's sample.py loads. Raises `ConfigError` for a model or a tokenizer that it lacks."""
    arguments, unknown = original_arguments(trained.model.config)
    if unknown:
        raise ConfigError(f"the original nanoGPT has no {', '.join(unknown)}; --to=hf carries this model")
    if not isinstance(trained.tokenizer, (CharTokenizer, GPT2Tokenizer)):
        raise ConfigError(f"the original nanoGPT knows characters and GPT-2's tokens, not the {trained.tokenizer}")
    progress = {"iter_num": trained.state.step, "best_val_loss": trained.state.best_val_loss}
    content = {"model_args": arguments, "model": trained.model.state_dict(), "optimizer": None, **progress}
    write_file(path, {"config": {MARK: __version__, **settings}, **content})


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder that replaces `path` when the block ends well, and else leaves no trace. Raises `UserError`."""
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
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
