import math

import pytest
import torch

from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.model import GPT
from nanogpt.optim import adamw, learning_rate_at


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8))
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.1)
    decayed, spared = (group["params"] for group in optimizer.param_groups)
    assert {id(p) for p in decayed}.isdisjoint(id(p) for p in spared)
    assert len(decayed) + len(spared) == len(list(model.parameters()))
    assert all(p.dim() >= 2 for p in decayed)
    assert all(p.dim() < 2 for p in spared)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_the_fused_update_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=8))
    reference = GPT(ours.config)
    reference.load_state_dict(ours.state_dict())
    plain = torch.optim.AdamW(
        [{"params": [p for p in reference.parameters() if p.dim() >= 2], "weight_decay": 0.1},
         {"params": [p for p in reference.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), fused=False, foreach=False,
    )  # fmt: skip
    fused = adamw(ours, 1e-2, (0.9, 0.95), 0.1)
    for _ in range(3):
        for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        fused.step()
        plain.step()
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_schedule_warms_up_decays_and_rests() -> None:
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)
    rates = [learning_rate_at(step, config) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)  # never zero: the first update counts
    assert rates[8] == pytest.approx(0.9)
    assert rates[9] == 1.0
    assert rates[59] == pytest.approx(0.55)  # half-way between peak and floor
    assert rates[34] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates[109:] == [0.1] * 91
    assert rates[9:110] == sorted(rates[9:110], reverse=True)


def test_without_decay_the_rate_is_constant() -> None:
    config = TrainConfig(learning_rate=1.0, decay_lr=False, warmup_iters=9)
    assert {learning_rate_at(step, config) for step in range(20)} == {1.0}


def test_a_warm_up_longer_than_the_run_is_no_crash() -> None:
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=100, lr_decay_iters=10)
    assert learning_rate_at(50, config) == pytest.approx(51 / 101)
    assert learning_rate_at(100, config) == 0.1
