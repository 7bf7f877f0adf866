"""The program behind `nanogpt serve`: OpenAI's completions API for one model, and a page to play with.

One thread owns the engine and runs its steps for all clients (`Scheduler`); asyncio speaks to the clients
(`make_server`). Each completion that a request asks for is a `Job`, admitted between two steps; what is new of it comes
back as a `Piece`. The API is described at https://platform.openai.com/docs/api-reference/completions.
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
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import Depends, FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field, ValidationError, model_validator
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive

from nanogpt import __version__
from nanogpt.checkpoint import load_trained
from nanogpt.device import choose_device
from nanogpt.engine import Engine, Likelihood, Request, Row, Sampling, quantize
from nanogpt.errors import UserError
from nanogpt.sample import TextStream, follow, prompt_ids
from nanogpt.settings import ServeConfig
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_VALUES = 2**19  # logprobs in one answer, which is put together in memory

Choice = dict[str, Any]
TokenInfo = tuple[int, int, Likelihood | None]  # where its text begins, its id, its logprobs


@dataclass(eq=False)
class Job:
    """One completion: what is asked for, and how far it has come."""

    request: Request
    index: int  # among the choices of its answer
    stream: TextStream
    prompt_texts: list[str]  # of its tokens
    echo: bool  # begin with the prompt
    pieces: "asyncio.Queue[Piece]"  # where what is new of it goes; the jobs of a request share one
    deadline: float = 0.0  # until when it may wait; once it runs, until when it may run
    cancelled: bool = False
    held: list[TokenInfo] = field(default_factory=list)  # tokens whose text is not certain yet
    sampled: int = 0  # tokens
    sent: int = 0  # characters

    def piece(self, text: str, end: str = "") -> "Piece":
        """Return text that has become certain, and the tokens up to it: not those of what may be a stop string."""
        self.sent += len(text)
        if not end and not (self.held and self.held[-1][0] < self.stream.length == self.sent):
            return Piece(self, text)
        length = sum(map(len, self.prompt_texts))
        certain = [each for each in self.held if each[0] < self.sent or not self.stream.stopped]
        tokens = [(length + start, token, logprobs) for start, token, logprobs in certain]
        self.held = []
        return Piece(self, text, tokens, end)


@dataclass(frozen=True)
class Piece:
    """What is new of a completion."""

    job: Job
    text: str = ""
    tokens: Sequence[TokenInfo] = ()  # if logprobs are asked for
    end: str = ""  # "length", "stop", or empty while it continues
    error: HTTPException | None = None


class Scheduler:
    """Runs the jobs of all clients on one engine, in a thread of its own that computes with `threads` (0: torch's)."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: ServeConfig, threads: int = 0) -> None:
        self.engine, self.tokenizer, self.config, self.threads = engine, tokenizer, config, threads
        self.waiting: list[Job] = []
        self.running: dict[Row, Job] = {}
        self.news: list[Piece] = []
        self.counters = dict.fromkeys(["prompt_tokens", "sampled_tokens", "refused_requests", "failures"], 0)
        self.failures_in_a_row = 0
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of a request, all or none. Called on asyncio's loop, to which their pieces come."""
        self.loop = asyncio.get_running_loop()
        with self.changed:
            if len(self.waiting) + len(jobs) > self.config.queue:
                self.counters["refused_requests"] += 1
                raise HTTPException(429, f"{len(self.waiting)} completions are waiting already; try again")
            for job in jobs:
                job.deadline = time.monotonic() + self.config.timeout
            self.waiting += jobs
            self.changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs whose client has left; those that have ended don't mind."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
            self.waiting = [job for job in self.waiting if not job.cancelled]
        jobs[0].pieces.put_nowait(Piece(jobs[0], error=HTTPException(499, "the client has left")))

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
            prefilled = 0  # One context at most between two steps, or those who are running would wait too long.
            while prefilled < self.engine.block_size and (jobs := self.admit()):
                self.prefill(jobs)
                prefilled += len(jobs[0].request.prompt)
            try:
                self.step()
            except Exception as error:
                self.fail(list(self.running.values()), error)
                self.running.clear()
                self.engine.rows.clear()
            with suppress(RuntimeError):  # The loop is closed: a second Ctrl-C has cut the clients off.
                self.loop.call_soon_threadsafe(deliver, self.news)
            self.news = []

    def admit(self) -> list[Job]:
        """Take the next job from the queue, and those that share its prompt, as far as rows are free."""
        with self.changed:
            while self.waiting and time.monotonic() > self.waiting[0].deadline:
                error = HTTPException(429, f"no row became free within {self.config.timeout} seconds; try again")
                self.news.append(Piece(self.waiting.pop(0), error=error))
            groups = itertools.groupby(self.waiting[: self.engine.room], key=lambda job: id(job.request.prompt))
            jobs = list(next(groups)[1]) if self.waiting and self.engine.room else []
            del self.waiting[: len(jobs)]
        for job in jobs:
            job.deadline = time.monotonic() + self.config.timeout
        return jobs

    def prefill(self, jobs: Sequence[Job]) -> None:
        """Prefill the prompt of jobs that share it. A failure ends only these."""
        request, echo = jobs[0].request, jobs[0].echo
        try:
            is_scored = echo and request.alternatives is not None
            scores = self.engine.score(request.prompt, request.alternatives or 0) if is_scored else []
            rows = self.engine.add([job.request for job in jobs])
        except Exception as error:
            self.fail(jobs, error)
            self.engine.rows = [row for row in self.engine.rows if row in self.running]
            return
        self.counters["prompt_tokens"] += len(request.prompt)
        offsets = itertools.accumulate(map(len, jobs[0].prompt_texts), initial=0)
        tokens = list(zip(offsets, request.prompt, [None, *scores], strict=False)) if is_scored else []
        for row, job in zip(rows, jobs, strict=True):
            if echo:
                self.news.append(Piece(job, "".join(job.prompt_texts), tokens))
            if row.end:  # Nothing is to be sampled.
                self.failures_in_a_row = 0
                self.news.append(job.piece("", row.end))
            else:
                self.running[row] = job

    def step(self) -> None:
        """Sample one token for every running job."""
        for row, job in list(self.running.items()):
            if job.cancelled or time.monotonic() > job.deadline:
                del self.running[row]
                self.engine.finish(row)
                self.news.append(job.piece(job.stream.push([], final=True), "length"))
        for row in self.engine.step():
            job, start = self.running[row], self.running[row].stream.length
            text = follow(self.engine, row, job.stream)  # This also ends the row where a stop string is complete.
            if row.end:
                del self.running[row]
            if row.end == "error":
                self.fail([job], FloatingPointError("the model's output is not a number; its weights may be damaged"))
                continue
            if row.alternatives:
                job.held.append((start, row.tokens[-1], row.alternatives[-1]))
            self.failures_in_a_row = 0
            self.counters["sampled_tokens"] += 1
            job.sampled += 1
            self.news.append(job.piece(text, row.end))

    def fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """Log what went wrong, and tell the clients whom it concerns that it did."""
        self.counters["failures"] += 1
        self.failures_in_a_row += 1
        log.error("the engine failed", exc_info=error)
        refusal = HTTPException(500, "the model failed; the server's log says how")
        self.news += [Piece(job, error=refusal) for job in jobs]


def deliver(pieces: Sequence[Piece]) -> None:
    """Hand pieces to the answers that wait for them."""
    for piece in pieces:
        piece.job.pieces.put_nowait(piece)


def error_text(error: HTTPException) -> str:
    """Return an error in OpenAI's form, in ASCII, which holds whatever a client has sent."""
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return json.dumps({"error": {"message": error.detail, "type": kind, "param": None, "code": None}})


async def error_response(_: object, error: Exception) -> Response:
    """Return the response that tells of an error; of a bug it tells no details."""
    if not isinstance(error, HTTPException):
        log.error("a bug in the server", exc_info=error)
        error = HTTPException(500, "the server has a bug; its log says where")
    headers = {429: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}.get(error.status_code)
    return Response(error_text(error), error.status_code, headers, media_type="application/json")


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Prompt = str | Ids | Texts | Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
# Parts of the standard that are missing here, and the values with which they change nothing.
MISSING = {"best_of": 1, "suffix": "", "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1,
           "logit_bias": {}}  # fmt: skip


class CompletionRequest(BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    """What to complete, and how."""

    model: str = ""  # if given, the one that is served
    prompt: Prompt = Field("", union_mode="left_to_right")
    max_tokens: int = Field(16, ge=0)
    n: int = Field(1, ge=1)  # completions of each prompt
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=-1)  # 0 or -1: from all tokens
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    stop: Text | Annotated[list[Text], Field(max_length=16)] = Field([])
    seed: int = Field(default_factory=lambda: secrets.randbits(62), ge=-(2**63), lt=2**63)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False  # begin with the prompt
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool | None] = {}
    truncate_prompt_tokens: int = Field(0, ge=-1)  # keep its last so many; 0: all; -1: as many as fit
    user: str = ""  # ignored

    @model_validator(mode="before")
    @classmethod
    def drop_defaults(cls, body: Any) -> Any:
        """Drop values of null, which mean the default, and what changes nothing."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None and value != MISSING.get(name)}


async def read_request(request: HTTPRequest, max_body: int) -> CompletionRequest:
    """Return the body of a request. Raises an HTTPException if it is too large or not as expected."""
    # This also keeps web pages out: without leave, a browser sends JSON to no other origin.
    if request.headers.get("content-type", "").partition(";")[0].lower() != "application/json":
        raise HTTPException(400, "expected JSON, with the header content-type: application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body:
            raise HTTPException(413, f"the body is larger than {max_body:,} bytes")
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, each['loc'][:1])) or 'body'}: {each['msg']}" for each in error.errors()]
        raise HTTPException(400, "; ".join(dict.fromkeys(found))) from error


def make_jobs(body: CompletionRequest, scheduler: Scheduler) -> list[Job]:
    """Return the jobs of a request: `n` for each prompt. Raises an HTTPException for what is not possible here."""
    config, tokenizer, longest = scheduler.config, scheduler.tokenizer, scheduler.engine.block_size
    if body.model not in ("", config.name):
        raise HTTPException(404, f"the model here is {config.name!r}, not {body.model!r:.100}")
    prompts: Any = body.prompt
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    n, max_tokens = body.n, body.max_tokens
    if len(prompts) * n > config.queue:
        raise HTTPException(400, f"at most {config.queue} completions in one request: prompts times n")
    try:
        prompts = [prompt_ids(each, tokenizer) if isinstance(each, str) else each for each in prompts]
    except UserError as error:
        raise HTTPException(400, f"prompt: {error}") from error
    if kept := body.truncate_prompt_tokens:
        prompts = [ids[-(longest if kept < 0 else kept) :] for ids in prompts]
    if (largest := max(map(max, prompts))) >= tokenizer.vocab_size:
        raise HTTPException(400, f"prompt: token id {largest}, where the vocabulary has {tokenizer.vocab_size:,}")
    if (length := max(map(len, prompts))) > longest:
        raise HTTPException(400, f"prompt: {length:,} tokens of at most {longest:,}; truncate_prompt_tokens=-1 cuts it")
    if max_tokens > config.max_new_tokens:
        raise HTTPException(400, f"max_tokens: at most {config.max_new_tokens:,} here")
    values = n * (len(prompts) * max_tokens + body.echo * sum(map(len, prompts))) * (1 + (body.logprobs or 0))
    if values > MAX_VALUES:
        raise HTTPException(400, f"{values:,} values in one answer; at most {MAX_VALUES:,}: tokens times 1 + logprobs")
    sampling = Sampling(body.temperature, max(body.top_k, 0), body.top_p, body.min_p)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    jobs, pieces = [], asyncio.Queue[Piece]()
    for index, ids in enumerate(ids for ids in prompts for _ in range(n)):
        texts = list(itertools.islice(tokenizer.decode_stream(ids), len(ids)))
        request = Request(ids, max_tokens, sampling, body.seed + index % n, tokenizer.end_tokens, body.logprobs)
        jobs.append(Job(request, index, TextStream(tokenizer, ids, stop), texts, body.echo, pieces))
    return jobs


async def choices_of(jobs: Sequence[Job], body: CompletionRequest, scheduler: Scheduler) -> AsyncIterator[Choice]:
    """Yield what is new of each choice, in OpenAI's form, until all have ended. Raises an HTTPException."""
    running = set(jobs)
    while running:
        piece = await jobs[0].pieces.get()
        if piece.error:
            raise piece.error
        logprobs = None if body.logprobs is None else logprobs_of(piece.tokens, body.logprobs, scheduler.tokenizer)
        if piece.text or piece.tokens or piece.end:
            choice = {"index": piece.job.index, "text": piece.text, "logprobs": logprobs}
            yield {**choice, "finish_reason": piece.end or None}
        if piece.end:
            running.remove(piece.job)


