import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from nanogpt import plot as plots
from nanogpt import train
from nanogpt.cli import parse
from nanogpt.errors import CheckpointError
from nanogpt.files import locked
from nanogpt.plot import RunRecord, draw_if_possible, list_runs, plot
from nanogpt.settings import PlotConfig, RunsConfig
from tests.conftest import Recipe


def write_run(folder: Path, losses: list[float], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 10 * n, "seconds": 2.0 * n, "tokens": 100 * n, "val/loss": y} for n, y in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"max_iters": 10 * (len(losses) - 1), **config}))
    return folder


def test_the_state_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [4.0, 3.0], max_iters=100)
    assert RunRecord(folder).state == "stopped"
    with locked(folder / "lock", "it"):
        assert RunRecord(folder).state == "running"
    assert RunRecord(folder).state == "stopped"
    (folder / "lock").write_text("process 1 on another-machine")
    assert RunRecord(folder).state == "running"  # heard of a moment ago
    os.utime(folder / "metrics.jsonl", (0, time.time() - 700))
    assert RunRecord(folder).state == "crashed"
    write_run(folder, [4.0, 3.0])  # to the end
    (folder / "lock").write_text("failed")
    assert RunRecord(folder).state == "crashed"  # its last checkpoint could not be written
    (folder / "lock").write_text("")
    assert RunRecord(folder).state == "done"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"), [4.0, 3.25])
    write_run(Path("deep/b"), [4.0], max_iters=5000)
    write_run(Path("a/previous-1"), [4.0])
    Path("c").mkdir()
    Path("c/metrics.jsonl").write_text("nonsense\n")
    list_runs(RunsConfig())
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "steps", "best", "loss", "last", "record"]
    table = sorted(line.split()[:6] for line in lines)
    assert table == [["a", "done", "10", "of", "10", "3.2500"], ["deep/b", "stopped", "0", "of", "5,000", "4.0000"]]
    list_runs(RunsConfig(previous=True))
    assert "a/previous-1" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no runs in or below"):
        list_runs(RunsConfig(folder="c"))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is missing or empty"):
        plot(PlotConfig(out_dir=["c"]))


def test_several_runs_in_one_picture(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write_run(Path("one"), [4.0, 3.0, 2.5], learning_rate=0.1, n_layer=2, out_dir="one", log_interval=1)
    write_run(Path("two"), [4.0, 2.0], learning_rate=0.2, n_layer=2, out_dir="two", log_interval=5)
    plot(parse(PlotConfig, ["one", "two", "--output=both.svg"], ""))
    assert Path("both.svg").read_bytes().startswith(b"<?xml")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["losses", "in", "nats", "per", "token"]
    assert lines[2] == ["run", "steps", "best", "loss", "training", "to", "2.5000"]
    assert lines[3:5] == [["one", "20", "2.5000", "4", "s"], ["two", "10", "2.0000", "2", "s"]]
    assert lines[6:] == [["setting", "one", "two"], ["max_iters", "20", "10"], ["learning_rate", "0.1", "0.2"],
                         ["log_interval", "1", "5"]]  # fmt: skip
    plot(PlotConfig(out_dir=["one", "two"]))
    assert Path("comparison.png").exists()
    assert not Path("one", "loss.png").exists()


def test_a_run_draws_itself_at_its_end(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    config = recipe(plot=True, max_iters=1)
    out_dir = Path(config.out_dir)
    assert train.train(config) == 0
    assert RunRecord(out_dir).state == "done"
    assert len((out_dir / "loss.png").read_bytes()) > 5000

    (out_dir / "loss.png").write_bytes(b"a moment ago")
    draw_if_possible(config.out_dir, at_most_every=60)
    assert (out_dir / "loss.png").read_bytes() == b"a moment ago"
    for name in ("config.json", "loss.png"):
        os.utime(out_dir / name, (0, time.time() - 70))
    draw_if_possible(config.out_dir, at_most_every=60)
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plots, "draw", fail)
    assert train.train(config) == 0
    assert "warning: loss.png could not be drawn: disk full" in capsys.readouterr().err
