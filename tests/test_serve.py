import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from nanogpt import serve
from nanogpt.config import GPTConfig
from nanogpt.engine import Engine, Request, Sampling
from nanogpt.huggingface import load_pretrained
from nanogpt.model import GPT
from nanogpt.serve import Scheduler
from nanogpt.settings import ServeConfig
from nanogpt.tokenizer import ByteTokenizer, Tokenizer
from tests.conftest import write_llama
from tests.programs import Started

TOKENIZER = ByteTokenizer()


def make_model(block_size: int = 32) -> GPT:
    torch.manual_seed(1)
    shape = {"block_size": block_size, "vocab_size": 320, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**shape, architecture="qwen3")).eval()
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

    def ask(self, path: str, body: Any = None, method: str = "", **headers: str) -> tuple[int, Any]:
        if body is not None:
            headers = {"content_type": "application/json", **headers}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        method, url = method or ("GET" if body is None else "POST"), f"http://127.0.0.1:{self.port}{path}"
        answer = httpx.request(method, url, content=body, headers=headers, timeout=30, trust_env=False)
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status_code, answer.json() if is_json else answer.content

    def complete(self, **settings: Any) -> tuple[int, Any]:
        return self.ask("/v1/completions", json.dumps({"model": "m", **settings}).encode())

    def wait_for(self, running: int, waiting: int) -> None:
        """Wait until so many completions run and wait."""
        for _ in range(2000):
            if (len(self.scheduler.running), len(self.scheduler.waiting)) == (running, waiting):
                return
            time.sleep(0.005)
        raise AssertionError("it does not come")


