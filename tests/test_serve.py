import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch

from nanogpt import cli, serve, train
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.engine import Engine, Request, Sampling
from nanogpt.model import GPT
from nanogpt.serve import Scheduler
from nanogpt.settings import ServeConfig
from nanogpt.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def make_model() -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=16, architecture="qwen3")).eval()
    with torch.no_grad():
        model.lm_head.weight *= 8  # opinions
    return model


@dataclass
class Server:
    """A server in a thread of this process."""

    port: int
    scheduler: Scheduler

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def ask(self, path: str, body: bytes | None = None, method: str = "", **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if body is not None:
            headers = {"content-type": "application/json", **headers}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if answer.headers["content-type"] == "application/json" else content

    def complete(self, **settings: Any) -> tuple[int, Any]:
        return self.ask("/v1/completions", json.dumps({"model": "m", **settings}).encode())

    def wait_until_idle(self) -> None:
        self.wait_for(lambda: not self.scheduler.running and not self.scheduler.waiting)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        for _ in range(2000):
            if condition():
                return
            time.sleep(0.005)
        raise AssertionError("it does not come")


@contextmanager
def serving(model: GPT, **settings: Any) -> Iterator[Server]:
    values = {"rows": 4, "queue": 32, "timeout": 60, "max_body": 20_000, "max_new_tokens": 3000, "name": "m"}
    config = ServeConfig(**{**values, **settings})
    scheduler = Scheduler(Engine(model, config.rows, vocab_size=TOKENIZER.vocab_size), TOKENIZER, config)
    server = serve.make_server(scheduler)
    listener = socket.create_server(("127.0.0.1", 0))
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
    with serving(make_model(), allow_host=["me.example"]) as server:
        yield server


def sampled(prompt: bytes, count: int, seed: int, temperature: float = 1.0) -> str:
    """What the engine says by itself."""
    engine = Engine(make_model(), 1, vocab_size=TOKENIZER.vocab_size)
    [row] = engine.add([Request(list(prompt), count, Sampling(temperature), seed, frozenset([256]))])
    while engine.step():
        pass
    return TOKENIZER.decode([token for token in row.new_tokens if token != 256])


def test_the_official_client_gets_what_the_engine_says(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["m"]
    answer = server.client.completions.create(model="m", prompt="hello", max_tokens=40, seed=5, n=3, temperature=0.8)
    assert [choice.text for choice in answer.choices] == [sampled(b"hello", 40, 5 + n, 0.8) for n in range(3)]
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
    text = sampled(b"a", 60, 9)
    stop = text[20:22]
    settings: dict[str, Any] = {"model": "m", "prompt": "a", "max_tokens": 60, "seed": 9, "stop": ["never", stop]}
    whole = server.client.completions.create(logprobs=0, **settings).choices[0]
    assert whole.text == text[: text.index(stop)]
    assert whole.finish_reason == "stop"
    assert whole.logprobs
    assert len(whole.logprobs.tokens or []) <= len(whole.text.encode())
    streamed = "".join(event.choices[0].text for event in server.client.completions.create(stream=True, **settings))
    assert streamed == whole.text


def test_logprobs_of_prompt_and_completion(server: Server) -> None:
    prompt = "good day"
    settings: dict[str, Any] = {"model": "m", "max_tokens": 6, "temperature": 0, "logprobs": 3, "echo": True}
    told = server.client.completions.create(prompt=prompt, **settings).choices[0].logprobs
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
    for token, logprob, top in zip(told.tokens[8:], told.token_logprobs[8:], told.top_logprobs[8:], strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())


def test_what_evaluation_harnesses_ask_for(server: Server) -> None:
    """lm-eval's local-completions sends ids of context and text, and reads the echo's logprobs."""
    batch = [[*b"the fox", *b" jumps"], [*b"a", *b" dog"]]
    body = {"prompt": batch, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    status, answer = server.complete(**body)
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for ids, choice in zip(batch, answer["choices"], strict=True):
        told = choice["logprobs"]
        assert choice["text"].startswith(bytes(ids).decode())
        assert told["tokens"][: len(ids)] == [chr(token) for token in ids]
        assert told["text_offset"][: len(ids)] == list(range(len(ids)))
        assert {len(values) for values in told.values()} == {len(ids) + 1}
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        for token, logprob, top in zip(*(list(told.values())[n][1:] for n in range(3)), strict=True):
            assert top[token] == logprob <= max(top.values())
        _, alone = server.complete(prompt=ids, max_tokens=0, logprobs=1, echo=True)
        assert alone["choices"][0]["logprobs"]["token_logprobs"] == told["token_logprobs"][:-1]
        assert alone["choices"][0]["finish_reason"] == "length"


def _id(token: str) -> int:
    return int(token.removeprefix("bytes:\\x"), 16) if token.startswith("bytes:") else token.encode()[0]


def _bytes(token: str) -> bytes:
    return bytes([_id(token)]) if token.startswith("bytes:") else token.encode()


def test_tokens_and_text_belong_together(server: Server) -> None:
    """Whatever ends it, offsets point at the tokens' texts, in a stream as well; the end of a text is a token, too."""
    ended = 0
    for seed in range(4):
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
        events = server.client.completions.create(model="m", stream=True, **settings)
        parts = [event.choices[0].logprobs for event in events]
        assert [token for part in parts if part for token in part.tokens or []] == told["tokens"]
        assert [at for part in parts if part for at in part.text_offset or []] == told["text_offset"]
        if stop := choice["text"][10:12]:
            cut = server.complete(**settings, stop=stop)[1]["choices"][0]
            shown = b"".join(_bytes(token) for token in cut["logprobs"]["tokens"] if token != "<|endoftext|>")
            assert shown.decode(errors="replace").startswith(cut["text"].rstrip("\ufffd"))
    assert 0 < ended < 4


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
    ("settings", "message"),
    [
        ({"prompt": "x" * 33}, "33 tokens of at most 32"),
        ({"prompt": [257]}, "token id 257, where the vocabulary has 257"),
        *(({"prompt": prompt}, "prompt: ") for prompt in ([], [[]], [-1], {"a": 1}, ["a"] * 2000 + [1])),
        ({"prompt": "\ud800"}, "Invalid JSON"),
        ({"max_tokens": 10**9}, "max_tokens: at most 3,000"),
        ({"max_tokens": "7"}, "max_tokens: Input should be a valid integer"),
        ({"prompt": ["a"] * 17, "n": 2}, "at most 32 completions"),
        ({"n": 30, "max_tokens": 3000, "logprobs": 20}, "1,890,000 values in one answer"),
        ({"stop": ["a"] * 17}, "stop: "),
        ({"temprature": 1}, "temprature: "),
        ({"presence_penalty": 0.5}, "presence_penalty: "),
        ({"logit_bias": {"5": 1.0}}, "logit_bias: "),
    ],
)
def test_what_cannot_be_done_is_said(server: Server, settings: dict[str, Any], message: str) -> None:
    status, answer = server.complete(**settings)
    assert status == 400
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_another_model_is_not_here(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="the model here is 'm'"):
        server.client.completions.create(model="gpt-9", prompt="a")


def test_what_changes_nothing_is_taken(server: Server) -> None:
    neutral = {"top_k": -1, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1}
    neutral |= {"suffix": None, "logit_bias": {}, "user": "me", "stop": None, "max_tokens": None, "seed": -1}
    status, _ = server.complete(prompt="a", stream_options={"include_obfuscation": False}, **neutral)
    assert status == 200


def test_without_a_seed_each_completion_is_another(server: Server) -> None:
    choices = [server.complete(prompt="a", max_tokens=20, n=3)[1]["choices"] for _ in range(2)]
    assert len({choice["text"] for answer in choices for choice in answer}) == 6


def test_long_prompts_are_cut_on_demand(server: Server) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    for kept, end in ((-1, text[-32:]), (4, " dog")):
        _, cut = server.complete(prompt=text, max_tokens=20, seed=1, truncate_prompt_tokens=kept)
        assert cut["choices"] == server.complete(prompt=end, max_tokens=20, seed=1)[1]["choices"]


NESTED = b'{"model": "m", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"prompt": "\xff"}', b'{"temperature": NaN}', NESTED, b" " * 20_001]
)
def test_hostile_bodies(server: Server, body: bytes) -> None:
    status, answer = server.ask("/v1/completions", body)
    assert status == (413 if len(body) > 20_000 else 400)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in json.dumps(answer)
    assert server.complete(prompt="a", max_tokens=1)[0] == 200


