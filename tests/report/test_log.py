import io
import logging
import sys

import pytest

from nanogpt.report.log import show_log_lines
from tests.conftest import Program

log = logging.getLogger("nanogpt.somewhere")


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_lines_go_to_standard_output_and_warnings_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    show_log_lines("normal")
    log.debug("a detail")
    log.info("what is going on: 100 %")
    log.warning("look here")
    assert capsys.readouterr() == ("what is going on: 100 %\n", "warning: look here\n")


def test_quiet_leaves_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    show_log_lines("quiet")
    log.info("what is going on")
    log.warning("look here")
    assert capsys.readouterr() == ("", "warning: look here\n")


def test_debug_says_when_and_where_from(capsys: pytest.CaptureFixture[str]) -> None:
    show_log_lines("debug")
    log.debug("a detail")
    time, name, text = capsys.readouterr().out.split(" ", 2)
    assert len(time) == len("12:34:56.789")
    assert (name, text) == ("somewhere:", "a detail\n")


def test_a_run_goes_on_behind_a_closed_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    show_log_lines(must_go_on=True)
    log.info("nobody reads this")
    log.info("nor this")
    assert capsys.readouterr().err == ("warning: standard output has been closed; the run goes on, see metrics.jsonl\n")


def test_other_programs_end_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    show_log_lines()
    with pytest.raises(BrokenPipeError):
        log.info("nobody reads this")


def test_a_second_call_shows_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    show_log_lines("normal")
    show_log_lines("normal")
    log.info("once")
    assert capsys.readouterr().out == "once\n"


def test_the_handlers_of_a_script_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, own = logging.getLogger("nanogpt"), logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logger, "handlers", [own])
    show_log_lines("normal")
    log.info("for both")
    assert own.stream.getvalue() == "for both\n"
    assert logger.handlers[0] is own


def test_a_quiet_program_prints_its_result_alone(program: Program) -> None:
    prepared = program("nanogpt", "prepare", "pystdlib", "--limit=50", "--verbosity=quiet")
    assert prepared.stdout == "wrote data/pystdlib/train.bin, val.bin and dataset.json\n"
    shape = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --gradient_accumulation_steps=1"
    short = "--max_iters=2 --eval_iters=1 --eval_interval=1 --warmup_iters=0 --plot=False --device=cpu"
    words = [*shape.split(), *short.split(), "--dataset=pystdlib"]
    assert program("train.py", *words, "--verbosity=quiet").stdout == ""
    lines = program("train.py", *words, "--out_dir=b", "--verbosity=debug").stdout
    assert "saver: checkpoint of 2 updates written in" in lines
    assert "train: evaluation took" in lines
    assert "start: optimizer: " in lines
