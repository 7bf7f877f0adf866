"""Programs in processes of their own, forked from one that has imported torch: seconds faster than starting Python."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
# Nothing of nanogpt: each process imports it from where it was started.
IMPORTED = ["torch._dynamo", "torch.distributed.launcher.api", "torch.distributed.fsdp", "torch.distributed.checkpoint",
            "tokenizers", "matplotlib.figure", "tests.programs"]  # fmt: skip
FORKS.set_forkserver_preload(IMPORTED)


def run_python(words: list[str], folder: Path, environment: dict[str, str], files: list[str]) -> None:
    """Do in this process what `python WORDS` does in a new one."""
    for descriptor, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-m":
        sys.path.insert(0, str(folder))
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class Started:
    """`python WORDS`, started in `folder` with `environment` on top of that of this process."""

    running: ClassVar[list["Started"]] = []

    def __init__(self, words: list[str], folder: Path | None = None, **environment: str) -> None:
        self.words, self.files = words, [tempfile.NamedTemporaryFile() for _ in ("stdout", "stderr")]
        everything = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        arguments = (words, folder or Path.cwd(), everything, [file.name for file in self.files])
        self.process = FORKS.Process(target=run_python, args=arguments)
        self.process.start()
        self.running.append(self)

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid or 0, number)

    def end(self) -> None:
        """Kill it, if it has not ended."""
        self.process.kill()
        self.process.join()
        self.running.remove(self)

    def wait_for(self, text: str) -> None:
        """Wait until it has written `text`."""
        while text not in self.written(0):
            assert self.process.is_alive(), self.written(1)
            time.sleep(0.02)

    def written(self, number: int) -> str:
        """What it has written to standard output (0) or standard error (1) so far."""
        return Path(self.files[number].name).read_text(encoding="utf-8")

    def wait(self) -> "subprocess.CompletedProcess[str]":
        """Its exit code and what it has written, once it has ended."""
        self.process.join(240)
        self.end()
        return subprocess.CompletedProcess(self.words, self.process.exitcode, *map(self.written, (0, 1)))
