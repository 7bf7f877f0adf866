import pytest
import torch

from nanogpt.config import GPTConfig
from nanogpt.infer.engine import next_token, stream
from nanogpt.model import GPT
from tests.conftest import random_ids


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=12, vocab_size=64, n_layer=2, n_head=2, n_embd=32)).eval()


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert next_token(logits, 0.0, 200, None).tolist() == [[1], [0]]


def test_top_k_draws_from_the_k_likeliest_in_their_proportions() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(20_000, 1)
    drawn = next_token(logits, 0.5, 2, torch.Generator().manual_seed(0)).flatten()
    assert set(drawn.tolist()) == {1, 2}
    expected = torch.tensor([2.0, 4.0]).softmax(0)[1].item()  # logits 1 and 2 at temperature 0.5
    assert (drawn == 2).float().mean().item() == pytest.approx(expected, abs=0.02)


def test_any_temperature_above_zero_draws_something() -> None:
    logits = torch.tensor([[500.0, 400.0, -300.0]])
    for temperature in (1e-45, 1e-9, 1e9):
        assert next_token(logits, temperature, None, None).item() in (0, 1, 2)
    assert next_token(logits, 1e-9, None, None).item() == 0


@pytest.mark.parametrize("top_k", [None, 0, 4, 99])
def test_top_k_of_everything_is_no_restriction(top_k: int | None) -> None:
    logits = torch.zeros(4000, 4)
    assert set(next_token(logits, 1.0, top_k, None).flatten().tolist()) == {0, 1, 2, 3}


def test_padded_entries_are_never_drawn(model: GPT) -> None:
    with torch.no_grad():
        model.transformer.wte.weight[61:] *= 100  # the likeliest by far, if they were allowed
    tokens = torch.cat(list(stream(model, random_ids(8, 4), 30, vocab_size=61)), dim=1)
    assert tokens.shape == (8, 30)
    assert tokens.max() < 61


def test_greedy_decoding_is_the_model_asked_again_and_again(model: GPT) -> None:
    idx = random_ids(1, 3)
    expected = idx
    for _ in range(20):  # past the block size: the window slides
        expected = torch.cat([expected, model(expected[:, -12:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(idx, 20, temperature=0.0), expected)


def test_the_seed_decides(model: GPT) -> None:
    def draw(seed: int) -> list[int]:
        tokens = stream(model, random_ids(1, 3), 20, generator=torch.Generator().manual_seed(seed))
        return torch.cat(list(tokens)).flatten().tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_an_empty_prompt_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        next(stream(model, torch.zeros(1, 0, dtype=torch.long), 1))
