import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch

from nanogpt import cli, serve, train
from nanogpt.api import Service, create_app
from nanogpt.board import add_board
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.engine import Engine, Request, Sampling
from nanogpt.errors import CheckpointError, ConfigError
from nanogpt.guard import Guard
from nanogpt.model import GPT
from nanogpt.scheduler import Scheduler
from nanogpt.settings import ServeConfig
from nanogpt.tokenizer import ByteTokenizer
from tests.conftest import ROOT
from tests.test_plot import write_run

TOKENIZER = ByteTokenizer()
PAGE = (ROOT / "nanogpt" / "page.html").read_text(encoding="utf-8")
GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


def make_model() -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=16, architecture="qwen3")).eval()
    with torch.no_grad():
        model.lm_head.weight *= 8  # opinions
    return model


@pytest.fixture
def out_dir(recipe: Callable[..., TrainConfig]) -> str:
    config = recipe(max_iters=2, eval_interval=2)
    train.train(config)
    return config.out_dir


@dataclass
class Server:
    """A server in a thread of this process."""

    port: int
    scheduler: Scheduler

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if body is not None:
            headers = {"content-type": "application/json", **headers}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if answer.headers["content-type"] == "application/json" else content

    def complete(self, **settings: Any) -> tuple[int, Any]:
        return self.ask("/v1/completions", json.dumps({"model": "m", **settings}).encode())

    def wait_until_idle(self) -> None:
        for _ in range(500):
            if not self.scheduler._running and not self.scheduler.waiting:
                return
            time.sleep(0.01)
        raise AssertionError("rows are still busy")


@contextmanager
def serving(
    model: GPT,
    rows: int = 4,
    queue: int = 32,
    seconds: int = 60,
    key: str = "",
    max_body: int = 20_000,
    runs: Sequence[Path] = (),
    buffer: int = 2**18,
) -> Iterator[Server]:
    scheduler = Scheduler(Engine(model, rows, vocab_size=TOKENIZER.vocab_size), TOKENIZER, queue)
    service = Service("m", scheduler, TOKENIZER, max_new_tokens=3000, seconds=seconds, created=0)
    app = create_app(service, PAGE)
    add_board(app, runs)
    guard = Guard(app, scheduler.registry, names=["me.example"], api_key=key, max_body=max_body)
    server = serve.make_server(guard, ServeConfig(rows=rows, queue=queue))
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Server(listener.getsockname()[1], scheduler)
    finally:
        server.should_exit = True
        thread.join()
        scheduler.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    torch.set_num_threads(1)
    with serving(make_model()) as server:
        yield server


def drawn(prompt: bytes, count: int, seed: int, temperature: float = 1.0) -> str:
    """What the engine says by itself."""
    engine = Engine(make_model(), 1, vocab_size=TOKENIZER.vocab_size)
    [row] = engine.add([Request(list(prompt), count, Sampling(temperature), seed, frozenset([256]))])
    while engine.step():
        pass
    return TOKENIZER.decode([token for token in row.new_tokens if token != 256])


