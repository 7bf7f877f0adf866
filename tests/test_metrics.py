"""What a run reports: log lines, metrics.jsonl, and what TensorBoard gets."""

import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from nanogpt import train
from nanogpt.checkpoint import TrainState
from nanogpt.metrics import Metrics, TensorBoard, read_metrics, show_log_lines
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
    assert captured.err.startswith("warning: ")
    assert captured.err.endswith("look here\n")


def test_the_handlers_of_a_script_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, own = logging.getLogger("nanogpt"), logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logger, "handlers", [own])
    show_log_lines()
    log.info("for both")
    assert own.stream.getvalue() == "for both\n"


def test_a_row_is_one_line_of_strict_json(recipe: Recipe) -> None:
    config = recipe()
    with Metrics(config) as metrics:
        metrics.log(TrainState(step=3, tokens=192, seconds=1.23456), {"train/loss": 2.0, "grad_norm": math.nan})
        lines = Path(config.out_dir, "metrics.jsonl").read_text().splitlines()  # readable while the run trains
    expected = {"v": 1, "step": 3, "seconds": 1.235, "tokens": 192, "train/loss": 2.0, "grad_norm": None}
    assert [json.loads(line) for line in lines] == [expected]
    assert "NaN" not in lines[0]


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
    def fail(*_: Any) -> None:
        raise OSError("not logged in")

    monkeypatch.setattr(TensorBoard, "__init__", fail)
    assert train.train(recipe(tensorboard_log=True, max_iters=1)) == 0
    assert "warning: TensorBoard could not start (not logged in)" in capsys.readouterr().err
