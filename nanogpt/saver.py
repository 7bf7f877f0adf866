"""Checkpoints are written beside the training, one at a time, and never over the last good one."""

import itertools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanogpt import checkpoint
from nanogpt.config import updates_and_seconds
from nanogpt.errors import UserError
from nanogpt.files import sync_folder

log = logging.getLogger(__name__)

RETRY = 60.0  # seconds until a checkpoint that could not be written is tried again
PAUSES = (1.0, 4.0)  # seconds between the attempts at one


class Saver:
    """Writes the checkpoints of one run, or its process's share of them.

    `interval` is "500" (updates) or "30m" (minutes), `keep` the number of checkpoints to have at a time. Only the main
    process writes whole files, and deletes.
    """

    def __init__(
        self, folder: Path, interval: str, keep: int, best_on_disk: float = math.inf, is_main: bool = True
    ) -> None:
        self._folder, self._keep, self._best_on_disk, self._is_main = folder, keep, best_on_disk, is_main
        due = updates_and_seconds(interval)
        assert due is not None, interval
        self._steps, self._seconds = due
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None
        self._content: dict[str, Any] | None = None  # of the last checkpoint, whose memory the next one takes
        self._owed_best: dict[str, Any] | None = None  # a best.pt that is yet to be written

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step` updates, evaluation or not."""
        waited = time.monotonic() - self._last
        if self._failure and not self._is_writing():
            return waited >= RETRY
        return bool(step % self._steps == 0 if self._steps else self._seconds and waited >= self._seconds)

    def save(self, snapshot: Callable[[Any], dict[str, Any]], *, best: bool = False) -> None:
        """Write a snapshot as ckpt.pt, and if it is the best as best.pt (without the optimizer), in the background.

        One that has a function `finish_shards` is written by that, by all processes together; without weights it
        becomes no best.pt. Waits for the checkpoint before it: there are never two copies of a run. A failure is a
        warning, tried again.
        """
        self.wait()
        self._last = time.monotonic()
        content = self._content = snapshot(None if self._owed_best else self._content)
        if best and content.get("model") and content["best_val_loss"] <= self._best_on_disk:
            self._owed_best = {**content, "optimizer": None}
            self._owed_best.pop("finish_shards", None)
        self._thread = threading.Thread(target=self._write, args=(content,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread:
            self._thread.join()

    def finish(self, snapshot: Callable[[Any], dict[str, Any]], is_saved: bool) -> None:
        """Write the last checkpoint, unless the one before is of the same state. Raises `UserError` if it can't be."""
        self.wait()
        if self._failure or not is_saved:
            self.save(snapshot)
            self.wait()
        if self._failure:
            raise self._failure

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint could not be written."""
        self.wait()
        return self._failure is not None

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, content: dict[str, Any]) -> None:
        began = time.monotonic()
        if sys.platform == "linux":  # where this is a thread's own: it takes the gaps that the training leaves
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        jobs = [self._write_best, lambda: self._write_newest(content)]  # in this order: ckpt.pt counts on best.pt
        for pause in (*PAUSES, None):
            jobs = [job for job in jobs if not self._succeeds(job)]
            if not jobs:
                self._failure = None
                log.debug(f"checkpoint of {content['iter_num']} updates written in {time.monotonic() - began:.2f} s")
                return
            if pause is not None:
                time.sleep(pause)
        log.warning(f"{self._failure}; training goes on, what is there stays, and it is tried again")

    def _succeeds(self, job: Callable[[], None]) -> bool:
        try:
            job()
        except UserError as error:
            self._failure = error
        except Exception as error:  # whatever it is, a thread that dies must not look like one that has saved
            self._failure = UserError(f"cannot save a checkpoint: {type(error).__name__}: {error}")
        else:
            return True
        return False

    def _write_best(self) -> None:
        if self._owed_best:
            checkpoint.write(self._folder / "best.pt", self._owed_best)
            self._best_on_disk, self._owed_best = self._owed_best["best_val_loss"], None

    def _write_newest(self, content: dict[str, Any]) -> None:
        if "finish_shards" in content:
            content["finish_shards"]()
        else:
            checkpoint.write(self._folder / "ckpt.new.pt", content)
            self._rotate()
        if self._is_main:
            self.remove_old()

    def remove_old(self) -> None:
        """Delete the checkpoints beyond the newest `keep`."""
        for path in checkpoint.kept(self._folder)[self._keep :]:
            checkpoint.remove(path)

    def _rotate(self) -> None:
        """Give the finished ckpt.new.pt its name; the ones before it move on by one."""
        names = [checkpoint.kept_name(self._folder, n) for n in range(self._keep)]
        for newer, older in reversed(list(itertools.pairwise(names))):
            if newer.exists():
                os.replace(newer, older)
        os.replace(self._folder / "ckpt.new.pt", names[0])
        sync_folder(self._folder)
