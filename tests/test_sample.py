from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nanogpt.sample import prompt_ids

from nanogpt import sample as module
from nanogpt import train
from nanogpt.checkpoint import TrainedModel
from nanogpt.cli import parse
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.errors import ConfigError, DataError
from nanogpt.huggingface import save_pretrained
from nanogpt.model import GPT
from nanogpt.sample import SEPARATOR, sample
from nanogpt.settings import SampleConfig
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer


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
    assert len(run(temperature=0)) == 1
    assert len(set(run(temperature=0, window="slide", max_new_tokens=12) + run(temperature=0, max_new_tokens=12))) == 1


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
    assert prompt_ids("", ByteTokenizer()) == [256]
    assert prompt_ids("\n", ByteTokenizer()) == [10]
    assert prompt_ids("", CharTokenizer("\na")) == [0]
    assert prompt_ids("\n", CharTokenizer("ab")) == [0]
    assert prompt_ids("<|endoftext|>", ByteTokenizer()) == [256]


def test_stop_strings_end_a_sample(run: Callable[..., list[str]]) -> None:
    whole = run(start="the", seed=5)
    ended = run(start="the", seed=5, stop=["qqq", "o"])
    assert ended == ["the" + text[3:].split("o")[0] for text in whole]
    assert any(len(text) < 43 for text in ended)


def test_the_end_of_a_text_ends_a_sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8)).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()  # every byte is as likely, and so is the end
    monkeypatch.setattr(module, "load_trained", lambda *_: TrainedModel(model, ByteTokenizer(), "m"))

    def samples(**settings: Any) -> list[str]:
        config = {
            "device": "cpu",
            "dtype": "float32",
            "start": "a",
            "max_new_tokens": 1500,
            "num_samples": 3,
            "top_k": 0,
        }
        sample(SampleConfig(**{**config, **settings}))
        return capsys.readouterr().out.split("parameters\n", 1)[1].split(f"\n{SEPARATOR}\n")[:3]

    whole, ended = samples(ignore_end=True), samples()
    assert [text.split("<|endoftext|>")[0] for text in whole] == ended
    assert all("<|endoftext|>" in text for text in whole)


def test_log_probabilities_are_listed(run: Callable[..., list[str]]) -> None:
    lines = run(num_samples=1, start="the", max_new_tokens=6, logprobs=2)[1].splitlines()
    assert len(lines) == 6
    for line in lines:
        log_p, *rest = line.split()
        assert float(log_p) <= 0
        assert len(rest) in (4, 5, 6, 7)  # a token, and two with their own; some are blanks in quotes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--num_samples=0"], "num_samples=0: expected a value >= 1"),
        (["--max_new_tokens=-3"], "max_new_tokens=-3"),
        (["--temperature=-1"], "temperature=-1"),
        (["--top_p=0"], r"top_p=0\.0: expected a value above 0, up to 1"),
        (["--min_p=1.5"], r"min_p=1\.5: expected a value above 0, up to 1"),
        (["--window=whole"], "--window=whole: expected half, slide"),
    ],
)
def test_settings_that_cannot_work_are_one_message(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(SampleConfig, settings, "")


def test_a_prompt_beyond_the_context_is_one_message(out_dir: str) -> None:
    with pytest.raises(ConfigError, match="the prompt has 17 tokens and the model sees 16 at a time"):
        sample(SampleConfig(out_dir=out_dir, device="cpu", start="the quick brown f"))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_a_folder_in_hugging_faces_format(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = GPTConfig(
        block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16, architecture=kind, bias=kind == "gpt2"
    )  # type: ignore[arg-type]
    save_pretrained(tmp_path, GPT(shape), ByteTokenizer(), torch.float32, "")
    for precision in ("--dtype=float32", "--dtype=bfloat16", "--int8"):
        words = [f"--init_from={tmp_path}", "--device=cpu", precision, "--start=hello", "--max_new_tokens=20"]
        sample(parse(SampleConfig, [*words, "--num_samples=2"], ""))
        text = capsys.readouterr().out
        assert text.count("hello") == 2
        assert text.count(SEPARATOR) == 2