def test_the_official_client_gets_what_the_engine_says(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["m"]
    assert server.client.models.retrieve("m").id == "m"
    answer = server.client.completions.create(model="m", prompt="hello", max_tokens=40, seed=5, n=3, temperature=0.8)
    assert [choice.text for choice in answer.choices] == [drawn(b"hello", 40, 5 + n, 0.8) for n in range(3)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens <= 120
    assert answer.usage.total_tokens == 5 + answer.usage.completion_tokens


def test_prompts_as_texts_and_as_ids(server: Server) -> None:
    settings: dict[str, Any] = {"model": "m", "max_tokens": 8, "temperature": 0}
    texts = server.client.completions.create(prompt=["ab", "c"], n=2, **settings)
    ids = server.client.completions.create(prompt=[[97, 98], [99]], n=2, **settings)
    assert [choice.text for choice in texts.choices] == [choice.text for choice in ids.choices]
    assert len(texts.choices) == 4
    assert server.client.completions.create(prompt=[97, 98], **settings).choices[0].text == texts.choices[0].text
    _, nothing = server.complete(max_tokens=8, temperature=0)
    _, end = server.complete(prompt=[256], max_tokens=8, temperature=0)
    assert nothing["choices"][0]["text"] == end["choices"][0]["text"]
    _, unnamed = server.ask("/v1/completions", b'{"max_tokens": 8, "temperature": 0}')
    assert unnamed["choices"] == nothing["choices"]


def test_a_stream_is_the_same_text_in_pieces(server: Server) -> None:
    settings: dict[str, Any] = {"model": "m", "prompt": "x", "max_tokens": 30, "seed": 3, "n": 2, "echo": True}
    whole = server.client.completions.create(**settings)
    texts, ends, usage = ["", ""], [None, None], None
    for event in server.client.completions.create(stream=True, stream_options={"include_usage": True}, **settings):
        for choice in event.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
        usage = event.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_stop_strings(server: Server) -> None:
    text = drawn(b"a", 60, 9)
    stop = text[20:22]
    whole, streamed = (
        server.client.completions.create(
            model="m", prompt="a", max_tokens=60, seed=9, stop=["never", stop], logprobs=0
        ),
        "",
    )
    assert whole.choices[0].text == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].logprobs
    assert len(whole.choices[0].logprobs.tokens or []) <= len(text[: text.index(stop)].encode())
    for event in server.client.completions.create(model="m", prompt="a", max_tokens=60, seed=9, stop=stop, stream=True):
        streamed += event.choices[0].text
    assert streamed == whole.choices[0].text


def test_log_probabilities_of_prompt_and_continuation(server: Server) -> None:
    prompt = "good day"
    answer = server.client.completions.create(
        model="m", prompt=prompt, max_tokens=6, temperature=0, logprobs=3, echo=True
    )
    told = answer.choices[0].logprobs
    assert told
    assert told.tokens
    assert told.token_logprobs
    assert told.top_logprobs
    ids = [*prompt.encode(), *(_id(token) for token in told.tokens[len(prompt) :])]
    with torch.no_grad():
        logits = make_model()(torch.tensor([ids]), targets=torch.tensor([ids]))[0][0, :-1, :257]
    expected = logits.log_softmax(dim=-1)[range(len(ids) - 1), ids[1:]]
    assert told.token_logprobs[0] is None
    torch.testing.assert_close(torch.tensor(told.token_logprobs[1:]), expected, atol=1e-4, rtol=0)
    for token, log_p, top in zip(told.tokens[8:], told.token_logprobs[8:], told.top_logprobs[8:], strict=True):
        assert len(top) == 3
        assert top[token] == log_p == max(top.values())
    _, scored = server.complete(prompt=prompt, max_tokens=0, logprobs=3, echo=True)
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == told.token_logprobs[: len(prompt)]
    assert scored["choices"][0]["text"] == prompt


def _id(token: str) -> int:
    return int(token.removeprefix("bytes:\\x"), 16) if token.startswith("bytes:") else token.encode()[0]


def test_a_request_does_not_notice_its_neighbours(server: Server) -> None:
    alone = server.complete(prompt="q", max_tokens=50, seed=4)[1]["choices"]
    answers: list[Any] = [None] * 8

    def ask(n: int) -> None:
        answers[n] = server.complete(prompt="q" if n == 5 else "z" * n, max_tokens=20 + 30 * (n == 5), seed=4)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers] == [200] * 8
    assert answers[5][1]["choices"] == alone