def test_bodies_without_a_length_are_limited_too(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    chunks = iter([b"x" * 9000] * 3)
    headers = {"transfer-encoding": "chunked", "content-type": "application/json"}
    connection.request("POST", "/v1/completions", chunks, headers, encode_chunked=True)
    assert connection.getresponse().status == 413


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:80", "[::1]:8000", "ME.example:8000"])
def test_own_names_are_answered(server: Server, host: str) -> None:
    assert server.ask("/v1/models", host=host)[0] == 200


@pytest.mark.parametrize("host", ["", "evil.example", "localhost.evil.example"])
def test_other_names_are_refused(server: Server, host: str) -> None:
    assert server.ask("/v1/models", host=host)[0] == 400


def test_open_to_all_addresses_it_takes_any_name() -> None:
    with serving(make_model(), host="0.0.0.0") as server:
        assert server.ask("/health", host="10.1.2.3")[0] == 200


def test_pages_of_other_origins_cannot_ask(server: Server) -> None:
    """A browser sends JSON to another origin only after a preflight, whose answer allows nothing."""
    origin = "https://evil.example"
    assert server.ask("/v1/completions", b'{"prompt": "a"}', origin=origin, content_type="text/plain")[0] == 400
    headers = {"access_control_request_method": "POST", "access_control_request_headers": "content-type"}
    assert server.ask("/v1/completions", method="OPTIONS", origin=origin, **headers)[0] == 405


def test_nothing_else_is_readable(server: Server) -> None:
    assert server.complete(prompt="FILE:/etc/passwd", max_tokens=0, echo=True)[1]["choices"][0]["text"][:5] == "FILE:"
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../etc/passwd", "/docs"):
        assert server.ask(path)[0] == 404
    assert server.ask("/v1/completions")[0] == 405


def test_a_key() -> None:
    with serving(make_model(), api_key="s3cret") as server:
        assert server.ask("/")[0] == 200
        assert server.ask("/health")[0] == 200
        for path in ("/v1/models", "/metrics"):
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
    """An engine that takes ten milliseconds for a token, and never samples the end of a text."""
    engine = server.scheduler.engine
    step = engine.step

    def wait() -> Any:
        time.sleep(0.01)
        return step()

    engine.step, engine.vocab_size = wait, 256  # type: ignore[method-assign]
    yield
    engine.step, engine.vocab_size = step, 257  # type: ignore[method-assign]


@contextmanager
def halted(server: Server) -> Iterator[Callable[[], None]]:
    """An engine that samples nothing until it is let go."""
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
    with serving(make_model(), rows=1, queue=2) as server, halted(server) as let_go:
        answers: list[Any] = []
        threads = []
        for n in range(3):  # one on the row, two that wait
            threads.append(threading.Thread(target=lambda: answers.append(server.complete(prompt="a", max_tokens=3))))
            threads[-1].start()
            server.wait_for(lambda n=n: len(server.scheduler.waiting) + len(server.scheduler.running) == n + 1)
        with pytest.raises(openai.RateLimitError, match="2 completions are waiting already"):
            server.client.completions.create(model="m", prompt="a")
        metrics = server.ask("/metrics")[1].decode().splitlines()
        assert {"nanogpt_waiting 2", "nanogpt_rows_busy 1", "nanogpt_refused_requests_total 1"} <= set(metrics)
        let_go()
        for thread in threads:
            thread.join()
        assert [status for status, _ in answers] == [200] * 3
        assert server.complete(prompt="a")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(stream: bool) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 3000, "n": 6, "stream": stream})
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    request = "\r\n".join([*lines, f"content-length: {len(body)}", "", body]).encode()
    with serving(make_model()) as server, slow(server):
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(request)
                server.wait_for(lambda: len(server.scheduler.running) == 4 and len(server.scheduler.waiting) == 2)
                if stream:
                    connection.recv(1000)
            started = time.monotonic()
            server.wait_until_idle()
            assert time.monotonic() - started < 4  # where all of it would take half a minute
        assert server.complete(prompt="a")[0] == 200


