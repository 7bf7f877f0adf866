"""The command `nanogpt VERB …` and the doors beside it: a table of programs.

The programs are named and imported when they run, so that `--help` and mistakes answer without loading torch.
"""

import difflib
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import get_type_hints

from nanogpt import __version__, programs
from nanogpt.config import BenchConfig, PlanConfig, TrainConfig
from nanogpt.errors import UserError
from nanogpt.settings import Settings, parse

log = logging.getLogger(__name__)

_TO_SERVE = "fastapi uvicorn prometheus-client"  # packages that `nanogpt serve` needs beside the others

# verb: its settings, its program, the setting that a bare word stands for
VERBS: dict[str, tuple[type[Settings], str, str]] = {
    "prepare": (programs.PrepareConfig, "nanogpt.prepare:prepare", "name"),
    "train": (TrainConfig, "nanogpt.train:train", "out_dir"),
    "sample": (programs.SampleConfig, "nanogpt.infer.sample:sample", "out_dir"),
    "serve": (programs.ServeConfig, "nanogpt.infer.serve:serve", "out_dir"),
    "eval": (programs.EvalConfig, "nanogpt.evaluate:evaluate", "out_dir"),
    "export": (programs.ExportConfig, "nanogpt.export:export", "out_dir"),
    "bench": (BenchConfig, "nanogpt.bench:bench", "out_dir"),
    "plan": (PlanConfig, "nanogpt.plan:plan", "out_dir"),
    "plot": (programs.PlotConfig, "nanogpt.report.plots:plot", "out_dir"),
    "runs": (programs.RunsConfig, "nanogpt.report.runs:list_runs", "folder"),
    "inspect": (programs.InspectConfig, "nanogpt.report.inside:inspect", "out_dir"),
}


@contextmanager
def _exit_code() -> Iterator[None]:
    """Turn what ends a program into its exit code, and a mistake of the user into one message."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # closed before we came
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a ? for a character that the terminal cannot show, rather than crash
            stream.reconfigure(errors="replace")
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return
    except UserError as error:
        with suppress(OSError):
            sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `sample.py | head` has read enough; 141 is what the shell expects of a program then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if not (explained := _explained(error)):
            raise
        print(f"error: {explained}", file=sys.stderr)
        code = UserError.exit_code
    sys.exit(code)


def _explained(error: Exception) -> str:
    """What a person can do about an error that is none of ours; empty if it is a bug."""
    name = (getattr(error, "name", "") or "nanogpt").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and name != "nanogpt":
        packages = _TO_SERVE if name in _TO_SERVE.replace("-", "_").split() else name
        return (
            f"{sys.executable} has no package {name}; activate the environment that has it (. .venv/bin/activate), or "
            f"pip install {packages}"
        )
    said = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", said):
        return (
            f"there is not enough memory{': ' * bool(said)}{said}; a smaller batch_size, block_size or model takes "
            "less, and in training so does --gradient_checkpointing=True; nanogpt plan tells how much"
        )
    return str(error) if isinstance(error, OSError) else ""  # a full disk, a folder without permission, …


def main() -> None:
    """The entry point `nanogpt VERB [word …] [--key=value …]`; exits with the program's code."""
    arguments = sys.argv[1:]
    with _exit_code():
        if arguments[:1] == ["--version"]:
            print(f"nanogpt {__version__}")
        elif not arguments or arguments[0] in ("--help", "-h", "help"):
            print("usage: nanogpt VERB [run folder or config.py …] [--key=value …]\n")
            for verb, (settings, _, _) in VERBS.items():
                print(f"  {verb:9} {(settings.__doc__ or '').splitlines()[0]}")
            print("\nnanogpt VERB --help lists the settings of one.")
        elif arguments[0] not in VERBS:
            nearest = difflib.get_close_matches(arguments[0], VERBS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"unknown verb {arguments[0]!r}; known: {', '.join(VERBS)}{hint}")
        else:
            run(arguments[0], arguments[1:], program=f"nanogpt {arguments[0]}")


def run(verb: str, arguments: Sequence[str] | None = None, *, program: str = "") -> None:
    """Run one program with `arguments` (default: those of this process) and exit with its code.

    Exit codes: 0 done, 2 the user's mistake, 75 stopped by a signal and resumable, 130 interrupted.
    """
    settings, program_at, positional = VERBS[verb]
    kind = get_type_hints(settings).get(positional)
    word = f" [{positional} …]" if kind == list[str] else f" [{positional}]" if kind else ""
    usage = f"{program or f'python {os.path.basename(sys.argv[0])}'} [config.py …]{word} [--key=value …]"
    notes: list[str] = []
    with _exit_code():
        words = sys.argv[1:] if arguments is None else arguments
        config = parse(settings, words, usage, positional=positional, notes=notes)
        from nanogpt.report.log import show_log_lines

        show_log_lines(getattr(config, "verbosity", "normal"))
        for note in notes:
            log.info(note)
        module, _, function = program_at.partition(":")
        result = getattr(importlib.import_module(module), function)(config)
        sys.exit(result if isinstance(result, int) else 0)