@pytest.mark.parametrize(
    ("settings", "status", "message"),
    [
        ({"model": "gpt-9"}, 404, "the model here is 'm'"),
        ({"prompt": "x" * 33}, 400, "33 tokens, where the model sees 32"),
        ({"prompt": []}, 400, "prompt: an empty list"),
        ({"prompt": [[]]}, 400, "without token ids"),
        ({"prompt": [257]}, 400, "token id 257, where the vocabulary has 257"),
        ({"prompt": [-1]}, 400, "prompt: expected a text"),
        ({"prompt": {"a": 1}}, 400, "prompt: expected a text"),
        ({"max_tokens": 10**9}, 400, "max_tokens: at most 3,000"),
        ({"max_tokens": -1}, 400, "max_tokens: Input should be greater"),
        ({"max_tokens": "7"}, 400, "max_tokens: Input should be a valid integer"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"temperature": 2.5}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n: "),
        ({"n": 33}, 400, "at most 32 continuations"),
        ({"prompt": ["a"] * 17, "n": 2}, 400, "at most 32 continuations"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"n": 30, "max_tokens": 3000, "logprobs": 20}, 400, "1,890,000 values in one answer"),
        ({"prompt": ["a"] * 2000 + [1]}, 400, "prompt: expected a text"),
        ({"stream_options": {"include_all": True}}, 400, "stream_options.include_all: unknown"),
        ({"top_k": -2}, 400, "top_k"),
        ({"temprature": 1}, 400, "temprature: unknown"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"best_of": 3}, 400, "best_of"),
        ({"suffix": "end"}, 400, "suffix"),
        ({"logit_bias": {"5": 1.0}}, 400, "logit_bias"),
        ({"seed": 2**63}, 400, "seed"),
        ({"\ud800": 1}, 400, "unicode"),
        ({"model": "\ud800"}, 404, "ud800"),
    ],
)
def test_what_cannot_be_done_is_said(server: Server, settings: dict[str, Any], status: int, message: str) -> None:
    got, answer = server.complete(**settings)
    assert got == status
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"model": "m", "prompt": "\xff"}', 400),
        (b'{"model": "m", "temperature": NaN}', 400),
        (b'{"model": "m", "temperature": Infinity}', 400),
        (b'{"model": "m", "top_p": -Infinity, "min_p": NaN}', 400),
        (b'{"model": "m", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b"[" * 19_000, 400),
        (b'{"model":' * 2000, 400),
        (b'{"model": "m", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400),
        (b" " * 20_001, 413),
    ],
)
def test_hostile_bodies(server: Server, body: bytes, status: int) -> None:
    got, answer = server.ask("/v1/completions", body)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in json.dumps(answer)
    assert server.complete(prompt="a", max_tokens=1)[0] == 200


def test_half_a_surrogate_pair(server: Server) -> None:
    status, answer = server.complete(prompt="\ud800a", max_tokens=0, echo=True, logprobs=1)
    assert status == 200
    assert answer["choices"][0]["text"].endswith("a")


def test_bodies_without_a_length_are_limited_too(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(
        "POST", "/v1/completions", iter([b"x" * 9000] * 3), {"transfer-encoding": "chunked"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413


def test_other_content_is_no_json(server: Server) -> None:
    status, answer = server.ask("/v1/completions", b'{"model": "m"}', content_type="text/plain")
    assert status == 400
    assert "content-type: application/json" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "192.168.1.7:80"}, 200),
        ({"host": "ME.example:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "a@localhost"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"origin": "http://localhost:1"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
    ],
)
def test_hosts_and_origins(server: Server, headers: dict[str, str], status: int) -> None:
    assert server.ask("/v1/models", **headers)[0] == status


def test_nothing_else_is_readable(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("swordfish")
    _, answer = server.complete(prompt=f"FILE:{secret}", max_tokens=0, echo=True, truncate_prompt_tokens=-1)
    assert answer["choices"][0]["text"] == f"FILE:{secret}"[-32:]
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/../../etc/passwd",
        "/page.html",
        "/docs",
    ):
        assert server.ask(path)[0] == 404
    assert server.ask("/v1/completions")[0] == 405


def test_what_changes_nothing_is_taken(server: Server) -> None:
    neutral = {"top_k": -1, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1}
    neutral |= {"suffix": None, "logit_bias": {}, "user": "me", "stop": None, "max_tokens": None, "seed": -1}
    status, _ = server.complete(prompt="a", stream_options={"include_obfuscation": False}, **neutral)
    assert status == 200
    choices = server.complete(prompt="a", max_tokens=20, n=3, seed=-1)[1]["choices"]
    assert len({choice["text"] for choice in choices}) == 3


def test_long_prompts_are_cut_on_demand(server: Server) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    _, cut = server.complete(prompt=text, max_tokens=20, seed=1, truncate_prompt_tokens=-1)
    assert cut["choices"] == server.complete(prompt=text[-32:], max_tokens=20, seed=1)[1]["choices"]
    _, cut = server.complete(prompt=text, max_tokens=20, seed=1, truncate_prompt_tokens=4)
    assert cut["choices"] == server.complete(prompt=" dog", max_tokens=20, seed=1)[1]["choices"]


def test_chat_is_refused(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="knows no chat format"):
        server.client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])


