"""Writing in the background: order, failures, and what is left behind."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt import checkpoint, saver
from nanogpt.checkpoint import _copied
from nanogpt.errors import UserError
from nanogpt.saver import Saver


def content(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"iter_num": step, "best_val_loss": loss, "model": {"w": torch.full((3,), step)}, "optimizer": {}}


def steps_in(folder: Path) -> dict[str, int]:
    return {path.name: torch.load(path)["iter_num"] for path in folder.glob("*.pt")}


def test_the_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, real, order = threading.Event(), checkpoint.write, []

    def slow(path: Path, what: dict[str, Any]) -> None:
        may_go_on.wait(10)
        order.append(what["iter_num"])
        real(path, what)

    monkeypatch.setattr(checkpoint, "write", slow)
    writer = Saver(tmp_path, "0", 2)
    writer.save(lambda _: content(1))
    assert order == []  # came back while nothing was written
    may_go_on.set()
    writer.save(lambda _: content(2))  # waits for the first: at most one at a time
    assert order[0] == 1
    writer.finish(lambda _: content(2), is_saved=True)
    assert steps_in(tmp_path) == {"ckpt.pt": 2, "ckpt.prev.pt": 1}


def test_what_cannot_be_written_is_tried_again_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer, real, fails = Saver(tmp_path, "0", 2), checkpoint.write, [True]
    writer.save(lambda _: content(1))
    writer.wait()

    def write(path: Path, what: dict[str, Any]) -> None:
        if fails[0]:
            raise UserError("cannot write it: No space left")
        real(path, what)

    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr(saver, "RETRY", 0.0)
    writer.save(lambda _: content(2, loss=0.5), best=True)
    writer.wait()
    assert "No space left; training goes on, what is there stays" in capsys.readouterr().err
    assert steps_in(tmp_path) == {"ckpt.pt": 1}
    assert writer.is_due(3)
    with pytest.raises(UserError, match="No space left"):
        writer.finish(lambda _: content(3), is_saved=True)
    fails[0] = False
    writer.finish(lambda _: content(3), is_saved=True)
    assert steps_in(tmp_path) == {"ckpt.pt": 3, "ckpt.prev.pt": 1, "best.pt": 2}  # which was owed
    assert not writer.is_due(4)


def test_the_copy_shares_what_the_original_shares_and_nothing_with_it() -> None:
    weight, other = torch.ones(4), torch.zeros(0)
    value = {"a": weight, "b": weight, "c": [weight[:2].clone(), (other, 3)]}
    copy = _copied(value, {})
    weight.zero_()
    assert copy["a"] is copy["b"]
    assert copy["a"].tolist() == [1, 1, 1, 1]
    assert copy["c"][1][1] == 3


def test_views_of_one_memory_stay_themselves() -> None:
    whole = torch.arange(6.0)
    copy = _copied({"whole": whole, "part": whole[:2]}, {})
    assert copy["whole"].tolist() == whole.tolist()
    assert copy["part"].tolist() == [0, 1]


@pytest.mark.parametrize(("interval", "due"), [("0", []), ("3", [3, 6, 9]), ("0m", [])])
def test_when_a_checkpoint_is_due(interval: str, due: list[int], tmp_path: Path) -> None:
    writer = Saver(tmp_path, interval, 2)
    assert [step for step in range(1, 10) if writer.is_due(step)] == due


def test_a_writer_that_dies_is_no_writer_that_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(path: Path, what: dict[str, Any]) -> None:
        raise MemoryError("no room for it")

    monkeypatch.setattr(checkpoint, "write", dies)
    writer = Saver(tmp_path, "0", 2)
    writer.save(lambda _: content(1))
    with pytest.raises(UserError, match="MemoryError: no room for it"):
        writer.finish(lambda _: content(1), is_saved=True)


def test_a_best_that_cannot_be_written_does_not_stop_the_newest(tmp_path: Path) -> None:
    (tmp_path / "best.pt").mkdir()
    writer = Saver(tmp_path, "0", 2)
    writer.save(lambda _: content(1), best=True)
    writer.wait()
    assert torch.load(tmp_path / "ckpt.pt")["iter_num"] == 1
    (tmp_path / "best.pt").rmdir()
    writer.finish(lambda _: content(1), is_saved=True)
    assert torch.load(tmp_path / "best.pt")["iter_num"] == 1


def test_fewer_checkpoints_than_before_leave_no_old_ones(tmp_path: Path) -> None:
    for keep in (4, 2):
        writer = Saver(tmp_path, "0", keep)
        for step in range(5):
            writer.save(lambda _, step=step: content(step))  # type: ignore[misc]
        writer.wait()
    assert steps_in(tmp_path) == {"ckpt.pt": 4, "ckpt.prev.pt": 3}


def test_the_memory_of_an_earlier_copy_is_used_again() -> None:
    weight = torch.ones(4)
    old = _copied({"a": weight, "b": weight, "c": torch.zeros(2), "n": {"x": torch.ones(3)}}, {})
    new = _copied({"a": weight * 2, "b": weight * 3, "c": torch.ones(5), "n": {"x": torch.zeros(3)}}, {}, old)
    assert new["n"]["x"] is old["n"]["x"]
    assert new["c"].tolist() == [1] * 5
    assert (new["n"]["x"].tolist(), new["a"].tolist(), new["b"].tolist()) == ([0] * 3, [2] * 4, [3] * 4)
