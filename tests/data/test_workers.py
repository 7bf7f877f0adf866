import os
import time

import pytest

from nanogpt.errors import DataError
from nanogpt.workers import cores, parallel_map


def square(n: int) -> int:
    time.sleep(0.02 * (3 - n % 4))  # later ones are done first
    return n * n


def fail(n: int) -> int:
    if n == 2:
        raise DataError("number two")
    return n


def die(n: int) -> int:
    os._exit(9)


@pytest.mark.parametrize("num_proc", [0, 1, 2])
def test_results_come_in_order(num_proc: int) -> None:
    assert list(parallel_map(square, range(8), num_proc)) == [n * n for n in range(8)]


def test_an_error_of_a_worker_arrives_as_itself() -> None:
    with pytest.raises(DataError, match="number two"):
        list(parallel_map(fail, range(5), 2))


def test_a_killed_worker_is_one_message() -> None:
    with pytest.raises(DataError, match=r"worker process was killed.*--num_proc"):
        list(parallel_map(die, range(3), 2))


def test_there_is_a_core() -> None:
    assert cores() >= 1
