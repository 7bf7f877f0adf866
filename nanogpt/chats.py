"""Conversations: as text, by a model's own Jinja template or as ChatML; as ids; and whole in the rows of a batch.

A conversation is a list of messages, {"role": "user", "content": "…"}, as in OpenAI's API. Templates come with models
from elsewhere, so they run in Jinja's sandbox.
"""

import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanogpt.errors import DataError
from nanogpt.tokenizer import BPETokenizer, Tokenizer, well_formed

Message = Mapping[str, Any]
Array = npt.NDArray[Any]
COUNTS, BEGINS = 1, 2  # marks of a token: the model learns to write it; a conversation begins with it
# For models that are trained here. Source: OpenAI's chatml.md, with the blank lines of Qwen and SmolLM.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """Return `tokenizer` for conversations: with its chat template, or with ChatML and the two tokens that this needs.

    <|im_end|> is one of its end tokens, also where the model's maker, as of base models, names another one only. Raises
    `DataError` for a vocabulary that cannot be extended.
    """
    import tokenizers

    if tokenizer.chat_template and tokenizer.engine.token_to_id("<|im_end|>") in (None, *tokenizer.end_tokens):
        return tokenizer
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"] if not tokenizer.chat_template else [])
    end = library.token_to_id("<|im_end|>")
    extended = BPETokenizer(library.to_str(), tokenizer.end_of_text)
    extended.generation_config = {**tokenizer.generation_config, "eos_token_id": [end, *sorted(tokenizer.end_tokens)]}
    extended.chat_template, extended.adds_bos = tokenizer.chat_template or CHATML, tokenizer.adds_bos
    return extended


def render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Return a conversation as text; `add_generation_prompt`: up to where the model's answer begins.

    Raises `DataError` if the model has no template, or if the template does not take these messages.
    """
    if not tokenizer.chat_template:
        raise DataError("this model has no chat template: it continues texts, and holds no conversations")
    config = tokenizer.full_generation_config
    special = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        ids = config.get(f"{name}_id")
        ids = ids if isinstance(ids, list) else [ids]
        special[name] = "" if ids[0] is None else tokenizer.decode(ids[:1])
    context = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        return compile_template(tokenizer.chat_template).render(**context, **special)  # type: ignore[no-any-return]
    except Exception as error:  # a template is a program: it can raise anything
        raise DataError(f"the model's chat template does not take these messages: {error}") from error


def prompt_of(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation, up to where the model's answer begins. Raises `DataError`."""
    return tokenizer.encode_prompt(render(tokenizer, messages, add_generation_prompt=True))


@functools.lru_cache
def compile_template(template: str) -> Any:
    """Return a chat template, ready to be rendered, with what transformers offers to templates."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    # transformers' blocks {% generation %} … {% endgeneration %} mark the model's words; here rendering finds those.
    template = re.sub(r"({%[-+]?\s*)generation(\s*[-+]?%})", r"\1if true\2", template)
    return environment.from_string(re.sub(r"({%[-+]?\s*)endgeneration(\s*[-+]?%})", r"\1endif\2", template))


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them count in the loss: the assistant's words and their ends.

    Where an answer begins follows from rendering the messages before it, so that any template will do; behind its words
    the first of the model's end tokens counts, if it comes before the next message's words. Raises `DataError`.
    """
    text = well_formed(render(tokenizer, messages))
    ends = [tokenizer.decode([i]) for i in tokenizer.end_tokens]
    spans = []
    for n, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = render(tokenizer, messages[:n], add_generation_prompt=True) if n else ""
        start = len(os.path.commonprefix([text, well_formed(before)]))  # noqa: RUF071
        said, *others = [well_formed(each["content"]).strip() for each in messages[n : n + 2]]
        behind = max(text.find(said, start) + len(said), start)
        limit = text.find(others[0], behind) if others else len(text)
        stops = [place + len(end) for end in ends if (place := text.find(end, behind, limit)) >= 0]
        spans.append((start, min(stops, default=behind)))
    tokenizer.engine.encode_special_tokens = False  # In the library, False lets their names stand for them.
    encoded = tokenizer.engine.encode(text, add_special_tokens=False)
    counted = [any(start <= begin < stop for start, stop in spans) for begin, _ in encoded.offsets]
    return list(encoded.ids), counted


class Chats:
    """The conversations of a split, whole and packed into rows: ids and marks (tokens,)."""

    def __init__(self, ids: Array, marks: Array) -> None:
        self.ids, self.marks = ids, marks
        self.rows = functools.lru_cache(self.pack)

    def pack(self, block_size: int) -> list[list[slice]]:
        """Return which conversations each row of block_size + 1 tokens holds, in a fixed random order.

        One that is longer loses its end, and is left out if it then counts nothing. Raises `DataError` if none is left.
        """
        starts = np.flatnonzero(self.marks & BEGINS)
        lengths = np.minimum(np.diff(starts, append=len(self.marks)), block_size + 1)
        rows, used = [list[slice]()], 0
        for n in np.random.default_rng(0).permutation(len(starts)).tolist():
            part = slice(starts[n], starts[n] + lengths[n])
            if not (self.marks[part] & COUNTS).any():
                continue
            if used + lengths[n] > block_size + 1:
                rows.append([])
                used = 0
            rows[-1].append(part)
            used += lengths[n]
        if not rows[0]:
            raise DataError(f"no conversation has an answer within the first block_size={block_size} tokens")
        return rows

    def batch(self, numbers: Iterable[int], block_size: int) -> list[Array]:
        """Return inputs, targets (-1: does not count) and document ids of rows, (rows, block_size) each."""
        rows = [self.rows(block_size)[n] for n in numbers]
        size = (len(rows), block_size + 1)
        inputs, targets, documents = np.zeros(size, np.int64), np.full(size, -1), np.full(size, -1)
        for n, parts in enumerate(rows):
            place = 0
            for number, part in enumerate(parts):
                found = self.ids[part].astype(np.int64)
                there = slice(place, place := place + len(found))
                inputs[n, there], documents[n, there] = found, number
                targets[n, there] = np.where(self.marks[part] & COUNTS, found, -1)
        return [inputs[:, :-1], targets[:, 1:], documents[:, :-1]]
