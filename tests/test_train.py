"""The training program, run in this process on a model that takes a second."""

import dataclasses
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt import data, train
from nanogpt.checkpoint import checkpoints_of, load_checkpoint
from nanogpt.cli import parse
from nanogpt.config import TrainConfig
from nanogpt.device import Device
from nanogpt.errors import ConfigError, DivergedError, UserError
from nanogpt.evaluate import evaluate
from nanogpt.files import locked
from nanogpt.metrics import read_metrics
from nanogpt.plot import RunRecord
from nanogpt.prepare import prepare
from nanogpt.settings import EvalConfig, PrepareConfig
from tests.conftest import ROOT, Program, Recipe, full_disk

GOLDEN = Path(__file__).parent / "golden" / "tiny_loss.json"


def rows(config: TrainConfig, key: str) -> dict[int, Any]:
    """`{step: value}` of the run's metrics that have `key`."""
    return {row["step"]: row[key] for row in read_metrics(Path(config.out_dir, "metrics.jsonl")) if key in row}


def weights(config: TrainConfig, name: str = "ckpt.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(config.out_dir, name)).weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def files_of(config: TrainConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.out_dir).iterdir() if path.is_file()}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int, signals: int = 1) -> None:
    """Send this process SIGINT when `data.FUNCTION` is called for the `call`-th time."""
    calls, real = itertools.count(), getattr(data, function)

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == call:
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
        return real(*arguments, **settings)

    monkeypatch.setattr(data, function, interrupted)


def test_it_learns_and_leaves_a_whole_run(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(max_iters=57, lr_decay_iters=57, eval_interval=20, learning_rate=1e-2, min_lr=1e-3)
    assert train.train(config) == 0
    names = ["best.pt", "ckpt.prev.pt", "ckpt.pt", "config.json", "lock", "metrics.jsonl"]
    assert sorted(os.listdir(config.out_dir)) == names
    assert json.loads(Path(config.out_dir, "config.json").read_text())["max_iters"] == 57
    validation = rows(config, "val/loss")
    assert sorted(validation) == [0, 20, 40, 57]  # The end is always evaluated.
    assert validation[57] < validation[0] - 1
    assert sorted(rows(config, "train/loss")) == list(range(1, 58))
    last = load_checkpoint(Path(config.out_dir, "ckpt.pt"))
    assert (last.state.step, last.state.tokens) == (57, 57 * 4 * 16)
    assert {int(state["step"]) for state in (last.optimizer or {})["state"].values()} == {57}
    out = capsys.readouterr().out
    assert f"step 57: train loss {rows(config, 'train/eval_loss')[57]:.4f}, val loss {validation[57]:.4f}" in out
    assert len([line for line in out.splitlines() if line.startswith("iter ")]) == 57


def test_the_golden_loss_curve(recipe: Recipe) -> None:
    """60 steps in float32 on one thread. After a change on purpose: delete the file, run, look at the difference."""
    config = recipe(
        max_iters=60, eval_interval=60, eval_iters=4, lr_decay_iters=60, batch_size=8, block_size=32, n_layer=3,
        n_head=4, n_embd=48, gradient_accumulation_steps=2, learning_rate=5e-3,
    )  # fmt: skip
    train.train(config)
    found = {"train": list(rows(config, "train/loss").values()), "val": list(rows(config, "val/loss").values())}
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} was missing and has been written; run again")
    expected = json.loads(GOLDEN.read_text())
    assert found["train"] == pytest.approx(expected["train"], abs=2e-3)  # other CPUs add up in another order
    assert found["val"] == pytest.approx(expected["val"], abs=2e-3)


def test_evaluating_and_showing_text_changes_nothing(recipe: Recipe) -> None:
    rarely = recipe(dropout=0.1, eval_interval=100, sample_interval=0)
    often = recipe(dropout=0.1, eval_interval=1, out_dir="often")
    train.train(rarely)
    train.train(often)
    assert same(weights(rarely), weights(often))
    assert rows(rarely, "train/loss") == rows(often, "train/loss")
    assert rows(rarely, "val/loss").items() <= rows(often, "val/loss").items()
    assert rows(rarely, "sample") == {}
    assert list(rows(often, "sample")) == [1, 2, 3, 4, 5, 6]


def test_accumulated_micro_batches_equal_one_large_batch(recipe: Recipe) -> None:
    large, small = recipe(batch_size=8), recipe(batch_size=2, gradient_accumulation_steps=4, out_dir="small")
    train.train(large)
    train.train(small)
    for key in ("train/loss", "grad_norm"):
        assert list(rows(large, key).values()) == pytest.approx(list(rows(small, key).values()), rel=1e-4)


def test_wandb_gets_the_metrics(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for settings in ({"max_iters": 2}, {"max_iters": 4, "init_from": "resume"}, {"max_iters": 1}):
        train.train(recipe(wandb_log=True, wandb_project="p", **settings))
    begun = [call.kwargs for call in wandb.init.call_args_list]
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]  # a resumed run is the same one
    logged = wandb.init.return_value.log.call_args_list
    assert [call.kwargs["step"] for call in logged if "val/loss" in call.args[0]] == [0, 2, 4, 0, 1]
    assert [call.kwargs for call in wandb.init.return_value.finish.call_args_list] == [{"exit_code": 0}] * 3


def test_a_dry_run_says_what_follows_and_writes_nothing(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.train(TrainConfig(dry_run=True, device="cpu", data_dir="/nowhere")) == 0
    out = capsys.readouterr().out
    assert "model: 123.59M parameters" in out
    assert "tokens per iteration will be: 491,520" in out
    train.train(recipe(dry_run=True, optimizer="muon", learning_rate=0, min_lr=0, warmup_iters=99, lr_decay_iters=3))
    captured = capsys.readouterr()
    assert "learning_rate = 0\n" not in captured.out  # follows from the width
    assert all(each in captured.err for each in ("the learning rate never peaks", "is 0 from step 3 on"))
    assert not Path(recipe().out_dir).exists()


def test_eval_only_writes_nothing(recipe: Recipe) -> None:
    config = recipe(eval_only=True)
    assert train.train(config) == 0
    assert not Path(config.out_dir).exists()
    train.train(recipe())
    before = files_of(config)
    train.train(recipe(eval_only=True, init_from="resume"))
    assert files_of(config) == before


def test_documents_apart_train_and_evaluate(recipe: Recipe, data_dir: Path) -> None:
    Path("x.txt").write_text("\n\n".join(f"{n} times {n} is {n * n}" for n in range(400)))
    prepare(PrepareConfig(name="doc", data_dir=str(data_dir), input=["x.txt"], separator=r"\n\n", tokenizer="byte"))
    losses = {}
    for masked in (False, True):
        config = recipe(dataset="doc", mask_documents=masked, max_iters=10, lr_decay_iters=10, block_size=64)
        assert train.train(config) == 0
        losses[masked] = evaluate(EvalConfig(out_dir=config.out_dir, device="cpu", dtype="float32"))["loss"]
    assert losses[True] != losses[False]


def test_a_text_file_is_all_that_is_needed(program: Program, tmp_path: Path) -> None:
    Path("my.text.txt").write_text("To be, or not to be: that is the question.\n" * 500)
    words = ["my.text.txt", "--max_iters=2", "--block_size=16", "--device=cpu", "--eval_iters=1"]
    result = program("train.py", *words)
    assert result.returncode == 0, result.stderr
    assert "preparing the data set out-my/data" in result.stdout
    loaded = load_checkpoint(tmp_path / "out-my" / "best.pt")
    assert (loaded.model_config.architecture, loaded.model_config.block_size) == ("qwen3", 16)
    assert [loaded.config[name] for name in ("lr_decay_iters", "eval_interval")] == [2, 1]  # follow from max_iters
    assert "preparing" not in program("train.py", *words, "--resume=auto").stdout
    os.utime("my.text.txt")
    assert "my.text.txt has changed" in program("train.py", *words, "--resume=auto").stderr  # The run's data stays.
    assert "preparing" in program("train.py", *words).stdout


def test_what_only_data_can_show_is_one_message(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="no token of the char tokenizer"):
        train.train(recipe(mask_documents=True))
    assert not Path(recipe().out_dir).exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "dropout": 0.2},
        {"optimizer": "muon", "architecture": "qwen3"},
        {"sampling": "epoch", "dropout": 0.1},
        {"optimizer": "sgd", "dtype": "bfloat16", "low_precision_residual": True},
        {"optimizer": "adafactor", "dtype": "float16"},  # with a gradient scaler
    ],
)
def test_a_resumed_run_equals_the_undisturbed_one(recipe: Recipe, settings: dict[str, Any]) -> None:
    settings = {"gradient_accumulation_steps": 2, "eval_interval": 3, **settings}
    whole, parts = recipe(**settings), recipe(**settings, out_dir="parts")
    train.train(whole)
    train.train(dataclasses.replace(parts, max_iters=3))
    train.train(dataclasses.replace(parts, init_from="resume"))
    assert same(weights(whole), weights(parts))
    for key in ("train/loss", "val/loss"):
        assert rows(whole, key) == rows(parts, key)
    steps = [row["step"] for row in read_metrics(Path(parts.out_dir, "metrics.jsonl")) if "train/loss" in row]
    assert steps == list(range(1, 7))  # none twice


