"""The program behind `nanogpt chat`: talk to a model in the terminal."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from nanogpt.chats import prompt_of
from nanogpt.checkpoint import load_trained
from nanogpt.device import choose_device
from nanogpt.engine import NOT_FINITE, Engine, Request, Sampling, quantize
from nanogpt.errors import DataError
from nanogpt.sample import TextStream, follow
from nanogpt.settings import ChatConfig
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

HELP = "/reset forgets what was said, /system TEXT says how to answer, Ctrl-C stops an answer, Ctrl-D ends"


def chat(config: ChatConfig) -> None:
    """Read messages from standard input and print the model's answers. Raises `DataError` for a model without chat."""
    device = choose_device(config)
    trained = load_trained(config, device)
    model, tokenizer = trained.model, trained.tokenizer
    prompt_of(tokenizer, [{"role": "user", "content": ""}])
    log.info(f"{trained.name}, {model.get_num_params() / 1e6:.2f}M parameters; {HELP}")
    quantize(model, device.dtype, int8=config.int8)
    engine = Engine(model, 1, vocab_size=tokenizer.vocab_size, dtype=device.dtype)
    with suppress(ImportError):  # arrow keys and a history, where Python was built with it
        import readline  # noqa: F401

    system = [{"role": "system", "content": config.system}] if config.system else []
    messages: list[dict[str, Any]] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        command, _, rest = text.partition(" ")
        if command in ("/reset", "/system"):
            messages = []
            if command == "/system":
                system = [{"role": "system", "content": rest}] if rest else []
        elif command.startswith("/"):
            print(HELP)
        elif text:
            messages.append({"role": "user", "content": text})
            said = ""
            try:
                for piece in answer(engine, tokenizer, [*system, *messages], config):
                    said += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                engine.rows.clear()
            except DataError as error:  # What was said before stays.
                print(f"error: {error}")
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": said})


def answer(
    engine: Engine, tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], config: ChatConfig
) -> Iterator[str]:
    """Yield the answer to a conversation, piece by piece. One that leaves it no room loses its oldest exchange."""
    kept, room = list(messages), engine.block_size - min(config.max_new_tokens, engine.block_size // 4)
    while len(ids := prompt_of(tokenizer, kept)) > room:
        first = next(n for n, message in enumerate(kept) if message["role"] == "user")
        if len(kept) < first + 3:
            raise DataError(f"the message has {len(ids):,} tokens with all that belongs to it; at most {room:,} fit")
        del kept[first : first + 2]
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p)
    # Another seed for each answer: asking again may give another one.
    new = min(config.max_new_tokens, engine.block_size - len(ids))
    request = Request(ids, new, sampling, config.seed + len(messages), tokenizer.end_tokens)
    [row], stream = engine.add([request]), TextStream(tokenizer, ids)
    while not row.end:
        engine.step()
        yield follow(engine, row, stream)
    if row.end == "error":
        raise DataError(NOT_FINITE)
