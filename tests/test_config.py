"""The settings: what stays as people know it, what is refused, what follows from what, and on which hardware."""

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt import cli
from nanogpt.config import PRESETS, GPTConfig, Machine, TrainConfig
from nanogpt.device import choose_device
from nanogpt.errors import ConfigError
from nanogpt.metrics import show_log_lines
from nanogpt.model import GPT
from nanogpt.settings import BenchConfig
from tests.conftest import ROOT

# every setting of the original's train.py under its name, with its default; None where ours depends on the machine
ORIGINAL = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
    "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "backend": None, "device": None,
    "dtype": None, "compile": None,
}  # fmt: skip
# vocabulary and parameters of the published checkpoints
PUBLISHED = {
    "gpt2": (50257, 124_439_808), "gpt2-medium": (50257, 354_823_168), "gpt2-large": (50257, 774_030_080),
    "gpt2-xl": (50257, 1_557_611_200), "llama-3.2-1b": (128256, 1_235_814_400),
    "llama-3.2-3b": (128256, 3_212_749_824), "llama-2-7b": (32000, 6_738_415_616),
    "llama-3.1-8b": (128256, 8_030_261_248), "qwen3-0.6b": (151936, 596_049_920),
    "qwen3-1.7b": (151936, 1_720_574_976), "qwen3-4b": (151936, 4_022_468_096), "qwen3-8b": (151936, 8_190_735_360),
}  # fmt: skip


def train(*words: str) -> TrainConfig:
    return cli.parse(TrainConfig, words, "usage")


def test_every_setting_of_the_original_is_there_with_its_default() -> None:
    ours = vars(TrainConfig())
    assert {name: None if default is None else ours[name] for name, default in ORIGINAL.items()} == ORIGINAL


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_setting_has_a_comment_which_is_its_help(verb: str) -> None:
    settings = cli.VERBS[verb][0]
    text = cli.help_text(settings, "")
    assert [field.name for field in dataclasses.fields(settings) if f"  --{field.name}=" not in text] == []


def test_the_defaults_and_every_recipe_are_valid() -> None:
    for recipe in sorted((ROOT / "config").glob("*.py")):
        train(str(recipe))
        cli.parse(BenchConfig, [str(recipe)], "usage")
    assert list(GPTConfig().problems()) == []


def documented_commands() -> list[list[str]]:
    pages = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"), *(ROOT / "config").glob("*.py")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = []
    for line in re.findall(r"^(?:# \$ |\t\$\(PY\) |python |nanogpt |torchrun ).*$", text, flags=re.MULTILINE):
        match = re.search(r"\b(?:(train|sample|bench)\.py|nanogpt) (.*)", line)
        if match and "`" not in line and "…" not in line:
            found.append([*([match[1]] if match[1] else []), *shlex.split(match[2], comments=True)])
    return [command for command in found if command[0] in cli.VERBS]


def test_every_documented_command_is_understood(tmp_path: Path) -> None:
    for folder in ("config", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for folder in ("FOLDER", "shakespeare-hf", "out-pystdlib-fast"):
        (tmp_path / folder).mkdir()
    commands = documented_commands()
    assert len(commands) > 50
    for verb, *words in commands:
        if "--help" in words or "config/my_run.py" in words:
            continue
        settings, _, positional = cli.VERBS[verb]
        cli.parse(settings, words, "usage", positional)


@pytest.mark.parametrize(
    ("words", "message"),
    [("train --n_embd=100", "n_embd=100 is not a multiple of n_head=12"),
     ("train --n_kv_head=4", "n_kv_head=4: GPT-2 has n_head=12; others need --architecture=llama"),
     ("train --dropout=1", "dropout=1.0: expected a value in [0, 1)"),
     ("train --device=gpu", "device='gpu': expected auto, cpu, mps, cuda or cuda:N"),
     ("train --optimizer=SGD", "optimizer='SGD': expected adamw, muon, or a class of torch.optim in lower case"),
     ("train --checkpoint_interval=1h", "checkpoint_interval='1h': expected steps, such as 500, or minutes"),
     ("train --init_from=out/ckpt.pt", "an existing folder or checkpoint"),
     ("train --learning_rate=1e-5", "min_lr=6e-05 is above learning_rate=1e-05: set --min_lr=1e-06 or --decay_lr=0"),
     ("export out", "output is missing"), ("export --output=x --dtype=q8_0", "dtype=q8_0: --to=hf cannot hold it"),
     ("prepare", "which data set? for example"), ("prepare x --tokenizer=bpe:100", "bpe:N (from 257)"),
     ("serve --port=70000", "port=70000: expected 0 to 65535")],
)  # fmt: skip
def test_an_impossible_config_is_refused(words: str, message: str) -> None:
    verb, *rest = words.split()
    settings, _, positional = cli.VERBS[verb]
    with pytest.raises(ConfigError) as caught:
        cli.parse(settings, rest, "usage", positional)
    assert message in str(caught.value)


def test_muon_brings_its_rates_which_explicit_ones_override(tmp_path: Path) -> None:
    file = tmp_path / "recipe.py"
    file.write_text('weight_decay = 0.2\noptimizer = "muon"\nn_embd = 512\nn_head = 8\nlr_decay_iters = 165\n')
    parsed = train(str(file), "--decay_share=0.5")
    assert (parsed.schedule, parsed.warmup_iters, parsed.beta1) == ("wsd", 0, 0.8)
    assert (parsed.weight_decay, parsed.decay_share) == (0.2, 0.5)
    derived = parsed.with_muon_rates()
    assert (derived.learning_rate, derived.muon_momentum) == (0.005, 0.85)  # half of the rate at 128 channels
    own = train(str(file), "--learning_rate=0.00123", "--muon_momentum=0.5").with_muon_rates()
    assert (own.learning_rate, own.muon_momentum) == (0.00123, 0.5)
    with pytest.raises(ConfigError, match=r"min_lr=0\.1 is above learning_rate=0\.005"):
        train(str(file), "--min_lr=0.1")
    back = train(str(file), "--optimizer=adamw")
    assert (back.learning_rate, back.schedule, back.beta1, back.n_embd) == (6e-4, "cosine", 0.9, 512)


def test_a_models_name_stands_for_its_shape(tmp_path: Path) -> None:
    parsed = train("--n_layer=3", "--model=qwen3-0.6b")
    assert (parsed.n_layer, parsed.n_embd, parsed.head_size, parsed.architecture) == (3, 1024, 128, "qwen3")
    file = tmp_path / "recipe.py"
    file.write_text('n_layer = 12\nmodel = "gpt2-xl"\n')  # 12 is the default, but explicit here
    assert train(str(file)).n_layer == 12
    for name in PRESETS:  # Nothing of the earlier shape is left.
        assert train(str(file), f"--model={name}") == train(f"--model={name}")
    text = re.sub(r"\s+", " ", cli.help_text(TrainConfig, ""))
    assert [name for name in PRESETS if name not in text] == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_of_their_models(name: str) -> None:
    vocab_size, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS[name], vocab_size=vocab_size))
    assert model.get_num_params(non_embedding=False) == parameters


