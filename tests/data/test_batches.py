import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch

from nanogpt.data import (
    EVALUATION,
    TRAINING,
    Ahead,
    Tokens,
    check_length,
    document_ids_of,
    epoch_window_starts,
    gather,
    permute,
    window_starts,
)
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


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4096, 4097])
def test_a_permutation_hits_every_number_once(n: int) -> None:
    numbers = np.arange(n)
    orders = [permute(numbers, n, seed=1, epoch=epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == numbers.tolist() for order in orders)
    if n > 16:
        assert orders[0] != orders[1] != orders[2] != numbers.tolist()
        assert permute(numbers, n, seed=2, epoch=0).tolist() != orders[0]
        assert permute(numbers[3:9], n, seed=1, epoch=0).tolist() == orders[0][3:9]


def test_a_permutation_of_a_large_set_needs_no_memory() -> None:
    tracemalloc.start()
    found = permute(np.arange(5 * 10**9, 5 * 10**9 + 5000), 10**10, seed=0, epoch=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6
    assert len(set(found.tolist())) == 5000
    assert 0 <= found.min()
    assert found.max() < 10**10
    assert abs(found.mean() / 10**10 - 0.5) < 5 * (1 / 12 / 5000) ** 0.5  # as evenly spread as chance would have it


def test_a_permutation_shows_no_order() -> None:
    """Neighbours land anywhere: their distance is that of two random places, and no place is preferred."""
    n, epochs = 997, 300
    orders = np.array([permute(np.arange(n), n, seed=3, epoch=epoch) for epoch in range(epochs)])
    distances = np.abs(np.diff(orders, axis=1)).mean()
    assert abs(distances / (n / 3) - 1) < 0.01
    correlation = np.corrcoef(orders)[np.triu_indices(epochs, 1)]
    assert abs(correlation.mean()) < 0.001
    assert abs(correlation.std() * n**0.5 - 1) < 0.05
    first = np.bincount(orders[:, 0] * 10 // n, minlength=10)  # where window 0 goes, in tenths
    assert ((first - epochs / 10) ** 2 / (epochs / 10)).sum() < 27.9  # chi-squared of 9 degrees: one in a thousand


@pytest.mark.parametrize("rows", [1, 4, 7, 60])
def test_an_epoch_shows_every_window_once(rows: int) -> None:
    n_tokens, block_size, epochs = 1000, 13, 5
    n_windows = (n_tokens - 1) // block_size
    steps = range(-(-epochs * n_windows // rows))
    starts = np.concatenate(
        [epoch_window_starts(n_tokens, block_size, seed=5, step=step, rows=rows) for step in steps]
    )[: epochs * n_windows].reshape(epochs, n_windows)
    offsets = set()
    for epoch in starts.tolist():
        tiles = sorted(epoch)
        assert tiles == list(range(tiles[0], tiles[0] + n_windows * block_size, block_size))
        assert 0 <= tiles[0]
        assert tiles[-1] + block_size + 1 <= n_tokens
        offsets.add(tiles[0])
    assert len({tuple(epoch) for epoch in starts.tolist()}) == epochs
    assert len(offsets) > 1


def test_epochs_are_the_same_whatever_the_number_of_rows() -> None:
    def starts(rows: int) -> list[int]:
        return [s for step in range(120 // rows)
                for s in epoch_window_starts(1000, 13, seed=5, step=step, rows=rows).tolist()]  # fmt: skip

    assert starts(1) == starts(8) == starts(60)


def test_the_very_same_epoch_everywhere() -> None:
    """Recorded once: a change here would silently change every run that is resumed."""
    assert epoch_window_starts(10**6, 64, seed=7, step=3, rows=6).tolist() == GOLDEN_EPOCH


GOLDEN_EPOCH = [101921, 661537, 940769, 294305, 690209, 558433]


def test_memory_stays_flat_over_many_batches() -> None:
    tokens = Tokens([np.arange(10**5, dtype=np.uint16) % 500])

    def batch(step: int) -> torch.Tensor:
        starts = epoch_window_starts(len(tokens), 64, seed=0, step=step, rows=8)
        return gather(tokens, starts, 64, vocab_size=500)

    ahead = Ahead(batch)
    held = []
    tracemalloc.start()
    for step in range(5001):
        ahead(step)
        if step % 1000 == 0:
            time.sleep(0.1)  # until the batches to come are there
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(held[3:]) < held[2] + 20_000


def test_ahead_gives_what_was_asked_for_in_any_order() -> None:
    calls: list[int] = []

    def make(step: int) -> int:
        calls.append(step)
        time.sleep(0.001)
        assert threading.current_thread() is not threading.main_thread()
        return step * step

    ahead = Ahead(make, depth=2)
    assert [ahead(step) for step in (0, 1, 2, 3, 10, 11, 3)] == [0, 1, 4, 9, 100, 121, 9]
    assert calls[:4] == [0, 1, 2, 3]
    time.sleep(0.02)
    assert max(calls[-2:]) == 5  # two more than were asked for, no more


def test_an_error_in_the_background_arrives_where_the_batch_is_asked_for() -> None:
    def broken(step: int) -> int:
        raise DataError(f"step {step}")

    with pytest.raises(DataError, match="step 3"):
        Ahead(broken)(3)


def test_the_end_of_text_opens_the_next_document() -> None:
    ids = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    assert document_ids_of(ids, 0).tolist() == [[0, 1, 1, 1, 2, 3, 3], [1] * 7]
