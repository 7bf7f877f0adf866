"""What must hold for every input: settings, and the order of the data."""

import dataclasses
import string
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.cli import VERBS, parse
from nanogpt.config import Settings
from nanogpt.data import dropout_seed, epoch_order, epoch_window_starts, window_starts
from nanogpt.errors import ConfigError

CONFIGS = [settings for settings, _, _ in VERBS.values()]
NAMES = sorted({field.name for config in CONFIGS for field in dataclasses.fields(config)})
VALUES = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(["auto", "-0"]))
WORDS = st.one_of(
    st.tuples(st.sampled_from(NAMES), VALUES).map(lambda pair: f"--{pair[0]}={pair[1]}"),
    st.sampled_from(NAMES).map(lambda name: f"--{name}"),
    st.text(string.printable, max_size=15).filter(lambda word: word not in ("-h", "--help") and "/" not in word),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
@settings(max_examples=150, deadline=None)
@given(words=st.lists(WORDS, max_size=6))
def test_any_command_line_is_a_config_or_one_message(config: type[Settings], words: list[str]) -> None:
    with suppress(ConfigError):
        parsed = parse(config, words, "usage", positional="out_dir")
        assert list(parsed.problems()) == []


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_a_permutation_is_one(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_order(n, seed, epoch)), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(
    block_size=st.integers(1, 64), spare=st.integers(640, 3000), seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32), rows=st.integers(1, 40), parts=st.integers(1, 8),
)  # fmt: skip
def test_windows_fit_and_do_not_depend_on_who_asks(
    block_size: int, spare: int, seed: int, step: int, rows: int, parts: int
) -> None:
    n_tokens = block_size + spare
    for draw in (window_starts, epoch_window_starts):
        starts = draw(n_tokens, block_size, seed=seed, step=step, rows=rows * parts)
        assert starts.shape == (rows * parts,)
        assert starts.min() >= 0
        assert starts.max() + block_size < n_tokens
    fewer = window_starts(n_tokens, block_size, seed=seed, step=step, rows=rows)
    assert np.array_equal(window_starts(n_tokens, block_size, seed=seed, step=step, rows=rows * parts)[:rows], fewer)
    seeds = [dropout_seed(seed, step, rank) for rank in range(parts)]
    assert len(set(seeds)) == parts
