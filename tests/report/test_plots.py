import json
import sys
from pathlib import Path

import pytest

from nanogpt.errors import CheckpointError, ConfigError
from nanogpt.programs import PlotConfig
from nanogpt.report.plots import plot


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [
        {"step": 0, "val/loss": 4.0, "train/eval_loss": 4.0},
        {"step": 1, "train/loss": 3.9},
        {"step": 2, "train/loss": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    plot(PlotConfig(out_dir=str(tmp_path)))
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def test_nothing_to_draw_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to draw"):
        plot(PlotConfig(out_dir=str(tmp_path)))


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plot(PlotConfig())
