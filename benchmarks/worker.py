"""A process of its own for each side of a comparison: none shares its threads and caches with another."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Worker:
    """`script` with `settings` as options: it answers each line of standard input with a line of JSON."""

    def __init__(self, script: str, settings: dict[str, Any], folder: Path) -> None:
        command = [sys.executable, script, *(f"--{name}={value}" for name, value in settings.items() if value)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)

    def ask(self, question: Any) -> dict[str, Any]:
        """Return what the process answers. Raises `RuntimeError` if it has ended."""
        assert self.process.stdin
        assert self.process.stdout
        if self.process.poll() is None:
            print(json.dumps(question), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"a side has ended with exit code {self.process.wait()}")

    def end(self) -> None:
        """Ask it to end, and wait."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
