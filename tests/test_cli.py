"""The command line: words to settings, and the programs as a user starts them: exit codes, messages, help."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import pytest

from nanogpt import cli
from nanogpt.config import Settings
from nanogpt.errors import ConfigError, DivergedError
from nanogpt.settings import PrepareConfig, SampleConfig
from tests.conftest import Program
from tests.programs import ROOT, Started

TINY = ["--device=cpu", "--dtype=float32", "--eval_iters=1", "--batch_size=2", "--gradient_accumulation_steps=1",
        "--block_size=8", "--n_layer=1", "--n_head=2", "--n_embd=16", "--dataset=tiny"]  # fmt: skip


class Example(Settings):
    """An example."""

    # --- first ---
    out_dir: str = "out"  # where it goes
    steps: int = 10  # how many
    # and a second line
    rate: float = 0.5  # how fast
    # --- second ---
    fast: bool = False  # hurry
    compile: bool | Literal["auto"] = "auto"  # or not
    kind: Literal["red", "green"] = "red"  # a colour
    start: str = "\n"  # a text


def read(*words: str) -> Example:
    return cli.parse(Example, words, "usage")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [("--rate=1", "rate", 1.0), ("--rate=1e-3", "rate", 1e-3), ("--rate 2", "rate", 2.0),
     ("--steps=1e3", "steps", 1000),
     ("--steps=9007199254740993", "steps", 9007199254740993), ("--steps=1 --steps=2", "steps", 2),
     ("--start=a=b", "start", "a=b"), ("--start=123", "start", "123"), ("--start=", "start", ""),
     ("--start=--x", "start", "--x"), ("--start a.py", "start", "a.py"), ("--out-dir=x", "out_dir", "x"),
     ("runs/lr=1", "out_dir", "runs/lr=1"), ("--fast", "fast", True), ("--fast no", "fast", False),
     ("--fast=False", "fast", False), ("--fast runs/a", "out_dir", "runs/a"), ("--compile=False", "compile", False),
     ("--compile", "compile", True), ("--compile auto", "compile", "auto"), ("--kind=green", "kind", "green")],
)  # fmt: skip
def test_command_line_means_what_it_says(words: str, name: str, value: object) -> None:
    found = getattr(read(*words.split()), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "message"),
    [("--stepps=3", "--stepps=3: there is no setting 'stepps'; the nearest is steps"),
     ("--steps=1.5", "--steps=1.5: expected a whole number"),
     ("one two", "two: out_dir is one already, and takes one value"),
     ("--rate=nan", "--rate=nan: expected a number"), ("--steps", "--steps: a value is missing: --steps=…"),
     ("--compile=always", "--compile=always: expected True or False or auto"),
     ("steps=3", "steps=3: expected config files (*.py) and --key=value only"),
     ("missing.py", "config file missing.py: FileNotFoundError")],
)  # fmt: skip
def test_a_mistake_is_named(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*words.split())
    assert message in str(caught.value)


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        read("--stepps=3", "--rate=x", "--steps=0", "missing.py", "gone.py", "--start")
    assert str(caught.value).startswith("these settings cannot work:\n  - ")
    assert str(caught.value).count("\n  - ") == 6


def test_precedence_is_defaults_then_files_then_command_line(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("steps = 20\nrate = 2")
    two.write_text("rate = rate * steps / 10")
    config = read("--steps=7", str(one), "--fast", str(two))
    assert (config.steps, config.rate, config.start, config.fast) == (7, 4.0, "\n", True)


def test_config_files_may_import_and_define_helpers(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    text = "import time\nfrom math import sqrt\ndef f(x): return _n * x\n_n = 8\nsteps = f(2)\nrate = sqrt(4)"
    file.write_text(text, encoding="utf-8-sig")  # with the byte-order mark of editors on Windows
    assert (read(str(file)).steps, read(str(file)).rate) == (16, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("stepps = 3", "a.py: stepps = 3: there is no setting 'stepps'; the nearest is steps"),
     ("steps = = 3", "SyntaxError"), ("\nsteps = x", "a.py, line 2: NameError")],
)  # fmt: skip
def test_a_mistake_in_a_config_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read("a.py")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [("x --input=a --input=b", ["a", "b"]), ("x --input a.py b --limit=1", ["a.py", "b"]), ("--input=a x", ["a"]),
     ("x c.py", ["from", "file"]), ("x c.py --input=a", ["a"])],
)  # fmt: skip
def test_a_list_is_repeated_or_written_in_a_row(words: str, expected: list[str]) -> None:
    Path("c.py").write_text("input = ['from', 'file']")
    config = cli.parse(PrepareConfig, words.split(), "usage", "name")
    assert (config.name, config.input) == ("x", expected)


def test_sampling_ignores_what_only_training_knows(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text("out_dir = 'run'\ninit_from = 'gpt2'\nbatch_size = 3\nmax_iters = batch_size\nseed = 7")
    config = cli.parse(SampleConfig, ["a.py", "--top_k=5"], "")
    assert (config.out_dir, config.init_from, config.seed, config.top_k) == ("run", "resume", 7, 5)
    assert capsys.readouterr().out == "a.py: ignored, for training only: batch_size, max_iters, init_from\n"
    Path("a.py").write_text("init_from = 'gpt2'\nbatch_size = 3\ntemprature = 1")
    with pytest.raises(ConfigError, match=r"^a\.py: temprature = 1: there is no setting 'temprature'"):
        cli.parse(SampleConfig, ["a.py"], "")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("train.py --help", "usage: python train.py"),
        ("data/pystdlib/prepare.py --help", "usage: "),
        ("-m nanogpt eval --help", "usage: nanogpt eval"),
        ("-m nanogpt", "  train     Train a GPT from scratch, resume a run"),
        ("-m nanogpt runs", "3.2500"),
    ],
)
def test_help_and_the_table_of_runs_need_no_torch(command: str, shown: str) -> None:
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text('{"step": 9, "val/loss": 3.25}\n')
    script, *words = command.split()
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script) if script.endswith(".py") else script, *words],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0
    assert shown in result.stdout
    imported = set(re.findall(r"\|\s+([\w.]+)$", result.stderr, flags=re.MULTILINE))
    assert "nanogpt.config" in imported
    assert not imported & {"torch", "numpy", "tqdm", "tiktoken"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken"), 2, "pip install tiktoken"),
     (RuntimeError("CUDA out of memory."), 2, "out of memory; reduce batch_size"),
     (OSError(28, "No space left on device"), 2, "No space left on device"), (KeyboardInterrupt(), 130, "interrupted"),
     (DivergedError("no finite loss"), 3, "error: no finite loss"), (RuntimeError("a bug"), None, "")],
)  # fmt: skip
def test_what_the_user_can_mend_is_one_message_and_an_exit_code(
    error: Exception, code: int | None, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("nanogpt.plot.list_runs", Mock(side_effect=error))
    with pytest.raises(SystemExit if code else type(error)) as ended:
        cli.run("runs", [])
    assert not code or ended.value.code == code  # type: ignore[union-attr]
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [("train", "python -m nanogpt prepare openwebtext"), ("plot", "missing or empty"),
     ("sample", "out holds no trained model; train one first"),
     ("prepare x", "'x' is no known data set"), ("bake", "unknown verb 'bake'; known: prepare, train")],
)  # fmt: skip
def test_what_is_missing_is_said_with_what_to_do(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nanogpt", *command.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_stopped_run_says_how_to_go_on_and_does(program: Program, data_dir: Path) -> None:
    started = Started([str(ROOT / "train.py"), *TINY, "--max_iters=100000", "--eval_interval=100000"])
    started.wait_for("iter 20:")
    started.send(signal.SIGINT)
    result = started.wait()
    assert result.returncode == 75
    assert "repeat the command with --init_from=resume" in result.stdout
    stopped = int(re.findall(r"stopped after (\d+) steps", result.stdout)[0])
    result = program("train.py", *TINY, f"--max_iters={stopped + 3}", "--init_from=resume")
    assert result.returncode == 0, result.stderr
    assert f"resuming out/ckpt.pt after {stopped} steps" in result.stdout
    steps = [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, *range(1, stopped + 4), stopped + 3]  # evaluations at both ends


def test_a_script_with_the_old_configurator_still_works() -> None:
    Path("a.py").write_text("'Of the file.'\nrate = 2.0\nhelper = 3\n")
    Path("mine.py").write_text(
        "'Mine.'\nbatch_size = 1\nrate = 0.1\nname = 'a'\nbetas = (0.9, 0.95)\n"
        f"exec(open({str(ROOT / 'configurator.py')!r}).read())\nprint(batch_size, rate, name, betas, helper)\n"
    )

    def script(*words: str) -> "subprocess.CompletedProcess[str]":
        return Started(["mine.py", "a.py", *words]).wait()

    lines = script("--batch_size=4", "--name=7", "--betas=(0.8, 0.99)").stdout.splitlines()
    assert lines[-2:] == ["Overriding: betas = (0.8, 0.99)", "4 2.0 7 (0.8, 0.99) 3"]
    for word, message in (("--batchsize=4", "no setting 'batchsize'"), ("--batch_size=x", "a value of type int")):
        result = script(word)
        assert result.returncode == 2
        assert message in result.stderr