def logprobs_of(tokens: Sequence[TokenInfo], count: int, tokenizer: Tokenizer) -> dict[str, list[Any]]:
    r"""Return the logprobs of tokens and of the `count` best ones; a part of a character reads `bytes:\xe2`."""

    def name(token: int) -> str:
        content = tokenizer.decode_bytes([token])
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    # JSON knows no infinity.
    top = [
        info and {name(each): round(max(logprob, -9999.0), 6) for each, logprob in [*info[1][:count], (token, info[0])]}
        for _, token, info in tokens
    ]
    names = [name(token) for _, token, _ in tokens]
    return {
        "tokens": names,
        "token_logprobs": [best and best[name] for best, name in zip(top, names, strict=True)],
        "top_logprobs": top,
        "text_offset": [offset for offset, _, _ in tokens],
    }


async def whole(choices: AsyncIterator[Choice]) -> list[Choice]:
    """Return all choices, each put together from what came of it."""
    found: dict[int, Choice] = {}
    async for new in choices:
        choice = found.setdefault(new["index"], new)
        if choice is not new:
            choice["text"] += new["text"]
            choice["finish_reason"] = new["finish_reason"]
            for name, values in (new["logprobs"] or {}).items():
                choice["logprobs"][name] += values
    return [found[index] for index in sorted(found)]


