"""The server's paths: a request for completions becomes jobs, and their pieces JSON or server-sent events."""

import asyncio
import base64
import hashlib
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from nanogpt import __version__, engine
from nanogpt.engine import Likelihood, Sampling
from nanogpt.errors import UserError
from nanogpt.protocol import (
    Completion,
    CompletionRequest,
    ErrorReply,
    RefusedError,
    logprobs,
    mistakes,
    pieces_of,
)
from nanogpt.sample import prompt_ids
from nanogpt.scheduler import Job, OverloadedError, Piece, Scheduler
from nanogpt.tokenizer import Tokenizer

_MOST = 2**19  # values in one answer, which is put together in memory


@dataclass(frozen=True)
class Service:
    """A model and what it gives to one request."""

    name: str
    scheduler: Scheduler
    tokenizer: Tokenizer
    max_new_tokens: int
    seconds: float
    created: int

    def prompts(self, body: CompletionRequest) -> list[list[int]]:
        """The token ids of a request's prompts, each at least one. Raises `RefusedError`."""
        if body.model is not None and body.model != self.name:
            raise RefusedError(404, f"the model here is {self.name!r}, not {body.model[:100]!r}", "model_not_found")
        prompts = _prompts(body.prompt)
        if len(prompts) * (body.n or 1) > self.scheduler.queue:
            raise RefusedError(400, f"at most {self.scheduler.queue} continuations in one request: prompts times n")
        return [self._ids(prompt, body.truncate_prompt_tokens) for prompt in prompts]

    def _ids(self, prompt: str | list[int], kept: int | None) -> list[int]:
        longest = self.scheduler.engine.block_size
        try:
            ids = prompt_ids(prompt, self.tokenizer) if isinstance(prompt, str) else prompt
        except UserError as error:
            raise RefusedError(400, f"prompt: {error}") from error
        if kept:
            ids = ids[-(longest if kept < 0 else kept) :]
        if not ids:
            raise RefusedError(400, "prompt: a list without token ids")
        if max(ids) >= self.tokenizer.vocab_size:
            raise RefusedError(
                400, f"prompt: token id {max(ids)}, where the vocabulary has {self.tokenizer.vocab_size:,}"
            )
        if len(ids) > longest:
            message = (
                f"prompt: {len(ids):,} tokens, where the model sees {longest:,}; truncate_prompt_tokens=-1 cuts it"
            )
            raise RefusedError(400, message, "context_length_exceeded")
        return ids

    def jobs(self, body: CompletionRequest, prompts: Sequence[list[int]]) -> list[Job]:
        """The continuations that a request asks for. Raises `RefusedError`."""
        n = body.n or 1
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        if max_tokens > self.max_new_tokens:
            raise RefusedError(400, f"max_tokens: at most {self.max_new_tokens:,} here")
        if body.best_of not in (None, n):
            raise RefusedError(400, "best_of: continuations are not compared here; leave it out")
        echoed = sum(map(len, prompts)) if body.echo and body.logprobs is not None else 0
        told = (n * (echoed + len(prompts) * max_tokens)) * (1 + (body.logprobs or 0))
        if told > _MOST:
            raise RefusedError(400, f"{told:,} values in one answer; at most {_MOST:,}: tokens times 1 + logprobs")
        temperature = 1.0 if body.temperature is None else body.temperature
        end = self.tokenizer.end_of_text
        request = engine.Request(
            [],
            max_tokens,
            Sampling(temperature, max(body.top_k or 0, 0), body.top_p or 1.0, body.min_p or 0.0),
            secrets.randbits(62) if body.seed is None else body.seed,
            frozenset([] if end is None else [end]),
            body.logprobs,
        )
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        return [
            Job(
                replace(request, prompt=prompt, seed=request.seed + number),
                pieces,
                self.seconds,
                index=place * n + number,
                stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
                score=bool(body.echo) and body.logprobs is not None,
            )
            for place, prompt in enumerate(prompts)
            for number in range(n)
        ]


