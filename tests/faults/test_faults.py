"""The harness, short in `make test` and long in `make test-faults`; and what it cannot try."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanogpt import start, train
from nanogpt.config import TrainConfig
from nanogpt.data import Ahead
from nanogpt.errors import DataError, UserError
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
    with pytest.raises(UserError, match=r"cannot write .*out"):
        train.train(recipe())
    assert Path("out").read_text() == "in the way"


def test_a_folder_without_permission_is_one_message(recipe: Recipe) -> None:
    if os.name != "posix" or os.getuid() == 0:
        pytest.skip("root may write everywhere")
    Path("out").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot write .*out"):
        train.train(recipe())


def test_a_loader_that_dies_in_its_thread_ends_the_run_with_its_own_message(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = start.loader

    def dies_at_three(*arguments: object) -> object:
        make = real(*arguments)  # type: ignore[arg-type]

        def one(step: int) -> object:
            if step == 3:
                raise DataError("train.bin has been cut off")
            return make(step)

        return Ahead(one)

    monkeypatch.setattr(start, "loader", dies_at_three)
    with pytest.raises(DataError, match="has been cut off"):
        train.train(recipe(checkpoint_interval="1"))
    monkeypatch.setattr(start, "loader", real)
    assert train.train(recipe(resume="auto")) == 0
