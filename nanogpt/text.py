"""From a prompt to token ids, and from those to text while they come."""

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from nanogpt.engine import Engine, Request, Row
from nanogpt.errors import ConfigError, DataError
from nanogpt.model import GPT
from nanogpt.sampling import Sampling
from nanogpt.tokenizer import Tokenizer


class TextStream:
    """The text of the tokens that follow a prompt, piece by piece, up to a stop string.

    A character whose bytes span several tokens appears when it is complete, and what may be the beginning of a stop
    string when it has turned out not to be.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.stop = stop
        self.stopped = False  # whether a stop string has come; it is not part of the text, nor is what follows
        self.length = 0  # characters so far, also those that are not certain
        self._held = ""
        self._ids: deque[int | None] = deque(prompt)
        self._pieces = tokenizer.decode_stream(iter(self._ids.popleft, None))
        for _ in prompt:
            next(self._pieces)

    def push(self, tokens: Sequence[int], final: bool = False) -> str:
        """The text that is certain after these tokens too; with `final`, all that is left."""
        before = len(self._held)
        self._ids += tokens
        for _ in tokens:
            self._held += next(self._pieces)
        if final:
            self._ids.append(None)
            self._held += next(self._pieces, "")
        self.length += len(self._held) - before
        found = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if found:
            certain, self.stopped = min(found), True
        elif final:
            certain = len(self._held)
        else:
            certain = len(self._held) - max((self._begun(text) for text in self.stop), default=0)
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece

    def _begun(self, text: str) -> int:
        """How many characters at the end of what is held are a beginning of `text`."""
        longest = min(len(text) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(text[:n])), 0)


def follow(engine: Engine, row: Row, stream: TextStream) -> str:
    """The text that the engine's latest step has made certain; ends the row where a stop string is complete."""
    # the token that ends a text is no part of it, and where the model fails there is none
    piece = stream.push([] if row.end in ("stop", "error") else row.tokens[-1:], final=bool(row.end))
    if stream.stopped and not row.end:
        engine.finish(row)
    if stream.stopped:
        row.end = "stop"
    return piece


def read_prompt(text: str, setting: str) -> str:
    """What a setting says: a text, or FILE: and the file that it is in. Raises `ConfigError`."""
    if not text.startswith("FILE:"):
        return text
    try:
        return Path(text.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--{setting}={text}: cannot read the prompt: {error}") from error


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt, at least one: an empty one begins a new document, else a new line.

    Raises `DataError` for what the vocabulary lacks.
    """
    if text not in ("", "\n"):
        return tokenizer.encode_prompt(text)
    if text == "" and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode_prompt("\n")
    except DataError:  # a character vocabulary of text without line breaks
        return [0]


def eager(model: GPT) -> AbstractContextManager[object]:
    """Within the block, what was compiled runs as it is written: compiling it again, for other sizes, takes minutes."""
    is_compiled = any(module._compiled_call_impl for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()  # the former takes a second


def short_sample(model: GPT, tokenizer: Tokenizer, tokens: int) -> str:
    """What a model says by itself, always from the same seed. For a look at it."""
    end = tokenizer.end_of_text
    stop = frozenset([] if end is None else [end])
    prompt = prompt_ids("", tokenizer)
    engine = Engine(model, 1, length=len(prompt) + tokens, vocab_size=tokenizer.vocab_size)
    [row] = engine.add([Request(prompt, tokens, Sampling(temperature=0.8, top_k=200), stop=stop)])
    training = model.training
    model.eval()
    try:
        with eager(model):
            while engine.step():
                pass
    finally:
        model.train(training)
    return tokenizer.decode([token for token in row.new_tokens if token not in stop]).strip("\n")
