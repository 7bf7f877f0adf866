"""Signals that ask a run to stop."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from nanogpt.distributed import World


@contextmanager
def stop_signals(world: World) -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP only ask to stop; a second one interrupts at once.

    Yields a function that tells whether one has come to any process.
    """
    received: list[int] = []
    # clusters announce the end with SIGUSR1; the terminal that goes, with SIGHUP, which nohup ignores
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()
        with suppress(OSError):  # print is not safe in a handler
            os.write(2, b"\nstopping after this step (once more to leave at once)\n")

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: world.any(bool(received))
    finally:
        restore()
