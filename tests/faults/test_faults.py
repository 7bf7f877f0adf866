"""The harness, short in `make test` and long in `make test-faults`; and what it cannot try."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt import train
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from tests.conftest import ROOT

Recipe = Callable[..., TrainConfig]
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes and sends signals")


def harness(*arguments: str) -> dict[str, list[int]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.faults.harness", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    found: dict[str, list[int]] = json.loads(result.stdout.splitlines()[-1])
    return found


@posix
def test_nothing_is_lost_and_no_bit_differs() -> None:
    found = harness("--kills=6", "--others=1")
    assert found["SIGKILL at a random moment"][0] >= 6
    assert all(lost == different == 0 for _, lost, different in found.values())


@posix
@pytest.mark.slow
@pytest.mark.faults
def test_nothing_is_lost_in_hundreds_of_tries() -> None:
    found = harness("--kills=300", "--others=20")
    assert found["SIGKILL at a random moment"][0] >= 300
    assert all(lost == different == 0 for _, lost, different in found.values())


def test_a_file_where_the_run_should_be_is_one_message(recipe: Recipe) -> None:
    Path("out").write_text("in the way")
    with pytest.raises(UserError, match=r"out can't hold a run in .*out \(File exists\): choose another"):
        train.train(recipe())
    assert Path("out").read_text() == "in the way"


def test_a_folder_without_permission_is_one_message(recipe: Recipe) -> None:
    if os.name != "posix" or os.getuid() == 0:
        pytest.skip("root may write everywhere")
    Path("out").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        train.train(recipe())
