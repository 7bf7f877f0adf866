"""Talking to a model: OpenAI's API, the terminal; and from a file of chats to held-out answers and adapters."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from nanogpt.chats import BEGINS, COUNTS, prompt_of, with_template
from nanogpt.checkpoint import load_checkpoint
from nanogpt.cli import parse
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data import get_batch, open_dataset
from nanogpt.engine import Engine, Request, Sampling
from nanogpt.errors import ConfigError, DataError
from nanogpt.evaluate import evaluate
from nanogpt.export import export
from nanogpt.files import read_json, write_json
from nanogpt.model import GPT
from nanogpt.prepare import prepare
from nanogpt.settings import ChatConfig, EvalConfig, ExportConfig, PrepareConfig
from nanogpt.tokenizer import ByteTokenizer
from nanogpt.train import train
from tests.conftest import save_model
from tests.test_serve import Server, serving

Recipe = Callable[..., TrainConfig]
TOKENIZER = with_template(ByteTokenizer())
TALK: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]


def make_model(opinions: float = 8.0, **shape: Any) -> GPT:
    torch.manual_seed(1)
    size = {"block_size": 128, "vocab_size": 320, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**{**size, "architecture": "qwen3", "bias": False, **shape})).eval()
    with torch.no_grad():
        model.lm_head.weight *= opinions
    return model


@pytest.fixture
def chat_model(tmp_path: Path) -> str:
    """A folder with a model that can chat, in Hugging Face's format."""
    save_model(tmp_path / "chatty", make_model(vocab_size=259), TOKENIZER)
    return str(tmp_path / "chatty")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(make_model(), TOKENIZER) as server:
        yield server


def test_the_official_client_talks(server: Server) -> None:
    prompt = prompt_of(TOKENIZER, TALK)
    engine = Engine(make_model(), 1, vocab_size=TOKENIZER.vocab_size)
    expected = []
    for seed in (7, 8):
        [row] = engine.complete([Request(prompt, 30, Sampling(), seed, TOKENIZER.end_tokens)])
        expected.append(TOKENIZER.decode([token for token in row.new_tokens if token not in TOKENIZER.end_tokens]))
    settings: dict[str, Any] = {"model": "m", "messages": TALK, "max_tokens": 30, "seed": 7, "n": 2}
    whole = server.client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in whole.choices] == expected
    assert whole.usage
    assert whole.usage.prompt_tokens == len(prompt)
    logprobs = whole.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in logprobs.content)
    said = b"".join(bytes(each.bytes or []) for each in logprobs.content)
    assert said.removesuffix(b"<|im_end|>").decode(errors="replace") == expected[0]
    streamed, usage = ["", ""], None
    for event in server.client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        for choice in event.choices:
            streamed[choice.index] += choice.delta.content or ""
        usage = event.usage or usage
    assert (streamed, usage) == (expected, whole.usage)


def test_parts_of_a_message_and_the_newer_name_of_a_limit(server: Server) -> None:
    answers = []
    for content in ("Hello", [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]):
        body = {"model": "m", "messages": [{"role": "user", "content": content}], "temperature": 0}
        answers.append(server.ask("/v1/chat/completions", json.dumps({**body, "max_completion_tokens": 9}).encode())[1])
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["completion_tokens"] <= 9


def test_what_cannot_be_answered_is_said(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="messages"):
        server.client.chat.completions.create(model="m", messages=[])
    with pytest.raises(openai.BadRequestError, match="of at most 128"):
        server.client.chat.completions.create(model="m", messages=[{"role": "user", "content": "long" * 99}])
    with serving(make_model()) as plain:
        assert plain.ask("/v1/models")[1]["data"][0]["chats"] is False
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            plain.client.chat.completions.create(model="m", messages=TALK)