def test_time_limits() -> None:
    with serving(make_model(), rows=1, timeout=1) as server, slow(server):
        status, answer = server.complete(prompt="a", max_tokens=3000)
        assert status == 200
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 3000
        status, answer = server.complete(prompt="a", max_tokens=3000, n=3)  # one after another
        assert status == 429
        assert "no row became free within 1 seconds" in answer["error"]["message"]


def test_damaged_weights_are_an_error_not_the_end() -> None:
    model = make_model()
    with serving(model) as server:
        weight = model.lm_head.weight.detach().clone()
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        for temperature in (0, 1):
            status, answer = server.complete(prompt="a", temperature=temperature, logprobs=1)
            assert status == 500
            assert answer["error"] == {**answer["error"], "type": "server_error"}
        with pytest.raises(openai.APIError, match="the model failed"):
            list(server.client.completions.create(model="m", prompt="a", stream=True))
        assert server.ask("/health")[0] == 503
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)
        assert server.complete(prompt="a")[0] == 200
        assert server.ask("/health") == (200, {"status": "ok"})


def test_a_failure_disturbs_no_other(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.scheduler.engine

    def fail(*_: Any) -> Any:
        raise RuntimeError("secret of the house")

    alone = server.complete(prompt="q", max_tokens=40, seed=4)[1]["choices"]
    events = iter(server.client.completions.create(model="m", prompt="q", max_tokens=40, seed=4, stream=True))
    text = next(events).choices[0].text
    for name, settings in (("score", {"echo": True, "logprobs": 1}), ("add", {})):
        with monkeypatch.context() as patch:
            patch.setattr(engine, name, fail)
            status, answer = server.complete(prompt="q", **settings)
            assert status == 500
            assert "secret" not in json.dumps(answer)
    assert text + "".join(event.choices[0].text for event in events) == alone[0]["text"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", fail)
        for _ in range(3):
            assert server.complete(prompt="q")[0] == 500
        assert server.ask("/health")[0] == 503
    assert server.complete(prompt="q")[0] == 200
    assert server.ask("/health")[0] == 200


def test_bugs_do_not_show_their_inside(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr(serve, "make_jobs", fail)
    status, answer = server.complete(prompt="a")
    assert status == 500
    assert "secret" not in json.dumps(answer)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_what_serving_needs_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "nanogpt.serve")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="2"):
        cli.run("serve", [])
    assert "pip install fastapi uvicorn" in capsys.readouterr().err


@pytest.fixture
def command(recipe: Callable[..., TrainConfig]) -> list[str]:
    """The program with a model that was trained for two steps."""
    config = recipe(max_iters=2, eval_interval=2)
    train.train(config)
    return [sys.executable, "-m", "nanogpt", "serve", config.out_dir, "--device=cpu", "--max_new_tokens=400000"]


def start(command: list[str]) -> tuple["subprocess.Popen[str]", int]:
    process = subprocess.Popen([*command, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    line = next(line for line in process.stdout if line.startswith("page at"))
    return process, int(line.split(",")[0].rsplit(":", 1)[1])


def test_the_program_drains_and_ends(command: list[str]) -> None:
    process, port = start(command)
    second = subprocess.run([*command, f"--port={port}"], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"('127.0.0.1', {port})" in second.stderr
    assert "Traceback" not in second.stderr
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    count = 0
    for event in client.completions.create(model="out", prompt="the", max_tokens=400, stream=True):
        count += len(event.choices[0].text)
        if count == 1:
            process.send_signal(signal.SIGTERM)
    assert count == 400
    assert process.wait(timeout=30) == 0
    assert process.communicate()[1] == ""


def test_a_second_ctrl_c_cuts_clients_off(command: list[str]) -> None:
    process, port = start(command)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"nonsense\r\n\r\n")  # This, too, is nothing for the log.
        assert connection.recv(1000)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    next(client.completions.create(model="out", prompt="the", max_tokens=400_000, stream=True))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 0