Pretend = Callable[..., None]
QWEN3: Any = {"architecture": "qwen3"}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """`pretend("cuda")`: a machine with two GPUs; or with Metal, or neither."""

    def change(
        kind: str, capability: tuple[int, int] = (9, 0), gpus: int = 2, amx: bool = False, cpu: str = ""
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "NVIDIA A100-SXM4-80GB")
        monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)  # set_device itself checks
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
        found = {"amx_tile": amx, "avx512_bf16": True, "cpu_name": cpu}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)

    return change


def test_without_a_gpu_the_cpu_is_taken_and_named(pretend: Pretend, capsys: pytest.CaptureFixture[str]) -> None:
    show_log_lines()
    for amx, cpu, dtype in ((True, "Intel", "bfloat16"), (False, "Intel", "float32"), (False, "AMD", "bfloat16")):
        pretend("cpu", amx=amx, cpu=cpu)
        chosen = choose_device(TrainConfig())
        assert (chosen.name, chosen.dtype, chosen.peak_flops()) == ("cpu", getattr(torch, dtype), None)
        assert capsys.readouterr().out.startswith("device cpu, dtype ")
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ConfigError, match=f"--device={name}, but torch"):
            choose_device(Machine(device=name))


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_cuda_is_preferred_and_never_emulates(
    pretend: Pretend, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    pretend("cuda", capability)
    for local_rank, expected in ((None, "cuda:0"), (1, "cuda:1")):
        chosen = choose_device(TrainConfig(), local_rank)
        assert (chosen.name, chosen.dtype, chosen.peak_flops()) == (expected, dtype, 312e12)
    with pytest.raises(ConfigError, match="2 GPUs: each process needs its own"):
        choose_device(TrainConfig(), local_rank=2)
    pretend("cuda", gpus=1)  # a launcher may show each process one GPU
    assert choose_device(Machine(), local_rank=3).name == "cuda:0"


def test_mps_computes_in_float32_unless_asked(pretend: Pretend) -> None:
    pretend("mps")
    chosen = choose_device(TrainConfig())
    assert (chosen.name, chosen.dtype, chosen.compile) == ("mps", torch.float32, False)
    with pytest.raises(ConfigError, match="float16 is not supported on mps"):
        choose_device(Machine(dtype="float16"))


@pytest.mark.parametrize(
    ("kind", "settings", "compiler", "has_triton", "expected"),
    [
        ("cpu", QWEN3, "g++", False, True),
        ("cpu", {**QWEN3, "max_iters": 1, "gradient_accumulation_steps": 1}, "g++", False, False),
        ("cpu", {}, "g++", False, False),  # GPT-2 gains nothing
        ("cpu", {"compile": True}, None, False, True),
        ("cuda", {}, "gcc", True, True),
        ("cuda", {}, "gcc", False, False),
        ("cuda", {"max_iters": 10}, "gcc", True, False),
    ],
)
def test_compiled_is_where_it_pays_and_can_be(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, kind: str, settings: Any, compiler: str | None,
    has_triton: bool, expected: bool,
) -> None:  # fmt: skip
    pretend(kind)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("nanogpt.device.find_spec", lambda _: has_triton or None)
    monkeypatch.setattr("nanogpt.device.shutil.which", lambda _: compiler)
    monkeypatch.setattr("nanogpt.device.Path.exists", lambda _: True)
    assert choose_device(TrainConfig(**settings)).compile == expected
