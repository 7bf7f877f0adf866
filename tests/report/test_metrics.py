import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt.checkpoint import Progress
from nanogpt.config import TrainConfig
from nanogpt.report import metrics as module
from nanogpt.report.metrics import Metrics, read_metrics

Recipe = Callable[..., TrainConfig]


def test_a_row_is_one_line_of_strict_json(recipe: Recipe) -> None:
    config = recipe()
    with Metrics(config) as metrics:
        metrics.write(Progress(step=3, tokens=192, seconds=1.23456), {"train/loss": 2.0, "grad_norm": math.nan})
        lines = Path(config.out_dir, "metrics.jsonl").read_text().splitlines()  # readable while the run goes on
    expected = {"v": 1, "step": 3, "seconds": 1.235, "tokens": 192, "train/loss": 2.0, "grad_norm": None}
    assert [json.loads(line) for line in lines] == [expected]
    assert "NaN" not in lines[0]


@pytest.mark.parametrize(("resumed_at", "kept"), [(None, []), (0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_resumed_run_goes_on_at_its_checkpoint(recipe: Recipe, resumed_at: int | None, kept: list[int]) -> None:
    config = recipe()
    with Metrics(config) as metrics:
        for step in (1, 2, 3):
            metrics.write(Progress(step=step), {})
    path = Path(config.out_dir, "metrics.jsonl")
    path.write_text(path.read_text() + '{"v": 1, "ste')  # cut off by a crash
    with Metrics(config, None if resumed_at is None else Progress(step=resumed_at)) as metrics:
        metrics.write(Progress(step=10), {})
    assert [row["step"] for row in read_metrics(path)] == [*kept, 10]


def test_an_evaluation_that_the_checkpoint_does_not_know_will_be_done_again(recipe: Recipe) -> None:
    config = recipe()
    for evaluated, kept in ((2, 2), (0, 1)):
        with Metrics(config) as metrics:
            metrics.write(Progress(step=2), {"train/loss": 1.0})
            metrics.write(Progress(step=2), {"val/loss": 1.0})
        with Metrics(config, Progress(step=2, evaluated=evaluated)):
            assert len(read_metrics(Path(config.out_dir, "metrics.jsonl"))) == kept


def test_a_folder_that_vanishes_or_is_blocked_does_not_end_the_run(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    config = recipe()
    folder = Path(config.out_dir)
    with Metrics(config) as metrics:
        shutil.rmtree(folder)
        metrics.write(Progress(step=1), {})
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1]
        shutil.rmtree(folder)
        folder.write_text("in the way")
        metrics.write(Progress(step=2), {})
        assert "warning: cannot write" in capsys.readouterr().err
        folder.unlink()
        metrics.write(Progress(step=3), {})
        metrics.sync()
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [2, 3]


def test_only_the_main_process_writes(recipe: Recipe) -> None:
    config = recipe()
    with Metrics(config, is_main=False) as metrics:
        metrics.write(Progress(), {})
    assert not Path(config.out_dir).exists()


def test_foreign_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'{"step": 1}\n[]\n3\n\xff\n{"step": "x"}\n\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
