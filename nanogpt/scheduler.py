"""Many callers, one engine: their requests join and leave the running batch between two of its steps.

A thread of its own drives the engine; what it draws goes to each caller's event loop.
"""

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nanogpt.engine import Engine, Likelihood, Request, Row
from nanogpt.sample import TextStream, follow
from nanogpt.tokenizer import Tokenizer

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # borders of the histograms


class OverloadedError(Exception):
    """More is waiting than the queue holds, or the server is going down: try again later."""


@dataclass(frozen=True)
class Token:
    """A token that was drawn, and how likely it was."""

    id: int
    offset: int  # of its text, in characters from the end of the prompt
    likelihood: Likelihood


@dataclass(frozen=True)
class Piece:
    """What is new of a continuation."""

    job: "Job"
    text: str = ""
    tokens: Sequence[Token] = ()  # if the request asks for alternatives
    end: str = ""  # "length", "stop" or "error"; empty while it goes on
    error: Exception | None = None  # what went wrong


@dataclass(eq=False)
class Job:
    """One continuation that somebody waits for, from its arrival to its end. Made and read in an event loop."""

    request: Request
    pieces: "asyncio.Queue[Piece]"  # where what is new of it goes; jobs may share one
    seconds: float  # that it may wait for a row, and then that it may take, after which it ends as if by its length
    index: int = 0  # for the caller's use
    stop: Sequence[str] = ()  # texts that end it
    score: bool = False  # also tell how likely the prompt's tokens are, in `scores`, before the first piece

    scores: list[Likelihood] = field(default_factory=list)  # of prompt[1:]
    drawn: int = 0  # tokens so far
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    # while it is under way; the scheduler's
    started: float = 0.0
    stream: TextStream | None = None
    said: int = 0  # characters that have gone to the caller
    unsaid: deque[tuple[int, Token]] = field(default_factory=deque)  # tokens whose text has not, and where that ends
    latest: float = 0.0  # when the last token was drawn

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > (self.started or self.arrived) + self.seconds


