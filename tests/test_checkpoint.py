import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt import checkpoint, sharded, train
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.device import Device
from nanogpt.errors import CheckpointError, UserError
from nanogpt.export import export
from nanogpt.infer.sample import sample
from nanogpt.model import GPT
from nanogpt.optim import adamw
from nanogpt.programs import ExportConfig, SampleConfig
from nanogpt.tokenizer import CharTokenizer, GPT2Tokenizer, write_meta
from tests.conftest import random_ids

Recipe = Callable[..., TrainConfig]
CPU = Device("cpu", "cpu", torch.float32, False)


@pytest.fixture
def trained(recipe: Recipe) -> Path:
    config = recipe(max_iters=2)
    train.train(config)
    return Path(config.out_dir)


def test_the_file_is_the_originals_dictionary(trained: Path) -> None:
    content = torch.load(trained / "ckpt.pt", weights_only=True)
    assert set(content) == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "nanogpt"}
    names = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert set(content["model_args"]) == names
    assert content["iter_num"] == 2
    assert content["config"]["dataset"] == "tiny"
    groups = content["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert content["nanogpt"]["tokenizer"]["kind"] == "char"


def test_a_shape_that_the_original_lacks_has_arguments_that_it_refuses(recipe: Recipe) -> None:
    train.train(recipe(max_iters=1, tied_head=False))
    assert torch.load("out/ckpt.pt", weights_only=True)["model_args"]["tied_head"] is False


def test_best_comes_without_optimizer(trained: Path) -> None:
    assert checkpoint.load(trained / "best.pt").optimizer is None
    assert (trained / "best.pt").stat().st_size < (trained / "ckpt.pt").stat().st_size / 2


def test_the_model_comes_back_tied_and_whole(trained: Path) -> None:
    loaded = checkpoint.load(trained / "ckpt.pt")
    model = loaded.model(CPU)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    fresh = GPT(loaded.model_config)
    fresh.load_state_dict(loaded.weights)
    x = random_ids(2, 8, vocab_size=20)
    assert torch.equal(model(x)[0], fresh.eval()(x)[0])


def original_checkpoint(folder: Path, dataset: str, prefix: str = "", vocab_size: int = 4) -> tuple[Path, GPT]:
    """A file as the original writes it: no key of ours, best_val_loss a tensor, perhaps a prefix."""
    model = GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=8, bias=False))
    groups = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": g, "weight_decay": w} for g, w in zip(groups, (0.1, 0.0), strict=True)])
    model(random_ids(2, 8, vocab_size=4), random_ids(2, 8, vocab_size=4))[1].backward()
    optimizer.step()
    arguments = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
        "block_size": 8,
        "bias": False,
        "vocab_size": vocab_size,
        "dropout": 0.0,
    }
    content = {
        "model": {prefix + k: v for k, v in model.state_dict().items()}
        | {f"{prefix}transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)},  # in its first versions
        "optimizer": optimizer.state_dict(),
        "model_args": arguments,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": dataset},
    }
    torch.save(content, folder / "ckpt.pt")
    return folder / "ckpt.pt", model


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_the_original_loads(tmp_path: Path, prefix: str) -> None:
    path, model = original_checkpoint(tmp_path, "letters", prefix)
    write_meta(tmp_path / "data" / "letters" / "meta.pkl", CharTokenizer("abcd"))
    loaded = checkpoint.load(path)
    assert (loaded.progress.step, loaded.progress.best_val_loss) == (5, 1.5)
    assert loaded.tokenizer.decode([0, 3]) == "ad"
    for name, tensor in loaded.model(CPU).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_checkpoint_of_the_original_without_meta_is_gpt2s_tokens(tmp_path: Path) -> None:
    path, _ = original_checkpoint(tmp_path, "openwebtext", vocab_size=50304)
    assert isinstance(checkpoint.load(path).tokenizer, GPT2Tokenizer)


def test_a_checkpoint_of_the_original_whose_characters_are_missing_says_so(tmp_path: Path) -> None:
    path, _ = original_checkpoint(tmp_path, "letters")
    with pytest.raises(CheckpointError, match=r"without its vocabulary of 4 entries, and data/letters/meta\.pkl"):
        checkpoint.load(path)
    write_meta(tmp_path / "elsewhere" / "letters" / "meta.pkl", CharTokenizer("abcd"))
    assert checkpoint.load(path, data_dir="elsewhere").tokenizer.vocab_size == 4


def test_a_run_of_the_original_is_resumed(tmp_path: Path, recipe: Recipe, data_dir: Path) -> None:
    original_checkpoint(tmp_path, "letters")
    folder = data_dir / "letters"
    write_meta(folder / "meta.pkl", CharTokenizer("abcd"))
    for name in ("train.bin", "val.bin"):
        random_ids(100, vocab_size=4).numpy().astype("uint16").tofile(folder / name)
    shape = {"n_layer": 1, "n_embd": 8, "block_size": 8}
    config = recipe(out_dir=str(tmp_path), dataset="letters", init_from="resume", max_iters=7, **shape)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save({**content, "best_val_loss": torch.tensor(0.5)}, tmp_path / "ckpt.pt")  # nothing will beat it
    best = (tmp_path / "ckpt.pt").read_bytes()
    assert train.train(config) == 0
    assert checkpoint.load(tmp_path / "ckpt.pt").progress.step == 7
    assert (tmp_path / "best.pt").read_bytes() == best  # which has no other file


def test_a_vocabulary_of_words_is_trained_on_resumed_sampled_and_handed_back(
    recipe: Recipe, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"vocab_size": 3, "itos": {0: "the", 1: " ", 2: "fox"}}
    (data_dir / "words").mkdir()
    (data_dir / "words" / "meta.pkl").write_bytes(pickle.dumps(words))
    for name in ("train.bin", "val.bin"):
        random_ids(100, vocab_size=3).numpy().astype("uint16").tofile(data_dir / "words" / name)
    for resumed in ({"max_iters": 2}, {"max_iters": 4, "init_from": "resume"}):
        assert train.train(recipe(dataset="words", **resumed)) == 0
    capsys.readouterr()
    sample(SampleConfig(out_dir="out", num_samples=1, max_new_tokens=9, device="cpu"))
    assert re.fullmatch(r"(the| |fox){10}\n-+\n", capsys.readouterr().out.split("parameters\n")[-1])
    export(ExportConfig(out_dir="out", output="flat.pt", to="flat"))
    assert checkpoint.load(Path("flat.pt"), str(data_dir)).tokenizer.decode([2, 1]) == "fox "
    with pytest.raises(UserError, match="try --to=flat"):
        export(ExportConfig(out_dir="out", output="hf"))
    assert not Path("hf").exists()


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch attacked",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "there is no checkpoint"),
        (lambda p: p.write_bytes(b""), "cannot be read as a checkpoint"),
        (lambda p: p.write_bytes(b"nonsense" * 99), "cannot be read as a checkpoint"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1000]), "cannot be read as a checkpoint"),
        (lambda p: torch.save([1, 2], p), "it holds a list"),
        (lambda p: torch.save({"model": {}}, p), "is no checkpoint of a GPT: KeyError"),
        (lambda p: torch.save({"model": Attack()}, p), "cannot be read as a checkpoint: UnpicklingError"),
        (lambda p: p.write_bytes(pickle.dumps(Attack())), "cannot be read as a checkpoint"),
    ],
)
def test_a_broken_or_hostile_file_is_refused(trained: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(trained / "ckpt.pt")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(trained / "ckpt.pt")
    assert message in str(caught.value)
    assert not Path("attacked").exists()


def test_a_flipped_bit_in_the_weights_is_found(trained: Path) -> None:
    path = trained / "ckpt.pt"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: checksum"):
        checkpoint.load(path)


def test_weights_that_do_not_fit_are_refused(trained: Path) -> None:
    content = torch.load(trained / "ckpt.pt", weights_only=True)
    del content["model"]["lm_head.weight"]
    torch.save(content, trained / "ckpt.pt")
    with pytest.raises(CheckpointError, match="the weights do not fit"):
        checkpoint.load(trained / "ckpt.pt").model(CPU)


def test_weights_that_are_views_of_fewer_numbers_become_plain(trained: Path) -> None:
    content = torch.load(trained / "ckpt.pt", weights_only=True)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        content["model"][name] = content["model"][name][:1].expand_as(content["model"][name])
    torch.save(content, trained / "ckpt.pt")
    model = checkpoint.load(trained / "ckpt.pt").model(CPU)
    assert all(parameter.is_contiguous() for parameter in model.parameters())  # an update would write beyond them


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("exp_avg", lambda value: value[:3], r"exp_avg is torch.float32 of shape \(3, 32\), where \(.*\) is needed"),
        ("exp_avg_sq", lambda value: value.int(), "exp_avg_sq is torch.int32"),
        ("exp_avg", lambda value: value.to_sparse(), "exp_avg is"),
        ("exp_avg", lambda value: value.to("meta"), "exp_avg is"),
        ("exp_avg", lambda value: "words", "'str' object has no attribute"),
        ("step", lambda value: value.expand(3), r"step is .* of shape \(3,\)"),
    ],
)
def test_an_optimizer_state_that_is_not_the_models_is_refused(
    trained: Path, recipe: Recipe, name: str, change: Callable[[Any], Any], message: str
) -> None:
    content = torch.load(trained / "ckpt.pt", weights_only=True)
    state = content["optimizer"]["state"][0]
    state[name] = change(state[name])
    torch.save(content, trained / "ckpt.pt")
    with pytest.raises(CheckpointError, match=f"the optimizer state does not fit the model: .*{message}"):
        train.train(recipe(init_from="resume"))


