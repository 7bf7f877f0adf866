"""The harness, short in `make test` and long in `make test-faults`."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes and sends signals")
@pytest.mark.parametrize(
    ("kills", "others"), [(5, 0), pytest.param(300, 20, marks=[pytest.mark.slow, pytest.mark.faults])]
)
def test_nothing_is_lost_and_no_bit_differs(kills: int, others: int) -> None:
    command = [sys.executable, "-m", "tests.faults.harness", f"--kills={kills}", f"--others={others}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    found: dict[str, list[int]] = json.loads(result.stdout.splitlines()[-1])
    assert found["SIGKILL at a random moment"][0] >= kills
    assert all(lost == different == 0 for _, lost, different in found.values())
