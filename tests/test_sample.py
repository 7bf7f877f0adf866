import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from nanogpt import gguf, train
from nanogpt import sample as module
from nanogpt.checkpoint import TrainedModel, load_model, load_trained
from nanogpt.cli import parse
from nanogpt.config import GPTConfig
from nanogpt.device import choose_device
from nanogpt.errors import ConfigError, DataError
from nanogpt.export import export
from nanogpt.model import GPT
from nanogpt.sample import SEPARATOR, TextStream, prompt_ids, sample
from nanogpt.settings import ExportConfig, SampleConfig
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, from_description, make_tokenizer, read_tokenizer
from tests.conftest import Recipe, write_dataset, write_llama

Run = Callable[..., list[str]]


@pytest.fixture
def run(trained: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(start="the")`: the samples that the program prints."""

    def samples(**settings: Any) -> list[str]:
        capsys.readouterr()
        defaults = {"out_dir": str(trained), "device": "cpu", "num_samples": 3, "max_new_tokens": 40}
        sample(SampleConfig(**{**defaults, **settings}))
        text = capsys.readouterr().out.split("parameters\n", 1)[1]
        return text.removesuffix(f"\n{SEPARATOR}\n").split(f"\n{SEPARATOR}\n")

    return samples


def test_samples_continue_the_prompt(run: Run) -> None:
    for precision in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"int8": True}):
        samples = run(start="the q", **precision)
        assert [len(text) for text in samples] == [45] * 3
        assert all(text.startswith("the q") for text in samples)
        assert len(set(samples)) > 1
    for encoding in ("utf-8", "utf-8-sig"):
        Path("prompt.txt").write_text("jumps over\n", encoding=encoding)
        assert run(start="FILE:prompt.txt", max_new_tokens=0) == ["jumps over\n"] * 3


def test_the_seed_decides_and_greedy_needs_none(run: Run) -> None:
    assert run(seed=3) == run(seed=3) != run(seed=4)
    greedy = run(seed=3, temperature=0)
    assert greedy == run(seed=4, temperature=0)
    assert len(greedy) == 1
    assert run(temperature=0, window="slide", max_new_tokens=12) == run(temperature=0, max_new_tokens=12)


def test_it_needs_no_data_and_no_particular_folder(run: Run, trained: Path) -> None:
    expected = run()
    trained.rename("moved")
    Path("data").rename("away")
    assert run(out_dir="moved") == expected


def test_an_impossible_prompt_is_one_message(run: Run) -> None:
    with pytest.raises(DataError, match=r"lacks 'é' \(U\+00E9\)"):
        run(start="thé")
    with pytest.raises(ConfigError, match="the prompt has 17 tokens and the model sees 16 at a time"):
        run(start="the quick brown f")


def test_the_empty_prompt() -> None:
    assert prompt_ids("", ByteTokenizer()) == prompt_ids("<|endoftext|>", ByteTokenizer()) == [256]
    assert prompt_ids("\n", ByteTokenizer()) == [10]
    assert prompt_ids("", CharTokenizer("\na")) == prompt_ids("\n", CharTokenizer("ab")) == [0]


def test_stop_strings_end_a_sample(run: Run) -> None:
    ended = run(start="the", seed=5, stop=["qqq", "o"])
    assert ended == ["the" + text[3:].split("o")[0] for text in run(start="the", seed=5)]


def test_the_end_of_a_text_ends_a_sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8)).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()  # every byte is as probable, and so is the end
    monkeypatch.setattr(module, "load_trained", lambda *_: TrainedModel(model, ByteTokenizer(), "m"))

    def samples(*words: str) -> list[str]:
        words = ("--device=cpu", "--dtype=float32", "--start=a", "--max_new_tokens=1500", "--top_k=0", *words)
        sample(parse(SampleConfig, [*words, "--num_samples=3"], ""))
        return capsys.readouterr().out.split("parameters\n", 1)[1].split(f"\n{SEPARATOR}\n")[:3]

    whole, ended = samples("--stop_at_eos=False"), samples()
    assert [text.split("<|endoftext|>")[0] for text in whole] == ended == samples("--stop_at_eos")
    assert all("<|endoftext|>" in text for text in whole)


def test_logprobs_are_listed(run: Run) -> None:
    lines = run(num_samples=1, start="the", max_new_tokens=6, logprobs=2)[1].splitlines()
    assert len(lines) == 6
    assert all(re.fullmatch(r" +-?\d\.\d{3} '.+' +( +'.+' -?\d\.\d{3}){2}", line) for line in lines)


def streamed(tokenizer: Tokenizer, ids: Iterable[int], stop: Sequence[str] = (), prompt: str = "") -> list[str]:
    """What a stream gives for each id, and at the end."""
    stream = TextStream(tokenizer, list(prompt.encode()), stop)
    return [*(stream.push([token]) for token in ids), stream.push([], final=True)]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("aaab", ["aab"], "a"),
        ("abab", ["abc"], "abab"),  # a beginning that never became one
        ("one two", ["two", "one t"], ""),
        ("one, two", ["wo", "two"], "one, "),  # the one that begins first, though both are there at once
        ("x€y€z", ["y€"], "x€"),
    ],
)
def test_a_text_ends_before_its_stop_string(text: str, stop: list[str], expected: str) -> None:
    assert "".join(streamed(ByteTokenizer(), text.encode(), stop)) == expected


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    assert streamed(ByteTokenizer(), b"ab\nc\n\nd", ["\n\n"]) == ["a", "b", "", "\nc", "", "", "", ""]
    assert streamed(ByteTokenizer(), "€".encode()) == ["", "", "€", ""]  # three bytes
    assert streamed(ByteTokenizer(), b"\nb", ["\n\n"], prompt="a\n") == ["", "\nb", ""]  # without the prompt


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<0xE2>", "<0x82>", "<0xAC>", "e"], ["", "", "€", "e", ""]),
        (["<0xE2>", "<0x82>", "▁is"], ["", "", "\ufffd is", ""]),
        (["<0xFF>", "▁is", "<0xE2>", "<0xE2>", "e"], ["\ufffd", " is", "", "\ufffd", "\ufffde", ""]),
        (["▁Hello", "<0xE2>", "<0x82>"], ["Hello", "", "", "\ufffd"]),  # cut off at the end
        (["<s>", "▁Hello"], ["<s>", " Hello", ""]),
        # Here SentencePiece keeps the character, and transformers does not.
        (["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "e"], ["", "", "€", "\ufffd", "e", ""]),
    ],
)
def test_sentencepieces_bytes_and_spaces(tokens: list[str], expected: list[str], tmp_path: Path) -> None:
    ids_of = write_llama(tmp_path, starts=False)
    tokenizer, ids = read_tokenizer(tmp_path), [ids_of.get(token, 0) for token in tokens]
    assert streamed(tokenizer, ids) == expected
    assert "".join(expected) == tokenizer.decode(ids)
    if "€\ufffd" not in "".join(expected):
        theirs = AutoTokenizer.from_pretrained(tmp_path).decode(ids)  # with one U+FFFD for each byte
        assert re.sub("\ufffd+", "\ufffd", tokenizer.decode(ids)) == re.sub("\ufffd+", "\ufffd", theirs)
    for n in range(len(ids)):  # whatever of it is the prompt
        stream = TextStream(tokenizer, ids[:n])
        texts = [*stream.prompt_texts, *(stream.push([token]) for token in ids[n:]), stream.push([], final=True)]
        assert texts == expected


@pytest.mark.parametrize("kind", ["llama 2", "llama 3", "qwen"])
def test_prompts_begin_as_transformers_begins_them(kind: str, tmp_path: Path) -> None:
    write_llama(tmp_path, starts=kind == "llama 2")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if kind == "llama 3":
        template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        theirs.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
        theirs.save_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path)
    for tokenizer in (ours, from_description(ours.describe())):
        for text in ("Hello world", "x", "</s>Hello") + (("",) if kind != "qwen" else ()):
            assert prompt_ids(text, tokenizer) == theirs(text).input_ids
    assert prompt_ids("<s>Hello", ours).count(1) == 1  # not twice
    assert not make_tokenizer(str(tmp_path), "", []).adds_bos  # of a data set
    lengths = {}
    for setting in ("auto", "True", "False"):
        config = parse(SampleConfig, [f"--init_from={tmp_path}", f"--add_bos={setting}", "--device=cpu"], "")
        lengths[setting] = len(prompt_ids("x", load_trained(config, choose_device(config)).tokenizer))
    assert lengths == {"auto": 2 if kind == "qwen" else 3, "True": 3, "False": 2}
    export(ExportConfig(init_from=str(tmp_path), output="exported"))
    assert AutoTokenizer.from_pretrained("exported")("Hello").input_ids == theirs("Hello").input_ids


@pytest.mark.parametrize(
    ("model", "said", "adds"),
    [("llama", None, True), ("llama", False, False), ("gpt2", None, False), ("gpt2", True, True)],
)
def test_a_gguf_says_whether_prompts_have_a_start_token(model: str, said: bool | None, adds: bool) -> None:
    about = {"model": model, "pre": "qwen2", "tokens": ["<s>", "a", "b"], "token_type": [3, 1, 1], "merges": [],
             "scores": [0.0] * 3, "bos_token_id": 0} | ({} if said is None else {"add_bos_token": said})  # fmt: skip
    keys = {f"tokenizer.ggml.{name}": value for name, value in about.items()}
    tokenizer = gguf.tokenizer_of_keys({"general.architecture": "llama", **keys})
    assert (tokenizer.adds_bos, tokenizer.bos) == (adds, 0)


def test_a_start_token_stays_with_the_model_that_knows_it(recipe: Recipe, data_dir: Path) -> None:
    write_llama(Path("llama"))
    tokenizer = make_tokenizer("llama", "", [])
    ids = tokenizer.encode("Hello world is true " * 20)
    write_dataset(data_dir / "words", tokenizer, ids, ids)
    for init_from, adds in (("llama", True), ("resume", True), ("scratch", False)):
        config = recipe(dataset="words", max_iters=1 + (init_from == "resume"), init_from=init_from)
        train.train(config)
        assert load_model(config.out_dir).tokenizer.adds_bos == adds