def test_a_key() -> None:
    with serving(make_model(), key="s3cret") as server:
        assert server.ask("/")[0] == 200
        assert server.ask("/health")[0] == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert server.ask(path)[0] == 401
            assert server.ask(path, authorization="Bearer s3cret")[0] == 200
        with pytest.raises(openai.AuthenticationError, match="asks for its key"):
            server.client.completions.create(model="m", prompt="a")
        for wrong in ("Bearer s3cre", "Bearer s3crett", "Bearer", "Basic s3cret", "Bearer s\xe9cret"):
            assert server.ask("/v1/models", authorization=wrong)[0] == 401
        client = server.client.with_options(api_key="s3cret")
        assert client.completions.create(model="m", prompt="a", max_tokens=1).choices


@contextmanager
def slow(server: Server) -> Iterator[None]:
    """An engine that takes ten milliseconds for a token, and never draws the end of a text."""
    step = server.scheduler.engine.step

    def wait() -> Any:
        time.sleep(0.01)
        return step()

    server.scheduler.engine.step, server.scheduler.engine.vocab_size = wait, 256  # type: ignore[method-assign]
    try:
        yield
    finally:
        server.scheduler.engine.step, server.scheduler.engine.vocab_size = step, 257  # type: ignore[method-assign]


@contextmanager
def halted(server: Server) -> Iterator[Callable[[], None]]:
    """An engine that draws nothing until one lets it go on."""
    gate, step = threading.Event(), server.scheduler.engine.step

    def wait() -> Any:
        gate.wait(30)
        return step()

    server.scheduler.engine.step = wait  # type: ignore[method-assign]
    try:
        yield gate.set
    finally:
        gate.set()


def test_overload() -> None:
    with serving(make_model(), rows=1, queue=2) as server, halted(server) as go_on:
        answers: list[Any] = []
        threads = []
        for n in range(3):  # one on the row, two that wait
            threads.append(threading.Thread(target=lambda: answers.append(server.complete(prompt="a", max_tokens=3))))
            threads[-1].start()
            while (
                len(server.scheduler._waiting) < n
                or server.scheduler.registry.get_sample_value("nanogpt_prompt_tokens_total") != 1
            ):
                time.sleep(0.005)
        with pytest.raises(openai.RateLimitError, match="2 continuations are waiting already"):
            server.client.completions.create(model="m", prompt="a")
        metrics = server.ask("/metrics")[1].decode()
        assert "nanogpt_waiting 2.0" in metrics
        assert 'nanogpt_responses_total{status="429"} 1.0' in metrics
        go_on()
        for thread in threads:
            thread.join()
        assert [status for status, _ in answers] == [200] * 3
        assert server.complete(prompt="a")[0] == 200


def test_metrics_are_read_between_changes(server: Server) -> None:
    asking = threading.Thread(target=lambda: server.ask("/metrics"))
    with server.scheduler._changed:  # what the engine's thread holds while it changes the queue
        asking.start()
        asking.join(0.5)
        assert asking.is_alive()
    asking.join(10)
    assert not asking.is_alive()


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_row(stream: bool) -> None:
    with serving(make_model()) as server, slow(server):
        hang_up(server, stream)


