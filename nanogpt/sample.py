"""The program behind `sample.py`: text from a trained model."""

import logging
from dataclasses import replace

from nanogpt.checkpoint import load_trained
from nanogpt.device import choose_device
from nanogpt.engine import Engine, Request, Row
from nanogpt.errors import ConfigError, DataError
from nanogpt.packed import pack
from nanogpt.sampling import Sampling
from nanogpt.settings import SampleConfig, unescape
from nanogpt.text import TextStream, follow, prompt_ids, read_prompt
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SEPARATOR = "---------------"


def sample(config: SampleConfig) -> None:
    """Print `num_samples` continuations of the prompt, each followed by a separator line.

    All are drawn side by side; the first is printed while it grows, the others when all are complete.
    """
    device = choose_device(replace(config, compile=False))
    if config.compile is True:
        log.info("compile=True: decoding is faster without, and goes without")
    trained = load_trained(config, device)
    model, tokenizer = trained.model, trained.tokenizer
    prompt = prompt_ids(read_prompt(config.start, "start"), tokenizer)
    if len(prompt) > model.config.block_size:
        raise ConfigError(
            f"the prompt has {len(prompt):,} tokens and the model sees {model.config.block_size:,} at a time; "
            "shorten --start"
        )
    log.info(f"{trained.name}, {model.get_num_params() / 1e6:.2f}M parameters")
    count = config.num_samples
    if config.temperature == 0 and count > 1:
        count = 1
        log.info("temperature=0 always takes the likeliest token: one sample stands for all")

    pack(model, device.dtype, int8=config.int8)
    length = len(prompt) + config.max_new_tokens
    engine = Engine(
        model, count, length=length, vocab_size=tokenizer.vocab_size, dtype=device.dtype, window=config.window
    )
    request = Request(
        prompt,
        config.max_new_tokens,
        Sampling(config.temperature, config.top_k, config.top_p, config.min_p),
        stop=frozenset() if config.ignore_end or tokenizer.end_of_text is None else frozenset([tokenizer.end_of_text]),
        alternatives=config.logprobs if config.logprobs >= 0 else None,
    )
    rows = engine.add([replace(request, seed=config.seed + n) for n in range(count)])
    stop = [unescape(text) for text in config.stop]
    streams = {row: TextStream(tokenizer, prompt, stop) for row in rows}
    texts = {row: tokenizer.decode(prompt) for row in rows}
    print(texts[rows[0]], end="", flush=True)
    while engine.rows:
        for row in engine.step():
            if row.end == "error":
                raise DataError(f"{trained.name}: the model's output is not a number; its weights may be damaged")
            piece = follow(engine, row, streams[row])
            texts[row] += piece
            if row is rows[0]:
                print(piece, end="", flush=True)
    for row in rows:
        print(f"{texts[row] if row is not rows[0] else ''}\n{SEPARATOR}")
        if row.alternatives:
            _print_alternatives(row, tokenizer)


def _print_alternatives(row: Row, tokenizer: Tokenizer) -> None:
    """Each new token with its log-probability, and the likeliest ones in its place with theirs."""
    for token, (log_p, likeliest) in zip(row.new_tokens, row.alternatives, strict=True):
        others = "".join(f"   {tokenizer.decode([other])!r} {each:.3f}" for other, each in likeliest)
        print(f"{log_p:8.3f} {tokenizer.decode([token])!r:16}{others}")
    print(SEPARATOR)