@contextmanager
def serving(model: GPT, tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> Iterator[Server]:
    values = {"rows": 4, "queue": 32, "timeout": 60, "max_body": 20_000, "max_new_tokens": 3000, "name": "m"}
    config = ServeConfig(**{**values, **settings})
    scheduler = Scheduler(Engine(model, config.rows, vocab_size=tokenizer.vocab_size), tokenizer, config)
    server = serve.make_server(scheduler)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Server(listener.getsockname()[1], scheduler)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    torch.set_num_threads(1)
    with serving(make_model(), allow_host=["me.example"]) as server:
        yield server


def sampled(prompt: bytes, count: int, seed: int, temperature: float = 1.0) -> str:
    """What the engine says by itself."""
    alone = Engine(make_model(), 1, vocab_size=TOKENIZER.vocab_size)
    [row] = alone.complete([Request(list(prompt), count, Sampling(temperature), seed, frozenset([256]))])
    return TOKENIZER.decode([token for token in row.new_tokens if token != 256])


def test_the_official_client_gets_what_the_engine_says(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["m"]
    settings: dict[str, Any] = {"model": "m", "prompt": "hello", "max_tokens": 40, "seed": 5, "n": 3, "logprobs": 1}
    whole = server.client.completions.create(temperature=0.8, **settings)
    assert [choice.text for choice in whole.choices] == [sampled(b"hello", 40, 5 + n, 0.8) for n in range(3)]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage
    assert whole.usage.total_tokens == 5 + whole.usage.completion_tokens <= 125
    settings |= {"temperature": 0.8, "stream": True, "stream_options": {"include_usage": True}, "echo": True}
    texts, ends, tokens, usage = [""] * 3, [""] * 3, [list[str](), list[str](), list[str]()], None
    for event in server.client.completions.create(**settings):
        for choice in event.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens or [] if choice.logprobs else []
            ends[choice.index] = choice.finish_reason or ends[choice.index]
        usage = event.usage or usage
    assert texts == ["hello" + choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert tokens == [[*"hello", *(choice.logprobs.tokens or [])] for choice in whole.choices if choice.logprobs]
    assert usage == whole.usage


def test_prompts_as_texts_and_as_ids(server: Server) -> None:
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "n": 2}
    _, texts = server.complete(prompt=["ab", "c"], **settings)
    _, ids = server.complete(prompt=[[97, 98], [99]], **settings)
    assert texts["choices"] == ids["choices"]
    assert [choice["index"] for choice in ids["choices"]] == [0, 1, 2, 3]
    assert server.complete(prompt=[97, 98], **settings)[1]["choices"] == ids["choices"][:2]
    nothing, end = (server.complete(**prompt, **settings)[1]["choices"] for prompt in ({}, {"prompt": [256]}))
    assert nothing == end


def test_stop_strings(server: Server) -> None:
    text = sampled(b"a", 60, 9)
    stop = text[20:22]
    settings: dict[str, Any] = {"model": "m", "prompt": "a", "max_tokens": 60, "seed": 9, "stop": ["never", stop]}
    whole = server.client.completions.create(**settings).choices[0]
    assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
    streamed = "".join(event.choices[0].text for event in server.client.completions.create(stream=True, **settings))
    assert streamed == whole.text


def test_what_evaluation_harnesses_ask_for(server: Server) -> None:
    """lm-eval's local-completions sends ids of context and text, and reads the echo's logprobs."""
    batch = [[*b"the fox", *b" jumps"], [*b"a", *b" dog"], [*b"", *sampled(b"x", 9, 1, 0.0).encode()]]
    body = {"prompt": batch, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    status, answer = server.complete(**body)
    assert status == 200
    expected = []
    for ids, choice in zip(batch, answer["choices"], strict=True):
        told = choice["logprobs"]
        with torch.no_grad():
            logprobs = make_model()(torch.tensor([ids]), targets=torch.tensor([ids]))[0][0, :-1, :257].log_softmax(-1)
        own = logprobs[range(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.tensor(told["token_logprobs"][1:-1]), own, atol=1e-4, rtol=0)
        expected.append((own[2:].sum().item(), bool((logprobs.argmax(-1)[2:] == torch.tensor(ids[3:])).all())))
        _, alone = server.complete(prompt=ids, max_tokens=0, logprobs=1, echo=True)
        assert alone["choices"][0]["logprobs"]["token_logprobs"] == told["token_logprobs"][:-1]
        assert alone["choices"][0]["finish_reason"] == "length"
    harness = pytest.importorskip("lm_eval.models.openai_completions", reason="pip install lm-eval")
    for found, right in zip(harness.LocalCompletionsAPI.parse_logprobs(answer, ctxlens=[3] * 3), expected, strict=True):
        assert found == (pytest.approx(right[0], abs=1e-3), right[1])
    assert [greedy for _, greedy in expected] == [False, False, True]


def test_tokens_of_sentencepiece_keep_spaces_and_do_not_collide(tmp_path: Path) -> None:
    """A Llama 2 finds `<0x65>` more probable than `e`, which is the same text, or less, but never as probable."""
    ids_of = write_llama(tmp_path)
    model, tokenizer = load_pretrained(str(tmp_path))
    with torch.no_grad():
        model.lm_head.weight[ids_of["e"]] *= -2  # often probable
        model.lm_head.weight[ids_of["<0x65>"]] = model.lm_head.weight[ids_of["e"]] * 1.1
    with serving(model, tokenizer) as server:
        settings: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": 20, "echo": True}
        text = "Hello world is true"
        for prompt, tokens in ((text, ["<s>", " Hello"]), (tokenizer.encode(text).tolist(), ["Hello"])):
            [choice] = server.complete(prompt=prompt, **settings)[1]["choices"]
            assert choice["text"].startswith(text)
            assert choice["logprobs"]["tokens"][:-1] == [*tokens, " world", " is", " true"]
            offsets = choice["logprobs"]["text_offset"][:-1]
            assert offsets == [0] * len(tokens[1:]) + [0, 5, 11, 14]
        ids = [1, *(ids_of[token] for token in ["e"] * 30 + ["<0x65>", "e", "<0xE2>", "<0x82>", "<0xAC>", "▁is"] * 3)]
        answer = server.complete(prompt=ids, **settings)[1]
    [choice] = answer["choices"]
    told = choice["logprobs"]
    assert choice["text"].startswith("e" * 30 + "ee€ is" * 3)
    assert told["tokens"][1:37] == ["e"] * 30 + [r"bytes:\x65", "e", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", " is"]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]), targets=torch.tensor([ids]))[0][0, :-1].log_softmax(-1)
    twins = 0
    for n, (token, row) in enumerate(zip(ids[1:], logprobs, strict=True), start=1):
        top = row.topk(20)
        expected = sorted(row[sorted({token, *top.indices.tolist()})].tolist(), reverse=True)
        assert sorted(told["top_logprobs"][n].values(), reverse=True) == pytest.approx(expected, abs=1e-4)
        assert told["token_logprobs"][n] == pytest.approx(row[token].item(), abs=1e-4)
        assert (told["token_logprobs"][n] == max(told["top_logprobs"][n].values())) == (row.argmax() == token)
        twins += {"e", r"bytes:\x65"} <= set(told["top_logprobs"][n])
    assert twins > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "x" * 33}, "33 tokens of at most 32"),
        ({"prompt": [257]}, "token id 257, where the vocabulary has 257"),
        *(({"prompt": prompt}, "prompt: ") for prompt in ([], [[]], [-1], {"a": 1})),
        ({"max_tokens": 10**9}, "max_tokens: at most 3,000"),
        ({"prompt": ["a"] * 17, "n": 2}, "at most 32 completions"),
        ({"model": "gpt-9"}, "the model here is 'm', not 'gpt-9'"),
        ({"presence_penalty": 0.5}, "presence_penalty: "),
    ],
)
def test_what_cannot_be_done_is_said(server: Server, settings: dict[str, Any], message: str) -> None:
    status, answer = server.complete(**settings)
    assert status == (404 if "model" in settings else 400)
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_is_taken(server: Server) -> None:
    neutral = {"top_k": -1, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1}
    neutral |= {"suffix": None, "logit_bias": {}, "user": "me", "stop": None, "max_tokens": None, "seed": -1}
    assert server.complete(prompt="a", stream_options={"include_obfuscation": False}, **neutral)[0] == 200
    unseeded = [server.complete(prompt="a", max_tokens=20, n=3, seed=seed)[1]["choices"] for seed in (None, -1, -1)]
    assert len({choice["text"] for choices in unseeded for choice in choices}) == 9


def test_long_prompts_are_cut_on_demand(server: Server) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    for kept, end in ((-1, text[-32:]), (4, " dog")):
        _, cut = server.complete(prompt=text, max_tokens=20, seed=1, truncate_prompt_tokens=kept)
        assert cut["choices"] == server.complete(prompt=end, max_tokens=20, seed=1)[1]["choices"]


NESTED = b'{"model": "m", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}"


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"prompt": "\xff"}', b'{"temperature": NaN}', NESTED, b" " * 20_001])
def test_hostile_bodies(server: Server, body: bytes) -> None:
    status, answer = server.ask("/v1/completions", body)
    assert status == (413 if len(body) > 20_000 else 400)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert server.complete(prompt="a", max_tokens=1)[0] == 200


