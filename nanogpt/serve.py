"""The program behind `nanogpt serve`: OpenAI's completions API for one model, and a page to play with.

Two halves meet in the `Job`, one completion under way. The `Scheduler` runs the jobs of all clients on one engine, and
knows nothing of HTTP but the status of an error. The other half speaks to the clients, and puts what comes of a job
into OpenAI's form: https://platform.openai.com/docs/api-reference/completions.
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
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import uvicorn
from fastapi import Depends, FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from nanogpt.chats import prompt_of
from nanogpt.checkpoint import load_trained
from nanogpt.device import choose_device
from nanogpt.engine import NOT_FINITE, Engine, Logprobs, Request, Row, Sampling, quantize
from nanogpt.errors import UserError
from nanogpt.sample import TextStream, follow, names_of, prompt_ids
from nanogpt.settings import ServeConfig
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

RETRY = {"retry-after": "1"}
Token = tuple[int, int, Logprobs | None]  # where its text begins, its id, its logprobs


@dataclass(eq=False)
class Job:
    """One completion: what is asked for, what has come of it, and how much of that its client has got."""

    index: int  # among the choices of its answer
    request: Request
    stream: TextStream
    changed: asyncio.Event  # set when there is something new; the jobs of a request share it
    echo: bool  # begin with the prompt
    text: str  # the prompt's, and what is certain of the completion
    taken: int  # characters
    tokens: list[Token] = field(default_factory=list)
    taken_tokens: int = 0
    sampled: int = 0  # tokens
    end: str = ""  # "length", "stop", or empty while it continues
    error: HTTPException | None = None
    is_told: bool = False  # whether finish_reason has been sent
    deadline: float = 0.0  # until when it may wait; once it runs, until when it may run

    def take(self) -> tuple[str, list[Token], str]:
        """Return what is new since the last call: text, the tokens that begin in it, and how it has ended."""
        if self.error:
            raise self.error
        end = self.end  # first, because the engine's thread writes it last
        text, tokens = self.text[self.taken :], self.tokens[self.taken_tokens :]
        self.taken += len(text)
        if not end or self.stream.stopped:  # What has no text yet may belong to a stop string.
            tokens = [token for token in tokens if token[0] < self.taken]
        self.taken_tokens += len(tokens)
        self.is_told = bool(end)
        return text, tokens, end


class Scheduler:
    """Runs jobs: step by step, in a thread of its own, which computes with `threads` (0: torch's)."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: ServeConfig, threads: int = 0) -> None:
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.thread = ThreadPoolExecutor(1, "engine", torch.set_num_threads, (threads or torch.get_num_threads(),))
        self.task: asyncio.Task[None] | None = None
        self.waiting: list[Job] = []
        self.running: dict[Row, Job] = {}
        self.news: set[asyncio.Event] = set()
        self.counters = dict.fromkeys(["prompt_tokens", "sampled_tokens", "refused_requests", "failures"], 0)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of a request, all or none."""
        if len(self.waiting) + len(jobs) > self.config.queue:
            self.counters["refused_requests"] += 1
            raise HTTPException(429, f"{len(self.waiting)} completions are waiting already; try again", RETRY)
        for job in jobs:
            job.deadline = time.monotonic() + self.config.timeout
        self.waiting += jobs
        if not self.task or self.task.done():
            self.task = asyncio.create_task(self.run())

    async def run(self) -> None:
        """Run jobs until none is left."""
        late = HTTPException(429, f"no row became free within {self.config.timeout} seconds; try again", RETRY)
        while self.waiting or self.running:
            self.fail([job for job in self.waiting if time.monotonic() > job.deadline], late)
            self.waiting = [job for job in self.waiting if not job.error]
            await asyncio.get_running_loop().run_in_executor(self.thread, self.step)
            for changed in self.news:
                changed.set()
            self.news.clear()

    def step(self) -> None:
        """Admit waiting jobs, and sample one token for every running one."""
        try:
            for row, job in list(self.running.items()):
                if job.error or time.monotonic() > job.deadline:  # Its client has left, or its time is over.
                    self.engine.finish(row, "length")
                    self.update(row, job.stream.push([], final=True))
            prefilled = 0  # Prefill at most one context between two steps: the running completions wait meanwhile.
            while self.waiting and self.engine.room and prefilled < self.engine.block_size:
                prefilled += self.admit()
            for row in self.engine.step():
                if row.end == "error":  # It ends this job, and no other.
                    self.fail([self.running.pop(row)], FloatingPointError(NOT_FINITE))
                    continue
                job, start = self.running[row], self.running[row].stream.length
                text = follow(self.engine, row, job.stream)  # This also ends the row where a stop string is complete.
                if row.logprobs:
                    job.tokens.append((start, row.tokens[-1], row.logprobs[-1]))
                job.sampled += 1
                self.counters["sampled_tokens"] += 1
                self.update(row, text)
        except Exception as error:
            self.fail(list(self.running.values()), error)
            self.running.clear()
            self.engine.rows.clear()

    def admit(self) -> int:
        """Prefill the next prompt for all jobs that share it and find a row; return its length.

        A failure ends only these jobs.
        """
        prompt = self.waiting[0].request.prompt
        jobs = list(itertools.takewhile(lambda job: job.request.prompt is prompt, self.waiting[: self.engine.room]))
        del self.waiting[: len(jobs)]
        first, echoed = jobs[0], list[Token]()
        try:
            if first.echo and first.request.logprobs is not None:  # One pass over the prompt, for all of these jobs.
                starts = itertools.accumulate(map(len, first.stream.prompt_texts), initial=0)
                scores = [None, *self.engine.score(prompt, first.request.logprobs)]
                echoed = list(zip(starts, prompt, scores, strict=False))
            rows = self.engine.add([job.request for job in jobs])
        except Exception as error:
            self.fail(jobs, error)
            self.engine.rows = [row for row in self.engine.rows if row in self.running]
            return 0
        self.counters["prompt_tokens"] += len(prompt)
        for row, job in zip(rows, jobs, strict=True):
            job.deadline = time.monotonic() + self.config.timeout
            job.tokens = list(echoed)
            self.running[row] = job
            self.update(row, "")
        return len(prompt)

    def update(self, row: Row, text: str) -> None:
        """Add text that has become certain to a job, and let go of its row if it has ended."""
        job = self.running[row]
        job.text += text
        job.end = row.end
        self.news.add(job.changed)
        if row.end:
            del self.running[row]

    def fail(self, jobs: Sequence[Job], error: Exception) -> None:
        """End jobs with an error. Its traceback goes to the log; clients get a general message."""
        if not isinstance(error, HTTPException):
            self.counters["failures"] += 1
            log.error("the engine failed", exc_info=error)
            error = HTTPException(500, "the model failed; the server's log says how")
        for job in jobs:
            job.error = error
            self.news.add(job.changed)


Text = Annotated[str, Field(min_length=1)]
Request_ = TypeVar("Request_", bound="Ask")
# Unsupported parameters of OpenAI's API, each with the value that has no effect. A seed of -1 means: no seed.
ABSENT = {"best_of": 1, "suffix": "", "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1,
          "logit_bias": {}, "seed": -1}  # fmt: skip


class Ask(BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    """How to complete something."""

    model: str = ""  # if given, the one that is served
    n: int = Field(1, ge=1)  # completions of each prompt
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=-1)  # 0 or -1: from all tokens
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    stop: Text | Annotated[list[Text], Field(max_length=16)] = Field([])
    seed: int = Field(default_factory=lambda: secrets.randbits(62), ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool | None] = {}
    user: str = ""  # ignored

    @model_validator(mode="before")
    @classmethod
    def drop_defaults(cls, body: Any) -> Any:
        """Drop values of null, which mean the default, and what changes nothing."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None and value != ABSENT.get(name)}


class CompletionRequest(Ask):
    """What to complete, and how."""

    prompt: str | list[NonNegativeInt] | list[str] | list[list[NonNegativeInt]] = ""
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False  # begin with the prompt
    truncate_prompt_tokens: int = Field(0, ge=-1)  # keep its last so many; 0: all; -1: as many as fit


class ChatRequest(Ask):
    """A conversation to continue, and how."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int = Field(0, ge=0)  # 0: as many as there is room for
    max_completion_tokens: int = Field(0, ge=0)  # the same under its newer name
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    def as_completion(self, scheduler: Scheduler) -> CompletionRequest:
        """Return the same as the completion of a prompt. Raises an HTTPException if the model can't chat so."""
        try:
            prompt = prompt_of(scheduler.tokenizer, [{**each, "content": text_of(each)} for each in self.messages])
        except (UserError, LookupError, TypeError) as error:
            raise HTTPException(400, f"messages: {error}") from error
        limit, fits = scheduler.config.max_new_tokens, max(1, scheduler.engine.block_size - len(prompt))
        asked = self.max_completion_tokens or self.max_tokens or limit
        max_tokens = min(asked, fits) if asked <= limit else asked  # which is refused
        shared = {name: getattr(self, name) for name in Ask.model_fields}
        logprobs = self.top_logprobs if self.logprobs else None
        return CompletionRequest(**shared, prompt=prompt, max_tokens=max_tokens, logprobs=logprobs)


async def read_request(request: HTTPRequest, max_body: int, kind: type[Request_]) -> Request_:
    """Return the body of a request. Raises an HTTPException if it is too large or not as expected."""
    # This also keeps out web pages of other origins: for JSON, a browser sends a preflight, which is never granted.
    if request.headers.get("content-type", "").partition(";")[0].lower() != "application/json":
        raise HTTPException(400, "expected JSON, with the header content-type: application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body:
            raise HTTPException(413, f"the body is larger than {max_body:,} bytes")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, each['loc'][:1])) or 'body'}: {each['msg']}" for each in error.errors()]
        raise HTTPException(400, "; ".join(dict.fromkeys(found))) from error


