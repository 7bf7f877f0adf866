from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanogpt import train
from nanogpt.config import TrainConfig
from nanogpt.data.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt.errors import ConfigError, DataError
from nanogpt.infer.sample import SEPARATOR, _prompt_ids, sample
from nanogpt.programs import SampleConfig


@pytest.fixture
def out_dir(recipe: Callable[..., TrainConfig]) -> str:
    config = recipe(max_iters=60, lr_decay_iters=60, eval_interval=60, learning_rate=1e-2, min_lr=1e-3)
    train.train(config)
    return config.out_dir


@pytest.fixture
def run(out_dir: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """`run(start="the")`: the samples that the program prints."""

    def samples(**settings: Any) -> list[str]:
        capsys.readouterr()
        sample(
            SampleConfig(**{"out_dir": out_dir, "device": "cpu", "num_samples": 3, "max_new_tokens": 40, **settings})
        )
        text = capsys.readouterr().out.split("parameters\n", 1)[1]
        return text.removesuffix(f"\n{SEPARATOR}\n").split(f"\n{SEPARATOR}\n")

    return samples


def test_samples_continue_the_prompt(run: Callable[..., list[str]]) -> None:
    samples = run(start="the q")
    assert [len(text) for text in samples] == [45] * 3
    assert all(text.startswith("the q") for text in samples)
    assert len(set(samples)) > 1


def test_the_seed_decides_and_greedy_needs_none(run: Callable[..., list[str]]) -> None:
    assert run(seed=3) == run(seed=3)
    assert run(seed=3) != run(seed=4)
    assert run(seed=3, temperature=0) == run(seed=4, temperature=0)
    assert len(set(run(temperature=0))) == 1


def test_a_prompt_from_a_file(run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("jumps over\n")
    assert run(start="FILE:prompt.txt", max_new_tokens=0) == ["jumps over\n"] * 3


def test_it_needs_no_data_and_no_particular_folder(
    run: Callable[..., list[str]], out_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path(out_dir).rename(elsewhere / "moved")
    monkeypatch.chdir(elsewhere)
    assert run(out_dir="moved") == expected


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ("thé", DataError, r"lacks 'é' \(U\+00E9\)"),
        ("FILE:missing.txt", ConfigError, "cannot read the prompt"),
        ("<|endoftext|>", DataError, "lacks '<'"),
    ],
)
def test_an_impossible_prompt_is_one_message(out_dir: str, start: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(SampleConfig(out_dir=out_dir, device="cpu", start=start))


def test_the_empty_prompt() -> None:
    assert _prompt_ids("", ByteTokenizer()) == [256]
    assert _prompt_ids("\n", ByteTokenizer()) == [10]
    assert _prompt_ids("", CharTokenizer("\na")) == [0]
    assert _prompt_ids("\n", CharTokenizer("ab")) == [0]
    assert _prompt_ids("<|endoftext|>", ByteTokenizer()) == [256]
