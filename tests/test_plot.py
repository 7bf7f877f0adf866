import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanogpt import cli, train
from nanogpt import plot as plots
from nanogpt.cli import parse
from nanogpt.config import TrainConfig
from nanogpt.errors import CheckpointError, ConfigError, DivergedError, UserError
from nanogpt.files import locked
from nanogpt.plot import differences, draw_if_possible, list_runs, open_run, plot
from nanogpt.settings import PlotConfig, RunsConfig
from tests.conftest import ROOT, Program

Recipe = Callable[..., TrainConfig]


def write_run(folder: Path, losses: list[float], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"v": 1, "step": 10 * n, "seconds": 2.0 * n, "tokens": 100 * n, "val/loss": loss}
        for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"max_iters": 10 * (len(losses) - 1), **config}))
    return folder


def test_a_run_that_has_ended(recipe: Recipe) -> None:
    config = recipe(max_iters=6)
    train.train(config)
    run = open_run(Path(config.out_dir))
    assert (run.name, run.state, run.step) == ("out", "done", 6)
    assert run.best == min(loss for _, loss in run.curve("val/loss"))
    assert run.age < 60
    assert open_run(Path(config.out_dir)).state == "done"


def test_a_run_that_is_running_then_crashed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [4.0, 3.0], max_iters=100)
    assert open_run(folder).state == "stopped"
    with locked(folder / "lock", "it"):
        assert open_run(folder).state == "running"
    assert open_run(folder).state == "stopped"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom nanogpt.files import locked\n"
         "with locked(sys.argv[1], 'it'): print('here', flush=True); time.sleep(60)", str(folder / "lock")],
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert holder.stdout
    holder.stdout.readline()
    assert open_run(folder).state == "running"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert open_run(folder).state == "crashed"
    (folder / "lock").write_text("process 1 on another-machine")
    assert open_run(folder).state == "running"  # heard of a moment ago
    os.utime(folder / "metrics.jsonl", (0, time.time() - 700))
    assert open_run(folder).state == "crashed"
    write_run(folder, [4.0, 3.0])  # to the end
    (folder / "lock").write_text("failed")
    assert open_run(folder).state == "crashed"  # its last checkpoint could not be written
    (folder / "lock").write_text("")
    assert open_run(folder).state == "done"


def test_a_run_that_diverged(recipe: Recipe) -> None:
    config = recipe(max_iters=30, eval_interval=30, max_bad_steps=2, learning_rate=1e30, warmup_iters=0, grad_clip=0.0)
    with pytest.raises(DivergedError):
        train.train(config)
    assert open_run(Path(config.out_dir)).state == "diverged"


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", [4.0, 3.25])
    write_run(tmp_path / "deep" / "b", [4.0], max_iters=5000)
    write_run(tmp_path / "a" / "previous-1", [4.0])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.jsonl").write_text("nonsense\n")
    list_runs(RunsConfig(folder=str(tmp_path)))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "steps", "best", "loss", "last", "record"]
    assert sorted(line.split()[:3] for line in lines) == [["a", "done", "10"], ["deep/b", "stopped", "0"]]
    assert any("3.2500" in line for line in lines)
    list_runs(RunsConfig(folder=str(tmp_path), previous=True))
    assert "previous-1" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no runs in or below"):
        list_runs(RunsConfig(folder=str(tmp_path / "c")))


