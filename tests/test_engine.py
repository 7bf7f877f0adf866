"""The engine against the network asked again and again, without a cache; sampling against its distribution."""

from typing import Any

import pytest
import torch

from nanogpt.config import GPTConfig
from nanogpt.engine import Engine, QuantizedLinear, Request, Row, Sampling, draw, quantize
from nanogpt.model import GPT
from tests.conftest import random_ids

SHAPES = {
    "gpt2": {"bias": True},
    "llama": {"architecture": "llama", "n_kv_head": 2, "rope_scaling": [4.0, 1.0, 4.0, 8.0]},
    "qwen3": {"architecture": "qwen3", "n_kv_head": 1, "head_size": 16, "tied_head": False},
}
GREEDY = Sampling(temperature=0)
LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5])


def make(shape: str = "gpt2") -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=3, n_head=4, n_embd=32, **SHAPES[shape]))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms count too, and the most probable token is clear
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> GPT:
    return make(request.param)


@torch.no_grad()
def logprobs_of(model: GPT, tokens: list[int]) -> torch.Tensor:
    """The logprobs (V,) after `tokens`, without a cache."""
    return model(torch.tensor([tokens]))[0][0, -1].log_softmax(0)


def recorded(row: Row, n: int) -> torch.Tensor:
    """The logprobs (V,) that a row has recorded for its n-th new token."""
    return torch.tensor([value for _, value in sorted(row.logprobs[n][1])])


@pytest.mark.parametrize(("window", "static"), [("half", False), ("half", True), ("slide", False)])
def test_every_step_has_the_logits_of_the_uncached_network(model: GPT, window: Any, static: bool) -> None:
    engine = Engine(model, 5, window=window, static=static)
    # Prompts of several lengths, also beyond the block size of 16, two of them equal, three times as long in the end.
    prompts = [random_ids(1, n)[0].tolist() for n in (1, 5, 16, 30)]
    rows = engine.add([Request(prompt, 48, GREEDY, logprobs=64) for prompt in [*prompts, prompts[1]]])
    begins = {row: max(0, len(row.tokens) - 16) for row in rows}
    while engine.rows:
        for row in engine.rows:
            if len(row.tokens) - begins[row] > 16:
                begins[row] = len(row.tokens) - (8 if window == "half" else 16)
        expected = {row: logprobs_of(model, row.tokens[begins[row] :]) for row in engine.rows}
        for row in engine.step():
            torch.testing.assert_close(recorded(row, -1), expected[row], atol=1e-5, rtol=0)
            assert row.tokens[-1] == expected[row].argmax()
    assert rows[1].new_tokens == rows[4].new_tokens
    assert all(len(row.new_tokens) == 48 and row.end == "length" for row in rows)


@pytest.mark.parametrize("static", [False, True])
def test_rows_come_and_go_without_disturbing_the_others(model: GPT, static: bool) -> None:
    settings = [Sampling(), Sampling(top_k=8), Sampling(top_p=0.9), Sampling(top_k=5, min_p=0.05)]
    requests = [Request(random_ids(1, 3 + n)[0].tolist(), 4 + 5 * n, settings[n], n) for n in range(4)]
    engine, rows = Engine(model, 3, static=static), list[Row]()
    for request in requests:  # the fourth waits until one has ended
        while not engine.room:
            engine.step()
        rows += engine.add([request])
        engine.step()
    while engine.rows:
        engine.step()
    assert [row.new_tokens for row in rows] == [Engine(model, 1).complete([each])[0].new_tokens for each in requests]