def usage_of(jobs: Sequence[Job], n: int) -> dict[str, int]:
    """Return the numbers of tokens."""
    prompt, sampled = sum(len(job.request.prompt) for job in jobs) // n, sum(job.sampled for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


async def cancel_when_gone(receive: Receive, scheduler: Scheduler, jobs: Sequence[Job]) -> None:
    """Free the rows of a request when its client has left or has the answer."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    finally:
        scheduler.cancel(jobs)


def make_server(scheduler: Scheduler) -> uvicorn.Server:
    """Return the paths, behind their checks, and what speaks HTTP for them."""
    config = scheduler.config

    async def check_key(request: HTTPRequest) -> None:
        given, key = request.headers.get("authorization", "").encode("latin-1"), f"Bearer {config.api_key}".encode()
        is_free = not config.api_key or request.url.path in ("/", "/health")
        if not is_free and not hmac.compare_digest(given, key):
            raise HTTPException(401, "this server asks for its key: Authorization: Bearer KEY")

    app = FastAPI(
        title="nanoGPT", version=__version__, docs_url=None, redoc_url=None, dependencies=[Depends(check_key)],
        exception_handlers={HTTPException: error_response, Exception: error_response},
    )  # fmt: skip
    schema = CompletionRequest.model_json_schema()
    page = resources.files("nanogpt").joinpath("page.html").read_text(encoding="utf-8")
    model = {"id": config.name, "object": "model", "created": int(time.time()), "owned_by": "nanogpt",
             "max_model_len": scheduler.engine.block_size, "max_tokens": config.max_new_tokens}  # fmt: skip

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        # The page asks nothing of other hosts, whatever text a model puts on it.
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page, headers={"content-security-policy": f"{policy}; img-src data:"})

    @app.post("/v1/completions", openapi_extra={"requestBody": {"content": {"application/json": {"schema": schema}}}})
    async def completions(request: HTTPRequest) -> Response:
        body = await read_request(request, config.max_body)
        jobs = await asyncio.to_thread(make_jobs, body, scheduler)  # Long prompts take time, and others must not wait.
        scheduler.submit(jobs)
        watch = asyncio.create_task(cancel_when_gone(request.receive, scheduler, jobs))
        choices, end = choices_of(jobs, body, scheduler), BackgroundTask(watch.cancel)
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                "model": config.name}  # fmt: skip

        async def events() -> AsyncIterator[str]:
            try:
                async for choice in choices:
                    yield f"data: {json.dumps({**head, 'choices': [choice]}, allow_nan=False)}\n\n"
                if body.stream_options.get("include_usage"):
                    yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage_of(jobs, body.n)})}\n\n"
            except HTTPException as error:
                yield f"data: {error_text(error)}\n\n"
            yield "data: [DONE]\n\n"

        if body.stream:
            return StreamingResponse(events(), media_type="text/event-stream", background=end)
        answer = {**head, "choices": await whole(choices), "usage": usage_of(jobs, body.n)}
        return JSONResponse(answer, background=end)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        if scheduler.failures_in_a_row >= 3 or not scheduler.thread.is_alive():
            raise HTTPException(503, "the model fails; the server's log says how")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        values = {f"{name}_total": count for name, count in scheduler.counters.items()}
        values |= {"rows_busy": len(scheduler.running), "waiting": len(scheduler.waiting)}
        lines = [f"nanogpt_{name} {value}\n" for name, value in values.items()]
        return Response("".join(lines), media_type="text/plain; version=0.0.4")

    names = ["localhost", "127.0.0.1", "::1", "[::1]", socket.gethostname(), config.host, *config.allow_host]
    # On all addresses, the server can't know its names. Unless some are given, it takes any.
    is_open = config.host in ("0.0.0.0", "::") and not config.allow_host
    checked = TrustedHostMiddleware(app, ["*"] if is_open else names, www_redirect=False)
    # uvicorn logs nothing: errors are logged where they are answered.
    return uvicorn.Server(uvicorn.Config(
        checked, ws="none", lifespan="off", log_level="critical", access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=config.timeout,
    ))  # fmt: skip


def serve(config: ServeConfig) -> None:
    """Answer requests until SIGINT or SIGTERM, then finish those under way. A second Ctrl-C cuts them off."""
    config = replace(config, api_key=config.api_key or os.environ.get("NANOGPT_API_KEY", ""))
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    scheduler = load(config)
    server = make_server(scheduler)
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
    size = model.get_num_params()
    quantize(model, device.dtype, int8=config.int8)
    engine = Engine(model, config.rows, vocab_size=tokenizer.vocab_size, dtype=device.dtype)
    name = config.name or Path(config.out_dir if config.init_from == "resume" else config.init_from).resolve().name
    log.info(
        f"{trained.name}, {size / 1e6:.2f}M parameters, as {name!r}; "
        f"{config.rows} rows of {model.config.block_size:,} tokens side by side"
    )
    # Small models decode no faster with more threads, and the connections need a core, too: 200 clients on two cores
    # got 2,390 tokens/s of a 0.7M model with one thread, and 1,460 with two.
    return Scheduler(engine, tokenizer, replace(config, name=name), threads=1 if size < 10e6 else 0)
