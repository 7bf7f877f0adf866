"""A run on disk, and how it comes back.

A checkpoint is the original nanoGPT's dictionary, so that its programs read ours; what is ours lies under one
more key, `nanogpt`. It is the whole run: sampling, evaluating and resuming need nothing else.
"""

import dataclasses
import itertools
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanogpt import sharded
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data import tokenizer_of_original
from nanogpt.device import Device
from nanogpt.errors import CheckpointError, ConfigError
from nanogpt.interop.flat import model_args, save_tensors, unknown_to_the_original
from nanogpt.model import GPT
from nanogpt.spread import is_spread, spread_like
from nanogpt.tokenizer import Tokenizer
from nanogpt.tokenizer_json import from_description

log = logging.getLogger(__name__)

FORMAT = 1
RUN_FILES = (
    "best.pt ckpt.dcp metrics.jsonl config.json diverged.json wandb_id wandb tensorboard logs loss.png attention.png "
    "tokens.html"
).split()


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # updates done
    best_val_loss: float = float("inf")
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # spent training so far, without evaluating and saving
    evaluated: int = -1  # step of the last evaluation
    skipped: int = 0  # updates left out because loss or gradient was not finite
    clipped: int = 0  # updates whose gradient was clipped, since that was last recorded
    losses: int = 0  # recorded so far
    loss_average: float = 0.0  # of the recorded losses, the latest ones counting most
    loss_deviation: float = 0.0  # how far they usually are from it


