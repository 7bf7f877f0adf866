"""The engine against the network asked again and again, without a cache."""

import pytest
import torch
from nanogpt.engine import quantize
from nanogpt.engine import Sampling

from nanogpt.config import GPTConfig
from nanogpt.engine import Engine, Request, Row
from nanogpt.model import GPT
from tests.conftest import random_ids

SHAPES = {
    "gpt2": {"bias": True},
    "llama": {"architecture": "llama", "n_kv_head": 2, "rope_scaling": [4.0, 1.0, 4.0, 8.0]},
    "qwen3": {"architecture": "qwen3", "n_kv_head": 1, "head_size": 16, "tied_head": False},
}
GREEDY = Sampling(temperature=0)


def make(shape: str, block_size: int = 16) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=64, n_layer=3, n_head=4, n_embd=32, **SHAPES[shape]))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms count too, and the likeliest token is clear
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> GPT:
    return make(request.param)


def finish(engine: Engine) -> None:
    while engine.rows:
        engine.step()


@torch.no_grad()
def logits_of(model: GPT, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]))[0][0, -1]


@pytest.mark.parametrize("window", ["half", "slide"])
def test_every_step_has_the_logits_of_the_uncached_network(model: GPT, window: str) -> None:
    engine = Engine(model, 5, window=window)  # type: ignore[arg-type]
    # prompts of several lengths, also beyond the block size of 16, two of them equal, three times as long in the end
    prompts = [random_ids(1, n)[0].tolist() for n in (1, 5, 16, 30)]
    rows = engine.add([Request(prompt, 48, GREEDY, alternatives=64) for prompt in [*prompts, prompts[1]]])
    begins = {row: max(0, len(row.tokens) - 16) for row in rows}
    while engine.rows:
        for row in engine.rows:
            if len(row.tokens) - begins[row] > 16:
                begins[row] = len(row.tokens) - (8 if window == "half" else 16)
        expected = {row: logits_of(model, row.tokens[begins[row] :]) for row in engine.rows}
        for row in engine.step():
            _, alternatives = row.alternatives[-1]
            log_p = torch.tensor([value for _, value in sorted(alternatives)])
            torch.testing.assert_close(log_p, expected[row].log_softmax(0), atol=1e-5, rtol=0)
            assert row.tokens[-1] == expected[row].argmax()
    assert rows[1].new_tokens == rows[4].new_tokens
    assert all(len(row.new_tokens) == 48 and row.end == "length" for row in rows)


def test_rows_come_and_go_without_disturbing_the_others(model: GPT) -> None:
    def alone(request: Request) -> list[int]:
        engine = Engine(model, 1)
        (row,) = engine.add([request])
        finish(engine)
        return row.new_tokens

    requests = [
        Request(random_ids(1, 3 + n)[0].tolist(), 4 + 5 * n, Sampling(1.0, [0, 8, 0, 5][n], [1.0, 1.0, 0.9, 1.0][n]), n)
        for n in range(4)
    ]
    engine, rows = Engine(model, 3), list[Row]()
    for request in requests:  # the fourth waits until one has ended
        while not engine.room:
            engine.step()
        rows += engine.add([request])
        engine.step()
    finish(engine)
    assert [row.new_tokens for row in rows] == [alone(request) for request in requests]