def text_of(message: dict[str, Any]) -> str:
    """Return what a message says: its content, or the texts of the parts of its content."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content or [])


def make_jobs(body: CompletionRequest, scheduler: Scheduler) -> list[Job]:
    """Return the jobs of a request: `n` for each prompt. Raises an HTTPException for what is not possible here."""
    config, tokenizer, longest = scheduler.config, scheduler.tokenizer, scheduler.engine.block_size
    if body.model not in ("", config.name):
        raise HTTPException(404, f"the model here is {config.name!r}, not {body.model!r:.100}")
    prompts: Any = body.prompt
    if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
        prompts = [prompts]
    if len(prompts) * body.n > config.queue:
        raise HTTPException(400, f"at most {config.queue} completions in one request: prompts times n")
    if body.max_tokens > config.max_new_tokens:
        raise HTTPException(400, f"max_tokens: at most {config.max_new_tokens:,} here")
    kept = longest if body.truncate_prompt_tokens < 0 else body.truncate_prompt_tokens
    sampling = Sampling(body.temperature, max(body.top_k, 0), body.top_p, body.min_p)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.logprobs is not None:
        names_of(tokenizer)  # A large vocabulary takes a while, in which this thread keeps no client waiting.
    jobs, changed = list[Job](), asyncio.Event()
    for prompt in prompts:
        try:
            ids = prompt_ids(prompt, tokenizer) if isinstance(prompt, str) else prompt
        except UserError as error:
            raise HTTPException(400, f"prompt: {error}") from error
        ids = ids[-kept:]  # all of them, if kept is 0
        if not 0 < len(ids) <= longest:
            raise HTTPException(400, f"prompt: {len(ids):,} tokens of at most {longest:,}; shorten it")
        if max(ids) >= tokenizer.vocab_size:
            raise HTTPException(400, f"prompt: token id {max(ids)}, where the vocabulary has {tokenizer.vocab_size:,}")
        for n in range(body.n):
            request = Request(ids, body.max_tokens, sampling, body.seed + n, tokenizer.end_tokens, body.logprobs)
            stream = TextStream(tokenizer, ids, stop)
            text, taken = "".join(stream.prompt_texts), 0 if body.echo else stream.length
            jobs.append(Job(len(jobs), request, stream, changed, body.echo, text, taken))
    return jobs


def chat_choice_of(job: Job, streamed: bool) -> dict[str, Any]:
    """Return what is new of an answer in a conversation, in OpenAI's form."""
    tokenizer = job.stream.tokenizer

    def entry(token: int, logprob: float) -> dict[str, Any]:
        name, content = names_of(tokenizer)[token], list(tokenizer.token_bytes[token])
        return {"token": name, "logprob": round(max(logprob, -9999.0), 6), "bytes": content}

    text, tokens, end = job.take()
    said = {"role": "assistant", "content": text}
    choice: dict[str, Any] = {"index": job.index, "delta" if streamed else "message": said, "logprobs": None}
    if job.request.logprobs is not None:
        found = [(token, logprobs) for _, token, logprobs in tokens if logprobs]
        content = [{**entry(token, own), "top_logprobs": [entry(*each) for each in top]} for token, (own, top) in found]
        choice["logprobs"] = {"content": content, "refusal": None}
    return {**choice, "finish_reason": end or None}


