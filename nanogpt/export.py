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
from nanogpt.checkpoint import TrainedModel, load_trained
from nanogpt.device import Device
from nanogpt.errors import ConfigError, UserError
from nanogpt.files import atomic_write, sync_folder
from nanogpt.gguf import MARK, save_gguf
from nanogpt.huggingface import save_pretrained
from nanogpt.lora import save_peft
from nanogpt.settings import ExportConfig

TAG = "tags: [nanogpt]"  # in the README.md of an exported folder
FILES = """README.md config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
    adapter_config.json adapter_model.safetensors""".split()
PRIVATE = ("out_dir", "data_dir", "init_from", "text", "wandb_project", "wandb_run_name")


def export(config: ExportConfig) -> None:
    """Write `output`, whole or not at all. Raises `UserError` if it is there, or can't hold the model."""
    output = Path(config.output).resolve()
    check_output(output, config)
    trained = load_trained(config, Device("cpu", "cpu", torch.float32, compile=False), merge=config.to != "peft")
    # An export may be published: leave out paths and names of this machine.
    settings = {key: value for key, value in trained.config.items() if key not in PRIVATE}
    if config.to != "gguf":
        with atomic_folder(output) as folder:
            (folder / "README.md").write_text(model_card(trained, settings, output.name), encoding="utf-8")
            if config.to == "peft":
                save_peft(folder, trained.model)
            else:
                save_pretrained(folder, trained.model, trained.tokenizer, getattr(torch, config.dtype))
    else:
        with atomic_write(output) as file:
            save_gguf(Path(file.name), output.stem, trained.model, trained.tokenizer, config.dtype)
    print(f"wrote {output} from {trained.name}")


def check_output(output: Path, config: ExportConfig) -> None:
    """Raise `ConfigError` if `output` has anything but an earlier export, or if that is not to be replaced."""
    names = set(os.listdir(output)) if output.is_dir() else set()
    if not names and not output.is_file():
        return
    marked, mark = (output / "README.md", TAG) if config.to != "gguf" else (output, MARK)
    is_export = marked.is_file() and mark.encode() in open(marked, "rb").read(4096)
    if not is_export or not names <= set(FILES):
        raise ConfigError(f"output={output} is there, and no earlier export of --to={config.to}; choose another name")
    if not config.force:
        raise ConfigError(f"output={output} is there already; --force replaces it")


def model_card(trained: TrainedModel, settings: dict[str, Any], name: str) -> str:
    """Return the README.md of an exported model: how far it was trained, and with which settings."""
    facts = {"parameters": trained.model.get_num_params(non_embedding=False), "tokenizer": trained.tokenizer}
    facts |= {**vars(trained.state), **settings} if settings else {}
    table = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    head = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{TAG}\n---\n\n# {name}\n"
    return f"{head}\nMade with nanoGPT {__version__}.\n\n| | |\n|---|---|\n{table}\n"


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
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
