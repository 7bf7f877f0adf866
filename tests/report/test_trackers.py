"""What Weights & Biases and TensorBoard get, read back from their files."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanogpt import train
from nanogpt.checkpoint import Progress
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.report.metrics import Metrics, TensorBoard, WandB, read_metrics

Recipe = Callable[..., TrainConfig]


def test_tensorboard_shows_one_unbroken_curve(recipe: Recipe) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.train(recipe(tensorboard_log=True, max_iters=4))
    train.train(recipe(tensorboard_log=True, max_iters=8, init_from="resume"))
    events = accumulator.EventAccumulator(str(Path(recipe().out_dir, "tensorboard")))
    events.Reload()
    rows = read_metrics(Path(recipe().out_dir, "metrics.jsonl"))
    for name in ("train/loss", "val/loss", "lr", "epoch"):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in seen] == [step for step, _ in expected]
        assert [value for _, value in seen] == pytest.approx([value for _, value in expected])
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("sample/text_summary")]
    assert texts == [f"```\n{row['sample']}\n```" for row in rows if "sample" in row]
    assert len(texts) == 2


def wandb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an offline run: records of LevelDB's log format, each a message of wandb's own."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:  # no header is cut by the border of a block
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = messages.Record.FromString(whole)
            whole = b""
            if record.HasField("history"):
                yield {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}


def test_wandb_offline_has_every_step_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.train(recipe(wandb_log=True, max_iters=4))
    time.sleep(1.1)  # wandb names its folders by the second
    train.train(recipe(wandb_log=True, max_iters=8, init_from="resume"))
    files = sorted(Path(recipe().out_dir).glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # one run, by its id
    seen = {}
    for path in files:
        for row in wandb_rows(path):
            assert not ("train/loss" in row and ("train/loss", row["_step"]) in seen)
            seen |= {(name, row["_step"]): value for name, value in row.items()}
    rows = read_metrics(Path(recipe().out_dir, "metrics.jsonl"))
    expected = {(name, row["step"]): row[name] for row in rows for name in ("train/loss", "val/loss") if name in row}
    assert {key: seen[key] for key in expected} == pytest.approx(expected)


def test_a_tracker_that_fails_is_a_warning(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")

    def fail(*_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(TensorBoard, "write", fail)
    with Metrics(recipe(tensorboard_log=True)) as metrics:
        metrics.write(Progress(step=1), {"train/loss": 1.0})
        metrics.write(Progress(step=2), {"train/loss": 1.0})
    assert capsys.readouterr().err.count("warning: TensorBoard failed (no network)") == 1
    monkeypatch.setattr(TensorBoard, "__init__", fail)
    assert train.train(recipe(tensorboard_log=True, max_iters=1)) == 0
    assert "warning: TensorBoard could not start" in capsys.readouterr().err


def test_the_name_of_a_wandb_run_is_there_whole_or_not_at_all(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("the power is gone")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None))
    config = recipe(out_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(UserError, match="the power is gone"):
            WandB(config, None)
    assert list(Path(config.out_dir).iterdir()) == []
    WandB(config, None)
    assert len(Path(config.out_dir, "wandb_id").read_text()) == 8