class Answer(Response):
    """The continuations of one request: all at once, or while they grow. Whoever hangs up frees their rows."""

    def __init__(self, service: Service, body: CompletionRequest, jobs: Sequence[Job]) -> None:
        super().__init__()
        self.service, self.asked, self.jobs = service, body, jobs
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.before: dict[Job, list[str]] = {}  # the texts of the prompts' tokens
        self.echoed: set[Job] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        say = asyncio.ensure_future(self._stream(send) if self.asked.stream else self._whole(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({say, gone}, return_when=asyncio.FIRST_COMPLETED)
            if say.done():
                say.result()
        finally:
            say.cancel()
            gone.cancel()
            self.service.scheduler.cancel(self.jobs)

    async def _pieces(self) -> AsyncIterator[Piece]:
        """What comes, until all have ended. Raises `RefusedError`."""
        ended: set[Job] = set()
        while len(ended) < len(self.jobs):
            piece = await self.jobs[0].pieces.get()
            if piece.error:
                raise RefusedError(429 if isinstance(piece.error, OverloadedError) else 500, str(piece.error))
            if piece.job not in ended:
                yield piece
            if piece.end:
                ended.add(piece.job)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: dict[Job, list[Piece]] = {job: [] for job in self.jobs}
        try:
            async for piece in self._pieces():
                pieces[piece.job].append(piece)
            response = await asyncio.to_thread(self._reply, pieces)  # it may be long, and the others' events go on
        except RefusedError as refusal:
            response = refusal.response
        await response(scope, receive, send)

    def _reply(self, pieces: dict[Job, list[Piece]]) -> JSONResponse:
        """All continuations, each put together from its pieces."""
        choices = []
        for job, parts in pieces.items():
            tokens = [token for part in parts for token in part.tokens]
            whole = Piece(job, "".join(part.text for part in parts), tokens, parts[-1].end)
            choices.append(self._form(whole, is_echo=bool(self.asked.echo)))
        return JSONResponse(self._completion(choices, usage=True))

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(content: Any, more: bool = True) -> None:
            text = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

        try:
            async for piece in self._pieces():
                choice = await self._choice(piece)
                if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
                    await event(self._completion([choice]))
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                await event(self._completion([], usage=True))
        except RefusedError as refusal:
            await event(refusal.content)
        await event("[DONE]", more=False)

    def _completion(self, choices: list[dict[str, Any]], usage: bool = False) -> dict[str, Any]:
        reply: dict[str, Any] = {"id": self.id, "object": "text_completion", "created": self.created}
        reply |= {"model": self.service.name, "choices": choices}
        if usage:
            read = sum(len(job.request.prompt) for job in self.jobs) // (self.asked.n or 1)
            drawn = sum(job.drawn for job in self.jobs)
            reply["usage"] = {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
        return reply

    async def _choice(self, piece: Piece) -> dict[str, Any]:
        """A piece of a continuation in OpenAI's form; before the first, the prompt if that was asked for."""
        job, is_echo = piece.job, bool(self.asked.echo) and piece.job not in self.echoed
        self.echoed.add(job)
        if is_echo and job.score:  # a long list
            return await asyncio.to_thread(self._form, piece, is_echo)
        return self._form(piece, is_echo)

    def _form(self, piece: Piece, is_echo: bool) -> dict[str, Any]:
        job, tokenizer, text = piece.job, self.service.tokenizer, piece.text
        told: list[tuple[int, int, Likelihood | None]] = []
        if is_echo or self.asked.logprobs is not None:
            if job not in self.before:
                self.before[job] = pieces_of(job.request.prompt, tokenizer)
            *places, length = itertools.accumulate(map(len, self.before[job]), initial=0)
            told = [(length + token.offset, token.id, token.likelihood) for token in piece.tokens]
            if is_echo:
                text = "".join(self.before[job]) + text
            if is_echo and job.score:
                told = [*zip(places, job.request.prompt, [None, *job.scores], strict=True), *told]
        likelihoods = logprobs(told, tokenizer) if self.asked.logprobs is not None and told else None
        return {"index": job.index, "text": text, "logprobs": likelihoods, "finish_reason": piece.end or None}


def create_app(service: Service | None, page: str) -> FastAPI:
    """The server's paths; without a service, those that need no model."""
    # no pages that load their scripts from elsewhere
    app = FastAPI(title="nanoGPT", version=__version__, docs_url=None, redoc_url=None)
    if service:
        _add_service(app, service)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": content_security_policy(page)})

    @app.exception_handler(RefusedError)
    async def refuse(_: Request, refusal: RefusedError) -> Response:
        return refusal.response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return RefusedError(400, "; ".join(dict.fromkeys(mistakes(error)))).response

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        response = RefusedError(error.status_code, error.detail).response
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return RefusedError(500, "the server has a bug; its own output says where").response

    return app


def _add_service(app: FastAPI, service: Service) -> None:
    about = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "nanogpt",
        "max_model_len": service.scheduler.engine.block_size,
        "max_tokens": service.max_new_tokens,
    }
    refusals: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}

    @app.post("/v1/completions", response_class=JSONResponse, response_model=None,
              responses={200: {"model": Completion, "content": {"text/event-stream": {}}}, **refusals})  # fmt: skip
    async def completions(body: CompletionRequest) -> Response:
        """Continue a text."""
        # reading a long prompt takes its time; the others' events go on meanwhile
        jobs = service.jobs(body, await asyncio.to_thread(service.prompts, body))
        answer = Answer(service, body, jobs)
        try:
            service.scheduler.submit(jobs)
        except OverloadedError as error:
            raise RefusedError(429, str(error), "overloaded") from error
        return answer

    @app.post("/v1/chat/completions", responses=refusals)
    async def chat() -> None:
        """Refused: the models here continue texts, and have not learned to chat."""
        raise RefusedError(400, "this model knows no chat format; send its text to /v1/completions", "no_chat_format")

    @app.get("/v1/models", responses=refusals)
    async def models() -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{model:path}", responses=refusals)
    async def model(model: str) -> dict[str, Any]:
        """The same for one model."""
        if model != service.name:
            raise RefusedError(404, f"the model here is {service.name!r}", "model_not_found")
        return about

    @app.get("/health", responses=refusals)
    async def health() -> dict[str, str]:
        """Whether requests are answered."""
        if not service.scheduler.alive:
            raise RefusedError(503, "the engine has stopped")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=refusals)
    async def metrics() -> Response:
        """Counters and times for Prometheus."""
        return Response(generate_latest(service.scheduler.registry), media_type="text/plain; version=0.0.4")


def content_security_policy(page: str) -> str:
    """A header that lets a page run its own script and style, speak to its own server, and nothing else."""

    def own(tag: str) -> str:
        content = page.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _disconnected(receive: Receive) -> None:
    """Returns when the caller has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _prompts(prompt: str | list[int] | list[str] | list[list[int]] | None) -> Sequence[str | list[int]]:
    """The standard lets one prompt be a text or ids, and several be a list of either."""
    if prompt is None:
        return [""]
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RefusedError(400, "prompt: an empty list")
    return [prompt] if isinstance(prompt[0], int) else prompt
