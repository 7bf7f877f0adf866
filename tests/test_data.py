"""Opening a data set, and batches: each is a pure function of (seed, step)."""

import json
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from nanogpt.data import (
    EVALUATION,
    TRAINING,
    Dataset,
    Prefetcher,
    document_ids_of,
    epoch_window_starts,
    get_batch,
    is_prepared,
    open_dataset,
    window_starts,
    windows,
)
from nanogpt.errors import DataError
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, write_meta
from tests.conftest import Recipe, write_dataset

ARGUMENTS = {"n_tokens": 10**6, "block_size": 64, "seed": 7, "stream": TRAINING, "step": 3, "rows": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = CharTokenizer("abc")
    write_dataset(tmp_path / "set", tokenizer, tokenizer.encode("abccab"), tokenizer.encode("bb"))
    return tmp_path / "set"


def starts(**changes: int) -> list[int]:
    return window_starts(**{**ARGUMENTS, **changes}).tolist()  # type: ignore[arg-type]


def test_a_data_set_of_the_original_opens(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        np.array([1, 0], dtype="<u2").tofile(tmp_path / name)
    assert is_prepared(tmp_path)
    assert isinstance(open_dataset(tmp_path).tokenizer, GPT2Tokenizer)
    write_meta(tmp_path / "meta.pkl", CharTokenizer("xy"))
    dataset = open_dataset(tmp_path)
    for ids in (dataset.train, dataset.val):
        assert dataset.tokenizer.decode(ids[:].tolist()) == "yx"


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size"),
    [({"kind": "char", "characters": "ab"}, 2), ({"kind": "vocabulary", "tokens": ["b", "word"]}, 2),
     ({"kind": "byte"}, 257), ({"kind": "gpt2"}, 50257),
     ({"kind": "tokenizers", "end_of_text": None, "definition": '{"version": "1.0", "model": {"type": "WordLevel", '
       '"vocab": {"a": 0, "b": 1}, "unk_token": "a"}}'}, 2)],
)  # fmt: skip
def test_a_data_set_of_version_1_0_opens(tmp_path: Path, tokenizer: dict[str, Any], vocab_size: int) -> None:
    for name in ("train.bin", "val.bin"):
        np.array([1, 0], dtype="<u4").tofile(tmp_path / name)
    counts = {"train": 2, "val": 2}
    description = {"version": 1, "dtype": "uint32", "tokens": counts, "documents": counts, "bytes": counts,
                   "skipped": {}, "tokenizer": tokenizer, "source_files": 1,
                   "sources": [{"path": "x", "bytes": 3, "sha256": "0" * 64}]}  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    dataset = open_dataset(tmp_path)
    assert dataset.tokenizer.vocab_size == vocab_size
    assert dataset.train[:].tolist() == [1, 0]


def test_damage_is_one_message(folder: Path) -> None:
    (folder / "train.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"train.bin holds 2 ids, not 6"):
        open_dataset(folder)
    (folder / "train.bin").unlink()
    with pytest.raises(DataError, match=r"holds no train.bin and val.bin: prepare it"):
        open_dataset(folder)


def test_a_model_and_its_data_must_fit(folder: Path) -> None:
    dataset = open_dataset(folder)
    dataset.match_tokenizer(CharTokenizer("abc"), "the model")
    with pytest.raises(DataError, match=r"ids of the char tokenizer \(3 entries\), but the model uses the"):
        dataset.match_tokenizer(ByteTokenizer(), "the model")
    dataset.check_length(1)
    with pytest.raises(DataError, match=r"the val split has 2 tokens, too few for block_size=2.*--block_size=1"):
        dataset.check_length(2)


def numbers(count: int) -> Dataset:
    """A data set whose token at each place is the place."""
    ids = np.arange(count, dtype=np.uint16)
    return Dataset(Path("numbers"), ids, ids, GPT2Tokenizer(), {})


def test_an_id_outside_the_vocabulary_is_named() -> None:
    dataset = numbers(100)
    dataset.tokenizer.vocab_size = 99
    x, y = windows(dataset, "train", np.array([0, 7, 88]), 9)
    assert x.tolist() == [list(range(n, n + 9)) for n in (0, 7, 88)]
    assert torch.equal(y, x + 1)
    with pytest.raises(DataError, match=r"train.bin holds token 99, but the vocabulary ends at 98"):
        windows(dataset, "train", np.array([90]), 9)


def test_the_end_of_text_opens_the_next_document() -> None:
    ids = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    assert document_ids_of(ids, 0).tolist() == [[0, 1, 1, 1, 2, 3, 3], [1] * 7]


def test_a_batch_is_a_function_of_its_arguments() -> None:
    assert starts() == starts()
    for change in ({"seed": 8}, {"step": 4}, {"stream": EVALUATION}):
        assert not set(starts(**change)) & set(starts())


def test_the_very_same_windows_everywhere() -> None:
    """Recorded once: a change here would silently change every run that is resumed."""
    assert starts(rows=4) == [367530, 754465, 308031, 976101]
    epoch = epoch_window_starts(10**6, 64, seed=7, step=3, rows=6).tolist()
    assert epoch == [986017, 386273, 590689, 91297, 332129, 469921]


def test_all_windows_are_drawn_and_none_beyond_the_end() -> None:
    assert {s for step in range(200) for s in starts(n_tokens=20, block_size=10, step=step)} == set(range(10))


@pytest.mark.parametrize(("sampling", "step", "n"), [("epoch", 5, 1), ("random", 60, 2), ("random", 0, 4)])
def test_targets_are_one_ahead_and_rows_the_same_for_all(sampling: Any, step: int, n: int, recipe: Recipe) -> None:
    config = recipe(sampling=sampling, batch_size=8, context_warmup=0.75 if n > 1 else 0.0, lr_decay_iters=100)
    # The warm-up cuts each context into n parts.
    dataset = numbers(1000)
    x, y = get_batch(dataset, step, config, range(8))
    assert (x.dtype, x.shape) == (y.dtype, y.shape) == (torch.int64, (8 * n, config.block_size // n))
    assert torch.equal(y, x + 1)
    assert torch.equal(get_batch(dataset, step, config, range(2, 5))[0], x[2 * n : 5 * n])
    assert not torch.equal(get_batch(dataset, step + 1, config, range(8))[0], x)


def test_an_epoch_shows_every_window_once_whatever_the_number_of_rows() -> None:
    n_tokens, block_size, epochs = 1000, 13, 5
    n_windows, expected = (n_tokens - 1) // block_size, None
    for rows in (1, 4, 7, 60):
        steps = range(-(-epochs * n_windows // rows))
        drawn = [epoch_window_starts(n_tokens, block_size, seed=5, step=step, rows=rows) for step in steps]
        tilings = np.concatenate(drawn)[: epochs * n_windows].reshape(epochs, n_windows).tolist()
        assert tilings == (expected or tilings)
        expected = tilings
    for tiles in map(sorted, tilings):
        assert tiles == list(range(tiles[0], tiles[0] + n_windows * block_size, block_size))
        assert 0 <= tiles[0]
        assert tiles[-1] + block_size + 1 <= n_tokens
    assert len({tuple(start - min(tiles) for start in tiles) for tiles in tilings}) == epochs  # orders, not offsets
    assert len({min(tiles) for tiles in tilings}) > 1


def test_the_prefetcher_gives_what_was_asked_for_in_any_order() -> None:
    def make(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert threading.current_thread() is not threading.main_thread()
        return torch.tensor([step]), torch.tensor([step + 1])

    prefetcher = Prefetcher(make, depth=2)
    asked = (0, 1, 2, 3, 10, 11, 3)
    assert [(x.item(), y.item()) for x, y in map(prefetcher, asked)] == [(step, step + 1) for step in asked]


def test_an_error_in_the_background_arrives_where_the_batch_is_asked_for() -> None:
    with pytest.raises(DataError, match="damaged"):
        Prefetcher(Mock(side_effect=DataError("damaged")))(3)
