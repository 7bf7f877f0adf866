"""Published files: downloaded once, checked, or taken from a folder of this machine."""

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from nanogpt.errors import DataError
from nanogpt.files import atomic_write

log = logging.getLogger(__name__)

LARGEST = 1 << 27  # bytes of a published file, at most
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def fetch(name: str, url: str, sha256: str, attempts: int = 3, option: str = "input") -> bytes:
    """The bytes of a published file: from the folder `$NANOGPT_DOWNLOADS`, else from the network.

    Network failures are tried again, with pauses. Raises `DataError`, with what to do instead, when the file can't be
    had or isn't the one expected (an error page, say); `option` is the setting that takes such a file.
    """
    by_hand = (
        f"download {url} by other means and pass it as --{option}=FILE, or put it as {name} into a folder that the "
        "environment variable NANOGPT_DOWNLOADS names"
    )
    mirror = os.environ.get("NANOGPT_DOWNLOADS")
    if mirror and (path := Path(mirror) / name).is_file():
        content, origin = path.read_bytes(), str(path)
    else:
        content, origin = _download(url, attempts, by_hand), url
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{origin} is not the file expected: {len(content):,} bytes with sha256 {found}; {by_hand}")
    return content


def _download(url: str, attempts: int, by_hand: str) -> bytes:
    for attempt in range(attempts):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read(LARGEST)  # the checksum refuses what is longer
                assert isinstance(content, bytes)
                if response.length and len(content) < LARGEST:  # read() with a limit is silent about it
                    raise http.client.IncompleteRead(content, response.length)
                return content
        except (OSError, http.client.HTTPException) as error:
            is_final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if is_final or attempt == attempts - 1:
                raise DataError(f"{url} could not be downloaded ({error}); {by_hand}") from error
            time.sleep(2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def kept(path: Path, name: str, url: str, sha256: str, option: str = "input") -> Path:
    """`path`, with the file that `fetch` fetches, now or from earlier. Raises `DataError` if it is another."""
    if not path.is_file():
        content = fetch(name, url, sha256, option=option)
        with atomic_write(path) as file:
            file.write(content)
    elif not _holds(path, sha256):
        raise DataError(f"{path} is not the published file; move it away, or pass it as --{option}={path} to use it")
    return path


def _holds(path: Path, sha256: str) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def shakespeare(folder: Path) -> Path:
    """Tiny Shakespeare (1.1 MB) as input.txt in `folder`; or what somebody put there, as in the original."""
    path = folder / "input.txt"
    if path.is_file():
        if not _holds(path, SHAKESPEARE_SHA256):
            log.warning(f"{path} is not Tiny Shakespeare as published: it is used as it is")
        return path
    return kept(path, "tinyshakespeare.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256)


def hub_folder(repository: str, patterns: list[str], option: str = "init_from") -> Path:
    """A folder with the files of a Hugging Face repository: from `$NANOGPT_DOWNLOADS`, the cache, or the network.

    `option` is the setting that takes such a folder. Raises `DataError` with what to do instead.
    """
    if (mirror := os.environ.get("NANOGPT_DOWNLOADS")) and (folder := Path(mirror, repository)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # offline, no such repository, disk full, …: the library has many ways
        raise DataError(
            f"{repository} could not be downloaded ({type(error).__name__}: {error}); bring its files "
            f"({', '.join(patterns)}) by other means and name their folder, --{option}=FOLDER, or put them into "
            f"$NANOGPT_DOWNLOADS/{repository}/"
        ) from error