@dataclass
class Checkpoint:
    """A checkpoint in memory, on the CPU."""

    path: Path
    weights: dict[str, torch.Tensor]
    model_config: GPTConfig
    config: dict[str, Any]  # of the training run
    progress: Progress
    tokenizer: Tokenizer
    optimizer: dict[str, Any] | None
    scaler: dict[str, Any]

    @property
    def is_unread(self) -> bool:
        """Whether the weights have no values yet: `restore` brings each process its share of them."""
        return any(tensor.is_meta for tensor in self.weights.values())

    def model(self, device: Device, *, dropout: float = 0.0) -> GPT:
        """The network, in evaluation mode, on `device`; without values as long as `is_unread`."""
        try:
            model = GPT.from_weights(dataclasses.replace(self.model_config, dropout=dropout), self.weights)
        except RuntimeError as error:
            raise CheckpointError(f"{self.path}: the weights do not fit the model they came with: {error}") from error
        return (model if self.is_unread else model.to(device.name)).eval()

    def restore(self, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Bring back what a run needs beside its weights: moments and loss scale; and weights that are yet to be read.

        Betas and weight decay stay those that `optimizer` was made with; every step sets the learning rate. Raises
        `CheckpointError` for a state that is not this model's.
        """
        if self.optimizer is None:
            raise CheckpointError(f"{self.path} has no optimizer state: it can be sampled, but not resumed")
        try:
            saved = sharded.read_into(self.path, model, optimizer) if self.is_unread else self.optimizer
            states = _states_for(optimizer, saved)
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: the optimizer state does not fit the model: {error}") from error
        if self.scaler and scaler.is_enabled():
            scaler.load_state_dict(self.scaler)


def _states_for(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[int, dict[str, torch.Tensor]]:
    """The saved states of the optimizer's parameters, in its order: spread as they are, one whole one at a time.

    AdamW's kernel writes as many numbers as the parameter has, wherever they lie: nothing else may pass.
    """
    sizes, expected = ([len(g["params"]) for g in groups] for groups in (saved["param_groups"], optimizer.param_groups))
    if sizes != expected:
        raise ValueError(f"it is of groups of {sizes} parameters, and not of {expected}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    states: dict[int, dict[str, torch.Tensor]] = {}
    for n, (parameter, number) in enumerate(zip(parameters, numbers, strict=True)):
        for name, value in saved["state"].get(number, {}).items():
            if name == "step":
                fitting = _fitting(name, torch.as_tensor(value), torch.Size())
            else:
                fitting = spread_like(parameter, _fitting(name, value, parameter.shape))
            states.setdefault(n, {})[name] = fitting
    return states


def _fitting(name: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    is_plain = is_spread(value) or (value.layout == torch.strided and not value.is_meta)
    if value.shape != shape or not is_plain or not (value.is_floating_point() or name == "step"):
        raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}, where {tuple(shape)} is needed")
    return value.contiguous()


def description(
    shape: GPTConfig, scaler: torch.amp.GradScaler, config: TrainConfig, progress: Progress, tokenizer: Tokenizer
) -> dict[str, Any]:
    """A checkpoint but for its tensors: what can be said as JSON."""
    fields = dataclasses.asdict(shape)
    return {
        "model_args": fields if unknown_to_the_original(shape) else model_args(shape),
        "iter_num": progress.step,
        "best_val_loss": progress.best_val_loss,
        "config": dataclasses.asdict(config),
        "nanogpt": {
            "format": FORMAT,
            "model_config": fields,
            "tokenizer": tokenizer.describe(),
            "scaler": scaler.state_dict(),
            **dataclasses.asdict(progress),
        },
    }


def snapshot(model: GPT, optimizer: torch.optim.Optimizer, described: dict[str, Any], into: Any) -> dict[str, Any]:
    """A run as it is now, the content of a checkpoint: copied, so that training may go on while it is written.

    `into`, an earlier one that nobody needs any more, gives its memory: new memory makes the next update slow.
    """
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **described}
    copied: dict[str, Any] = _copied(content, {}, into)
    return copied


def _copied(value: Any, done: dict[Any, torch.Tensor], into: Any = None) -> Any:
    """`value` with all tensors in memory of the CPU of their own; those that share theirs (a tied head) still do."""
    if isinstance(value, torch.Tensor):
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if place not in done:
            fits = isinstance(into, torch.Tensor) and (into.shape, into.dtype) == (value.shape, value.dtype)
            is_free = fits and not any(into is taken for taken in done.values())
            done[place] = into.copy_(value.detach()) if is_free else value.detach().to("cpu", copy=True)
        return done[place]
    if isinstance(value, dict):
        old = into if isinstance(into, dict) else {}
        return {key: _copied(item, done, old.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, done) for item in value)
    return value


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically. Raises `UserError` when the operating system refuses."""
    save_tensors(path, content)


def load(path: Path, data_dir: str = "data", *, spread: bool = False, is_checked: bool = False) -> Checkpoint:
    """Read a checkpoint written here or by the original, without running any code that it may contain.

    The original keeps a character vocabulary with the data set: it is looked for below `data_dir`. With `spread`, each
    process will keep a share of it only: nothing is read yet that can wait. `is_checked`: it is known to be whole.
    Raises `CheckpointError` if the file is missing, damaged or no such checkpoint.
    """
    content = _read(path, spread, is_checked)
    try:
        ours = content.get("nanogpt", {})
        if ours.get("format", FORMAT) > FORMAT:
            raise CheckpointError(f"{path} was written by a newer version of nanoGPT (format {ours['format']})")
        shape = GPTConfig(**(ours.get("model_config") or content["model_args"]))
        if problems := list(shape.problems()):
            raise CheckpointError(f"{path} holds an impossible model: {'; '.join(problems)}")
        # the original's compiled models carry a prefix, its oldest ones attention masks
        weights = {
            name.removeprefix("_orig_mod."): _weight(name, tensor)
            for name, tensor in content["model"].items()
            if not name.endswith(".attn.bias")
        }
        if (layers := len({name.split(".")[2] for name in weights if ".h." in name})) != shape.n_layer:
            raise CheckpointError(f"{path} holds the weights of {layers} layers, but describes {shape.n_layer}")
        if ours:
            tokenizer = from_description(ours["tokenizer"])
            if tokenizer.vocab_size > shape.vocab_size:
                raise CheckpointError(f"{path} holds a model of {shape.vocab_size} entries for the {tokenizer}")
        else:
            tokenizer = _tokenizer_of_original(path, Path(data_dir, str(content["config"].get("dataset"))), shape)
        progress = Progress(
            **{field.name: ours[field.name] for field in dataclasses.fields(Progress) if field.name in ours}
            | {"step": content["iter_num"], "best_val_loss": float(content["best_val_loss"])}
        )
        expected: dict[str, Any] = {name: (int, type(default)) for name, default in vars(Progress()).items()}
        for name, value in {"config": content["config"], **vars(progress)}.items():
            if not isinstance(value, expected.get(name, dict)):
                raise CheckpointError(f"{path} is no checkpoint of a GPT: its {name} is {value!r:.100}")
        return Checkpoint(
            path=path,
            weights=weights,
            model_config=shape,
            config=content["config"],
            progress=progress,
            tokenizer=tokenizer,
            optimizer=content["optimizer"],
            scaler=ours.get("scaler", {}),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of a GPT: {type(error).__name__}: {error}") from error


def _weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight, contiguous, as kernels expect it. Raises `TypeError` for what is none, or shows few numbers as many."""
    is_usual = tensor.layout == torch.strided and tensor.is_floating_point()
    if not is_usual or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise TypeError(f"{name} is no plain tensor of numbers: {tensor.dtype}, {tensor.layout}, {tensor.shape}")
    return tensor.contiguous()


def is_damaged(path: Path) -> bool:
    """Whether a checkpoint is not what was once written (cut off, bits flipped); not if it can't be read just now."""
    try:
        return _damage(path) is not None
    except OSError:
        return False
    except Exception:  # zipfile and pickle have many ways
        return True


def _damage(path: Path) -> str | None:
    """What in a checkpoint does not have its checksum; torch.load alone lets a flipped byte pass."""
    return sharded.damage(path) if path.is_dir() else sharded.damaged_part(path)


def _read(path: Path, spread: bool, is_checked: bool) -> dict[str, Any]:
    try:
        if not is_checked and (damaged := _damage(path)):
            raise CheckpointError(f"{path} is damaged: checksum of {damaged} is wrong; use an older checkpoint")
        if path.is_dir():
            return sharded.read(path, values=not spread)
        # where each process takes a share, they read the same pages of memory
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=spread)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except CheckpointError:
        raise
    except Exception as error:  # zipfile, torch and pickle each raise their own for a broken or hostile file
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint of a GPT: it holds a {type(content).__name__}")
    return content


def _tokenizer_of_original(path: Path, data: Path, shape: GPTConfig) -> Tokenizer:
    """The vocabulary beside the data set, for a checkpoint that has none in it."""
    tokenizer = tokenizer_of_original(data)
    if tokenizer.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{path} comes without its vocabulary of {shape.vocab_size} entries, and {data / 'meta.pkl'} does not "
            "hold it either; put the meta.pkl of its data set there"
        )
    return tokenizer


