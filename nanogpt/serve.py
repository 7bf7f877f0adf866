"""The program behind `nanogpt serve`: OpenAI's completions API for one model, and a page to play with.

One thread owns the engine and runs its steps for all clients (`Scheduler`); asyncio speaks to the clients
(`create_app`). Each completion that a request asks for is a `Job`, admitted between two steps; what is new of it comes
back as a `Piece`.
"""

import asyncio
import hmac
import itertools
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, FailFast, Field
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanogpt import __version__
from nanogpt.checkpoint import load_trained
from nanogpt.device import choose_device
from nanogpt.engine import Engine, Likelihood, Request, Row
from nanogpt.errors import UserError
from nanogpt.packed import pack
from nanogpt.sampling import Sampling
from nanogpt.settings import ServeConfig
from nanogpt.text import TextStream, follow, prompt_ids
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_VALUES = 2**19  # logprobs in one answer, which is put together in memory
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # seconds

Told = tuple[int, int, Likelihood | None]  # of a token: where its text begins, its id, its logprobs


# --- the engine's thread ---


@dataclass(eq=False)
class Job:
    """One completion: what is asked for, and how far it has come."""

    request: Request
    index: int  # among the choices of its answer
    stream: TextStream
    prompt_texts: list[str]  # of its tokens; empty if neither echo nor logprobs are asked for
    score_prompt: bool  # tell the logprobs of the prompt's tokens, too
    pieces: "asyncio.Queue[Piece]"  # where what is new of it goes; the jobs of a request share one
    arrived: float = field(default_factory=time.monotonic)
    deadline: float = 0.0  # until when it may wait; once it runs, until when it may run
    turn: int = 0
    cancelled: bool = False
    prompt_logprobs: Sequence[Likelihood] = ()  # of prompt[1:]
    held: list[Told] = field(default_factory=list)  # tokens whose text is not certain yet
    latest: float = 0.0  # when the latest token was sampled
    sampled: int = 0  # tokens
    sent: int = 0  # characters

    def piece(self, text: str, end: str = "") -> "Piece":
        """Return text that has become certain, and the tokens up to it: not those of what may be a stop string."""
        self.sent += len(text)
        if not end and not (self.held and self.held[-1][0] < self.stream.length == self.sent):
            return Piece(self, text)
        tokens, self.held = self.held, []
        return Piece(self, text, [each for each in tokens if each[0] < self.sent or not self.stream.stopped], end)


@dataclass(frozen=True)
class Piece:
    """What is new of a completion."""

    job: Job
    text: str = ""
    tokens: Sequence[Told] = ()  # if logprobs are asked for; they begin after the prompt
    end: str = ""  # "length", "stop", or empty while it continues
    error: Exception | None = None


