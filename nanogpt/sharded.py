"""Checkpoints of runs whose state is spread over the processes: ckpt.dcp/STEP/, to which each writes its share.

The format is that of torch.distributed.checkpoint, so that any other number of processes can read it. What is no tensor
lies in `run.json`; the checkpoint is whole when that is there, and `.metadata`.
"""

import io
import pickle
import shutil
import warnings
import zipfile
from concurrent.futures import Future
from enum import EnumMeta
from pathlib import Path, PurePath
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanogpt.files import read_json, sync_folder, write_json
from nanogpt.model import GPT

FOLDER = "ckpt.dcp"  # in the run folder
_METADATA, _DESCRIPTION = ".metadata", "run.json"
_CLASSES = "Metadata MetadataIndex StorageMeta TensorStorageMetadata ChunkStorageMetadata TensorProperties"
_IN_METADATA = {f"torch.distributed.checkpoint.metadata.{name}" for name in f"{_CLASSES} _MEM_FORMAT_ENCODING".split()}
_IN_METADATA |= {
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
}


def finished(out_dir: Path) -> list[Path]:
    """The checkpoints in a run folder, the newest first."""
    folders = [path for path in (out_dir / FOLDER).glob("*") if path.name.isdecimal()]
    whole = [path for path in folders if (path / _METADATA).exists() and (path / _DESCRIPTION).exists()]
    return sorted(whole, key=lambda path: -int(path.name))


def remove(path: Path) -> None:
    """Delete a checkpoint, first of all what makes it one."""
    (path / _METADATA).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(out_dir: Path) -> None:
    """Delete what killed processes were writing."""
    whole = finished(out_dir)
    for path in (out_dir / FOLDER).glob("*"):
        if path.name.isdecimal() and path not in whole:
            remove(path)


def begin_write(path: Path, model: GPT, optimizer: torch.optim.Optimizer, group: Any) -> Future[Any]:
    """Copy this process's share and begin to write it into `path`; all processes must call. `group` connects them.

    The result comes when all have written theirs; what has failed in one is raised in all.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    is_there = [path in finished(path.parents[1])]
    torch.distributed.broadcast_object_list(is_there, group=group)  # each sees a shared disk at a time of its own
    if is_there[0]:  # a run was stopped just after it had saved
        done: Future[Any] = Future()
        done.set_result(None)
        return done
    begun = async_save(tensors_of(model, optimizer), storage_writer=FileSystemWriter(path), process_group=group)
    assert isinstance(begun, Future)
    return begun


def finish_write(path: Path, begun: Future[Any], described: dict[str, Any] | None) -> None:
    """Wait until the checkpoint is on the disk. `described`, what is no tensor, comes from one of the processes."""
    if described:
        write_json(path / _DESCRIPTION, described)
    begun.result()
    for folder in (path, *path.parents[:2]):  # the names, too: older checkpoints will be deleted
        sync_folder(folder)


def whole_weights(model: GPT) -> dict[str, Tensor]:
    """All weights, on the CPU, in the main process; an empty dictionary in the others, which must ask, too."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        name: weight
        for name, weight in get_model_state_dict(model, options=options).items()
        if isinstance(weight, Tensor)
    }


def tensors_of(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a run by names that do not repeat: model.NAME and optimizer.NUMBER.NAME."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if model.config.tied_head:
        del tensors["model.lm_head.weight"]
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    return tensors


def read(path: Path, *, values: bool = True) -> dict[str, Any]:
    """A checkpoint as one process holds it, in the form of ckpt.pt; without `values`, tensors have shapes only."""
    from torch.distributed.checkpoint.state_dict_loader import load

    described = read_json(path / _DESCRIPTION)
    with torch.device("cpu" if values else "meta"):
        tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in _contents(path).items()}
    if values:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process only
            load(dict(tensors), storage_reader=_reader(path), no_dist=True)
    weights, states = _told_apart(tensors)
    if described["nanogpt"]["model_config"]["tied_head"]:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {
        "model": weights,
        "optimizer": {"state": states, "param_groups": described.pop("param_groups")},
        **described,
    }


def read_into(path: Path, model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read this process's share of the weights into `model`, and of the optimizer's state into what is returned."""
    from torch.distributed.checkpoint.state_dict_loader import load

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = tensors_of(model, optimizer)
    for name, (size, dtype) in _contents(path).items():
        if name.startswith("optimizer."):
            owner = parameters[int(name.split(".")[1])]
            tensors[name] = (
                torch.empty_like(owner, dtype=dtype) if size == owner.shape else torch.empty(size, dtype=dtype)
            )
    load(dict(tensors), storage_reader=_reader(path))
    return {"state": _told_apart(tensors)[1], "param_groups": optimizer.state_dict()["param_groups"]}


def damage(path: Path) -> str | None:
    """The name of a tensor whose checksum is wrong; None if all is well. Raises what reading broken files raises."""
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    for index, place in _reader(path).read_metadata().storage_data.items():
        if not 0 <= place.offset <= place.offset + place.length <= sizes[place.relative_path]:
            raise ValueError(f"{index.fqn} lies outside of {place.relative_path}")
        with open(path / place.relative_path, "rb") as file:
            file.seek(place.offset)
            if damaged_part(io.BytesIO(file.read(place.length))):
                return str(index.fqn)
    return None if read_json(path / _DESCRIPTION) else _DESCRIPTION


def damaged_part(file: Path | io.BytesIO) -> str | None:
    """What in a zip of torch's does not have its checksum. Raises `BadZipFile` for what torch packs never: a bomb."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed, which no checkpoint is")
        return archive.testzip()


def _contents(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    described = _reader(path).read_metadata().state_dict_metadata
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in described.items()}


def _told_apart(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    weights: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "model":
            weights[rest] = tensor
        else:
            number, key = rest.split(".", 1)
            states.setdefault(int(number), {})[key] = tensor
    return weights, states


def _member(enumeration: Any, name: str) -> Any:
    if isinstance(enumeration, EnumMeta):
        return enumeration[name]
    raise pickle.UnpicklingError(f"{name} has no place in a checkpoint")


class _Unpickler(pickle._Unpickler):
    """Reads torch's `.metadata`, and runs nothing that is hidden in it; Python's unpickler takes no memory ahead."""

    dispatch: ClassVar = {**pickle._Unpickler.dispatch}
    del dispatch[pickle.BYTEARRAY8[0]]  # but for this

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _IN_METADATA:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.2 writes a member of an enumeration
            return _member
        if module.startswith("pathlib") and name.endswith("Path"):
            return PurePath  # where it was written, on whatever system
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **keywords: Any) -> Any:
            return _Unpickler(io.BytesIO((path / _METADATA).read_bytes())).load()

    return Reader(path)
