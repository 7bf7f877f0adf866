"""The order of the data, whoever reads it."""

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt import start, train
from nanogpt.config import TrainConfig
from nanogpt.data import open_dataset
from nanogpt.device import Device
from nanogpt.distributed import World
from nanogpt.errors import ConfigError
from nanogpt.evaluate import evaluate
from nanogpt.model import GPT
from nanogpt.prepare import prepare
from nanogpt.programs import EvalConfig, PrepareConfig
from nanogpt.report.metrics import read_metrics
from nanogpt.start import loader
from nanogpt.tokenizer import GPT2Tokenizer
from tests.conftest import write_dataset

Recipe = Callable[..., TrainConfig]
CPU = Device("cpu", "cpu", torch.float32, False)


@pytest.fixture
def documents(data_dir: Path) -> Path:
    """A data set `documents` of many short texts, byte by byte."""
    lines = (f"{n} times {n} is {n * n}" for n in range(400))
    Path("x.txt").write_text("\n\n".join(lines))
    prepare(
        PrepareConfig(name="documents", data_dir=str(data_dir), input=["x.txt"], separator=r"\n\n", tokenizer="byte")
    )
    return data_dir / "documents"


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_the_global_batch_is_the_same_for_any_number_of_processes(recipe: Recipe, sampling: str) -> None:
    config = recipe(gradient_accumulation_steps=8, batch_size=3, sampling=sampling)
    dataset = open_dataset(Path(config.data_dir, "tiny"))
    shape = config.model_config(dataset.tokenizer.vocab_size)

    def global_batch(step: int, size: int) -> torch.Tensor:
        worlds = [World(rank, rank, size) for rank in range(size)]
        return torch.cat([loader(config, dataset, shape, CPU, world)(step) for world in worlds])

    for step in (0, 1, 57, 10**6):
        one = global_batch(step, 1)
        assert one.shape == (24, config.block_size + 1)
        assert torch.equal(one, global_batch(step, 2))
        assert torch.equal(one, global_batch(step, 8))


def test_processes_that_write_together_wait_as_long_as_others(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(dist_timeout=4)
    dataset = open_dataset(Path(config.data_dir, "tiny"))
    monkeypatch.setattr(start, "choose_parallel", lambda *_: "fsdp")
    monkeypatch.setattr(start, "wrap", lambda model, *_: model)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend, timeout: (backend, timeout))
    model = GPT(config.model_config(dataset.tokenizer.vocab_size))
    assert start.assemble(config, CPU, World(), dataset, model).shards == ("gloo", timedelta(minutes=4))


def test_an_epoch_reads_everything_once(recipe: Recipe, data_dir: Path) -> None:
    write_dataset(data_dir / "numbers", GPT2Tokenizer(), np.arange(1601), np.arange(20))
    config = recipe(sampling="epoch", dataset="numbers")
    rows_of = loader(config, open_dataset(data_dir / "numbers"), config.model_config(50304), CPU, World())
    first = torch.cat([rows_of(step) for step in range(25)])  # 100 windows of 16
    assert sorted(first[:, 0].tolist()) == list(range(0, 1600, 16))
    assert first[:, 0].tolist() != sorted(first[:, 0].tolist())
    second = torch.cat([rows_of(step) for step in range(25, 50)])
    assert sorted(second[:, 0].tolist()) == sorted(first[:, 0].tolist())
    assert second[:, 0].tolist() != first[:, 0].tolist()


@pytest.mark.parametrize("settings", [{"sampling": "epoch"}, {"sampling": "epoch", "mask_documents": True}])
def test_a_resumed_run_equals_the_undisturbed_one(
    recipe: Recipe, documents: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    settings |= {"dataset": "documents", "dropout": 0.1, "gradient_accumulation_steps": 2, "eval_interval": 3}
    whole, parts = recipe(**settings), recipe(**settings, out_dir=str(tmp_path / "parts"))
    train.train(whole)
    train.train(recipe(**{**vars(parts), "max_iters": 3}))
    train.train(recipe(**{**vars(parts), "init_from": "resume"}))
    rows = [
        {(row["step"], key): row[key] for row in read_metrics(Path(out_dir, "metrics.jsonl"))
         for key in ("train/loss", "val/loss") if key in row}
        for out_dir in (whole.out_dir, parts.out_dir)
    ]  # fmt: skip
    assert rows[0] == rows[1]


def test_documents_apart_train_evaluate_and_say_bits_per_byte(
    recipe: Recipe, documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for masked in (False, True):
        config = recipe(dataset="documents", mask_documents=masked, max_iters=30, lr_decay_iters=30, block_size=64)
        assert train.train(config) == 0
        losses[masked] = evaluate(EvalConfig(out_dir=config.out_dir, device="cpu", dtype="float32"))["loss"]
    assert losses[True] != losses[False]
    out = capsys.readouterr().out
    dataset = open_dataset(documents)
    expected = losses[True] * (len(dataset.val) - 1) / 0.6931471805599453 / dataset.description["bytes"]["val"]
    assert re.search(rf"loss +bits per byte +{expected:.4f}", out)


def test_characters_know_no_documents(recipe: Recipe) -> None:
    with pytest.raises(
        ConfigError, match=r"mask_documents: the char tokenizer .* of data set tiny has no token that ends"
    ):
        train.train(recipe(mask_documents=True))


def test_a_model_of_another_program_is_not_written_over(recipe: Recipe) -> None:
    config = recipe(max_iters=1)
    folder = Path(config.out_dir)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"config\.json belongs to no run, and would be overwritten"):
        train.train(config)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == '{"model_type": "gpt2"}'
    (folder / "config.json").unlink()
    assert train.train(config) == 0
    (folder / "config.json").write_text("damaged")
    assert train.train(recipe(max_iters=2, init_from="resume")) == 0