class Scheduler:
    """Runs the jobs of all clients on one engine, in a thread of its own that computes with `threads` (0: torch's)."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: ServeConfig, threads: int = 0) -> None:
        self.engine, self.tokenizer, self.config, self.threads = engine, tokenizer, config, threads
        # The ids that end a text. End tokens that a model brings along belong in this set, too.
        self.end_tokens = frozenset([] if tokenizer.end_of_text is None else [tokenizer.end_of_text])
        self.waiting: list[Job] = []
        self.running: dict[Row, Job] = {}
        self.news: list[Piece] = []
        self.turn = self.failures = 0  # of the latest job; since anything went well
        self.closing = False
        self.changed = threading.Condition()

        self.registry = registry = CollectorRegistry()
        self.prompt_tokens = Counter("nanogpt_prompt_tokens", "Prompt tokens read", registry=registry)
        self.sampled_tokens = Counter("nanogpt_drawn_tokens", "Tokens sampled", registry=registry)
        self.responses = Counter("nanogpt_responses", "Responses by status", ["status"], registry=registry)
        self.first_token, self.next_token = (
            Histogram(f"nanogpt_{name}_token_seconds", "Time to a token", registry=registry, buckets=BUCKETS)
            for name in ("first", "next")
        )
        Gauge("nanogpt_rows_busy", "Completions running", registry=registry).set_function(lambda: len(self.running))
        Gauge("nanogpt_waiting", "Completions waiting", registry=registry).set_function(lambda: len(self.waiting))
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of a request, all or none. Called on asyncio's loop, to which their pieces come."""
        self.loop = asyncio.get_running_loop()
        with self.changed:
            if len(self.waiting) + len(jobs) > self.config.queue:
                raise RefusedError(429, f"{len(self.waiting)} completions are waiting already; try again", "overloaded")
            for job in jobs:
                job.deadline = job.arrived + self.config.timeout
                # Clients take turns: the first completions of a new request come before the later ones of others.
                job.turn = self.turn + job.index
            self.waiting = sorted([*self.waiting, *jobs], key=lambda job: job.turn)
            self.changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs whose client has left; those that have ended don't mind."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
            self.waiting = [job for job in self.waiting if not job.cancelled]
        jobs[0].pieces.put_nowait(Piece(jobs[0], error=RefusedError(499, "the client has left")))

    def close(self) -> None:
        """Finish what is there and end the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def run(self) -> None:
        """Admit jobs, step, deliver: until closed and idle."""
        if self.threads:
            torch.set_num_threads(self.threads)
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.running or self.closing)
                if not self.waiting and not self.running:
                    return
                groups = self.admit()
            for group in groups:
                self.start(group)
            try:
                self.step()
            except Exception as error:
                self.fail(list(self.running.values()), error)
                self.running.clear()
                self.engine.rows.clear()
            with suppress(RuntimeError):  # The loop is closed: a second Ctrl-C has cut the clients off.
                self.loop.call_soon_threadsafe(deliver, self.news)
            self.news = []

    def admit(self) -> list[list[Job]]:
        """Take jobs for the free rows from the queue, grouped by prompt.

        Together their prompts fill one context at most, so that those who are running need not wait long.
        """
        now, room, tokens = time.monotonic(), self.engine.room, 0
        groups: dict[tuple[int, ...], list[Job]] = {}
        for job in self.waiting[:]:
            prompt = tuple(job.request.prompt)
            tokens += len(prompt)
            if now > job.deadline:
                error = RefusedError(429, f"no row became free in {self.config.timeout} s; try again", "overloaded")
                self.news.append(Piece(job, error=error))
            elif room and (tokens <= self.engine.block_size or not groups):
                groups.setdefault(prompt, []).append(job)
                job.deadline, self.turn, room = now + self.config.timeout, job.turn, room - 1
            else:
                break
            self.waiting.remove(job)
        return list(groups.values())

    def start(self, jobs: Sequence[Job]) -> None:
        """Prefill a prompt for all jobs that complete it. A failure ends only these."""
        prompt = jobs[0].request.prompt
        try:
            scores: Sequence[Likelihood] = ()
            if any(job.score_prompt for job in jobs):
                scores = self.engine.score(prompt, max(job.request.alternatives or 0 for job in jobs))
            rows = self.engine.add([job.request for job in jobs])
        except Exception as error:
            self.fail(jobs, error)
            self.engine.rows = [row for row in self.engine.rows if row in self.running]
            return
        self.prompt_tokens.inc(len(prompt))
        for row, job in zip(rows, jobs, strict=True):
            job.prompt_logprobs = scores
            if row.end:  # Nothing is to be sampled.
                self.news.append(job.piece("", row.end))
                self.failures = 0
            else:
                self.running[row] = job

    def step(self) -> None:
        """Sample one token for every running job."""
        for row, job in list(self.running.items()):
            if job.cancelled or time.monotonic() > job.deadline:
                del self.running[row]
                self.engine.finish(row)
                self.news.append(job.piece(job.stream.push([], final=True), "length"))
        rows = self.engine.step()
        self.sampled_tokens.inc(len(rows))
        now = time.monotonic()
        for row in rows:
            job, start = self.running[row], self.running[row].stream.length
            (self.next_token if job.sampled else self.first_token).observe(now - (job.latest or job.arrived))
            job.latest, job.sampled = now, job.sampled + 1
            text = follow(self.engine, row, job.stream)  # This also ends the row where a stop string is complete.
            if row.end:
                del self.running[row]
            if row.end == "error":
                self.fail([job], FloatingPointError("the model's output is not a number; its weights may be damaged"))
                continue
            if row.alternatives:
                job.held.append((start, row.tokens[-1], row.alternatives[-1]))
            self.news.append(job.piece(text, row.end))
            self.failures = 0

    def fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Log what went wrong, and tell the clients whom it concerns that it did."""
        self.failures += 1
        log.error("the engine failed", exc_info=error)
        refusal = RefusedError(500, "the model failed; the server's log says how")
        self.news += [Piece(job, error=refusal) for job in jobs]


