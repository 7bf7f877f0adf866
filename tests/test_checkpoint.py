"""What is in a checkpoint, what is refused, which one is taken, and that no file is lost while it is written."""

import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from nanogpt import checkpoint, train
from nanogpt.checkpoint import Checkpoints, TrainState, checkpoints_of, find_checkpoint, load_checkpoint, load_latest
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.distributed import Distributed
from nanogpt.errors import CheckpointError, ConfigError, DamagedError, UserError
from nanogpt.evaluate import evaluate
from nanogpt.files import atomic_write, locked
from nanogpt.model import GPT
from nanogpt.optim import make_optimizer
from nanogpt.prepare import prepare
from nanogpt.sample import sample
from nanogpt.settings import EvalConfig, PrepareConfig, SampleConfig
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, write_meta
from tests.conftest import Recipe, random_ids
from tests.programs import Started

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def change(path: Path, **values: Any) -> None:
    """Write a checkpoint again, with other values in its dictionary."""
    torch.save({**torch.load(path, weights_only=True), **values}, path)


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(data)


def test_the_file_is_the_originals_dictionary(trained: Path, recipe: Recipe) -> None:
    content = torch.load(trained / "ckpt.pt", weights_only=True)
    assert set(content) == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "nanogpt"}
    names = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert set(content["model_args"]) == names
    assert [group["weight_decay"] for group in content["optimizer"]["param_groups"]] == [0.1, 0.0]
    assert (content["iter_num"], content["config"]["dataset"]) == (2, "tiny")
    best = torch.load(trained / "best.pt", weights_only=True)
    assert best["optimizer"] is None
    assert (trained / "best.pt").stat().st_size < (trained / "ckpt.pt").stat().st_size / 2
    # A shape that the original lacks has arguments that it refuses.
    train.train(recipe(max_iters=1, tied_head=False))
    assert torch.load(trained / "ckpt.pt", weights_only=True)["model_args"]["tied_head"] is False