def test_an_optimizer_state_is_brought_into_the_form_that_the_kernel_needs(tmp_path: Path) -> None:
    path, model = original_checkpoint(tmp_path, "openwebtext", vocab_size=50304)  # of an AdamW that is not fused
    content = torch.load(path, weights_only=True)
    content["optimizer"]["state"][0]["step"] = torch.tensor(3.0, dtype=torch.float64)
    content["optimizer"]["state"][0]["exp_avg"] = torch.ones(1).expand(50304, 8)
    torch.save(content, path)
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 0.1)
    checkpoint.load(path).restore(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    state = optimizer.state[model.transformer.wte.weight]
    assert (state["step"].dtype, state["step"].item()) == (torch.float32, 3)  # fused: also where the parameter is
    assert state["exp_avg"].is_contiguous()
    assert optimizer.param_groups[0]["fused"]


def test_an_impossible_shape_is_refused(trained: Path) -> None:
    content = torch.load(trained / "ckpt.pt", weights_only=True)
    for value, message in [(0, "n_head=0: expected a value >= 1"), ("two", "is no checkpoint of a GPT: TypeError")]:
        content["nanogpt"]["model_config"]["n_head"] = value
        torch.save(content, trained / "ckpt.pt")
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(trained / "ckpt.pt")


@pytest.mark.parametrize(
    ("key", "value"), [("config", 5), ("config", [1]), ("iter_num", "x"), ("tokens", "x"), ("losses", 1.5)]
)
def test_what_is_of_another_type_is_refused(trained: Path, key: str, value: Any) -> None:
    content = torch.load(trained / "ckpt.pt", weights_only=True)
    (content if key in content else content["nanogpt"])[key] = value
    torch.save(content, trained / "ckpt.pt")
    with pytest.raises(CheckpointError, match="is no checkpoint of a GPT: its "):
        checkpoint.load(trained / "ckpt.pt")


def test_a_tokenizer_larger_than_its_model_is_refused(trained: Path) -> None:
    content = torch.load(trained / "ckpt.pt", weights_only=True)
    content["nanogpt"]["tokenizer"] = {"kind": "byte"}
    torch.save(content, trained / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"a model of 28 entries for the byte tokenizer \(257 entries\)"):
        checkpoint.load(trained / "ckpt.pt")


def test_find_prefers_the_best_and_says_what_is_missing(trained: Path, tmp_path: Path) -> None:
    out = str(trained)
    assert checkpoint.find(out, "auto").name == "best.pt"
    assert checkpoint.find(out, "last").name == "ckpt.pt"
    assert checkpoint.find(out, "some/file.pt") == Path("some/file.pt")
    (trained / "best.pt").unlink()
    assert checkpoint.find(out, "auto").name == "ckpt.pt"
    with pytest.raises(CheckpointError, match=r"has no best\.pt"):
        checkpoint.find(out, "best")
    with pytest.raises(CheckpointError, match="there is no folder nowhere"):
        checkpoint.find("nowhere", "auto")


def test_a_failed_write_leaves_the_old_checkpoint(
    trained: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    before = (trained / "ckpt.pt").read_bytes()

    def fails(*_: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(UserError, match=r"cannot write .*\.pt: disk on fire"):
        train.train(recipe(max_iters=4, init_from="resume"))
    assert (trained / "ckpt.pt").read_bytes() == before
    assert list(trained.glob("*.tmp")) == []


def test_shares_are_written_if_the_main_process_finds_none_and_their_names_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda answer, group: answer.__setitem__(0, True))
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8))
    path = tmp_path / "out" / "ckpt.dcp" / "6"
    begun = sharded.begin_write(path, model, adamw(model, 1e-3, (0.9, 0.95), 0.1), group=None)
    assert begun.done()  # since the main one has it, whatever this one sees
    path.mkdir(parents=True)
    synced: list[Path] = []
    monkeypatch.setattr(sharded, "sync_folder", synced.append)
    sharded.finish_write(path, begun, None)
    assert synced == [path, path.parent, tmp_path / "out"]


def test_what_cannot_be_read_just_now_is_not_taken_for_damaged(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained / "ckpt.prev.pt").write_bytes((trained / "ckpt.pt").read_bytes())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        checkpoint.load_last(str(trained), "data")
    assert (trained / "ckpt.pt").exists()


def test_a_checkpoint_that_had_no_time_to_take_its_name_counts(trained: Path) -> None:
    os.replace(trained / "ckpt.pt", trained / "ckpt.new.pt")
    assert checkpoint.load_last(str(trained), "data").progress.step == 2
    assert checkpoint.find(str(trained), "last").name == "ckpt.new.pt"