def deliver(pieces: Sequence[Piece]) -> None:
    """Hand pieces to the answers that wait for them."""
    for piece in pieces:
        piece.job.pieces.put_nowait(piece)


# --- requests and answers, https://platform.openai.com/docs/api-reference/completions ---


class RefusedError(HTTPException):
    """An error for the client: a status, a message without secrets, and sometimes a code for programs."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        headers = {429: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}.get(status)
        super().__init__(status, message, headers)
        self.code = code


def error_text(error: HTTPException) -> str:
    """Return an error in OpenAI's form, in ASCII, which holds whatever a client has sent."""
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    about = {"message": error.detail, "type": kind, "param": None, "code": getattr(error, "code", None)}
    return json.dumps({"error": about})


def error_response(error: HTTPException) -> Response:
    """Return the response that tells of an error."""
    return Response(error_text(error), error.status_code, error.headers, media_type="application/json")


Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], FailFast()]
Prompt = str | Ids | Annotated[list[str], FailFast()] | Annotated[list[Ids], FailFast()]


class StreamOptions(BaseModel, strict=True, extra="forbid"):
    """What else a stream tells."""

    include_usage: bool | None = False  # a last event counts the tokens
    include_obfuscation: bool | None = None  # ignored


class CompletionRequest(BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    """What to complete, and how. A value of null means the default."""

    model: str | None = None
    prompt: Prompt | None = Field(None, union_mode="left_to_right")
    max_tokens: int | None = Field(16, ge=0)
    n: int | None = Field(1, ge=1)  # completions of each prompt
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_k: int | None = Field(0, ge=-1)  # 0 or -1: from all tokens
    top_p: float | None = Field(1.0, gt=0, le=1)
    min_p: float | None = Field(0.0, ge=0, le=1)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = False  # begin with the prompt
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)  # keep its last so many; -1: as many as fit
    user: str | None = None  # ignored
    # What this server lacks may be sent as far as it changes nothing.
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


