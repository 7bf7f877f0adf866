import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from nanogpt.engine import Sampling, draw

LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5])


def drawn(times: int = 20_000, logits: torch.Tensor = LOGITS, **settings: Any) -> torch.Tensor:
    """How often each entry comes, as a share."""
    stream = random.Random(0)
    ids = draw(logits.repeat(times, 1), [Sampling(**settings)] * times, [stream] * times)
    return torch.bincount(torch.tensor(ids), minlength=len(logits)) / times


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert draw(logits, [Sampling(temperature=0)] * 2, [random.Random(0)] * 2) == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_are_those_of_the_distribution(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    assert (drawn(temperature=temperature) - expected).abs().max() < 0.015
    assert (drawn(temperature=temperature, top_k=99) - expected).abs().max() < 0.015
    assert (drawn(temperature=temperature, top_p=1.0, top_k=5) - expected).abs().max() < 0.015


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [2, 4]),
        ({"top_k": 1}, [2]),
        ({"top_p": 0.4}, [2]),  # which alone has 0.46
        ({"top_p": 0.47}, [2, 4]),
        ({"top_p": 1e-9}, [2]),
        ({"min_p": 0.3}, [1, 2, 4]),  # exp(-1) of the likeliest, and exp(-2)
        ({"min_p": 1.0}, [2]),
        ({"top_k": 3, "top_p": 0.6}, [2, 4]),  # of what top_k leaves, the likeliest has 0.51
        ({"top_k": 3, "min_p": 0.5}, [2, 4]),
        ({"top_p": 0.47, "temperature": 0.3}, [2]),  # after the temperature
    ],
)
def test_what_is_drawn_from(settings: dict[str, Any], kept: list[int]) -> None:
    shares = drawn(**settings)
    assert shares.nonzero().flatten().tolist() == kept
    expected = (LOGITS / settings.get("temperature", 1.0)).softmax(0)[kept]
    assert (shares[kept] - expected / expected.sum()).abs().max() < 0.015


def test_a_rows_draw_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 100)
    kinds = [Sampling(), Sampling(0.0), Sampling(0.7, 5), Sampling(1.0, 0, 0.8), Sampling(1.0, 60, 0.9, 0.01)]
    settings = [replace(kinds[n % 5], min_p=0.05 * (n % 3)) for n in range(40)]
    together = draw(logits, settings, [random.Random(n) for n in range(40)])
    alone = [draw(logits[[n]], [settings[n]], [random.Random(n)])[0] for n in range(40)]
    assert together == alone


def test_any_temperature_above_zero_draws_something() -> None:
    logits = torch.tensor([500.0, 400.0, -300.0])
    for temperature in (1e-45, 1e-9, 1e9):
        assert drawn(10, logits, temperature=temperature).sum() == 1
    assert drawn(10, logits, temperature=1e-9)[0] == 1