def choice_of(job: Job) -> dict[str, Any]:
    """Return what is new of a job, with the logprobs of its tokens and of the top-k ones in their places."""
    text, tokens, end = job.take()
    choice: dict[str, Any] = {"index": job.index, "text": text, "logprobs": None, "finish_reason": end or None}
    if job.request.logprobs is not None:
        names, first = names_of(job.stream.tokenizer), job.stream.prompt_texts[0]
        # JSON knows no infinity. A prompt's first token has no logprob, and SentencePiece's no space.
        tops = [
            found and {names[each]: round(max(value, -9999.0), 6) for each, value in [*found[1], (token, found[0])]}
            for _, token, found in tokens
        ]
        choice["logprobs"] = {
            "tokens": [names[token] if found else first or names[token] for _, token, found in tokens],
            "token_logprobs": [top and top[names[token]] for top, (_, token, _) in zip(tops, tokens, strict=True)],
            "top_logprobs": tops,
            "text_offset": [start for start, _, _ in tokens],
        }
    return choice


def error_text(error: Exception) -> str:
    """Return an error in OpenAI's form, in ASCII, which holds whatever a client has sent; of a bug, no details."""
    if not isinstance(error, HTTPException):
        log.error("a bug in the server", exc_info=error)
        error = HTTPException(500, "the server has a bug; its log says where")
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return json.dumps({"error": {"message": error.detail, "type": kind, "param": None, "code": None}})