def original_checkpoint(folder: Path, dataset: str, vocab_size: int = 4) -> tuple[Path, GPT]:
    """A file as the original writes it: no key of ours, best_val_loss a tensor, an old mask."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "bias": False, "vocab_size": vocab_size}
    model = GPT(GPTConfig(**shape))
    groups = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": g, "weight_decay": w} for g, w in zip(groups, (0.1, 0.0), strict=True)])
    model(random_ids(2, 8, vocab_size=4), random_ids(2, 8, vocab_size=4))[1].backward()
    optimizer.step()
    content = {
        "model": model.state_dict() | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)},
        "optimizer": optimizer.state_dict(), "model_args": {**shape, "dropout": 0.0}, "iter_num": 5,
        "best_val_loss": torch.tensor(1.5), "config": {"dataset": dataset},
    }  # fmt: skip
    torch.save(content, folder / "ckpt.pt")
    return folder / "ckpt.pt", model


def test_a_checkpoint_of_the_original_loads(tmp_path: Path) -> None:
    path, model = original_checkpoint(tmp_path, "letters")
    write_meta(tmp_path / "data" / "letters" / "meta.pkl", CharTokenizer("abcd"))
    loaded = load_checkpoint(path)
    assert (loaded.state.step, loaded.state.best_val_loss) == (5, 1.5)
    assert loaded.tokenizer.decode([0, 3]) == "ad"
    built = loaded.build_model()
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert built.lm_head.weight is built.transformer.wte.weight
    assert not built.training


def test_the_vocabulary_of_an_originals_checkpoint_is_found_or_named(tmp_path: Path) -> None:
    path, _ = original_checkpoint(tmp_path, "openwebtext", vocab_size=50304)
    assert isinstance(load_checkpoint(path).tokenizer, GPT2Tokenizer)
    path, _ = original_checkpoint(tmp_path, "letters")
    with pytest.raises(CheckpointError, match=r"has no vocabulary of 4 entries: put its meta\.pkl into data/letters"):
        load_checkpoint(path)
    write_meta(tmp_path / "elsewhere" / "letters" / "meta.pkl", CharTokenizer("abcd"))
    assert load_checkpoint(path, data_dir="elsewhere").tokenizer.vocab_size == 4


def test_a_run_of_the_original_is_resumed(tmp_path: Path, recipe: Recipe, data_dir: Path) -> None:
    original_checkpoint(tmp_path, "letters")
    write_meta(data_dir / "letters" / "meta.pkl", CharTokenizer("abcd"))
    for name in ("train.bin", "val.bin"):
        random_ids(100, vocab_size=4).numpy().astype("uint16").tofile(data_dir / "letters" / name)
    shape = {"n_layer": 1, "n_embd": 8, "block_size": 8}
    assert train.train(recipe(out_dir=str(tmp_path), dataset="letters", init_from="resume", max_iters=7, **shape)) == 0
    assert load_checkpoint(tmp_path / "ckpt.pt").state.step == 7
    assert (tmp_path / "best.pt").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "there is no checkpoint"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1000]), "is damaged"),
        (flip_a_bit, r"is damaged: the checksum of .* is wrong"),
        (lambda p: torch.save({"model": {}}, p), "cannot be read as a checkpoint of a GPT: KeyError"),
        (lambda p: change(p, nanogpt={"format": 2}), "written by a newer version"),
    ],
)
def test_a_broken_file_is_refused(trained: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(trained / "ckpt.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(trained / "ckpt.pt")


def test_the_state_of_another_optimizer_is_refused(trained: Path, recipe: Recipe) -> None:
    with pytest.raises(CheckpointError, match=r"out/ckpt\.pt is of a run with optimizer=adamw; --init_from=FILE"):
        train.train(recipe(init_from="resume", optimizer="muon"))


def test_moments_of_parameters_in_another_order_are_refused(trained: Path, recipe: Recipe) -> None:
    optimizer = torch.load(trained / "ckpt.pt", weights_only=True)["optimizer"]
    states = optimizer["state"]
    optimizer["state"] = dict(zip(states, reversed(states.values()), strict=True))
    change(trained / "ckpt.pt", optimizer=optimizer)
    with pytest.raises(CheckpointError, match="exp_avg of parameter 0 is not of the parameter's shape"):
        train.train(recipe(init_from="resume"))


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "adafactor", "nadam"])
def test_the_state_of_any_optimizer_comes_back_bit_for_bit(recipe: Recipe, name: str) -> None:
    train.train(recipe(max_iters=2, optimizer=name))
    saved, loaded = torch.load("out/ckpt.pt", weights_only=True), load_checkpoint(Path("out/ckpt.pt"))
    model = loaded.build_model()
    optimizer = make_optimizer(model, recipe(optimizer=name, learning_rate=2e-3), torch.float32)
    loaded.restore(model, optimizer, SCALER)
    torch.testing.assert_close(optimizer.state_dict()["state"], saved["optimizer"]["state"], rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), saved["model"], rtol=0, atol=0)
    assert optimizer.param_groups[0]["lr"] == 2e-3


def test_the_best_is_taken_and_what_is_missing_is_said(trained: Path) -> None:
    assert find_checkpoint(trained, "auto").name == "best.pt"
    assert find_checkpoint(trained, "last").name == "ckpt.pt"
    assert find_checkpoint(trained, "some/file.pt") == Path("some/file.pt")
    (trained / "best.pt").unlink()
    assert find_checkpoint(trained, "auto").name == "ckpt.pt"
    with pytest.raises(CheckpointError, match=r"out holds no trained model"):
        find_checkpoint("out", "best")


def test_a_damaged_checkpoint_is_passed_over_and_never_takes_the_place_of_a_good_one(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    train.train(recipe(max_iters=4, checkpoint_interval="1"))
    out = Path(recipe().out_dir)
    flip_a_bit(out / "ckpt.pt")
    assert load_latest(out).path.name == "ckpt.prev.pt"
    assert caplog.text.count("trying the one before it") == 1
    good = (out / "ckpt.prev.pt").read_bytes()
    with checkpoint.use_out_dir(recipe(), Distributed(), out / "ckpt.prev.pt"):
        assert checkpoints_of(out) == [out / "ckpt.prev.pt"]
    assert train.train(recipe(max_iters=4, checkpoint_interval="1", init_from="resume")) == 0
    assert (out / "ckpt.prev.pt").read_bytes() == good
    assert load_latest(out).state.step == 4
    for path in checkpoints_of(out):
        flip_a_bit(path)
    with pytest.raises(DamagedError, match="are damaged; to use its best model: --init_from="):
        load_latest(out)


def test_what_cannot_be_read_just_now_is_not_taken_for_damaged(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained / "ckpt.prev.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    monkeypatch.setattr(zipfile, "ZipFile", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError, match="Permission denied"):
        load_latest(trained)


class Writer:
    """Checkpoints of a tiny model, written as in a run of one process."""

    def __init__(self, **settings: Any) -> None:
        self.model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        Path("out").mkdir(exist_ok=True)
        self.checkpoints = Checkpoints(TrainConfig(**settings), Distributed(), is_sharded=False)

    def save(self, step: int, **settings: Any) -> None:
        state = TrainState(step, best_val_loss=1.0)
        self.checkpoints.save(self.model, self.optimizer, SCALER, state, ByteTokenizer(), **settings)


def steps() -> dict[str, int]:
    return {path.name: torch.load(path)["iter_num"] for path in Path("out").glob("*.pt")}


def test_the_training_does_not_wait_for_the_disk_and_may_change_what_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_write, real = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: may_write.wait(10) and real(*arguments))
    writer = Writer()
    before = writer.model.lm_head.weight.detach().clone()
    writer.save(1)
    with torch.no_grad():
        writer.model.lm_head.weight.zero_()
    assert not Path("out/ckpt.pt").exists()
    may_write.set()
    writer.save(2)  # waits for the first: at most one at a time
    writer.checkpoints.__exit__(None, None, None)
    assert steps() == {"ckpt.pt": 2, "ckpt.prev.pt": 1}
    weights = load_checkpoint(Path("out/ckpt.prev.pt")).weights
    assert torch.equal(weights["lm_head.weight"], before)
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()  # on disk once


def test_what_cannot_be_written_is_a_warning_and_at_the_end_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Writer()
    writer.save(1)
    writer.checkpoints.written.exception()

    full = RuntimeError("[enforce fail at inline_container.cc:672] . No space left\nmore")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", Mock(side_effect=full))
        writer.save(2, is_best=True)
        assert writer.checkpoints.written.exception()
        assert "No space left); training continues" in caplog.text
        with pytest.raises(UserError, match=r"cannot write out/best\.pt: .*No space left\)$"):
            writer.checkpoints.__exit__(None, None, None)
    assert os.listdir("out") == ["ckpt.pt"]  # nor is there half a file
    writer.save(3)
    writer.checkpoints.__exit__(None, None, None)
    assert steps() == {"ckpt.pt": 3, "ckpt.prev.pt": 1}


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_run_killed_between_two_renames_has_no_checkpoint_less(renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, left, real = Writer(keep_checkpoints=3), [99], os.replace
    for step in (1, 2, 3):
        writer.save(step)
    writer.checkpoints.__exit__(None, None, None)

    def killed(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("killed")
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    left[0] = renames
    writer.save(4)
    assert writer.checkpoints.written.exception()
    kept = [torch.load(path)["iter_num"] for path in checkpoints_of("out")]
    assert kept == [3, 2, 1][: 3 if renames == 0 else 2]  # the oldest may go
    left[0] = 99
    writer.save(5)
    writer.checkpoints.__exit__(None, None, None)
    assert [torch.load(path)["iter_num"] for path in checkpoints_of("out")][:3] == [5, 3, 2]


@pytest.mark.parametrize(("interval", "due"), [("0", []), ("3", [3, 6, 9]), ("0m", []), ("0.00001m", [1, 2, 3])])
def test_when_a_checkpoint_is_due(interval: str, due: list[int]) -> None:
    checkpoints = Writer(checkpoint_interval=interval).checkpoints
    checkpoints.last -= 1
    assert [step for step in range(1, 10) if checkpoints.is_due(step)][:3] == due


def test_a_new_run_moves_earlier_ones_aside_and_leaves_what_is_not_a_runs(trained: Path, recipe: Recipe) -> None:
    for name in ("notes.txt", "ckpt.pt.123.tmp", "model.safetensors"):
        (trained / name).write_text("x")
    (trained / "ckpt.dcp" / "7").mkdir(parents=True)  # half-written
    before = [(trained / "ckpt.pt").read_bytes()]
    for seed in (1, 2):
        train.train(recipe(seed=seed, max_iters=1))
        before.append((trained / "ckpt.pt").read_bytes())
    assert [(trained / f"previous-{n}" / "ckpt.pt").read_bytes() for n in (1, 2)] == before[:2]
    assert not list(trained.rglob("7"))
    run = {"best.pt", "ckpt.pt", "config.json", "metrics.jsonl"}
    assert set(os.listdir(trained / "previous-2")) == run
    assert set(os.listdir(trained)) == run | {"lock", "model.safetensors", "notes.txt", "previous-1", "previous-2"}


def test_another_programs_folder_is_not_taken(recipe: Recipe) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="files of another program"):
        train.train(recipe(out_dir="model"))
    assert [path.name for path in Path("model").iterdir() if path.name != "lock"] == ["config.json"]


SHORT = ["--device=cpu", "--compile=False", "--dtype=float32", "--eval_iters=1", "--eval_interval=5", "--batch_size=4",
         "--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=32", "--dropout=0.0"]  # fmt: skip


@pytest.fixture
def checkout(original: Path, tmp_path: Path, downloads: Path) -> Path:
    """A copy of the checkout, with Shakespeare prepared as it would."""
    shutil.copytree(original, tmp_path / "original", ignore=shutil.ignore_patterns(".git", "out*"))
    data = tmp_path / "original" / "data" / "shakespeare_char"
    prepare(PrepareConfig(name="shakespeare_char", data_dir=str(data.parent)))
    (data / "dataset.json").unlink()  # the original writes none
    return tmp_path / "original"


def run(folder: Path, *words: str) -> str:
    result = Started(list(words), folder).wait()
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_ours_in_theirs(checkout: Path, recipe: Recipe) -> None:
    train.train(recipe(dataset="shakespeare_char", data_dir=str(checkout / "data"), out_dir=str(checkout / "out-ours")))
    text = run(checkout, "sample.py", "--out_dir=out-ours", "--device=cpu", "--num_samples=2", "--max_new_tokens=20")
    assert text.count("---------------") == 2
    words = [*SHORT, "--out_dir=out-ours", "--max_iters=8", "--log_interval=1", "--init_from=resume"]
    text = run(checkout, "train.py", "config/train_shakespeare_char.py", *words)
    assert "iter 6: loss" in text  # goes on after our 6 steps
    assert "iter 5: loss" not in text


def test_theirs_in_ours(
    checkout: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SHORT, "--out_dir=out-theirs", "--max_iters=5", "--always_save_checkpoint=True"]
    run(checkout, "train.py", "config/train_shakespeare_char.py", *words)
    monkeypatch.chdir(checkout)
    sample(SampleConfig(out_dir="out-theirs", device="cpu", num_samples=2, max_new_tokens=20))
    assert capsys.readouterr().out.count("---------------") == 2
    assert 3 < evaluate(EvalConfig(out_dir="out-theirs", device="cpu", dtype="float32"))["loss"] < 4.5
    resumed = recipe(dataset="shakespeare_char", data_dir="data", out_dir="out-theirs", init_from="resume", max_iters=9)
    assert train.train(resumed) == 0


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"

    def broken() -> None:
        with atomic_write(path) as file:
            file.write(b"two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert path.read_bytes() == b"one"
    assert os.listdir(path.parent) == ["b.bin"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for content in (b"one", b"two"):  # what it leads to is not there yet, then is
        with atomic_write(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "file").read_bytes() == content
    assert os.listdir(tmp_path / "disk") == ["file"]


def test_a_lock_names_its_owner_and_goes_with_it(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", "it"),
        pytest.raises(UserError, match=f"process {os.getpid()} on .* is using it; wait for it"),
        locked(tmp_path / "lock", "it"),
    ):
        pass
    assert (tmp_path / "lock").read_text() == ""
    with pytest.raises(ArithmeticError), locked(tmp_path / "lock", "it"):
        raise ArithmeticError
    assert (tmp_path / "lock").read_text() == "failed"
    with locked(tmp_path / "lock", "it"):
        pass
