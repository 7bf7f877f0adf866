"""What a run reports: log lines, metrics.jsonl, TensorBoard, pictures and tables; and a look inside a model."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from nanogpt import plot as plots
from nanogpt import train
from nanogpt.checkpoint import TrainState, find_checkpoint, load_checkpoint
from nanogpt.cli import parse
from nanogpt.config import GPTConfig
from nanogpt.errors import CheckpointError
from nanogpt.files import locked
from nanogpt.inspect import inspect, look
from nanogpt.metrics import Metrics, TensorBoard, read_metrics, show_log_lines
from nanogpt.model import GPT
from nanogpt.plot import RunRecord, list_runs, plot
from nanogpt.settings import InspectConfig, PlotConfig, RunsConfig
from tests.conftest import Recipe

log = logging.getLogger("nanogpt.somewhere")


@pytest.mark.parametrize(
    ("verbosity", "out"),
    [("normal", "at work: 100 %\n"), ("quiet", ""), ("debug", " nanogpt.somewhere: at work: 100 %\n")],
)
def test_lines_go_to_standard_output_and_warnings_to_standard_error(
    capsys: pytest.CaptureFixture[str], verbosity: str, out: str
) -> None:
    show_log_lines(verbosity)
    show_log_lines(verbosity)  # shows nothing twice
    log.info("at work: 100 %")
    log.warning("look here")
    captured = capsys.readouterr()
    assert captured.out.endswith(out)
    assert captured.out.count("\n") == out.count("\n")
    assert captured.err.endswith("look here\n")


def test_a_row_is_one_line_of_strict_json(recipe: Recipe) -> None:
    config = recipe()
    with Metrics(config) as metrics:
        metrics.log(TrainState(step=3, tokens=192, seconds=1.23456), {"train/loss": 2.0, "grad_norm": math.nan})
        lines = Path(config.out_dir, "metrics.jsonl").read_text().splitlines()  # readable while the run trains
    expected = {"v": 1, "step": 3, "seconds": 1.235, "tokens": 192, "train/loss": 2.0, "grad_norm": None}
    assert lines == [json.dumps(expected)]


@pytest.mark.parametrize(("resumed_at", "kept"), [(None, []), (0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_resumed_run_continues_at_its_checkpoint(recipe: Recipe, resumed_at: int | None, kept: list[int]) -> None:
    config = recipe()
    with Metrics(config) as metrics:
        for step in (1, 2, 3):
            metrics.log(TrainState(step=step), {})
    path = Path(config.out_dir, "metrics.jsonl")
    path.write_text(path.read_text() + '{"v": 1, "ste')  # cut off by a crash
    with Metrics(config, None if resumed_at is None else TrainState(step=resumed_at)) as metrics:
        metrics.log(TrainState(step=10), {})
    assert [row["step"] for row in read_metrics(path)] == [*kept, 10]


@pytest.mark.parametrize(("evaluated", "kept"), [(2, 2), (0, 1)])
def test_an_evaluation_that_the_checkpoint_does_not_know_is_dropped(recipe: Recipe, evaluated: int, kept: int) -> None:
    with Metrics(recipe()) as metrics:
        metrics.log(TrainState(step=2), {"train/loss": 1.0})
        metrics.log(TrainState(step=2), {"val/loss": 1.0})
    with Metrics(recipe(), TrainState(step=2, evaluated=evaluated)):
        assert len(read_metrics(Path(recipe().out_dir, "metrics.jsonl"))) == kept


def test_only_the_main_process_writes(recipe: Recipe) -> None:
    with Metrics(recipe(), is_main=False) as metrics:
        metrics.log(TrainState(), {})
        metrics.sync()
    assert not Path(recipe().out_dir).exists()


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


def test_a_tracker_that_cannot_start_is_a_warning(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TensorBoard, "__init__", Mock(side_effect=OSError("not logged in")))
    assert train.train(recipe(tensorboard_log=True, max_iters=1)) == 0
    assert "warning: TensorBoard could not start (not logged in)" in capsys.readouterr().err


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
    _, *lines = capsys.readouterr().out.splitlines()
    table = sorted(line.split()[:6] for line in lines)
    assert table == [["a", "done", "10", "of", "10", "3.2500"], ["deep/b", "stopped", "0", "of", "5,000", "4.0000"]]
    list_runs(RunsConfig(previous=True))
    assert "a/previous-1" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no runs in or below"):
        list_runs(RunsConfig(folder="c"))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is missing or empty"):
        plot(PlotConfig(out_dir=["c"]))


def test_several_runs_in_one_picture(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("one"), [4.0, 3.0, 2.5], learning_rate=0.1, n_layer=2, out_dir="one", log_interval=1)
    write_run(Path("two"), [4.0, 2.0], learning_rate=0.2, n_layer=2, out_dir="two", log_interval=5)
    plot(parse(PlotConfig, ["one", "two", "--output=both.svg"], ""))
    assert Path("both.svg").read_bytes().startswith(b"<?xml")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[3:5] == [["one", "20", "2.5000", "4", "s"], ["two", "10", "2.0000", "2", "s"]]
    assert lines[6:8] == [["setting", "one", "two"], ["max_iters", "20", "10"]]
    plot(PlotConfig(out_dir=["one", "two"]))
    assert Path("comparison.png").exists()


def test_a_run_draws_itself_at_its_end(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(plot=True, max_iters=1)
    out_dir = Path(config.out_dir)
    assert train.train(config) == 0
    assert RunRecord(out_dir).state == "done"
    assert len((out_dir / "loss.png").read_bytes()) > 5000
    monkeypatch.setattr(plots, "draw", Mock(side_effect=OSError("disk full")))
    assert train.train(config) == 0
    assert "warning: loss.png could not be drawn: disk full" in capsys.readouterr().err


def test_a_look_inside(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(max_iters=2)
    train.train(config)
    capsys.readouterr()
    inspect(InspectConfig(out_dir=config.out_dir, text="the quick fox"))
    out = capsys.readouterr().out
    checkpoint = load_checkpoint(find_checkpoint(config.out_dir, "auto"))
    model, row = checkpoint.build_model(), torch.tensor([checkpoint.tokenizer.encode_prompt("the quick fox")])
    for name, parameter in model.named_parameters():
        [line] = [line for line in out.splitlines() if line.startswith(f"{name} ")]
        shape = " x ".join(map(str, parameter.shape))
        assert line.split(maxsplit=1)[1].split() == f"{shape} {parameter.norm():.3f}".split()
    first, *told = out.partition("loss\n")[2].splitlines()[: row.numel()]
    assert first == "'t'"
    assert told[0].split()[0] == "'h'"
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(row, row)[0][0, :-1], row[0, 1:], reduction="none")
    assert [float(line.split()[-1]) for line in told] == pytest.approx(expected.tolist(), abs=1e-3)
    assert Path(config.out_dir, "attention.png").read_bytes().startswith(b"\x89PNG")
    inspect(InspectConfig(out_dir=config.out_dir, text="the " * 5))
    assert "nats per token over 16 tokens" in capsys.readouterr().out  # 20 are more than the model's context


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_attention_adds_up_and_looks_back_only(architecture: str) -> None:
    config = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=4, n_embd=32, architecture=architecture)  # type: ignore[arg-type]
    if architecture != "gpt2":
        config.n_kv_head = 2
    _, attention = look(GPT(config).eval(), range(10))
    assert [each.shape for each in attention] == [(4, 10, 10)] * 2
    for each in attention:
        torch.testing.assert_close(each.sum(dim=-1), torch.ones(4, 10))
        assert each.triu(1).count_nonzero() == 0
