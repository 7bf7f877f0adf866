"""What a run says of its updates: lines, or a live one where someone is watching."""

import logging

from tqdm import tqdm

log = logging.getLogger(__name__)


class Console:
    """Log lines, or one live line on standard error if that is a terminal."""

    def __init__(self, total: int, done: int = 0, is_main: bool = True) -> None:
        self._loss: float | None = None
        hidden = None if is_main else True  # None: shown on a terminal only
        live = "{percentage:3.0f}% |{bar:10}| {n_fmt} of {total_fmt}, {remaining} left{postfix}"
        self._bar = tqdm(
            total=total, initial=done, dynamic_ncols=True, disable=hidden, smoothing=0.05, bar_format=live, leave=False
        )

    def report(self, loss: float, plain: str, live: str) -> None:
        """What an update has come to: a line of its own, or, where someone is watching, a part of the live one."""
        if self._bar.disable:
            log.info(plain)
        else:  # a running average of the loss: single batches differ
            self._loss = loss if self._loss is None else 0.8 * self._loss + 0.2 * loss
            self._bar.set_postfix_str(f"loss {self._loss:.4f}, {live}", refresh=False)

    def say(self, doing: str) -> None:
        """What is being done that takes a while, shown on the live line alone."""
        self._bar.set_postfix_str(doing)

    def advance(self) -> None:
        """One update is done."""
        self._bar.update()

    def close(self) -> None:
        """Take the live line away."""
        self._bar.close()
