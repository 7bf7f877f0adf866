"""Work shared out over processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nanogpt.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], num_proc: int) -> Iterator[Result]:
    """`function` of each item, in order, computed by up to `num_proc` processes.

    Processes start with a fresh interpreter: function and items must be picklable, and a script that ends up
    here must be importable. Raises what `function` raises, and `DataError` if a process is killed.
    """
    num_proc = min(num_proc, len(items), 61)  # more, Windows can't wait for
    if num_proc <= 1:
        yield from map(function, items)
        return
    # not fork: the libraries that tokenize and unpack have threads of their own
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_proc, context, initializer=_begin) as pool:
            try:
                for future in [pool.submit(function, item) for item in items]:
                    yield future.result()
            except BaseException:  # also Ctrl-C: nobody waits for work that nobody needs
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory. What is finished is kept: the same command goes "
            f"on, also with another --num_proc (now {num_proc}). (A script of your own must call this below "
            "`if __name__ == '__main__':`)"
        ) from error


def _begin() -> None:
    """Leave Ctrl-C to the main process, and don't outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
