from typing import Any

import numpy as np
import pytest
import torch

from nanogpt.errors import ConfigError
from nanogpt.model import GPT
from nanogpt.shape import PRESETS, GPTConfig

# of the published checkpoints: vocabulary, parameters
PUBLISHED = {
    "gpt2": (50257, 124_439_808),
    "gpt2-medium": (50257, 354_823_168),
    "gpt2-large": (50257, 774_030_080),
    "gpt2-xl": (50257, 1_557_611_200),
    "llama-3.2-1b": (128256, 1_235_814_400),
    "llama-3.2-3b": (128256, 3_212_749_824),
    "llama-2-7b": (32000, 6_738_415_616),
    "llama-3.1-8b": (128256, 8_030_261_248),
    "qwen3-0.6b": (151936, 596_049_920),
    "qwen3-1.7b": (151936, 1_720_574_976),
    "qwen3-4b": (151936, 4_022_468_096),
    "qwen3-8b": (151936, 8_190_735_360),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_of_their_models(name: str) -> None:
    vocab_size, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name, vocab_size=vocab_size))
    assert model.get_num_params(non_embedding=False) == parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "activation='relu': expected gelu or gelu_tanh"),
        ({"architecture": "mamba"}, "architecture='mamba': expected gpt2 or llama or qwen3"),
    ],
)
def test_what_cannot_be_built_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, **settings))


def test_numbers_of_numpy_are_numbers() -> None:
    shape = GPTConfig(vocab_size=np.int64(65), dropout=np.float64(0.1))
    assert list(shape.problems()) == []
    assert {type(shape.vocab_size), type(shape.dropout)} == {int, float}