@pytest.mark.parametrize(
    ("function", "call", "stopped_at"),
    [("get_batch", 1, 2), ("evaluation_batch", 5, 4), ("evaluation_batch", 1, 0)],  # 4 batches make an evaluation
)
def test_ctrl_c_saves_and_the_run_resumes(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    function: str, call: int, stopped_at: int,
) -> None:  # fmt: skip
    whole, config = recipe(dropout=0.1), recipe(dropout=0.1, out_dir="stopped")
    train.train(whole)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, function, call)
        assert train.train(config) == train.STOPPED
    assert signal.getsignal(signal.SIGINT) is handler
    assert load_checkpoint(Path(config.out_dir, "ckpt.pt")).state.step == stopped_at
    assert max((row["step"] for row in read_metrics(Path("stopped/metrics.jsonl"))), default=0) == stopped_at
    assert "--init_from=resume" in capsys.readouterr().out
    assert train.train(dataclasses.replace(config, init_from="resume")) == 0
    assert same(weights(whole), weights(config))
    assert rows(whole, "val/loss") == rows(config, "val/loss")


def test_a_second_ctrl_c_leaves_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    interrupt_at(monkeypatch, "get_batch", 1, signals=2)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe())


def test_one_command_starts_resumes_and_ends(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    whole, config = recipe(out_dir="whole", max_iters=9), recipe(resume="auto", max_iters=9, checkpoint_interval="1")
    train.train(whole)
    train.train(dataclasses.replace(config, max_iters=4))
    assert "resuming" not in capsys.readouterr().out
    train.train(config)
    out = capsys.readouterr().out
    assert "after 4 steps" in out
    assert "changed since the checkpoint: max_iters = 9, was 4" in out
    for _ in range(2):  # the second time there is nothing left to do
        assert same(weights(whole), weights(config))
        assert train.train(config) == 0
    assert not Path(config.out_dir, "previous-1").exists()


def test_a_loaded_model_keeps_its_shape(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    train.train(recipe(out_dir="base"))
    command = recipe(init_from="base", resume="auto", n_layer=7, bias=True)
    train.train(dataclasses.replace(command, max_iters=4))
    assert train.train(command) == 0
    assert "n_layer = 7 is ignored: the model that is loaded has n_layer = 2" in capsys.readouterr().err
    last = load_checkpoint(Path(command.out_dir, "ckpt.pt"))
    assert (last.state.step, last.model_config.n_layer, last.config["n_layer"]) == (6, 2, 2)
    assert last.config["init_from"] == "base"
    assert json.loads(Path(command.out_dir, "config.json").read_text())["n_layer"] == 2


def test_a_second_run_in_the_same_folder_is_refused(trained: Path, recipe: Recipe) -> None:
    before = files_of(recipe())
    with locked(trained / "lock", "a run"), pytest.raises(UserError, match=rf"process {os.getpid()} on "):
        train.train(recipe())
    assert files_of(recipe()) == before


def test_without_always_save_only_better_models_are_kept(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4])
    monkeypatch.setattr(train, "estimate_loss", lambda *_: {"train": 1.0, "val": next(losses)})
    train.train(recipe(max_iters=6, eval_interval=2, always_save_checkpoint=False, keep_checkpoints=9))
    out = Path(recipe().out_dir)
    assert load_checkpoint(out / "best.pt").state.step == 2
    assert [load_checkpoint(path).state.step for path in checkpoints_of(out)] == [6, 2]  # the last, and the best


def test_finetuning_that_only_gets_worse_still_leaves_its_best(recipe: Recipe) -> None:
    train.train(recipe(out_dir="base", max_iters=100, lr_decay_iters=100, eval_interval=100))
    train.train(recipe(init_from="base/ckpt.pt", learning_rate=0.3, min_lr=0.1, always_save_checkpoint=False))
    losses = rows(recipe(), "val/loss")
    assert min(losses, key=lambda step: losses[step]) == 0
    best = load_checkpoint(Path(recipe().out_dir, "best.pt"))
    assert best.state.best_val_loss == pytest.approx(min(losses[4], losses[6]))


def test_a_disk_that_fills_up_is_one_message_and_keeps_the_old_checkpoint(trained: Path, recipe: Recipe) -> None:
    before = (trained / "ckpt.pt").read_bytes()
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*\.pt"):
        train.train(recipe(init_from="resume", max_iters=3))
    assert (trained / "ckpt.pt").read_bytes() == before
    assert list(trained.glob("*.tmp")) == []


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adamw", "float32"), ("muon", "float32"), ("sgd", "float32"), ("adafactor", "float32"), ("adamw", "float16")],
)
def test_steps_that_are_not_finite_are_skipped_and_counted(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, optimizer: str, dtype: str
) -> None:
    poisoned, at = {2, 3}, []
    real_batch, real_loss, real_step = data.get_batch, train.compute_loss, train.step_if_finite

    def get_batch(dataset: Any, step: int, **settings: Any) -> Any:
        at.append(step)
        return real_batch(dataset, step, **settings)

    def compute_loss(run: Any, network: Any, x: Any, y: Any) -> torch.Tensor:
        loss = real_loss(run, network, x, y)
        return loss * float("nan") if torch.is_grad_enabled() and at[-1] in poisoned else loss

    def step_if_finite(optimizer: torch.optim.Optimizer, is_finite: torch.Tensor) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        states = [{k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in parameters]
        real_step(optimizer, is_finite)
        assert bool(is_finite) == (at[-1] not in poisoned)
        if not is_finite:
            assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
            for p, state in zip(parameters, states, strict=True):
                assert all(torch.equal(optimizer.state[p][name], value) for name, value in state.items())

    monkeypatch.setattr(data, "get_batch", get_batch)
    monkeypatch.setattr(train, "compute_loss", compute_loss)
    monkeypatch.setattr(train, "step_if_finite", step_if_finite)
    config = recipe(optimizer=optimizer, dtype=dtype)
    assert train.train(config) == 0
    last = load_checkpoint(Path(config.out_dir, "ckpt.pt"))
    assert (last.state.skipped, last.state.step) == (2, 6)
    assert all(tensor.isfinite().all() for tensor in last.weights.values())
    assert [step for step, loss in rows(config, "train/loss").items() if loss is None] == [3, 4]

    poisoned |= set(range(6, 100))
    before = Path(config.out_dir, "ckpt.pt").read_bytes()
    changes: dict[str, Any] = {"init_from": "resume", "max_iters": 50, "max_bad_steps": 3, "eval_interval": 100}
    with pytest.raises(DivergedError, match="3 steps in a row, up to") as caught:
        train.train(dataclasses.replace(config, **changes))
    assert caught.value.exit_code == 3
    assert Path(config.out_dir, "ckpt.pt").read_bytes() == before


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoints(recipe: Recipe) -> None:
    train.train(recipe(max_iters=4))
    before = Path(recipe().out_dir, "ckpt.pt").read_bytes()
    with pytest.raises(DivergedError, match=r"validation loss nan at step 8"):
        train.train(recipe(max_iters=20, init_from="resume", decay_lr=False, learning_rate=1e30, grad_clip=0.0))
    assert Path(recipe().out_dir, "ckpt.pt").read_bytes() == before
    assert RunRecord(Path(recipe().out_dir)).state == "diverged"


def test_float16_skips_a_norm_that_overflows_though_no_gradient_does(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, max_norm: torch.tensor(float("inf")))
    train.train(recipe(dtype="float16", max_iters=2))
    last = load_checkpoint(Path(recipe().out_dir, "ckpt.pt"))
    assert last.state.skipped == 2
    assert all((state["exp_avg"] == 0).all() for state in last.optimizer["state"].values())  # type: ignore[index]


def test_on_mps_nothing_needs_float64_pinned_memory_or_cuda(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Mac is at hand: the CPU plays one, and everything that Metal can't do raises."""
    import torch._dynamo.trace_rules as rules  # which the mode below needs; lists torch's functions at first use

    rules.get_torch_obj_rule_map()  # not those that are put in their place here

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), func
            return out

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("Metal can't do this")

    for name in ("synchronize", "get_rng_state", "set_rng_state", "set_device", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    monkeypatch.setattr(torch.Tensor, "pin_memory", forbidden)
    synchronize = MagicMock()
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    monkeypatch.setattr(torch.mps, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", torch.set_rng_state)
    monkeypatch.setattr(train, "choose_device", lambda *_: Device("cpu", "mps", torch.float32, False))
    config = recipe(dropout=0.1, sample_interval=0)  # drawing goes back to the CPU where the device says mps
    with NoFloat64():
        assert train.train(config) == 0
        assert train.train(dataclasses.replace(config, max_iters=8, init_from="resume")) == 0
    assert synchronize.called


@pytest.mark.slow
def test_the_readmes_run_reaches_its_loss(downloads: Path, data_dir: Path, tmp_path: Path) -> None:
    """The CPU command of the README in float32, a minute: at most 1.91 over the whole split; the original has 1.898."""
    prepare(PrepareConfig(name="shakespeare_char", data_dir=str(data_dir)))
    torch.set_num_threads(os.cpu_count() or 1)
    command = next(line for line in (ROOT / "README.md").read_text().splitlines() if "--max_iters=2000" in line)
    words = [str(ROOT / "config" / "train_shakespeare_char.py"), *command.split()[3:], "--dtype=float32"]
    config = parse(TrainConfig, [*words, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}"], "")
    assert train.train(config) == 0
    assert evaluate(EvalConfig(out_dir=config.out_dir, data_dir=str(data_dir), dtype="float32"))["loss"] <= 1.91