def find(out_dir: str, which: str) -> Path:
    """The checkpoint `which` (auto, best, last or a file) of the run in `out_dir`."""
    folder = Path(out_dir)
    last = [str(path.relative_to(folder)) for path in kept(out_dir)] or ["ckpt.pt"]
    names = {"best": ["best.pt"], "last": last, "auto": ["best.pt", *last]}.get(which)
    if names is None:
        return Path(which)
    if found := next((folder / name for name in names if (folder / name).exists()), None):
        return found
    there = f"the folder {out_dir} has no {' or '.join(names)}" if folder.is_dir() else f"there is no folder {out_dir}"
    raise CheckpointError(f"{there}; train a model first, or name its folder with --out_dir=…")


def best_val_loss(path: Path) -> float:
    """The validation loss of a checkpoint, whose weights are not read; infinite if there is none, or it is damaged."""
    return float(_glance(path, "best_val_loss", math.inf))


def step_of(path: Path) -> float:
    """After how many updates a checkpoint was made; of one that can't be read, infinite: its place is to be refused."""
    return float(path.name) if path.is_dir() else float(_glance(path, "iter_num", math.inf))


def _glance(path: Path, name: str, default: float) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)[name]
    except Exception:  # torch and pickle have many ways
        return default


def remove(path: Path) -> None:
    """Delete a checkpoint; a folder so that it is never taken for whole meanwhile."""
    if path.is_dir():
        sharded.remove(path)
    else:
        path.unlink(missing_ok=True)


def kept(out_dir: str | Path) -> list[Path]:
    """The checkpoints that a run can go on from, the newest first: ckpt.pt, ckpt.prev.pt, …; folders of ckpt.dcp."""
    paths = [path for n in range(100) if (path := kept_name(Path(out_dir), n)).exists()]
    finished = Path(out_dir) / "ckpt.new.pt"  # killed just before it took its name
    if not kept_name(Path(out_dir), 0).exists() and finished.exists():
        paths = [finished, *paths]
    folders = sharded.finished(Path(out_dir))
    return sorted([*paths, *folders], key=step_of, reverse=True) if folders and paths else folders or paths


def kept_name(folder: Path, n: int) -> Path:
    """The name of the checkpoint that is n checkpoints old."""
    return folder / ("ckpt.pt" if n == 0 else f"ckpt.prev{n if n > 1 else ''}.pt")


def load_last(out_dir: str, data_dir: str, *, spread: bool = False) -> Checkpoint:
    """The newest checkpoint of the run in `out_dir` that is whole; damaged ones are passed over, and named.

    Raises `CheckpointError` if there is none.
    """
    paths = kept(out_dir)
    for path, older in itertools.pairwise(paths):
        try:
            return load(path, data_dir, spread=spread)
        except CheckpointError as error:
            if not is_damaged(path):
                raise
            log.warning(f"{error}; going on from {older.name}, the one before it")
    return load(paths[-1] if paths else find(out_dir, "last"), data_dir, spread=spread)  # find says what is missing


def set_previous_run_aside(out_dir: str) -> None:
    """Move the files of an earlier run to out_dir/previous-N: a new run neither mixes with it nor destroys it."""
    folder = Path(out_dir)
    if not kept(out_dir) and not any((folder / name).exists() for name in ("best.pt", "metrics.jsonl")):
        return
    aside = next(path for n in itertools.count(1) if not (path := folder / f"previous-{n}").exists())
    try:
        aside.mkdir()
        for path in [*folder.glob("ckpt*.pt*"), *(folder / name for name in RUN_FILES)]:
            if path.exists():
                os.replace(path, aside / path.name)
    except OSError as error:
        raise ConfigError(f"cannot move the earlier run in {out_dir} aside: {error.strerror}") from error
    log.info(f"{out_dir} held an earlier run: moved to {aside}")
