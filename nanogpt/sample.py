"""The program behind `sample.py`, and what lies between text and the engine: prompts, streamed text, stop strings."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from nanogpt.checkpoint import load_trained
from nanogpt.device import choose_device
from nanogpt.engine import NOT_FINITE, Engine, Request, Row, Sampling, quantize
from nanogpt.errors import ConfigError, DataError
from nanogpt.model import GPT
from nanogpt.settings import SampleConfig
from nanogpt.tokenizer import BPETokenizer, TextDecoder, Tokenizer, unescape

log = logging.getLogger(__name__)

SEPARATOR = "---------------"


def sample(config: SampleConfig) -> None:
    """Print `num_samples` completions of the prompt, each followed by a separator line.

    All are drawn in one batch; the first is printed while it grows, the others when all are complete.
    """
    device = choose_device(replace(config, compile=False))
    trained = load_trained(config, device)
    model, tokenizer = trained.model, trained.tokenizer
    prompt = prompt_ids(read_prompt(config.start), tokenizer)
    if len(prompt) > (most := model.config.block_size):
        raise ConfigError(
            f"the prompt has {len(prompt):,} tokens and the model sees {most:,} at a time; shorten --start"
        )
    log.info(f"{trained.name}, {model.get_num_params() / 1e6:.2f}M parameters")
    count = config.num_samples if config.temperature else 1  # Greedy samples are all the same.
    quantize(model, device.dtype, int8=config.int8)
    engine = Engine(model, count, length=len(prompt) + config.max_new_tokens, vocab_size=tokenizer.vocab_size,
                    dtype=device.dtype, window=config.window, static=config.cuda_graph)  # fmt: skip
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p)
    ends = tokenizer.end_tokens if config.stop_at_eos else frozenset()
    logprobs = config.logprobs if config.logprobs >= 0 else None
    rows = engine.add(
        [Request(prompt, config.max_new_tokens, sampling, config.seed + n, ends, logprobs) for n in range(count)]
    )
    stop = [unescape(text) for text in config.stop]
    streams = {row: TextStream(tokenizer, prompt, stop) for row in rows}
    texts = {row: "".join(stream.prompt_texts) for row, stream in streams.items()}
    print(texts[rows[0]], end="", flush=True)
    while engine.rows:
        for row in engine.step():
            if row.end == "error":
                raise DataError(f"{trained.name}: {NOT_FINITE}")
            piece = follow(engine, row, streams[row])
            texts[row] += piece
            if row is rows[0]:
                print(piece, end="", flush=True)
    for row in rows:
        print(f"{texts[row] if row is not rows[0] else ''}\n{SEPARATOR}")
        # Each new token with its logprob, and the top-k ids in its place with theirs.
        for token, (logprob, top) in zip(row.new_tokens, row.logprobs, strict=False):
            others = "".join(f"   {names_of(tokenizer)[other]!r} {each:.3f}" for other, each in top)
            print(f"{logprob:8.3f} {names_of(tokenizer)[token]!r:16}{others}")
        if logprobs is not None:
            print(SEPARATOR)


@lru_cache
def names_of(tokenizer: Tokenizer) -> list[str]:
    r"""Return a name of its own for each id: its text, with its spaces, or else its bytes, like `bytes:\xe2`.

    Bytes name a part of a character, and a token whose text is another's: in SentencePiece's vocabularies `<0x41>`,
    where there is also an `A`.
    """

    def is_byte(token: int) -> bool:
        return isinstance(tokenizer, BPETokenizer) and bool(
            re.fullmatch("<0x..>", tokenizer.engine.id_to_token(token) or "")
        )

    ids: dict[str, int] = {}
    for token in sorted(range(tokenizer.vocab_size), key=is_byte):  # The others come first.
        content = tokenizer.decode_bytes([token])
        text, by_bytes = content.decode(errors="ignore"), "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
        names = [text] * (text.encode() == content) + [by_bytes, f"{by_bytes}#{token}"]
        ids[next(name for name in names if name not in ids)] = token
    return sorted(ids, key=ids.__getitem__)


class TextStream:
    """Text of the tokens that follow a prompt, piece by piece, up to a stop string.

    A character whose bytes span several tokens comes when it is complete, and what may be the beginning of a stop
    string when it has turned out not to be one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False  # whether a stop string has come; neither it nor what follows is part of the text
        self._held = ""
        self._decoder = TextDecoder(tokenizer)
        starts = tokenizer.adds_bos and list(prompt[:1]) == [tokenizer.bos]  # A start token is no text.
        self.prompt_texts = [""] * starts + [self._decoder.decode([token]) for token in prompt[starts:]]
        self.length = sum(map(len, self.prompt_texts))  # characters so far, with the prompt's and those held back

    def push(self, tokens: Sequence[int], final: bool = False) -> str:
        """Return the text that is certain after these tokens; with `final`, all that is left."""
        text = self._decoder.decode(tokens, final)
        self.length += len(text)
        self._held += text
        places = [place for each in self.stop if (place := self._held.find(each)) >= 0]
        self.stopped = bool(places)
        if not places and not final:  # Hold back what may be the beginning of a stop string.
            rests = ((n, self._held[n:]) for n in range(len(self._held)))
            places = [n for n, rest in rests if any(each.startswith(rest) for each in self.stop)]
        certain = min(places, default=len(self._held))
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece


def follow(engine: Engine, row: Row, stream: TextStream) -> str:
    """Return the text that the engine's latest step has made certain; end the row where a stop string is complete."""
    # An end token is not part of the text, and after an error there is no token.
    piece = stream.push([] if row.end in ("stop", "error") else row.tokens[-1:], final=bool(row.end))
    if stream.stopped:
        if not row.end:
            engine.finish(row)
        row.end = "stop"
    return piece


def read_prompt(text: str) -> str:
    """Return the text of a setting, or of the file that it names as FILE:PATH."""
    return Path(text.removeprefix("FILE:")).read_text("utf-8-sig", "replace") if text.startswith("FILE:") else text


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt, at least one, behind a start token where the model's tokenizer adds one.

    An empty prompt begins a new document, or else a new line. Raises `DataError` for what the vocabulary lacks.
    """
    start = [tokenizer.bos] if tokenizer.adds_bos and tokenizer.bos is not None else []
    if not text and (start or tokenizer.end_of_text is not None):
        return start or [tokenizer.end_of_text or 0]
    try:
        ids = tokenizer.encode_prompt(text or "\n")
    except DataError:
        if text not in ("", "\n"):
            raise
        return [0]  # a character vocabulary of text without line breaks
    if (largest := max(ids, default=0)) >= tokenizer.vocab_size:
        raise DataError(f"the prompt has token {largest}, but the model knows {tokenizer.vocab_size}")
    return ids if ids[:1] == start else start + ids


def short_sample(model: GPT, tokenizer: Tokenizer, tokens: int) -> str:
    """Return what a model writes by itself, always from the same seed, for a look at it during training."""
    ends, sampling = tokenizer.end_tokens, Sampling(temperature=0.8, top_k=200)
    engine = Engine(model, 1, vocab_size=tokenizer.vocab_size)
    [row] = engine.complete([Request(prompt_ids("", tokenizer), tokens, sampling, stop=ends)])
    return tokenizer.decode([token for token in row.new_tokens if token not in ends]).strip("\n")