def make_jobs(body: CompletionRequest, scheduler: Scheduler) -> list[Job]:
    """Return the jobs of a request: `n` for each prompt. Raises `RefusedError`."""
    config, tokenizer = scheduler.config, scheduler.tokenizer
    if body.model not in (None, config.name):
        raise RefusedError(404, f"the model here is {config.name!r}, not {body.model!r:.100}", "model_not_found")
    prompt: Any = "" if body.prompt is None else body.prompt
    is_single = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
    n, prompts = body.n or 1, [prompt] if is_single else prompt
    if len(prompts) * n > config.queue:
        raise RefusedError(400, f"at most {config.queue} completions in one request: prompts times n")
    prompts = [encode_prompt(each, body.truncate_prompt_tokens, scheduler) for each in prompts]
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens > config.max_new_tokens:
        raise RefusedError(400, f"max_tokens: at most {config.max_new_tokens:,} here")
    score_prompt = bool(body.echo) and body.logprobs is not None
    tokens = n * (len(prompts) * max_tokens + score_prompt * sum(map(len, prompts)))
    if (values := tokens * (1 + (body.logprobs or 0))) > MAX_VALUES:
        raise RefusedError(400, f"{values:,} values in one answer; at most {MAX_VALUES:,}: tokens times 1 + logprobs")
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = Sampling(temperature, max(body.top_k or 0, 0), body.top_p or 1.0, body.min_p or 0.0)
    seed = secrets.randbits(62) if body.seed is None else body.seed
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    jobs, pieces = [], asyncio.Queue[Piece]()
    for index, ids in enumerate(ids for ids in prompts for _ in range(n)):
        texts: list[str] = []
        if body.echo or body.logprobs is not None:  # A character of several tokens comes with the last of them.
            texts = list(itertools.islice(tokenizer.decode_stream(ids), len(ids)))
        request = Request(ids, max_tokens, sampling, seed + index % n, scheduler.end_tokens, body.logprobs)
        jobs.append(Job(request, index, TextStream(tokenizer, ids, stop), texts, score_prompt, pieces))
    return jobs


def encode_prompt(prompt: str | list[int], kept: int | None, scheduler: Scheduler) -> list[int]:
    """Return the ids of a prompt, the last `kept`: at least one, and no more than the model sees."""
    longest, vocab_size = scheduler.engine.block_size, scheduler.tokenizer.vocab_size
    try:
        ids = prompt_ids(prompt, scheduler.tokenizer) if isinstance(prompt, str) else prompt
    except UserError as error:
        raise RefusedError(400, f"prompt: {error}") from error
    if kept:
        ids = ids[-(longest if kept < 0 else kept) :]
    if not ids:
        raise RefusedError(400, "prompt: an empty list")
    if max(ids) >= vocab_size:
        raise RefusedError(400, f"prompt: token id {max(ids)}, where the vocabulary has {vocab_size:,}")
    if len(ids) > longest:
        message = f"prompt: {len(ids):,} tokens, where the model sees {longest:,}; truncate_prompt_tokens=-1 cuts it"
        raise RefusedError(400, message, "context_length_exceeded")
    return ids