async def error_response(_: object, error: Exception) -> Response:
    """Return an error as an HTTP response."""
    status, headers = getattr(error, "status_code", 500), getattr(error, "headers", None)
    return Response(error_text(error), status, headers, media_type="application/json")


async def answer(
    request: HTTPRequest, body: CompletionRequest, scheduler: Scheduler, is_chat: bool = False
) -> Response:
    """Run the jobs of a request and return what comes of them, as a stream or whole. A client that leaves ends them."""
    jobs = await asyncio.to_thread(make_jobs, body, scheduler)  # Long prompts take time, and others must not wait.
    scheduler.submit(jobs)
    changed = jobs[0].changed

    async def cancel_when_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scheduler.fail(jobs, HTTPException(499, "the client has left"))

    request.state.watch = asyncio.create_task(cancel_when_gone())  # It also ends when the answer is complete.
    kind = ("chat.completion.chunk" if body.stream else "chat.completion") if is_chat else "text_completion"
    head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}", "object": kind,
            "created": int(time.time()), "model": scheduler.config.name}  # fmt: skip
    form = partial(chat_choice_of, streamed=body.stream) if is_chat else choice_of

    def usage() -> dict[str, int]:
        prompt, sampled = sum(len(job.request.prompt) for job in jobs) // body.n, sum(job.sampled for job in jobs)
        return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}

    def event(**content: Any) -> str:
        return f"data: {json.dumps({**head, **content})}\n\n"

    async def events() -> AsyncIterator[str]:
        try:
            while running := [job for job in jobs if not job.is_told]:
                await changed.wait()
                changed.clear()
                for job in running:
                    taken, choice = job.taken, form(job)
                    if job.taken > taken or job.is_told:
                        yield event(choices=[choice])
            if body.stream_options.get("include_usage"):
                yield event(choices=[], usage=usage())
        except Exception as error:
            yield f"data: {error_text(error)}\n\n"
        yield "data: [DONE]\n\n"

    if body.stream:
        return StreamingResponse(events(), media_type="text/event-stream")
    while not all(job.end for job in jobs) and not any(job.error for job in jobs):
        await changed.wait()
        changed.clear()
    return JSONResponse({**head, "choices": [form(job) for job in jobs], "usage": usage()})


