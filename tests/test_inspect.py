from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanogpt import train
from nanogpt.checkpoint import find_checkpoint, load_checkpoint
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.inspect import inspect, look
from nanogpt.model import GPT
from nanogpt.settings import InspectConfig


def test_a_look_inside(recipe: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    config = recipe(max_iters=2)
    train.train(config)
    capsys.readouterr()
    inspect(InspectConfig(out_dir=config.out_dir, text="the quick fox"))
    out = capsys.readouterr().out
    checkpoint = load_checkpoint(find_checkpoint(config.out_dir, "auto"))
    model, row = checkpoint.build_model(), torch.tensor([checkpoint.tokenizer.encode_prompt("the quick fox")])
    for name, parameter in model.named_parameters():
        [line] = [line for line in out.splitlines() if line.startswith(f"{name} ")]
        shape = " x ".join(map(str, parameter.shape))
        assert line.split(maxsplit=1)[1].split() == f"{shape} {parameter.norm():.3f}".split()
    first, *told = out.partition("loss\n")[2].splitlines()[: row.numel()]
    assert first == "'t'"
    assert told[0].split()[0] == "'h'"
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(row, row)[0][0, :-1], row[0, 1:], reduction="none")
    assert [float(line.split()[-1]) for line in told] == pytest.approx(expected.tolist(), abs=1e-3)
    assert Path(config.out_dir, "attention.png").read_bytes().startswith(b"\x89PNG")
    inspect(InspectConfig(out_dir=config.out_dir, text="the " * 5))
    assert "nats per token over 16 tokens" in capsys.readouterr().out  # 20 are more than the model's context


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_attention_adds_up_and_looks_back_only(architecture: str) -> None:
    config = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=4, n_embd=32, architecture=architecture)  # type: ignore[arg-type]
    if architecture != "gpt2":
        config.n_kv_head = 2
    _, attention = look(GPT(config).eval(), range(10))
    assert [each.shape for each in attention] == [(4, 10, 10)] * 2
    for each in attention:
        torch.testing.assert_close(each.sum(dim=-1), torch.ones(4, 10))
        assert each.triu(1).count_nonzero() == 0