class Answer:
    """The completions of a request in OpenAI's form."""

    def __init__(self, body: CompletionRequest, jobs: Sequence[Job], scheduler: Scheduler) -> None:
        self.body, self.jobs, self.tokenizer = body, jobs, scheduler.tokenizer
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                     "model": scheduler.config.name}  # fmt: skip

    async def choices(self) -> AsyncIterator[dict[str, Any]]:
        """Yield what is new of each choice, until all have ended. Raises `RefusedError`."""
        running, echoed = set(self.jobs), set[Job]()
        while running:
            piece = await self.jobs[0].pieces.get()
            if piece.error:
                raise piece.error
            job, text = piece.job, piece.text
            length = sum(map(len, job.prompt_texts))
            told: list[Told] = [(length + start, token, logprobs) for start, token, logprobs in piece.tokens]
            if self.body.echo and job not in echoed:
                echoed.add(job)
                text = "".join(job.prompt_texts) + text
                if job.score_prompt:
                    offsets = itertools.accumulate(map(len, job.prompt_texts), initial=0)
                    told = [*zip(offsets, job.request.prompt, [None, *job.prompt_logprobs], strict=False), *told]
            logprobs = None if self.body.logprobs is None else self.logprobs(told)
            if text or told or piece.end:
                yield {"index": job.index, "text": text, "logprobs": logprobs, "finish_reason": piece.end or None}
            if piece.end:
                running.remove(job)

    def logprobs(self, told: Iterable[Told]) -> dict[str, list[Any]]:
        """Return tokens and their logprobs; a part of a character is written like `bytes:\\xe2`."""

        def name(token: int) -> str:
            content = self.tokenizer.decode_bytes([token])
            try:
                return content.decode()
            except UnicodeDecodeError:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

        def rounded(logprob: float) -> float:
            return round(max(logprob, -9999.0), 6)  # JSON knows no infinity.

        form: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for offset, token, logprobs in told:
            form["tokens"].append(name(token))
            form["text_offset"].append(offset)
            form["token_logprobs"].append(logprobs and rounded(logprobs[0]))
            top = [*logprobs[1][: self.body.logprobs], (token, logprobs[0])] if logprobs else []
            form["top_logprobs"].append({name(each): rounded(logprob) for each, logprob in top} or None)
        return form

    async def whole(self) -> dict[str, Any]:
        """Return all choices, each put together from what came of it."""
        choices: dict[int, dict[str, Any]] = {}
        async for new in self.choices():
            choice = choices.setdefault(new["index"], new)
            if choice is not new:
                choice["text"] += new["text"]
                choice["finish_reason"] = new["finish_reason"]
                for name, values in (new["logprobs"] or {}).items():
                    choice["logprobs"][name] += values
        return {**self.head, "choices": [choices[index] for index in sorted(choices)], "usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events."""
        try:
            async for choice in self.choices():
                yield f"data: {json.dumps({**self.head, 'choices': [choice]}, allow_nan=False)}\n\n"
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield f"data: {json.dumps({**self.head, 'choices': [], 'usage': self.usage()})}\n\n"
        except RefusedError as error:
            yield f"data: {error_text(error)}\n\n"
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens."""
        prompt = sum(len(job.request.prompt) for job in self.jobs) // (self.body.n or 1)
        sampled = sum(job.sampled for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


async def cancel_when_gone(receive: Receive, scheduler: Scheduler, jobs: Sequence[Job]) -> None:
    """Free the rows of a request when its client has left or has the answer."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    finally:
        scheduler.cancel(jobs)


# --- the paths ---


def create_app(scheduler: Scheduler) -> ASGIApp:
    """Return the server's paths behind its checks."""
    config = scheduler.config
    app = FastAPI(title="nanoGPT", version=__version__, docs_url=None, redoc_url=None)
    page = resources.files("nanogpt").joinpath("page.html").read_text(encoding="utf-8")
    model = {"id": config.name, "object": "model", "created": int(time.time()), "owned_by": "nanogpt",
             "max_model_len": scheduler.engine.block_size, "max_tokens": config.max_new_tokens}  # fmt: skip
    # The page asks nothing of other hosts, whatever text a model puts on it.
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": f"{policy}; img-src data:"})

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: HTTPRequest) -> Response:
        jobs = await asyncio.to_thread(make_jobs, body, scheduler)  # Long prompts take time, and others must not wait.
        scheduler.submit(jobs)
        answer, watch = Answer(body, jobs, scheduler), cancel_when_gone(request.receive, scheduler, jobs)
        watching = asyncio.create_task(watch)
        if body.stream:
            end = BackgroundTask(watching.cancel)
            return StreamingResponse(answer.events(), media_type="text/event-stream", background=end)
        try:
            return JSONResponse(await answer.whole())
        finally:
            watching.cancel()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def model_of(name: str) -> dict[str, Any]:
        if name != config.name:
            raise RefusedError(404, f"the model here is {config.name!r}", "model_not_found")
        return model

    @app.get("/health")
    async def health() -> dict[str, str]:
        if scheduler.failures >= 3 or not scheduler.thread.is_alive():
            raise RefusedError(503, "the model fails; the server's log says how")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(scheduler.registry), media_type="text/plain; version=0.0.4")

    @app.exception_handler(HTTPException)
    async def refused(_: object, error: HTTPException) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: object, error: RequestValidationError) -> Response:
        found = [f"{'.'.join(map(str, each['loc'][1:2])) or 'JSON body'}: {each['msg']}" for each in error.errors()]
        return error_response(RefusedError(400, "; ".join(dict.fromkeys(found))))

    @app.exception_handler(Exception)
    async def bug(_: object, error: Exception) -> Response:
        log.error("a bug in the server", exc_info=error)
        return error_response(RefusedError(500, "the server has a bug; its log says where"))

    names = ["localhost", "127.0.0.1", "::1", "[::1]", socket.gethostname(), config.host, *config.allow_host]
    # On all addresses, the server can't know its names. Unless some are given, it takes any.
    is_open = config.host in ("0.0.0.0", "::") and not config.allow_host
    return TrustedHostMiddleware(guard(app, scheduler), ["*"] if is_open else names, www_redirect=False)


