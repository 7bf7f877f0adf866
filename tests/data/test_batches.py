import numpy as np
import pytest
import torch

from nanogpt.data.batches import EVALUATION, TRAINING, check_length, gather, window_starts
from nanogpt.data.tokens import Tokens
from nanogpt.errors import DataError

ARGUMENTS = {"n_tokens": 10**6, "block_size": 64, "seed": 7, "stream": TRAINING, "step": 3, "rows": 32}


def starts(**changes: int) -> list[int]:
    return window_starts(**{**ARGUMENTS, **changes}).tolist()  # type: ignore[arg-type]


def test_a_batch_is_a_function_of_its_arguments() -> None:
    assert starts() == starts()
    for change in ({"seed": 8}, {"step": 4}, {"stream": EVALUATION}):
        assert not set(starts(**change)) & set(starts())


@pytest.mark.parametrize("n_tokens", [100, 10**6, 10**11])
def test_a_row_does_not_depend_on_how_many_there_are(n_tokens: int) -> None:
    assert starts(n_tokens=n_tokens, rows=8) == starts(n_tokens=n_tokens, rows=32)[:8]


def test_the_very_same_windows_everywhere() -> None:
    """Recorded once: a change here would silently change every run that is resumed."""
    assert starts(rows=4) == GOLDEN


GOLDEN = [367530, 754465, 308031, 976101]


def test_all_windows_are_drawn_and_none_beyond_the_end() -> None:
    seen = {s for step in range(200) for s in starts(n_tokens=20, block_size=10, step=step)}
    assert seen == set(range(10))


def test_targets_are_one_token_ahead() -> None:
    ids = gather(Tokens([np.arange(100, dtype=np.uint16)]), np.array([0, 50, 89]), 10, vocab_size=100)
    x, y = ids[:, :-1], ids[:, 1:]
    assert x.dtype == y.dtype == torch.int64
    assert x.tolist() == [list(range(s, s + 10)) for s in (0, 50, 89)]
    assert torch.equal(y, x + 1)


def test_an_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(DataError, match="holds token 99, but the model's vocabulary ends at 98"):
        gather(Tokens([np.arange(100, dtype=np.uint16)]), np.array([89]), 10, vocab_size=99)


def test_a_split_must_hold_a_window_and_its_target() -> None:
    check_length(Tokens([np.zeros(11, dtype=np.uint16)]), 10, "it")
    with pytest.raises(DataError, match="it has 10 tokens, too few for one window of block_size=10"):
        check_length(Tokens([np.zeros(10, dtype=np.uint16)]), 10, "it")
