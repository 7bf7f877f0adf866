import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from nanogpt import cli
from nanogpt.config import BenchConfig, GPTConfig, TrainConfig
from nanogpt.errors import ConfigError
from nanogpt.settings import _commented_fields, help_text, parse
from nanogpt.shape import PRESETS
from tests.conftest import ROOT

# every setting of the original's train.py under its name, with its default; None where ours follows the machine
ORIGINAL = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
    "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "backend": None, "device": None,
    "dtype": None, "compile": None,
}  # fmt: skip


def train(*words: str) -> TrainConfig:
    return parse(TrainConfig, words, "usage")


def test_every_setting_of_the_original_is_there_with_its_default() -> None:
    ours = dataclasses.asdict(TrainConfig())
    assert {name: ours[name] if default is not None else None for name, default in ORIGINAL.items()} == ORIGINAL


def test_every_setting_has_a_comment_for_help() -> None:
    for settings, _, _ in cli.VERBS.values():
        fields = {field.name for field in dataclasses.fields(settings)}
        comments = {name: comment for c in settings.__mro__[:-1] for _, name, comment in _commented_fields(c)}
        assert set(comments) == fields
        assert [name for name, comment in comments.items() if not comment] == []
        source = inspect.getsource(inspect.getmodule(settings) or settings)
        # a comment that is too long is torn by the formatter, and its first line would be lost
        assert re.findall(r"^    \w+: .+ = \($", source, flags=re.MULTILINE) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n_embd=100"], "n_embd=100 is not a multiple of n_head=12; n_embd=96 or 108 would be"),
        (["--dropout=1"], "dropout=1.0: expected a value in [0, 1)"),
        (["--batch_size=0"], "batch_size=0: expected a value >= 1"),
        (["--device=gpu"], "device='gpu': expected auto, cpu, mps, cuda or cuda:N"),
        (
            ["--init_from=gpt5"],
            "init_from='gpt5': expected scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, ORGANISATION/NAME",
        ),
        (["--init_from=out/ckpt.pt"], "init_from='out/ckpt.pt': there is no such file or folder"),
        (["--init_from=m.gguf"], "init_from='m.gguf': there is no such file or folder"),
        (["--init_from=./out"], "init_from='./out': there is no such file or folder"),
        (["--learning_rate=1e-5"], "min_lr=6e-05 is above learning_rate=1e-05"),
        (["--dtype=fp16"], "expected auto, float32, bfloat16, float16"),
        (["--seed=-1"], "seed=-1: expected a value from 0 to"),
    ],
)
def test_an_impossible_config_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(*words)
    assert message in str(caught.value)


def test_the_defaults_and_every_recipe_are_valid() -> None:
    train()
    for recipe in sorted((ROOT / "config").glob("*.py")):
        train(str(recipe))
    assert list(BenchConfig().problems()) == []
    assert list(GPTConfig().problems()) == []


def test_a_recipe_of_the_original_is_understood(tmp_path: Path) -> None:
    recipe = tmp_path / "finetune.py"
    recipe.write_text(
        "import time\nout_dir = 'out-x'\neval_interval = 5\nwandb_run_name = 'ft-' + str(time.time())\n"
        "always_save_checkpoint = False\nlearning_rate = 3e-5\ndecay_lr = False\n"
    )
    config = train(str(recipe))
    assert config.wandb_run_name.startswith("ft-")
    assert not config.always_save_checkpoint


def test_muon_brings_its_rates(tmp_path: Path) -> None:
    file = tmp_path / "recipe.py"
    file.write_text('weight_decay = 0.2\noptimizer = "muon"\nn_embd = 512\nn_head = 8\nlr_decay_iters = 165\n')
    parsed = parse(TrainConfig, [str(file), "--decay_share=0.5"], "")
    assert (parsed.schedule, parsed.warmup_iters, parsed.beta1) == ("wsd", 0, 0.8)
    assert (parsed.weight_decay, parsed.decay_share) == (0.2, 0.5)  # what is said counts
    derived = parsed.with_derived_rates()
    assert (derived.learning_rate, derived.muon_momentum) == (0.005, 0.85)  # half of that at 128 channels
    own = parse(TrainConfig, [str(file), "--learning_rate=0.00123", "--muon_momentum=0.5"], "").with_derived_rates()
    assert (own.learning_rate, own.muon_momentum) == (0.00123, 0.5)
    with pytest.raises(ConfigError, match=r"min_lr=0\.1 is above learning_rate=0\.005"):
        parse(TrainConfig, [str(file), "--min_lr=0.1"], "")
    with pytest.raises(ConfigError, match="learning_rate=0 follows from the shape with optimizer=muon only"):
        parse(TrainConfig, [str(file), "--optimizer=adamw", "--learning_rate=0"], "")
    back = parse(TrainConfig, [str(file), "--optimizer=adamw"], "")  # and takes them with it
    assert (back.learning_rate, back.schedule, back.beta1, back.n_embd) == (6e-4, "cosine", 0.9, 512)
    again = parse(TrainConfig, [str(file), "--optimizer=muon"], "")  # it is chosen already
    assert (again.weight_decay, again.beta1) == (0.2, 0.8)
    assert TrainConfig().with_derived_rates() == TrainConfig()


def test_a_models_name_stands_for_its_shape(tmp_path: Path) -> None:
    parsed = parse(TrainConfig, ["--n_layer=3", "--model=qwen3-0.6b"], "")
    assert (parsed.n_layer, parsed.n_embd, parsed.head_size, parsed.architecture) == (3, 1024, 128, "qwen3")
    file = tmp_path / "recipe.py"
    file.write_text('n_layer = 12\nmodel = "gpt2-xl"\n')  # 12 is the default, and said all the same
    parsed = parse(TrainConfig, [str(file), "--n_head=20"], "")
    assert (parsed.n_layer, parsed.n_head, parsed.n_embd) == (12, 20, 1600)
    with pytest.raises(ConfigError, match="model='gpt3': expected one of gpt2, gpt2-medium"):
        parse(TrainConfig, ["--model=gpt3"], "")
    for name in PRESETS:  # nothing of the earlier shape is left
        both, alone = (
            parse(TrainConfig, [str(file), f"--model={name}"], ""),
            parse(TrainConfig, [f"--model={name}"], ""),
        )
        assert both == alone
        assert not list(both.problems())
    file.write_text('model = "qwen3-0.6b"\n')
    assert parse(TrainConfig, [str(file), "--model=llama-2-7b"], "") == parse(TrainConfig, ["--model=llama-2-7b"], "")
    assert all(name in help_text(TrainConfig, "").replace("\n" + " " * 40, " ") for name in PRESETS)