def hang_up(server: Server, stream: bool) -> None:
    body = json.dumps({"model": "m", "prompt": "a", "max_tokens": 3000, "n": 6, "stream": stream, "logit_bias": {}})
    for _ in range(3):
        connection = socket.create_connection(("127.0.0.1", server.port))
        lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
        connection.sendall("\r\n".join([*lines, f"content-length: {len(body)}", "", body]).encode())
        while not server.scheduler._running:
            time.sleep(0.002)
        if stream:
            connection.recv(1000)
        connection.close()
        started = time.monotonic()
        server.wait_until_idle()
        assert time.monotonic() - started < 2  # where all of it would take half a minute
    assert server.complete(prompt="a")[0] == 200


def test_idle_connections_refuse_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt.guard._SECONDS_TO_ASK", 3)
    with serving(make_model(), rows=1, queue=2) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(50)]
        idle[0].sendall(b"GET / HTTP/1.1\r\nhost: local")  # a part of a request is none
        assert server.complete(prompt="a", max_tokens=1)[0] == 200
        assert [connection.recv(100) for connection in idle] == [b""] * 50
        for connection in idle:
            connection.close()


def post(headers: str, body: bytes = b"") -> bytes:
    return f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n\r\n".encode() + body


@pytest.mark.parametrize("opening", [GET + b"GET / HTTP/1.1\r\nx: ", post("content-length: 19000")])
def test_who_asks_in_drops_is_cut_off(opening: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the header of a second request, and in a body that is not wanted."""
    monkeypatch.setattr("nanogpt.guard._SECONDS_TO_ASK", 1)
    with (
        serving(make_model(), key="s3cret") as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        connection.sendall(opening)
        assert connection.recv(100)
        ends_when_written_to(connection)


def ends_when_written_to(connection: socket.socket) -> None:
    with suppress(ConnectionError):
        for _ in range(200):
            time.sleep(0.1)
            connection.send(b"a")
        raise AssertionError("the connection is still open")


STREAM = b'{"model": "m", "prompt": "a", "max_tokens": 3000, "logprobs": 20, "stream": true}'


@pytest.mark.parametrize(
    "asked", [GET * 20, post(f"content-type: application/json\r\ncontent-length: {len(STREAM)}", STREAM)]
)
def test_who_does_not_read_is_cut_off(asked: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanogpt.guard._SECONDS_TO_READ", 1)
    with serving(make_model(), buffer=4096) as server, slow(server), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(asked)
        ends_when_written_to(connection)
        server.wait_until_idle()


def test_time_limits() -> None:
    with serving(make_model(), rows=1, seconds=0) as server:
        status, answer = server.complete(prompt="a", max_tokens=3000)
        assert status == 429
        assert "no row came free within 0 seconds" in answer["error"]["message"]
    with serving(make_model(), rows=1, seconds=1) as server, slow(server):
        status, answer = server.complete(prompt="a", max_tokens=3000, temperature=0)
        assert status == 200
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 3000


def test_damaged_weights_are_an_error_not_the_end() -> None:
    model = make_model()
    with serving(model) as server:
        weight = model.lm_head.weight.detach().clone()
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        for temperature in (0, 1):
            status, answer = server.complete(prompt="a", temperature=temperature, logprobs=1)
            assert status == 500
            assert "its weights may be damaged" in answer["error"]["message"]
        with pytest.raises(openai.APIError, match="not a number"):
            list(server.client.completions.create(model="m", prompt="a", stream=True))
        assert server.ask("/health")[0] == 503
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)
        assert server.complete(prompt="a")[0] == 200
        assert server.ask("/health") == (200, {"status": "ok"})


def test_who_fails_disturbs_no_other(server: Server) -> None:
    engine = server.scheduler.engine
    score, step, add = engine.score, engine.step, engine.add

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    engine.score = fail  # type: ignore[method-assign]
    alone = server.complete(prompt="q", max_tokens=40, seed=4)[1]["choices"]
    events = iter(server.client.completions.create(model="m", prompt="q", max_tokens=40, seed=4, stream=True))
    text = next(events).choices[0].text
    try:
        assert server.complete(prompt="q", echo=True, logprobs=1)[0] == 500
    finally:
        engine.score = score  # type: ignore[method-assign]
    assert text + "".join(event.choices[0].text for event in events) == alone[0]["text"]
    assert server.ask("/health")[0] == 200
    for name, ask in (("step", {}), ("add", {}), ("score", {"echo": True, "logprobs": 1, "max_tokens": 0})):
        setattr(engine, name, fail)
        try:
            for _ in range(3):
                assert server.complete(prompt="q", **ask)[0] == 500
            assert server.ask("/health")[0] == 503
        finally:
            engine.score, engine.step, engine.add = score, step, add  # type: ignore[method-assign]
        assert server.complete(prompt="q", **ask)[0] == 200
        assert server.ask("/health")[0] == 200


def test_tokens_and_text_belong_together(server: Server) -> None:
    """Whatever ends it, offsets point at the tokens' texts, in a stream as well; the end of a text is a token, too."""
    ended = 0
    for seed in range(12):
        settings: dict[str, Any] = {"prompt": [104, 195], "max_tokens": 60, "seed": seed, "logprobs": 1, "echo": True}
        whole = server.complete(**settings)[1]
        [choice] = whole["choices"]
        told = choice["logprobs"]
        assert len(told["tokens"]) == whole["usage"]["total_tokens"]
        ended += told["tokens"][-1] == "<|endoftext|>"
        content = b"".join(_bytes(token) for token in told["tokens"] if token != "<|endoftext|>")
        assert choice["text"] == content.decode(errors="replace")
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            if len(token) == 1 and token.isascii():
                assert token in choice["text"][offset : offset + 2]  # after what may be left of a character
        parts = []
        for event in server.client.completions.create(model="m", stream=True, **settings):
            parts.append(event.choices[0].logprobs)
        assert [token for part in parts if part for token in part.tokens or []] == told["tokens"]
        assert [at for part in parts if part for at in part.text_offset or []] == told["text_offset"]
        if stop := choice["text"][10:12]:
            cut = server.complete(**settings, stop=stop)[1]["choices"][0]
            shown = b"".join(_bytes(token) for token in cut["logprobs"]["tokens"] if token != "<|endoftext|>")
            assert shown.decode(errors="replace").startswith(cut["text"].rstrip("\ufffd"))
    assert 0 < ended < 12


def _bytes(token: str) -> bytes:
    return bytes([_id(token)]) if token.startswith("bytes:") else token.encode()


def test_callers_take_turns() -> None:
    with serving(make_model(), rows=2, queue=30) as server, halted(server) as go_on:
        order: list[str] = []

        def ask(name: str, n: int) -> None:
            for event in server.client.completions.create(model="m", prompt=name, n=n, max_tokens=1, stream=True):
                order.append(name if event.choices[0].finish_reason else "")

        many = threading.Thread(target=ask, args=("many", 20))
        many.start()
        while server.scheduler.waiting < 18:
            time.sleep(0.005)
        one = threading.Thread(target=ask, args=("one", 1))
        one.start()
        while server.scheduler.waiting < 19:
            time.sleep(0.005)
        go_on()
        many.join()
        one.join()
        assert order.index("one") < 15  # of 21: what comes first is read by two threads


def test_bugs_do_not_show_their_inside(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr(Service, "jobs", fail)
    status, answer = server.complete(prompt="a")
    assert status == 500
    assert "secret" not in json.dumps(answer)


def test_the_page(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "connect-src 'self'" in answer.headers["content-security-policy"]


def test_the_head_alone(server: Server) -> None:
    heads = []
    for method in ("GET", "HEAD"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(f"{method} / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
            head, _, body = b"".join(iter(lambda: connection.recv(100_000), b"")).partition(b"\r\n\r\n")
        heads.append([line for line in head.splitlines() if not line.startswith(b"date")])
    assert heads[0] == heads[1]
    assert body == b""


def test_runs_are_read_from_the_named_folders_only(tmp_path: Path) -> None:
    losses = [5 - n / 1000 for n in range(2000)]
    run = write_run(tmp_path / "run", losses, max_iters=10**6)
    write_run(tmp_path / "other", [1.0])
    with serving(make_model(), runs=[run, tmp_path / "nothing"]) as server:
        [summary] = server.ask("/runs")[1]["runs"]
        assert (summary["name"], summary["step"], summary["best"]) == ("run", 19990, min(losses))
        status, one = server.ask("/runs/0")
        assert status == 200
        curve = one["curves"]["val/loss"]
        assert len(curve) <= 601
        assert curve[-1] == [19990, 199900, 3998.0, min(losses)]
        for number in ("1", "2", "-1", "../other", "99999999999999999999"):
            assert server.ask(f"/runs/{number}")[0] in (400, 404)


def test_a_run_without_a_checkpoint_shows_its_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [4.0, 3.0])
    app, scheduler = serve.load(ServeConfig(out_dir=[str(run)]))
    assert scheduler is None
    paths = {route.path for route in app.app.routes}  # type: ignore[attr-defined]
    assert {"/", "/runs", "/runs/{number}"} <= paths
    assert "/v1/completions" not in paths
    with pytest.raises(CheckpointError):
        serve.load(ServeConfig(out_dir=[str(tmp_path)]))


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "http://localhost", "a" * 80, ""])
def test_a_host_that_is_not_here_is_one_message(host: str) -> None:
    with pytest.raises(ConfigError, match=f"^--host={host} --port=0: .*; --host takes an address of this machine"):
        serve.serve(ServeConfig(host=host, port=0))


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_what_serving_needs_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("nanogpt.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="2"):
        cli.run("serve", [])
    assert "pip install fastapi uvicorn prometheus-client" in capsys.readouterr().err


def test_the_program_drains_and_ends(tmp_path: Path, out_dir: str) -> None:
    command = [sys.executable, "-m", "nanogpt", "serve", out_dir, "--port=0", "--device=cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("page at"):
            break
    port = int(line.split(",")[0].rsplit(":", 1)[1])
    second = subprocess.run([*command[:-2], f"--port={port}"], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"--port={port}: " in second.stderr
    assert "choose another --port" in second.stderr
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="out", prompt="the", max_tokens=400, stream=True)
    count = 0
    for event in stream:
        count += len(event.choices[0].text)
        if count == 1:
            process.send_signal(signal.SIGTERM)
    assert count == 400
    assert process.wait(timeout=30) == 0
    _, errors = process.communicate()
    assert errors == ""


def test_a_busy_engine_does_not_keep_a_signal_from_ending_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    scheduler = SimpleNamespace(close=lambda: seen.append(signal.getsignal(signal.SIGINT)))
    server = SimpleNamespace(run=lambda sockets: signal.raise_signal(signal.SIGINT))  # as uvicorn does in the end
    monkeypatch.setattr(serve, "load", lambda config: (None, scheduler))
    monkeypatch.setattr(serve, "make_server", lambda app, config: server)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        serve.serve(ServeConfig(port=0))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert seen == [signal.SIG_DFL]


def test_what_callers_do_is_no_news(out_dir: str) -> None:
    """Neither requests that are none, nor one that a second Ctrl-C cuts off."""
    command = [sys.executable, "-m", "nanogpt", "serve", out_dir, "--port=0", "--device=cpu"]
    process = subprocess.Popen(
        [*command, "--max_new_tokens=400000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    line = next(line for line in process.stdout if line.startswith("page at"))
    port = int(line.split(",")[0].rsplit(":", 1)[1])
    upgrade = b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    for request in (b"nonsense\r\n\r\n", upgrade):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(request)
            assert connection.recv(1000)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="out", prompt="the", max_tokens=400_000, stream=True)
    next(stream)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0


def test_the_schema_keeps_its_word(server: Server) -> None:
    """Whatever the schema allows, and whatever it forbids: no answer that it does not describe, none above 499."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    # sizes of vocabulary and context are not in the schema: some of what it allows is refused
    unwritten = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]

    def check(operation: Any, mode: Any) -> None:
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def each(case: Any) -> None:
            if mode is modes[0] and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "m"  # or nothing but 404 would be seen
            case.call_and_validate(excluded_checks=unwritten)

        each()

    for operation in [result.ok() for result in schema.get_all_operations()]:
        check(operation, modes[0])
        if operation.body:
            check(operation, modes[1])
