import errno
import os
from pathlib import Path
from typing import IO

import pytest

from nanogpt import files
from nanogpt.errors import UserError
from nanogpt.files import atomic_write, read_json, write_json


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


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for content in (b"one", b"two"):  # what it leads to is not there yet, then is
        with atomic_write(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "file").read_bytes() == content
    assert os.listdir(tmp_path / "disk") == ["file"]


def test_an_operating_system_that_refuses_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*file/b\.bin: (Not a directory|File exists)"):
        write_json(tmp_path / "file" / "b.bin", {})


def test_where_nothing_can_be_locked_it_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(file: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_lock", unsupported)
    with files.locked(tmp_path / "lock", "it"):
        pass
    assert "can't be locked here" in capsys.readouterr().err


def test_a_lock_that_its_owner_removes_is_none_for_who_had_opened_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files._lock

    def removed_meanwhile(file: IO[bytes]) -> None:
        (tmp_path / "lock").unlink()
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_lock", removed_meanwhile)
        with pytest.raises(UserError, match="another process is at work on it"), files.locked(tmp_path / "lock", "it"):
            pass
    with files.locked(tmp_path / "lock", "it"):
        pass


def test_json_holds_names_that_are_no_unicode(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"folder": os.fsdecode(b"\xff")})
    assert read_json(tmp_path / "a.json") == {"folder": os.fsdecode(b"\xff")}