def test_bodies_without_a_length_are_limited_too(server: Server) -> None:
    assert server.ask("/v1/completions", iter([b"x" * 9000] * 3))[0] == 413


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("localhost:80", 200), ("[::1]:8000", 200), ("ME.example:8000", 200),
     ("", 400), ("evil.example", 400), ("localhost.evil.example", 400)],
)  # fmt: skip
def test_only_own_names_are_answered(server: Server, host: str, status: int) -> None:
    assert server.ask("/v1/models", host=host)[0] == status
    with serving(make_model(), host="0.0.0.0") as open_server:  # which can't know its names
        assert open_server.ask("/v1/models", host=host)[0] == 200


def test_pages_of_other_origins_cannot_ask(server: Server) -> None:
    """A browser sends JSON to another origin only after a preflight, whose answer allows nothing."""
    assert server.ask("/v1/completions", b'{"prompt": "a"}', content_type="text/plain")[0] == 400
    assert server.ask("/v1/completions", method="OPTIONS", access_control_request_method="POST")[0] == 405


def test_a_key() -> None:
    with serving(make_model(), api_key="s3cret") as server:
        for path in ("/", "/health"):
            assert server.ask(path)[0] == 200
        for path in ("/v1/models", "/metrics"):
            assert server.ask(path, authorization="Bearer s3cret")[0] == 200
            for wrong in ("", "Bearer s3cre", "Basic s3cret"):
                assert server.ask(path, authorization=wrong)[0] == 401
        with pytest.raises(openai.AuthenticationError, match="asks for its key"):
            server.client.completions.create(model="m", prompt="a")


@contextmanager
def slowed(server: Server, wait: Callable[[], object]) -> Iterator[None]:
    """An engine that waits before each token, and never samples the end of a text."""
    engine = server.scheduler.engine
    step = engine.step
    engine.step, engine.vocab_size = lambda: (wait(), step())[1], 256  # type: ignore[method-assign]
    yield
    engine.step, engine.vocab_size = step, 257  # type: ignore[method-assign]