def test_the_terminal(
    chat_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from nanogpt import chat

    asked: list[list[dict[str, str]]] = []

    def prompt(tokenizer: Any, messages: Any) -> list[int]:
        asked.append([dict(each) for each in messages])
        return prompt_of(tokenizer, messages)

    monkeypatch.setattr(chat, "prompt_of", prompt)
    lines = ["Hello", "Again", "x" * 200, "/reset", "/system Be brief.", "/what", "Hi"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    settings = {"init_from": chat_model, "max_new_tokens": 5, "device": "cpu", "dtype": "float32"}
    chat.chat(ChatConfig(**settings))
    out = capsys.readouterr().out
    assert "/reset forgets" in out
    assert "error: the message has" in out  # and the conversation continues
    assert [each[-1]["content"] for each in asked if each[-1]["content"]][:2] == ["Hello", "Again"]
    assert [each["role"] for each in asked[2]] == ["user", "assistant", "user"]
    assert asked[-1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    save_model(tmp_path / "plain", make_model(), ByteTokenizer())
    with pytest.raises(DataError, match="no chat template"):
        chat.chat(ChatConfig(**{**settings, "init_from": str(tmp_path / "plain")}))


def write_chats(path: Path, count: int = 60) -> None:
    rows: list[Any] = [{"prompt": f"Twice {n}?", "completion": f"{2 * n}"} for n in range(count // 2)]
    rows += [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes" * (n % 3 + 1)}]}
             for n in range(count - count // 2)]  # fmt: skip
    rows += [
        {"messages": [{"role": "user", "content": "alone"}]},
        {"text": "no chat"},
        {"prompt": 3, "completion": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare_chats(data_dir: Path, tokenizer: str = "byte") -> None:
    """The data set `mine` of the conversations of `write_chats`."""
    write_chats(Path("chats.jsonl"))
    prepare(PrepareConfig(name="mine", input=["chats.jsonl"], chat=True, data_dir=str(data_dir), tokenizer=tokenizer,
                          val_fraction=0.2))  # fmt: skip


def test_a_file_of_chats_becomes_ids_and_marks(tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl")
    words = ["mine", f"--input={tmp_path / 'chats.jsonl'}", "--chat", "--tokenizer=byte", "--val_fraction=0.2"]
    prepare(parse(PrepareConfig, [*words, f"--data_dir={tmp_path}"], "usage", "name"))
    about = read_json(tmp_path / "mine" / "dataset.json")
    assert about["skipped"] == {"row: no conversation with an answer": 3}
    assert sum(about["documents"].values()) == 60
    dataset = open_dataset(tmp_path / "mine")
    assert dataset.tokenizer.chat_template
    ids, marks = dataset.train, dataset.chats["train"].marks
    assert len(ids) == len(marks)
    assert int((marks & BEGINS > 0).sum()) == about["documents"]["train"]
    counted = dataset.tokenizer.decode(ids[marks & COUNTS > 0].tolist())
    assert set(counted.split("<|im_end|>")) <= {"", "yes", "yesyes", "yesyesyes", *(str(2 * n) for n in range(30))}
    settings: dict[str, Any] = {"batch_size": 4, "gradient_accumulation_steps": 2, "block_size": 64, "seed": 3}
    config = TrainConfig(**settings)
    whole, half = get_batch(dataset, 5, config, range(8)), get_batch(dataset, 5, config, range(4, 8))
    assert all(torch.equal(a[4:], b) for a, b in zip(whole, half, strict=True))  # whoever asks


def test_what_a_template_refuses_is_left_out_and_messages_come_before_a_prompt(chat_model: str, tmp_path: Path) -> None:
    strict = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}<|im_end|>"
    )
    write_json(Path(chat_model, "tokenizer_config.json"), {"chat_template": strict})
    talks = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{n}"}] for n in range(60)]
    rows: list[Any] = [{"messages": talk[n % 10 == 0 :], "prompt": "of UltraChat"} for n, talk in enumerate(talks)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(PrepareConfig(name="mine", input=[str(tmp_path / "chats.jsonl")], chat=True, tokenizer=chat_model,
                          data_dir=str(tmp_path), val_fraction=0.3))  # fmt: skip
    chats = open_dataset(tmp_path / "mine").chats
    assert sum(int((chats[split].marks & BEGINS > 0).sum()) for split in ("train", "val")) == 54
    with pytest.raises(ConfigError, match="use --tokenizer=byte"):
        parse(PrepareConfig, ["x", "--chat", "--tokenizer=char", "--input=x"], "", "name")


def test_finetuning_teaches_the_answers(recipe: Recipe, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    prepare_chats(data_dir)
    save_model(tmp_path / "base", make_model(opinions=1.0, n_embd=32), ByteTokenizer())
    settings: dict[str, Any] = {"dataset": "mine", "data_dir": str(data_dir), "device": "cpu", "dtype": "float32"}
    config = recipe(**settings, init_from=str(tmp_path / "base"), block_size=64, max_iters=150, eval_interval=150,
                    learning_rate=1e-2, batch_size=4, gradient_accumulation_steps=2)  # fmt: skip
    assert train(config) == 0
    before = evaluate(EvalConfig(**settings, init_from=str(tmp_path / "base")))
    after = evaluate(EvalConfig(**settings, out_dir=config.out_dir))
    assert before["answers"] == after["answers"] > 5
    assert after["logprob"] > before["logprob"] / 2
    assert after["loss"] == pytest.approx(-after["logprob"] * after["answers"] / after["tokens"])
    assert 0 < after["exact_match"] <= 1
    trained = load_checkpoint(Path(config.out_dir, "best.pt"))
    assert trained.tokenizer.chat_template
    # What an evaluation counts is the loss of the targets that training sees.
    model, dataset = trained.build_model(), open_dataset(data_dir / "mine")
    chats = dataset.chats["val"]
    x, y, documents = map(torch.from_numpy, chats.batch(range(len(chats.rows(64))), 64))
    logits = model(x, y, document_ids=documents)[0][..., : dataset.tokenizer.vocab_size]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    assert loss.item() == pytest.approx(after["loss"], abs=1e-4)


@pytest.mark.parametrize("shape", [{"n_kv_head": 1}, {"architecture": "gpt2", "bias": True, "activation": "gelu_tanh"}])
def test_peft_loads_the_adapters(shape: dict[str, Any], recipe: Recipe, tmp_path: Path) -> None:
    import peft
    import transformers

    save_model(tmp_path / "base", make_model(vocab_size=259, **shape), TOKENIZER)
    prepare_chats(tmp_path, tokenizer=str(tmp_path / "base"))
    config = recipe(dataset="mine", data_dir=str(tmp_path), init_from=str(tmp_path / "base"), block_size=64,
                    max_iters=5, lora_rank=3, learning_rate=1e-2)  # fmt: skip
    assert train(config) == 0
    export(parse(ExportConfig, ["--to=peft", f"--out_dir={config.out_dir}", f"--output={tmp_path / 'adapter'}"], ""))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.tensor([prompt_of(TOKENIZER, TALK)])
    before = base(ids).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    ours, _ = load_checkpoint(Path(config.out_dir, "best.pt")).build_model()(ids, ids)
    assert not torch.allclose(theirs, before, atol=1e-3)
    torch.testing.assert_close(theirs, ours[..., :259], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="this model has no adapters"):
        export(ExportConfig(init_from=str(tmp_path / "base"), to="peft", output=str(tmp_path / "none")))