def test_what_ends_a_row() -> None:
    engine, prompt = Engine(make(), 4), random_ids(1, 4)[0].tolist()
    [row] = engine.complete([Request(prompt, 12, GREEDY)])
    last = row.new_tokens[5]
    count = row.new_tokens.index(last) + 1
    requests = [Request(prompt, 12, GREEDY, stop=frozenset([last, 999])), Request(prompt, 0), Request(prompt, 12)]
    stopped, none, cancelled, long = engine.add([*requests, Request(prompt, 99, GREEDY)])
    engine.step()
    engine.finish(cancelled)
    while engine.rows:
        engine.step()
    assert (stopped.new_tokens, stopped.end) == (row.new_tokens[:count], "stop")
    assert (none.new_tokens, none.end) == ([], "length")
    assert (len(cancelled.new_tokens), cancelled.end) == (1, "cancelled")
    assert len(long.new_tokens) == 99
    assert long.new_tokens[:12] == row.new_tokens


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1), ("int8", 0.1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_weights_give_the_same_logits(shape: str, precision: str, tolerance: float) -> None:
    model, quantized = make(shape), make(shape)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    quantize(quantized, dtype, int8=precision == "int8")
    requests = [Request(random_ids(1, n)[0].tolist(), 3, GREEDY, logprobs=64) for n in (12, 3)]
    for row in Engine(quantized, 2, dtype=dtype).complete(requests):
        for n in range(3):
            expected = logprobs_of(model, row.tokens[: len(row.request.prompt) + n])
            assert (recorded(row, n) - expected).abs().max() < tolerance


def test_int8_in_float32_and_for_many_rows_is_the_same_matmul() -> None:
    linear, x = torch.nn.Linear(64, 48), torch.randn(40, 64)
    quantized, half = (QuantizedLinear(linear, dtype, int8=True) for dtype in (torch.float32, torch.bfloat16))
    weight = quantized.weight.float() * quantized.scale[:, None]
    assert (weight - linear.weight).abs().max() <= linear.weight.abs().max() / 127 / 2 + 1e-6
    torch.testing.assert_close(quantized(x), x @ weight.T + linear.bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half(x[:2]), half(x)[:2], atol=0.02, rtol=0.02)  # two kernels


def test_padded_entries_are_never_drawn() -> None:
    model = make()
    with torch.no_grad():
        model.transformer.wte.weight[61:] *= 100  # the most probable by far, if they were allowed
    rows = Engine(model, 8, vocab_size=61).complete([Request([n], 30, seed=n) for n in range(8)])
    assert max(max(row.new_tokens) for row in rows) < 61


def test_generate_slides_as_the_originals_does_and_torchs_seed_decides(model: GPT) -> None:
    idx = random_ids(2, 3)
    rows = Engine(model, 2, window="slide").complete([Request(prompt, 20, GREEDY) for prompt in idx.tolist()])
    model.train()
    assert model.generate(idx, 20, temperature=0.0).tolist() == [row.tokens for row in rows]
    assert model.training
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(model.generate(idx[:1].repeat(4, 1), 20).tolist())
    assert samples[0] == samples[1] != samples[2]
    assert len(set(map(tuple, samples[0]))) == 4


def test_a_broken_network_is_an_error() -> None:
    model = make()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    for sampling in (Sampling(), GREEDY, Sampling(top_k=5)):
        engine = Engine(model, 1)
        [row] = engine.complete([Request([1], 1, sampling)])
        assert (row.end, row.new_tokens, engine.rows) == ("error", [], [])
    with pytest.raises(FloatingPointError, match="not a number"):
        model.generate(random_ids(1, 3), 2)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0, "top_k": 5, "top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 1e9}, [0, 1, 2, 3, 4]),
        ({"temperature": 1e-45}, [2]),
        ({"top_k": 2}, [2, 4]),
        ({"top_k": 1}, [2]),
        ({"top_p": 0.47}, [2, 4]),
        ({"min_p": 0.3}, [1, 2, 4]),  # exp(-1) of the most probable one, and exp(-2)
        ({"top_k": 3, "top_p": 0.6}, [2, 4]),  # of what top_k leaves, the most probable one has 0.51
        ({"top_k": 3, "min_p": 0.5}, [2, 4]),
        ({"top_p": 0.47, "temperature": 0.3}, [2]),  # after the temperature
    ],
)
def test_what_is_drawn_and_how_often(settings: dict[str, Any], kept: list[int]) -> None:
    """The ids in `kept`, each as often as the distribution says."""
    ids = draw(LOGITS.repeat(20_000, 1), [Sampling(**settings)] * 20_000, [n / 20_000 for n in range(20_000)])
    found = torch.bincount(torch.tensor(ids), minlength=len(LOGITS)) / 20_000
    assert found.nonzero().flatten().tolist() == kept
    expected = (LOGITS.double() / settings.get("temperature", 1.0)).softmax(0)[kept]
    assert (found[kept] - expected / expected.sum()).abs().max() < 0.015


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.7, 2), (0.75, 3), (0.9, 3), (0.95, 4)])
def test_top_p_takes_no_token_more_where_it_is_reached_exactly(top_p: float, kept: int) -> None:
    """The fewest tokens that reach it, as in transformers, in spite of rounding."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().repeat(1000, 1)
    ids = draw(logits, [Sampling(top_p=top_p)] * 1000, [n / 1000 for n in range(1000)])
    assert {token for token in ids if isinstance(token, int)} == set(range(kept))