def test_what_ends_a_row(model: GPT) -> None:
    engine = Engine(model, 4)
    prompt = random_ids(1, 4)[0].tolist()
    (row,) = engine.add([Request(prompt, 12, GREEDY)])
    finish(engine)
    last = row.new_tokens[5]
    count = row.new_tokens.index(last) + 1
    requests = [Request(prompt, 12, GREEDY, stop=frozenset([last])), Request(prompt, 0), Request(prompt, 12)]
    stopped, none, cancelled, long = engine.add([*requests, Request(prompt, 99, GREEDY)])
    engine.step()
    engine.finish(cancelled)
    finish(engine)
    assert (stopped.new_tokens, stopped.end) == (row.new_tokens[:count], "stop")
    assert (none.new_tokens, none.end) == ([], "length")
    assert (len(cancelled.new_tokens), cancelled.end) == (1, "cancelled")
    assert len(long.new_tokens) == 99
    assert long.new_tokens[:12] == row.new_tokens
    assert engine.step() == []
    with pytest.raises(ValueError, match="5 requests for 4 free rows"):
        engine.add([Request(prompt, 1)] * 5)
    for impossible in (Request([], 1), Request([1], -1)):
        with pytest.raises(ValueError, match="at least one token, and max_new_tokens can't be negative"):
            engine.add([impossible])
    with pytest.raises(ValueError, match="9 tokens in a cache of 8"):
        Engine(model, 1, length=8).add([Request([1] * 5, 4)])


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    sizes = []
    forward = model.transformer.forward
    monkeypatch.setattr(
        model.transformer, "forward", lambda idx, **how: sizes.append(tuple(idx.shape)) or forward(idx, **how)
    )
    engine = Engine(model, 4)
    rows = engine.add([Request(random_ids(1, 6)[0].tolist(), 3, seed=n) for n in range(4)])
    finish(engine)
    assert sizes == [(1, 5), (4, 1), (4, 1), (4, 1)]
    assert len({tuple(row.new_tokens) for row in rows}) > 1


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1), ("int8", 0.1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_weights_give_the_same_logits(shape: str, precision: str, tolerance: float) -> None:
    model, packed = make(shape), make(shape)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    quantize(packed, dtype, int8=precision == "int8")
    engine = Engine(packed, 2, dtype=dtype)
    prompts = [random_ids(1, n)[0].tolist() for n in (12, 3)]
    rows = engine.add([Request(prompt, 3, GREEDY, alternatives=64) for prompt in prompts])
    finish(engine)
    for row in rows:
        for n, (_, alternatives) in enumerate(row.alternatives):
            expected = logits_of(model, row.tokens[: len(row.request.prompt) + n]).log_softmax(0)
            log_p = torch.tensor([value for _, value in sorted(alternatives)])
            assert (log_p - expected).abs().max() < tolerance


def test_scores_need_few_logits_at_a_time(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_ids(1, 16)[0].tolist()
    with torch.no_grad():
        log_p = model(torch.tensor([tokens]), targets=torch.tensor([tokens]))[0][0].log_softmax(dim=-1)
    monkeypatch.setattr("nanogpt.engine._CHUNK", 5)
    heights: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: heights.append(logits.shape[-2]))
    scores = Engine(model, 1).score(tokens, 1)
    torch.testing.assert_close([score for score, _ in scores], log_p[range(15), tokens[1:]].tolist())
    assert heights == [5, 5, 5]


def test_int8_in_float32_and_many_rows_is_the_same_product() -> None:
    linear, x = torch.nn.Linear(64, 48), torch.randn(20, 64)
    from nanogpt.engine import QuantizedLinear

    packed = QuantizedLinear(linear, torch.float32, int8=True)
    rows = packed.weight.float() * packed.scale[:, None]
    assert (rows - linear.weight).abs().max() <= linear.weight.abs().max() / 127 / 2 + 1e-6
    torch.testing.assert_close(packed(x), x @ rows.T + linear.bias, atol=1e-5, rtol=1e-5)
    half = QuantizedLinear(linear, torch.bfloat16, int8=True)
    few, many = half(x[:2].bfloat16()), half(x.bfloat16())[:2]  # two kernels
    torch.testing.assert_close(few, many, atol=0.02, rtol=0.02)


def test_padded_entries_are_never_drawn() -> None:
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[61:] *= 100  # the likeliest by far, if they were allowed
    tokens = torch.cat(list(stream(model, random_ids(8, 4), 30, vocab_size=61)), dim=1)
    assert tokens.shape == (8, 30)
    assert tokens.max() < 61


def test_generate_slides_as_the_originals_does(model: GPT) -> None:
    idx = random_ids(2, 3)
    expected = idx
    for _ in range(20):  # past the block size
        logits = model(expected[:, -16:])[0]
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    model.train()
    assert torch.equal(model.generate(idx, 20, temperature=0.0), expected)
    assert model.training
    assert torch.equal(model.generate(idx, 0), idx)


def test_the_seed_decides() -> None:
    model = make("gpt2")

    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return model.generate(random_ids(1, 3), 20).flatten().tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    rows = model.generate(random_ids(1, 3).repeat(4, 1), 20).tolist()
    assert len({tuple(row) for row in rows}) == 4


def test_a_broken_network_is_an_error() -> None:
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_k=5)):
        engine = Engine(model, 1)
        [row] = engine.add([Request([1], 1, sampling)])
        assert engine.step() == [row]
        assert (row.end, row.new_tokens, engine.rows) == ("error", [], [])
    with pytest.raises(FloatingPointError, match="not a number"):
        model.generate(random_ids(1, 3), 2)