class Scheduler:
    """Runs jobs on an engine. Up to `queue` wait for a free row; those of several callers take turns.

    threads: that the engine computes with; 0: as many as torch takes by itself.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, queue: int, threads: int = 0) -> None:
        self.engine, self.tokenizer, self.queue, self.threads = engine, tokenizer, queue, threads
        self._waiting: deque[deque[Job]] = deque()  # by caller
        self._running: dict[Row, Job] = {}
        self._news: list[Piece] = []
        self._changed = threading.Condition()
        self._closing = False
        self._failures = 0  # since anything went well
        self.registry = CollectorRegistry()
        self._measure()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs in, all or none. Raises `OverloadedError`."""
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise OverloadedError("the server is going down")
            if self.waiting + len(jobs) > self.queue:
                raise OverloadedError(
                    f"{self.waiting} continuations are waiting already, and {self.queue} may; try again"
                )
            self._waiting.append(deque(jobs))
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more; those that have ended don't mind."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            remaining = [deque(job for job in group if not job.cancelled) for group in self._waiting]
            self._waiting = deque(group for group in remaining if group)

    @property
    def waiting(self) -> int:
        """Continuations that wait for a free row."""
        with self._changed:
            return sum(len(group) for group in self._waiting)

    def close(self) -> None:
        """Finish what is there, take nothing in, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the engine works: it runs, and has not failed three times without anything that went well."""
        return self._thread.is_alive() and self._failures < 3

    def _measure(self) -> None:
        def counter(name: str, what: str) -> Counter:
            return Counter(f"nanogpt_{name}", what, registry=self.registry)

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(f"nanogpt_{name}_seconds", what, buckets=_SECONDS, registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read")
        self.drawn_tokens = counter("drawn_tokens", "Tokens that were drawn")
        self.first_token = histogram("first_token", "From a continuation's arrival to its first token")
        self.next_token = histogram("next_token", "From a token to the next of the same continuation")
        busy = Gauge("nanogpt_rows_busy", "Continuations under way", registry=self.registry)
        busy.set_function(lambda: len(self._running))
        waiting = Gauge("nanogpt_waiting", "Continuations that wait for a free row", registry=self.registry)
        waiting.set_function(lambda: self.waiting)

    # --- the engine's thread ---

    def _work(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        while True:
            with self._changed:
                while not self._waiting and not self._running:
                    if self._closing:
                        return
                    self._changed.wait()
                jobs = self._admit()
            self._start(jobs)
            try:
                self._step()
            except Exception as error:
                self._fail(list(self._running.values()), error)
                self._running.clear()
                self.engine.rows.clear()
            self._deliver()

    def _admit(self) -> list[Job]:
        """Those whose turn it is: as many as there are free rows, and not more prompts than make the others wait."""
        admitted: list[Job] = []
        room = self.engine.block_size  # tokens to read before the others go on
        while self._waiting:
            group = self._waiting[0]
            job = group[0]
            if job.late:
                error = OverloadedError(f"no row came free within {job.seconds} seconds; try again")
                self._news.append(Piece(job, end="error", error=error))
            elif len(admitted) == self.engine.room or (admitted and len(job.request.prompt) > room):
                break
            else:
                job.started = time.monotonic()
                admitted.append(job)
                room -= len(job.request.prompt)
            group.popleft()
            self._waiting.rotate(-1)
            if not group:
                self._waiting.pop()
        return admitted

    def _start(self, jobs: Sequence[Job]) -> None:
        """Read the prompts; equal ones that came together are read once. One that fails disturbs no other."""
        groups: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            groups.setdefault(tuple(job.request.prompt), []).append(job)
        for prompt, group in groups.items():
            try:
                self._read(prompt, group)
            except Exception as error:
                self._fail(group, error)
                self.engine.rows = [row for row in self.engine.rows if row in self._running]

    def _read(self, prompt: Sequence[int], group: Sequence[Job]) -> None:
        """Read a prompt for all jobs that continue it."""
        self.prompt_tokens.inc(len(prompt))
        if any(job.score for job in group):
            scores = self.engine.score(prompt, max(job.request.alternatives or 0 for job in group))
            for job in group:
                job.scores = scores
        rows = self.engine.add([job.request for job in group])
        for row, job in zip(rows, group, strict=True):
            job.stream = TextStream(self.tokenizer, prompt, job.stop)
            if row.end:  # nothing is to be drawn
                self._failures = 0
                self._news.append(Piece(job, end=row.end))
            else:
                self._running[row] = job

    def _step(self) -> None:
        """A token for everyone."""
        for row, job in list(self._running.items()):
            if job.cancelled or job.late:
                del self._running[row]
                self.engine.finish(row)
                assert job.stream is not None
                if not job.cancelled:
                    self._news.append(self._piece(job, job.stream.push([], final=True), "length"))
        stepped = self.engine.step()
        self.drawn_tokens.inc(len(stepped))
        if stepped:
            self._failures = self._failures + 1 if all(row.end == "error" for row in stepped) else 0
        now = time.monotonic()
        for row in stepped:
            job = self._running[row]
            if row.end:
                del self._running[row]
            if row.end == "error":
                error = FloatingPointError("the model's output is not a number; its weights may be damaged")
                self._news.append(Piece(job, end="error", error=error))
                continue
            (self.next_token if job.drawn else self.first_token).observe(now - (job.latest or job.arrived))
            job.latest, job.drawn = now, job.drawn + 1
            assert job.stream is not None
            start = job.stream.length
            text = follow(self.engine, row, job.stream)
            if row.end:  # a stop string may have come
                self._running.pop(row, None)
            if row.alternatives:
                job.unsaid.append((job.stream.length, Token(row.tokens[-1], start, row.alternatives[-1])))
            self._news.append(self._piece(job, text, row.end))

    def _piece(self, job: Job, text: str, end: str) -> Piece:
        """What is certain now, and its tokens: not those of what may become a stop string, nor parts of a character."""
        job.said += len(text)
        assert job.stream is not None
        told = 0
        for n, (until, token) in enumerate(job.unsaid, start=1):
            is_whole = token.offset < until <= job.said
            is_left = end and (not job.stream.stopped or token.offset < job.said)
            told = n if is_whole or is_left else told
        return Piece(job, text, [job.unsaid.popleft()[1] for _ in range(told)], end)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Tell those whom it concerns."""
        self._failures += 1
        with suppress(Exception):  # nobody may be reading there any more
            traceback.print_exception(error, file=sys.stderr)
        told = RuntimeError("the model failed; the server's own output says how")
        self._news += [Piece(job, end="error", error=told) for job in jobs]

    def _deliver(self) -> None:
        news, self._news = self._news, []
        for loop in {piece.job.loop for piece in news}:
            try:
                loop.call_soon_threadsafe(_hand_over, [piece for piece in news if piece.job.loop is loop])
            except RuntimeError:  # the loop is closed, and with it whoever waited
                continue


def _hand_over(pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        piece.job.pieces.put_nowait(piece)
