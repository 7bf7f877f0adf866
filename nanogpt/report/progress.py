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
    """Prints lines to standard output, above one live line on standard error if that is a terminal."""

    def __init__(self, total: int, done: int = 0, is_main: bool = True) -> None:
        self._loss: float | None = None
        hidden = None if is_main else True  # None: shown on a terminal only
        live = "{percentage:3.0f}% |{bar:20}| {n_fmt} of {total_fmt}, {remaining} left{postfix}"
        self._bar = tqdm(
            total=total, initial=done, dynamic_ncols=True, disable=hidden, smoothing=0.05, bar_format=live, leave=False
        )

    def report(self, loss: float, plain: str, live: str) -> None:
        """What an update has come to: a line of its own, or, where someone is watching, a part of the live one."""
        if self._bar.disable:
            self.line(plain)
        else:  # a running average of the loss: single batches differ
            self._loss = loss if self._loss is None else 0.8 * self._loss + 0.2 * loss
            self._bar.set_postfix_str(f"loss {self._loss:.4f}, {live}", refresh=False)

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
