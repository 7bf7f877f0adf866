"""Who may speak to the server, and how much: in front of everything else, on plain ASGI."""

import asyncio
import hmac
import ipaddress
import math
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanogpt.protocol import RefusedError

_SECONDS_TO_ASK = 30
_SECONDS_TO_READ, _LEAST = 60, 2**16  # for a caller to take in what is sent: so many bytes at least
_SECONDS_FOR_A_BODY = 30
_OPEN = ("/", "/health")  # paths that ask for no key
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Connection(H11Protocol):
    """A connection that ends if no request comes in, or nothing is read: the system has so many of them only."""

    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # noqa: D102
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        super().connection_lost(exc)
        for timer in (self._asking, self._reading):
            if timer:
                timer.cancel()

    def on_response_complete(self) -> None:  # noqa: D102
        self._await_request()
        super().on_response_complete()

    def _await_request(self) -> None:
        if self._asking:
            self._asking.cancel()
        self._asking = self.loop.call_later(_SECONDS_TO_ASK, self._close_if_silent, self.cycle)

    def _close_if_silent(self, latest: object) -> None:
        if self.cycle is latest:
            self.transport.close()  # when all has been read that was sent
            self._await_reader()

    def pause_writing(self) -> None:  # noqa: D102
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:  # noqa: D102
        super().resume_writing()
        if self._reading and not self.transport.is_closing():
            self._reading.cancel()

    def _await_reader(self, before: float = math.inf) -> None:
        """Look again and again how much is unread, while it becomes less."""
        if self._reading:
            self._reading.cancel()
        unread = self.transport.get_write_buffer_size()
        if unread > before - _LEAST:
            self.transport.abort()
        else:
            self._reading = self.loop.call_later(_SECONDS_TO_READ, self._await_reader, unread)


class Guard:
    """Lets a request through if it is addressed to this machine, comes from no other site, has the key and is small.

    A web page of another site can make a browser send requests here; its address stands in `Origin`, or, where its
    name was made to point at this machine (DNS rebinding), in `Host`.
    """

    def __init__(
        self, app: ASGIApp, registry: CollectorRegistry, *, names: Sequence[str], api_key: str, max_body: int
    ) -> None:
        self.app, self.api_key, self.max_body = app, api_key.encode(), max_body
        self.responses = Counter("nanogpt_responses", "Answers by status", ["status"], registry=registry)
        self.names = {name.lower() for name in ("localhost", socket.gethostname(), socket.getfqdn(), *names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            return  # no websockets, and nothing to start

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.responses.labels(message["status"]).inc()
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the connection knows, and sends no body
        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except RefusedError as refusal:
            await refusal.response(scope, receive, counted)
            return
        if body is not None:
            await self.app(scope, _after(body, receive), counted)

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._is_this_machine(host):
            raise RefusedError(403, f"this server does not answer for the host {host!r}; --allow_host adds a name")
        if "origin" in headers and headers["origin"].partition("://")[2].lower() != host.lower():
            raise RefusedError(403, "requests from pages of other origins are refused")
        if self.api_key and scope["path"] not in _OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.api_key):
                raise RefusedError(401, "this server asks for its key: Authorization: Bearer KEY", "invalid_api_key")

    def _is_this_machine(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            ipaddress.ip_address(name)  # an address can't be made to point elsewhere
        except ValueError:
            return "@" not in host and host.rsplit(":", 1)[0].lower() in self.names
        return True

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the caller has gone."""
        too_large = RefusedError(413, f"the body is larger than {self.max_body:,} bytes")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if int(length) > self.max_body:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_SECONDS_FOR_A_BODY):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.max_body:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise RefusedError(408, f"the body did not arrive within {_SECONDS_FOR_A_BODY} seconds") from None


def _after(body: bytes, receive: Receive) -> Receive:
    """`receive`, with a body that was read already put back in front."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again
