import math

import pytest
import torch

from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.model import GPT
from nanogpt.optim import Muon, learning_rate_at, make_optimizer, newton_schulz, orthogonalize


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8))
    optimizer = make_optimizer(model, TrainConfig(), torch.float32)
    decayed, spared = (group["params"] for group in optimizer.param_groups)
    assert sorted(map(id, decayed + spared)) == sorted(map(id, model.parameters()))
    assert [p.dim() >= 2 for p in decayed + spared] == [True] * len(decayed) + [False] * len(spared)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def muon(model: GPT, dtype: torch.dtype = torch.float32) -> Muon:
    return Muon(model, TrainConfig(learning_rate=1e-3, muon_lr=0.02, muon_momentum=0.95), dtype)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("tied_head", [True, False])
def test_muon_steps_the_matrices_of_the_blocks_and_nothing_else(architecture: str, tied_head: bool) -> None:
    shape = {"n_kv_head": 1, "architecture": architecture, "tied_head": tied_head} if architecture != "gpt2" else {}
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8, **shape))  # type: ignore[arg-type]
    groups = muon(model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    listed = [[names[id(p)] for p in group["params"]] for group in groups]
    assert sorted(name for group in listed for name in group) == sorted(names.values())  # each exactly once
    hidden = {name for group in listed[2:] for name in group}
    assert hidden == {name for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    assert all("ln" in name or "norm" in name or "bias" in name for name in listed[1])
    for group in groups[2:]:
        assert {sum(group["cuts"])} == {p.shape[0] for p in group["params"]}


def test_muon_does_what_that_of_torch_does() -> None:
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=3, n_head=2, n_embd=16))
    reference = GPT(ours.config)
    reference.load_state_dict(ours.state_dict())
    names = [name for name, _ in ours.named_parameters() if name.endswith(("c_proj.weight", "c_fc.weight"))]
    weights = [reference.get_parameter(name) for name in names]
    mine, theirs = muon(ours, torch.bfloat16), torch.optim.Muon(weights, lr=0.02, weight_decay=0.1, momentum=0.95)
    for group in mine.param_groups:
        group["lr"] = 0.02
    for _ in range(4):
        for name, weight in zip(names, weights, strict=True):
            weight.grad = torch.randn_like(weight)
            ours.get_parameter(name).grad = weight.grad.clone()
        mine.step()
        theirs.step()
    for name, weight in zip(names, weights, strict=True):  # updates of 0.02 / 4 per number, in bfloat16
        torch.testing.assert_close(ours.get_parameter(name), weight, atol=4e-4, rtol=0)


def test_maps_that_share_a_tensor_are_orthogonalize_one_by_one() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 24, 8)
    whole = orthogonalize(stack, [8, 8, 8])
    unequal = orthogonalize(stack, [16, 4, 4])
    torch.testing.assert_close(whole[:, 8:16], newton_schulz(stack[:, 8:16]))
    torch.testing.assert_close(unequal[:, :16], newton_schulz(stack[:, :16]) * 2**0.5)
    torch.testing.assert_close(unequal[:, 20:], newton_schulz(stack[:, 20:]))


def test_the_schedule_warms_up_decays_and_rests() -> None:
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)
    rates = [learning_rate_at(step, config) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)  # never zero: the first step counts
    assert rates[8] == pytest.approx(0.9)
    assert rates[9] == 1.0
    assert rates[59] == pytest.approx(0.55)  # half-way between peak and floor
    assert rates[34] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates[109:] == [0.1] * 91
    assert rates[9:110] == sorted(rates[9:110], reverse=True)


def test_the_other_schedule_stays_at_the_peak_and_then_decays_in_a_line() -> None:
    config = TrainConfig(
        learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=100, schedule="wsd", decay_share=0.4
    )
    rates = [learning_rate_at(step, config) for step in range(120)]
    assert rates[8] == pytest.approx(0.9)
    assert rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.55)
    assert rates[100:] == [0.1] * 20


def test_without_decay_the_rate_is_constant_and_a_warm_up_beyond_the_end_no_crash() -> None:
    config = TrainConfig(learning_rate=1.0, decay_lr=False, warmup_iters=9)
    assert {learning_rate_at(step, config) for step in range(20)} == {1.0}
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=100, lr_decay_iters=10)
    assert learning_rate_at(50, config) == pytest.approx(51 / 101)
    assert learning_rate_at(100, config) == 0.1
