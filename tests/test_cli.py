"""The programs as a person starts them: exit codes, messages, help."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt import cli
from tests.conftest import ROOT, Program

TINY = ["--device=cpu", "--dtype=float32", "--eval_iters=1", "--batch_size=2", "--gradient_accumulation_steps=1",
        "--block_size=8", "--n_layer=1", "--n_head=2", "--n_embd=16", "--dataset=tiny"]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [("train.py",), ("sample.py",), ("bench.py",), ("data/pystdlib/prepare.py",), ("nanogpt",), ("nanogpt", "eval")],
)
def test_help_answers_without_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    start = [str(ROOT / command[0])] if command[0].endswith(".py") else ["-m", command[0]]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *start, *command[1:], "--help"],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    imported = set(re.findall(r"\|\s+([\w.]+)$", result.stderr, flags=re.MULTILINE))
    assert "nanogpt.settings" in imported
    assert not imported & {"torch", "numpy", "tqdm", "tiktoken"}


@pytest.mark.parametrize(
    ("verb", "usage"),
    [("serve", "[config.py …] [out_dir …] [--key"), ("sample", "[config.py …] [out_dir] [--key"),
     ("bench", "[config.py …] [--key")],
)  # fmt: skip
def test_usage_says_which_words_are_taken(verb: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(verb, ["--help"])
    text = capsys.readouterr().out
    assert usage in text.splitlines()[0]
    assert text.count("--out_dir=out ") == (verb != "bench")
    assert "--runs" not in text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken"), 2, "has no package tiktoken; activate"),
        (MemoryError("Unable to allocate 7 PiB"), 2, "not enough memory: Unable to allocate 7 PiB; a smaller batch"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            2,
            "CUDA out of memory. Tried to allocate 2 GiB;",
        ),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ModuleNotFoundError("No module named 'nanogpt.gone'", name="nanogpt.gone"), None, ""),
        (RuntimeError("a bug"), None, ""),
    ],
)
def test_what_a_person_can_mend_is_no_traceback(
    error: Exception,
    code: int | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("nanogpt.report.runs.list_runs", fail)
    with pytest.raises(SystemExit if code else type(error)) as ended:
        cli.run("runs", [])
    assert not code or ended.value.code == code  # type: ignore[union-attr]
    assert message in capsys.readouterr().err


def test_an_output_that_was_closed_before_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    command = [sys.executable, "-m", "nanogpt", "runs", str(tmp_path)]
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_mistakes_end_with_2_and_one_message(program: Program) -> None:
    result = program("train.py", "--lerning_rate=1", "--n_embd=100", "--batch_size=x")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: these settings cannot work:\n  - ")
    assert "did you mean learning_rate?" in result.stderr
    assert "n_embd=100 is not a multiple" in result.stderr
    assert "--batch_size=x: expected a whole number" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train.py"], "prepare it with: python -m nanogpt prepare openwebtext"),
        (["train.py", "--dataset=shakespeare_char"], "python -m nanogpt prepare shakespeare_char"),
        (["sample.py"], "there is no folder out; train a model first"),
        (["nanogpt", "eval", "somewhere"], "there is no folder somewhere"),
        (["nanogpt", "plot"], "missing or empty"),
        (["nanogpt", "prepare"], "which data set?"),
        (["nanogpt", "bake"], "unknown verb 'bake'; known: prepare, train"),
        (["nanogpt", "trian"], "inspect; did you mean train?"),
        (["bench.py", "--device=cpu"], "--real_data=False"),
        (["bench.py", "out"], "out: expected config files (*.py) and --key=value only"),
        (["train.py", "missing.py"], "there is no config file missing.py"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(program: Program, command: list[str], message: str) -> None:
    result = program(*command)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_train_stop_resume_eval_sample_bench_plot(program: Program, data_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--max_iters=100000", "--eval_interval=100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("iter 20:"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75
    assert "the same command with --init_from=resume goes on" in rest
    stopped = int(re.findall(r"stopped after (\d+) updates", rest)[0])

    result = program("train.py", *TINY, f"--max_iters={stopped + 3}", "--init_from=resume")
    assert result.returncode == 0, result.stderr
    assert f"resuming out/ckpt.pt after {stopped} updates" in result.stdout
    steps = [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, *range(1, stopped + 4), stopped + 3]  # evaluations at both ends

    result = program("nanogpt", "eval", "out", "--device=cpu")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["model"] == f"out/best.pt, {stopped + 3} updates"
    result = program("sample.py", "--device=cpu", "--num_samples=2", "--max_new_tokens=5", "--start=the")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("---------------") == 2
    Path("recipe.py").write_text("out_dir = 'out'\nbatch_size = 2\nmax_iters = 9")
    result = program("sample.py", "recipe.py", "--device=cpu", "--num_samples=1", "--max_new_tokens=5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "recipe.py: passed over, not for this program: batch_size, max_iters"
    result = program("nanogpt", "plot", "out")
    assert result.returncode == 0, result.stderr
    assert Path("out/loss.png").exists()


def test_the_output_may_be_cut_off_by_head(data_dir: Path, tmp_path: Path, program: Program) -> None:
    assert program("train.py", *TINY, "--max_iters=1").returncode == 0
    sample = [sys.executable, str(ROOT / "sample.py"), "--device=cpu", "--max_new_tokens=2000"]
    process = subprocess.Popen(sample, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


def test_a_mistake_is_told_behind_a_closed_pipe(tmp_path: Path) -> None:
    (tmp_path / "talks.py").write_text("print('waits in the buffer')")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "train.py"), "talks.py", "--nonsense=1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, check=False)
    os.close(writer)
    assert result.returncode in (2, 120)  # 120: Python itself can't write the rest at its end
    assert b"there is no setting 'nonsense'" in result.stderr


@pytest.mark.parametrize("words", ["--help", "--version", "train --help"])
def test_help_may_be_cut_off_by_head(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nanogpt", *words.split()]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, check=False, timeout=60)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_a_run_that_compiles_nothing_does_not_load_the_compiler(data_dir: Path, tmp_path: Path) -> None:
    words = [*TINY, "--max_iters=4", "--eval_interval=2", "--health_interval=2", "--plot=False"]
    script = f"import sys; from nanogpt import cli\ntry: cli.run('train', {words})\n"
    script += "finally: print('torch._dynamo' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "False"  # it takes a second


@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_training_goes_on_when_nobody_listens_any_more(stderr: int, data_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--max_iters=200"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    assert any(line.startswith("iter 1:") for line in process.stdout)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    if process.stderr is not None:
        assert "standard output has been closed; the run goes on" in process.stderr.read()
    assert json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])["step"] == 200


def test_a_folder_that_is_a_file_is_one_message(data_dir: Path, tmp_path: Path, program: Program) -> None:
    (tmp_path / "file").write_text("x")
    for command in (["nanogpt", "prepare", "pystdlib", "--data_dir=file"], ["train.py", *TINY, "--out_dir=file"]):
        result = program(*command)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr


def test_a_script_with_the_old_configurator_still_works(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        f"'Mine.'\nimport sys; sys.path.insert(0, {str(ROOT)!r})\nbatch_size = 1\nname = 'a'\n"
        f"exec(open({str(ROOT / 'configurator.py')!r}).read())\n"
        "from model import GPT, GPTConfig\nprint(batch_size, name, __doc__)\n"
    )

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, str(script), *words], capture_output=True, text=True, check=False, timeout=60
        )

    assert run("--batch_size=4").stdout == "Overriding: batch_size = 4\n4 a Mine.\n"
    mistaken = run("--batchsize=4")
    assert mistaken.returncode == 2
    assert "did you mean batch_size?" in mistaken.stderr
    assert "--batch_size=1" in run("--help").stdout


def test_the_verbs_are_listed_with_their_purpose(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["nanogpt"])
    cli.main()
    out = capsys.readouterr().out
    for verb, (settings, _, _) in cli.VERBS.items():
        assert f"  {verb:9} {(settings.__doc__ or '').splitlines()[0]}" in out