def guard(app: ASGIApp, scheduler: Scheduler) -> ASGIApp:
    """Return `app` behind checks of origin, key and size, with its responses counted."""
    config = scheduler.config

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        headers, received = Headers(scope=scope), 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > config.max_body:
                raise RefusedError(413, f"the body is larger than {config.max_body:,} bytes")
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                scheduler.responses.labels(message["status"]).inc()
            await send(message)

        checked, key = app, headers.get("authorization", "").encode("latin-1")
        if "origin" in headers and headers["origin"].partition("://")[2] != headers.get("host"):
            checked = error_response(RefusedError(403, "requests from web pages of other origins are refused"))
        elif config.api_key and scope["path"] not in ("/", "/health"):
            if not hmac.compare_digest(key, f"Bearer {config.api_key}".encode()):
                checked = error_response(RefusedError(401, "this server asks for its key: Authorization: Bearer KEY"))
        await checked(scope, limited, counted)

    return guarded


# --- the program ---


def serve(config: ServeConfig) -> None:
    """Answer requests until SIGINT or SIGTERM, then finish those under way. A second Ctrl-C cuts them off."""
    config = replace(config, api_key=config.api_key or os.environ.get("NANOGPT_API_KEY", ""))
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    scheduler = load(config)
    server = make_server(create_app(scheduler), config)
    if not config.api_key and config.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("anyone who reaches this machine may use the model: --api_key=KEY asks for a key")
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"page at http://{host}:{listener.getsockname()[1]}, API at /v1; Ctrl-C ends", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again when it has ended because of them.
    server.run(sockets=[listener])
    scheduler.close()


def load(config: ServeConfig) -> Scheduler:
    """Return the model, ready to answer."""
    device = choose_device(replace(config, compile=False))
    trained = load_trained(config, device)
    model, tokenizer = trained.model, trained.tokenizer
    if config.block_size:
        model.crop_block_size(min(config.block_size, model.config.block_size))
    size, shape = model.get_num_params(), model.config
    pack(model, device.dtype, int8=config.int8)
    engine = Engine(model, config.rows, vocab_size=tokenizer.vocab_size, dtype=device.dtype)
    name = config.name or Path(config.out_dir if config.init_from == "resume" else config.init_from).resolve().name
    cached = 2 * config.rows * shape.block_size * shape.n_layer * shape.n_kv_head * shape.head_size
    log.info(
        f"{trained.name}, {size / 1e6:.2f}M parameters, as {name!r}; {config.rows} rows of "
        f"{shape.block_size:,} tokens side by side ({cached * device.dtype.itemsize / 1e6:,.0f} MB)"
    )
    # Small models decode no faster with more threads, and the connections need a core, too: with 200 clients on two
    # cores, a model of 0.7M parameters is several times faster with one.
    return Scheduler(engine, tokenizer, replace(config, name=name), threads=1 if size < 10e6 else 0)


def make_server(app: ASGIApp, config: ServeConfig) -> uvicorn.Server:
    """Return what speaks HTTP. It logs nothing: errors are logged where they are answered."""
    return uvicorn.Server(uvicorn.Config(
        app, ws="none", lifespan="off", log_level="critical", access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=config.timeout,
    ))  # fmt: skip
