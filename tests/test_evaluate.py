import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanogpt import train
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.device import Device
from nanogpt.errors import ConfigError, DataError
from nanogpt.evaluate import evaluate, whole_split_loss
from nanogpt.export import export
from nanogpt.model import GPT
from nanogpt.settings import EvalConfig, ExportConfig
from tests.conftest import random_ids

CPU = Device("cpu", "cpu", torch.float32, False)


@pytest.mark.parametrize("n_tokens", [2, 8, 9, 10, 50, 65])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_target_counts_once(n_tokens: int, batch_size: int) -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=61, n_layer=1, n_head=2, n_embd=16))
    tokens = random_ids(n_tokens)
    total = 0.0
    model.eval()
    for start in range(0, n_tokens - 1, 8):  # window by window, plainly
        window = tokens[start : start + 9]
        total += model(window[None, :-1], window[None, 1:])[1].item() * (len(window) - 1)
    model.train()
    loss, count = whole_split_loss(model, tokens.numpy().astype("uint16"), 8, batch_size, CPU)
    assert count == n_tokens - 1
    assert loss == pytest.approx(total / count, abs=1e-5)
    assert model.training


def test_the_program_prints_a_line_of_json(
    recipe: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe()
    train.train(config)
    result = evaluate(EvalConfig(out_dir=config.out_dir, data_dir=config.data_dir, device="cpu", dtype="float32"))
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == result
    assert (result["dataset"], result["split"], result["tokens"], result["block_size"]) == ("tiny", "val", 719, 16)
    assert out[-2].split()[:3] == ["loss", "perplexity", f"{math.exp(result['loss']):.4f}"]


def test_data_dir_is_where_an_originals_checkpoint_has_its_characters(
    recipe: Callable[..., TrainConfig], data_dir: Path
) -> None:
    train.train(recipe(max_iters=1))
    export(ExportConfig(out_dir="out", output="flat.pt", to="flat"))
    data_dir.rename("elsewhere")
    for source in ({"init_from": "flat.pt", "dataset": "tiny"}, {"checkpoint": "flat.pt"}):
        result = evaluate(EvalConfig(**source, data_dir="elsewhere", device="cpu"))  # type: ignore[arg-type]
        assert result["tokens"] == 719


def test_mismatches_are_refused(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    train.train(config)
    common = {"out_dir": config.out_dir, "data_dir": config.data_dir, "device": "cpu"}
    with pytest.raises(ConfigError, match="block_size=17 exceeds the model's 16"):
        evaluate(EvalConfig(**common, block_size=17))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"nowhere holds no train\.bin and val\.bin"):
        evaluate(EvalConfig(**common, dataset="nowhere"))  # type: ignore[arg-type]


def test_an_id_outside_the_vocabulary_is_one_message() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=16))
    with pytest.raises(DataError, match="the data holds token 60, but the vocabulary ends at 9"):
        whole_split_loss(model, torch.tensor([60] * 9).numpy(), 8, 4, CPU)
