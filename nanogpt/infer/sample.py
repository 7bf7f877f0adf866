"""The program behind `sample.py`: text from a trained model."""

from collections.abc import Iterator
from pathlib import Path

import torch

from nanogpt.data.tokenizer import Tokenizer
from nanogpt.device import choose
from nanogpt.errors import ConfigError, DataError
from nanogpt.infer.engine import stream
from nanogpt.programs import SampleConfig
from nanogpt.trained import load_trained

SEPARATOR = "---------------"


def sample(config: SampleConfig) -> None:
    """Print `num_samples` continuations of the prompt, each followed by a separator line.

    All are drawn as one batch; the first is printed while it grows, the others when it is complete.
    """
    device = choose(config.device, config.dtype, config.compile)
    trained = load_trained(config, device)
    model, tokenizer = trained.model, trained.tokenizer
    prompt = _prompt_ids(config.start, tokenizer)
    print(f"{trained.name}, {model.get_num_params() / 1e6:.2f}M parameters")
    generator = torch.Generator(device.name).manual_seed(config.seed)
    rows: list[list[int]] = [[] for _ in range(config.num_samples)]

    def first_row() -> Iterator[int]:
        yield from prompt
        idx = torch.tensor([prompt] * config.num_samples, device=device.name)  # (B, T)
        with device.autocast():
            tokens = stream(
                model,
                idx,
                config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                vocab_size=tokenizer.vocab_size,
                generator=generator,
            )
            for token in tokens:
                for row, new in zip(rows, token[:, 0].tolist(), strict=True):
                    row.append(new)
                yield rows[0][-1]

    for text in tokenizer.decode_stream(first_row()):
        print(text, end="", flush=True)
    print(f"\n{SEPARATOR}")
    for row in rows[1:]:
        print(f"{tokenizer.decode(prompt + row)}\n{SEPARATOR}")


def _prompt_ids(start: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of `--start`, at least one: an empty prompt begins a new document, else a new line."""
    if start.startswith("FILE:"):
        try:
            start = Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--start={start}: cannot read the prompt: {error}") from error
    if start not in ("", "\n"):
        return tokenizer.encode_prompt(start)
    if start == "" and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode_prompt("\n")
    except DataError:  # a character vocabulary of text without line breaks
        return [0]
