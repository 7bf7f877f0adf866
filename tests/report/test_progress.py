import logging
import sys
from contextlib import closing

import pytest

from nanogpt.report.progress import Console


def test_lines_are_plain_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Console(total=3, done=1)) as console:
        console.report(2.0, "iter 1: loss 2.0", "evaluation in 5")
        console.advance()
    assert capsys.readouterr() == ("iter 1: loss 2.0\n", "")


def test_on_a_terminal_there_is_a_bar_below_the_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with closing(Console(total=3, done=1)) as console:
        console.say("evaluating")
        logging.getLogger("nanogpt").info("step 1: loss")
        console.report(2.0, "iter 1: loss 2.0", "evaluation in 5")
        console.report(3.0, "iter 2: loss 3.0", "evaluation in 4")
        console.advance()
        console._bar.refresh()
    out, err = capsys.readouterr()
    assert out == "step 1: loss\n"
    assert "1 of 3, ? left, evaluating" in err
    assert "2 of 3" in err
    assert "loss 2.2000, evaluation in 4" in err


def test_other_processes_show_no_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with closing(Console(total=3, is_main=False)) as console:
        console.advance()
    assert capsys.readouterr().err == ""