def make_server(scheduler: Scheduler) -> uvicorn.Server:
    """Return the HTTP server: routes, API key and host check."""
    config = scheduler.config

    async def check_key(request: HTTPRequest) -> None:
        given, key = request.headers.get("authorization", "").encode("latin-1"), f"Bearer {config.api_key}".encode()
        is_free = not config.api_key or request.url.path in ("/", "/health")
        if not is_free and not hmac.compare_digest(given, key):
            raise HTTPException(401, "this server asks for its key: Authorization: Bearer KEY")

    handlers: Any = {HTTPException: error_response, Exception: error_response}
    app = FastAPI(openapi_url=None, dependencies=[Depends(check_key)], exception_handlers=handlers)
    page = resources.files("nanogpt").joinpath("page.html").read_text(encoding="utf-8")
    model = {"id": config.name, "object": "model", "created": int(time.time()), "owned_by": "nanogpt",
             "max_model_len": scheduler.engine.block_size, "max_tokens": config.max_new_tokens,
             "chats": bool(scheduler.tokenizer.chat_template)}  # fmt: skip

    @app.get("/")
    async def playground() -> Response:
        # The page asks nothing of other hosts, whatever text a model puts on it.
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page, headers={"content-security-policy": f"{policy}; img-src data:"})

    @app.post("/v1/completions")
    async def completions(request: HTTPRequest) -> Response:
        return await answer(request, await read_request(request, config.max_body, CompletionRequest), scheduler)

    @app.post("/v1/chat/completions")
    async def chat(request: HTTPRequest) -> Response:
        body = await read_request(request, config.max_body, ChatRequest)
        return await answer(request, await asyncio.to_thread(body.as_completion, scheduler), scheduler, is_chat=True)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> dict[str, str]:
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
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    device = choose_device(config)
    trained = load_trained(config, device)
    model, tokenizer = trained.model, trained.tokenizer
    if config.block_size:
        model.crop_block_size(min(config.block_size, model.config.block_size))
    size = model.get_num_params()
    quantize(model, device.dtype, int8=config.int8)
    engine = Engine(model, config.rows, vocab_size=tokenizer.vocab_size, dtype=device.dtype, static=config.cuda_graph)
    name = config.name or Path(config.out_dir if config.init_from == "resume" else config.init_from).resolve().name
    config = replace(config, name=name, api_key=config.api_key or os.environ.get("NANOGPT_API_KEY", ""))
    log.info(f"{trained.name}, {size / 1e6:.2f}M parameters, as {name!r}; {config.rows} rows of {engine.block_size:,}")
    # Small models decode no faster with more threads, and the connections need a core, too: 200 clients on two cores
    # got 2,390 tokens/s of a 0.7M model with one thread, and 1,460 with two.
    scheduler = Scheduler(engine, tokenizer, config, threads=1 if size < 10e6 else 0)
    server = make_server(scheduler)
    if not config.api_key and config.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("anyone who reaches this machine may use the model: --api_key=KEY asks for a key")
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"page at http://{host}:{listener.getsockname()[1]}, API at /v1; Ctrl-C ends", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again when it has ended because of them.
    server.run(sockets=[listener])
