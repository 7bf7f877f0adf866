"""Writing files so that nobody ever sees half of one."""

import errno
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nanogpt.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends well, and leaves no trace when it doesn't.

    The bytes are on the disk before the name is: temporary file beside it, fsync, rename, fsync of the
    folder. Raises `UserError` when the operating system refuses (no permission, disk full, …).
    """
    target = Path(os.path.realpath(path))  # a link stays one
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def remove_unfinished(folder: Path) -> None:
    """Delete what `atomic_write` was writing into `folder` when its process was killed."""
    for path in folder.glob("*.tmp"):
        if path.is_file() and re.fullmatch(r".+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and does not need to."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(path: str | Path, what: str) -> Iterator[None]:
    """Keep other processes out of `what` while the block runs; a process that dies lets go.

    Raises `UserError`, which names the owner's process and host, if it is taken.
    """
    path = Path(path)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a+b"))
            file.seek(0)
            try:
                _lock(file)
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    raise FileNotFoundError(errno.ENOENT, "who had it has removed it just now")
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.ENOENT):
                    log.warning(f"{path} can't be locked here ({error}): start nothing else there")
                else:
                    owner = file.read(200).decode("utf-8", "replace").strip() or "another process"
                    raise UserError(f"{owner} is at work on {what}; wait for it, or stop it") from None
            file.truncate(0)  # what a process left that died
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            yield
        except BaseException:
            _say(file, b"failed")
            raise
        _say(file, b"")  # left in order; what stays after a crash tells of it


def _say(file: IO[bytes], text: bytes) -> None:
    with suppress(OSError):
        file.truncate(0)
        file.write(text)
        file.flush()


def _lock(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def parse_json(text: str | bytes) -> Any:
    """The value that JSON stands for. Raises `ValueError`, also for what is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, or it is damaged."""
    try:
        value = parse_json(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        file.write(text.encode(errors="backslashreplace"))  # names of files may hold what is no Unicode
