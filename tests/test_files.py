"""Files appear whole or not at all; a lock has one owner."""

import os
from pathlib import Path

import pytest

from nanogpt.errors import UserError
from nanogpt.export import atomic_folder
from nanogpt.files import atomic_write, locked


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"

    def broken() -> None:
        with atomic_write(path) as file:
            file.write(b"two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert path.read_bytes() == b"one"
    assert os.listdir(path.parent) == ["b.bin"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "a" / "b") as folder:
            (folder / "file").write_text(content)
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"

    def full() -> None:
        with atomic_folder(tmp_path / "a" / "b") as folder:
            (folder / "file").write_text("newest")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        full()
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for content in (b"one", b"two"):  # what it leads to is not there yet, then is
        with atomic_write(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "file").read_bytes() == content
    assert os.listdir(tmp_path / "disk") == ["file"]


def test_a_lock_names_its_owner_and_goes_with_it(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", "it"),
        pytest.raises(UserError, match=f"process {os.getpid()} on .* is using it; wait for it"),
        locked(tmp_path / "lock", "it"),
    ):
        pass
    assert (tmp_path / "lock").read_text() == ""
    with pytest.raises(ArithmeticError), locked(tmp_path / "lock", "it"):
        raise ArithmeticError
    assert (tmp_path / "lock").read_text() == "failed"
    with locked(tmp_path / "lock", "it"):
        pass
