"""The fast way to encode gives the ids of the slow one, whatever the text."""

import itertools
import random

import pytest
import regex

from nanogpt import pieces
from nanogpt.pieces import PieceEncoder, piece_starts
from nanogpt.tokenizer import GPT2Tokenizer
from nanogpt.tokenizer_json import train_bpe

GPT2 = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
PARTS = ["a", "Bc", "the", "12", "3", " ", "  ", "\n", "\t", "\r\n", "\v", "'", "'s", "'ll", "'re", "'ve", "'d", "'m",
         "'t", "''", ".", ",!", "_", "\x01", "\x1c", "\x7f",
         "ä", "é", "漢字", "🎉", "’", "Ⅷ", "٣", "<|endoftext|>"]  # fmt: skip
BLANKS = ["\u00a0", "\u3000", "\u2003", "\x85", "\0"]


def texts(seed: int, parts: list[str], count: int = 300) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choices(parts, k=source.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_ascii_are_those_of_the_pattern(seed: int) -> None:
    source = random.Random(seed)
    alphabet = ["".join(map(chr, range(1, 128))), "ab '  \n", "'sdmtlvre", " .a1\n'"][seed % 4]
    for _ in range(300):
        text = "".join(source.choices(alphabet, k=source.randrange(1, 60)))
        text = text.replace("\x1c", "").replace("\x1d", "").replace("\x1e", "").replace("\x1f", "")
        data = text.encode() + b"\0"
        bounds = [*piece_starts(data).tolist(), len(data)]
        found = [data[a:b].decode() for a, b in itertools.pairwise(bounds)]
        assert found == [*GPT2.findall(text), "\0"], text


@pytest.mark.parametrize("seed", range(30))
def test_ids_are_tiktokens(seed: int) -> None:
    tokenizer = GPT2Tokenizer()
    batch = texts(seed, PARTS + (BLANKS if seed % 3 == 0 else []))
    batch += ["", "a\ud800b", "x" * 500, "\n" * 99 + "x", " " * 99, "don't" * 50]
    for _ in range(2):  # unknown, then remembered
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            assert ids.tolist() == tokenizer._encoding.encode_ordinary(text), text


def test_any_code_point_is_encoded_as_by_tiktoken() -> None:
    tokenizer = GPT2Tokenizer()
    points = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]
    batch = [f"a {c}b{c}{c} 1{c}.{c} {c}'s {c}\n{c} x" for c in points[::7]]
    for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
        assert ids.tolist() == tokenizer._encoding.encode_ordinary(text), repr(text)


@pytest.mark.parametrize("seed", range(5))
def test_ids_of_a_trained_vocabulary_are_the_librarys(seed: int) -> None:
    tokenizer = train_bpe(texts(99, PARTS), 400)
    batch = texts(seed, PARTS + BLANKS)
    for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
        assert ids.tolist() == tokenizer.encode(text).tolist(), text


def test_memory_is_bounded_and_forgetting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_REMEMBERED", 500)
    monkeypatch.setattr(pieces, "_SLOTS", 4)  # nearly every slot is fought over
    asked = 0

    def encode(text: str) -> list[int]:
        nonlocal asked
        asked += 1
        return [ord(character) for character in text]

    encoder = PieceEncoder(encode)
    for seed in range(30):
        batch = [f"{seed} {text}" for text in texts(seed, PARTS, count=20)]
        for text, ids in zip(batch, encoder(batch), strict=True):
            assert ids.tolist() == [ord(character) for character in text]
    assert len(encoder._number) <= 500
    assert asked > len(encoder._number)  # some of them again


def test_a_single_batch_with_more_pieces_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_REMEMBERED", 50)
    encoder = PieceEncoder(lambda text: [len(text)])
    text = " ".join(str(n) for n in range(1000))
    [ids] = encoder([text])
    assert ids.tolist() == [len(piece) for piece in GPT2.findall(text)]
