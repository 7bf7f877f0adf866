import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt import cli, train
from nanogpt import plot as plots
from nanogpt.cli import parse
from nanogpt.config import TrainConfig
from nanogpt.errors import CheckpointError, ConfigError, UserError
from nanogpt.plot import plot
from nanogpt.runs import open_run
from nanogpt.settings import PlotConfig
from tests.test_runs import write_run


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
    assert lines[1] == ["run", "steps", "best", "loss", "training", "to", "2.5000"]
    assert lines[2:4] == [["one", "20", "2.5000", "4", "s"], ["two", "10", "2.0000", "2", "s"]]
    assert lines[5:] == [["setting", "one", "two"], ["learning_rate", "0.1", "0.2"], ["max_iters", "20", "10"]]
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
    recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    config = recipe(plot=True, max_iters=1)
    assert train.train(config) == 0
    assert (Path(config.out_dir) / "loss.png").exists()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plots, "draw", fail)
    assert train.train(config) == 0
    assert "warning: loss.png could not be drawn: disk full" in capsys.readouterr().err
