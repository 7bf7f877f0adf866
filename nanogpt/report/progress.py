"""What a run says while it trains: plain lines, and a progress bar where someone is watching."""

import os
import sys
from types import TracebackType

from tqdm import tqdm


def warn(text: str) -> None:
    """Say on standard error what went wrong beside the training; a full disk behind that must not end it."""
    try:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody reads that either; what is left of it must not fail again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    except (OSError, ValueError):
        pass


class Console:
    """Prints lines to standard output, above a progress bar on standard error if that is a terminal."""

    def __init__(self, total: int, done: int = 0, is_main: bool = True) -> None:
        hidden = None if is_main else True  # None: shown on a terminal only
        self._bar = tqdm(total=total, initial=done, unit="it", dynamic_ncols=True, disable=hidden, smoothing=0.05)

    def line(self, text: str) -> None:
        """Print one line, at once. Training goes on even when nobody listens any more."""
        try:
            if self._bar.disable:
                print(text, flush=True)
            else:
                self._bar.write(text)
        except BrokenPipeError:  # `| head` has read enough, a terminal has gone
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
            warn("standard output has been closed; the run goes on, see metrics.jsonl")
        except OSError as error:  # a full disk behind it
            warn(f"standard output: {error}")

    def advance(self) -> None:
        """One update is done."""
        self._bar.update()

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