def test_overload() -> None:
    gate = threading.Event()
    with serving(make_model(), rows=1, queue=2) as server, slowed(server, gate.wait), ThreadPoolExecutor() as pool:
        answers = []
        for n in range(3):  # one on the row, two that wait
            answers.append(pool.submit(server.complete, prompt="a", max_tokens=3))
            server.wait_for(running=1, waiting=n)
        with pytest.raises(openai.RateLimitError, match="2 completions are waiting already"):
            server.client.completions.create(model="m", prompt="a")
        metrics = server.ask("/metrics")[1].decode().splitlines()
        assert {"nanogpt_waiting 2", "nanogpt_rows_busy 1", "nanogpt_refused_requests_total 1"} <= set(metrics)
        gate.set()
        assert [answer.result()[0] for answer in answers] == [200] * 3
        assert server.complete(prompt="a")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 3000, "n": 6, "stream": stream}
    with serving(make_model()) as server, slowed(server, lambda: time.sleep(0.01)):
        url, started = f"http://127.0.0.1:{server.port}/v1/completions", time.monotonic()
        with (
            suppress(httpx.ReadTimeout),  # the client that does not stream waits no longer
            httpx.stream("POST", url, json=body, timeout=0.5, trust_env=False),
        ):
            server.wait_for(running=4, waiting=2)
        server.wait_for(running=0, waiting=0)
        assert time.monotonic() - started < 10  # where all of it would take half a minute
        assert server.complete(prompt="a")[0] == 200


def test_time_limits() -> None:
    with serving(make_model(), rows=1, timeout=1) as server, slowed(server, lambda: time.sleep(0.01)):
        status, answer = server.complete(prompt="a", max_tokens=3000)
        assert status == 200
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 3000
        status, answer = server.complete(prompt="a", max_tokens=3000, n=3)  # one after another
        assert status == 429
        assert "no row became free within 1 seconds" in answer["error"]["message"]


def test_a_failure_ends_neither_other_requests_nor_the_server() -> None:
    model = make_model()
    with serving(model) as server:
        weight = model.lm_head.weight.detach().clone()
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        for temperature in (0, 1):
            assert server.complete(prompt="a", temperature=temperature, logprobs=1)[0] == 500
        with pytest.raises(openai.APIError, match="the model failed"):
            list(server.client.completions.create(model="m", prompt="a", stream=True))
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)
        assert server.complete(prompt="a")[0] == 200
        assert server.ask("/health") == (200, {"status": "ok"})


def test_a_fault_in_one_completion_ends_no_other(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    score = Engine.score

    def fail(engine: Engine, tokens: Any, count: int) -> Any:
        if count == 7:  # the victim's logprobs
            raise RuntimeError("secret")
        return score(engine, tokens, count)

    neighbour: dict[str, Any] = {"prompt": "q", "max_tokens": 60, "seed": 4, "top_k": 5, "logprobs": 1}
    victim = {"prompt": "q", "max_tokens": 30, "stop": "victim", "top_k": 7, "logprobs": 7, "echo": True}
    with slowed(server, lambda: time.sleep(0.005)), ThreadPoolExecutor() as pool:
        alone = server.complete(**neighbour)[1]["choices"][0]["text"]
        monkeypatch.setattr(Engine, "score", fail)
        other = pool.submit(server.complete, **neighbour)
        server.wait_for(running=1, waiting=0)
        for stream in (False, True):
            status, answer = server.complete(stream=stream, **victim)
            assert status == (200 if stream else 500)
            told = answer.decode() if stream else json.dumps(answer)
            assert "server_error" in told
            assert "secret" not in told
        assert other.result()[1]["choices"][0]["text"] == alone
        assert server.ask("/health") == (200, {"status": "ok"})
    server.wait_for(running=0, waiting=0)


def test_a_second_ctrl_c_cuts_clients_off(trained: Path) -> None:
    words = ["serve", str(trained), "--device=cpu", "--max_new_tokens=400000", "--port=0"]
    started = Started(["-m", "nanogpt", *words])
    started.wait_for("API at /v1")
    [address] = re.findall(r"page at (\S+),", started.written(0))
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    next(client.completions.create(model="out", prompt="the", max_tokens=400_000, stream=True))
    started.send(signal.SIGINT)
    time.sleep(0.5)
    assert started.process.is_alive()
    started.send(signal.SIGINT)
    result = started.wait()
    assert (result.returncode, result.stderr) == (0, "")
