"""Log lines of all programs: what is going on to standard output, warnings to standard error."""

import logging
import os
import sys

from tqdm import tqdm

LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "debug": logging.DEBUG}
log = logging.getLogger(__name__)


class LogLines(logging.Handler):
    """Writes each line at once, above a progress bar if there is one.

    What happens to standard error, and with `must_go_on` also to standard output, ends no program: a pipe that is
    closed, a full disk behind it.
    """

    def __init__(self, must_go_on: bool = False, with_origin: bool = False) -> None:
        super().__init__()
        self._must_go_on, self._with_origin = must_go_on, with_origin

    def format(self, record: logging.LogRecord) -> str:
        """The bare text; of a warning, `warning: ` and the text; when looking for a fault, when and where from."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"warning: {text}"
        if self._with_origin:
            time = logging.Formatter().formatTime(record, "%H:%M:%S")
            text = f"{time}.{record.msecs:03.0f} {record.name.removeprefix('nanogpt.')}: {text}"
        return text

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line. Raises `OSError` as print would, unless the program must go on."""
        is_warning = record.levelno >= logging.WARNING
        stream = sys.stderr if is_warning else sys.stdout
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except (OSError, ValueError) as error:
            if is_warning:
                if isinstance(error, BrokenPipeError):  # what is left in its buffer must not fail again at the end
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            elif not self._must_go_on:
                raise
            elif isinstance(error, BrokenPipeError):  # `| head` has read enough, a terminal has gone
                sys.stdout = open(os.devnull, "w", encoding="utf-8")
                log.warning("standard output has been closed; the run goes on, see metrics.jsonl")
            else:
                log.warning("standard output: %s", error)


def show_log_lines(verbosity: str = "normal", must_go_on: bool = False) -> None:
    """From now on, show log lines: quiet, only warnings; normal; debug, also what takes how long."""
    logger = logging.getLogger("nanogpt")
    callers = [handler for handler in logger.handlers if not isinstance(handler, LogLines)]
    logger.handlers = [*callers, LogLines(must_go_on, with_origin=verbosity == "debug")]
    logger.setLevel(LEVELS[verbosity])
    logger.propagate = False  # what other packages set up at the root would show them twice
