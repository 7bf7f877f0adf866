"""Files that appear whole or not at all, JSON, and locks."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nanogpt.errors import UserError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends well, and leaves no trace when it does not.

    Raises `UserError` when the operating system refuses (no permission, disk full, …).
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the name: else a power cut can leave an empty file
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut; Windows cannot open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def locked(path: str | Path, what: str) -> Iterator[None]:
    """Keep other processes out of `what` during the block. The system releases the lock of a process that dies.

    The file holds the owner's name, or that it failed. Raises `UserError` with that name if the lock is taken.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).decode("utf-8", "replace") or "another process"
            raise UserError(f"{owner} is using {what}; wait for it, or stop it") from None
        except (OSError, ImportError) as error:  # Lustre and NFS are often mounted without locks; Windows has no fcntl
            logging.getLogger(__name__).warning(f"{path} can't be locked here: start nothing else there ({error})")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        except BaseException:
            Path(path).write_text("failed")
            raise
        file.truncate(0)


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")