def test_the_table_needs_no_torch(program: Program, tmp_path: Path) -> None:
    write_run(tmp_path / "a", [4.0, 3.25])
    (tmp_path / "torch.py").write_text("raise SystemExit('imported torch')")
    result = program("nanogpt", "runs", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert "3.2500" in result.stdout, result.stderr


def test_different_data_sets_compare_in_bits_per_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name, n_bytes in (("words", 3000), ("letters", 1000)):
        write_run(tmp_path / f"of-{name}", [2.0], data_dir=str(tmp_path), dataset=name)
        (tmp_path / name).mkdir()
        about = {"tokens": {"train": 1000, "val": 1000}, "bytes": {"train": n_bytes, "val": n_bytes}}
        (tmp_path / name / "dataset.json").write_text(json.dumps(about))
    both = PlotConfig(out_dir=[str(tmp_path / "of-words"), str(tmp_path / "of-letters")])
    plot(both)
    printed = capsys.readouterr().out
    assert "losses in bits per byte" in printed
    assert f"{2 / math.log(2) / 3:.4f}" in printed
    assert f"{2 / math.log(2):.4f}" in printed
    (tmp_path / "words" / "dataset.json").unlink()
    plot(both)
    assert "nats per token: different data, no comparison" in capsys.readouterr().out


def test_settings_without_effect_are_no_differences(tmp_path: Path) -> None:
    common = {"optimizer": "adamw", "schedule": "wsd"}
    one = write_run(tmp_path / "one", [2.0], muon_lr=0.1, decay_share=0.1, log_interval=1, **common)
    two = write_run(tmp_path / "two", [2.0], muon_lr=0.2, decay_share=0.2, log_interval=5, **common)
    assert differences([open_run(one), open_run(two)]) == {"decay_share": [0.1, 0.2]}


def test_rows_that_are_damaged_are_no_points(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [4.0, 3.0], max_iters="many")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "seconds": null, "val/loss": 1.0}\n{"step": 30, "seconds": 6, "val/loss": "low"}\n')
    run = open_run(folder)
    assert (run.planned, run.best) == (0, 1.0)
    assert run.curve("val/loss", by="seconds") == [(0.0, 4.0), (2.0, 3.0)]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_several_runs_in_one_picture(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write_run(tmp_path / "one", [4.0, 3.0, 2.5], learning_rate=0.1, n_layer=2, out_dir="one")
    write_run(tmp_path / "two", [4.0, 2.0], learning_rate=0.2, n_layer=2, out_dir="two")
    target = tmp_path / f"both.{suffix}"
    plot(parse(PlotConfig, [str(tmp_path / "one"), str(tmp_path / "two"), f"--output={target}"], ""))
    assert target.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["losses", "in", "nats", "per", "token"]
    assert lines[2] == ["run", "steps", "best", "loss", "training", "to", "2.5000"]
    assert lines[3:5] == [["one", "20", "2.5000", "4", "s"], ["two", "10", "2.0000", "2", "s"]]
    assert lines[6:] == [["setting", "one", "two"], ["learning_rate", "0.1", "0.2"], ["max_iters", "20", "10"]]
    monkeypatch.chdir(tmp_path)
    plot(PlotConfig(out_dir=["one", "two"]))
    assert Path("comparison.png").exists()
    assert not Path("one", "loss.png").exists()


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run, target = open_run(write_run(tmp_path / "one", [4.0])), tmp_path / "loss.png"
    target.write_bytes(b"the old one")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(UserError, match="cannot write"):
        plots.draw([run], target)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["loss.png"]
    assert target.read_bytes() == b"the old one"


def test_one_run_goes_into_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot(PlotConfig(out_dir=[str(write_run(tmp_path / "one", [4.0]))]))
    assert len((tmp_path / "one" / "loss.png").read_bytes()) > 5000


def test_nothing_to_draw_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is missing or empty"):
        plot(PlotConfig(out_dir=[str(tmp_path)]))
    with pytest.raises(ConfigError, match=r"ends in \.png, \.svg or \.pdf"):
        parse(PlotConfig, ["--output=a.jpeg"], "")


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="2"):
        cli.run("plot", [str(write_run(tmp_path / "one", [4.0]))])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_run_draws_itself_at_its_end(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    config = recipe(plot=True, max_iters=1)
    assert train.train(config) == 0
    assert (Path(config.out_dir) / "loss.png").exists()

    (Path(config.out_dir) / "loss.png").write_bytes(b"a moment ago")
    draw_if_possible(config.out_dir, at_most_every=60)
    assert (Path(config.out_dir) / "loss.png").read_bytes() == b"a moment ago"
    for name in ("config.json", "loss.png"):
        os.utime(Path(config.out_dir) / name, (0, time.time() - 70))
    draw_if_possible(config.out_dir, at_most_every=60)
    assert (Path(config.out_dir) / "loss.png").read_bytes().startswith(b"\x89PNG")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plots, "draw", fail)
    assert train.train(config) == 0
    assert "warning: loss.png could not be drawn: disk full" in capsys.readouterr().err
