"""Talking to a model: templates, batches of conversations, OpenAI's API, the terminal; finetuning and adapters."""

import functools
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from nanogpt.chats import BEGINS, COUNTS, Chats, Message, conversation_ids, prompt_of, render, with_template
from nanogpt.checkpoint import load_checkpoint, load_model
from nanogpt.cli import parse
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data import get_batch, open_dataset
from nanogpt.engine import Engine, Request, Sampling
from nanogpt.errors import CheckpointError, ConfigError, DataError
from nanogpt.evaluate import evaluate
from nanogpt.export import export
from nanogpt.files import read_json, write_json
from nanogpt.lora import Adapter, add_adapters, merge_adapters
from nanogpt.model import GPT
from nanogpt.prepare import prepare
from nanogpt.settings import ChatConfig, EvalConfig, ExportConfig, PrepareConfig
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, from_description, train_bpe
from nanogpt.train import train
from tests.conftest import Recipe, random_ids, save_model
from tests.test_serve import Server, serving

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


def test_the_terminal(chat_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from nanogpt import chat

    asked: list[list[dict[str, str]]] = []

    def prompt(tokenizer: Any, messages: Any) -> list[int]:
        asked.append([dict(each) for each in messages])
        return prompt_of(tokenizer, messages)

    monkeypatch.setattr(chat, "prompt_of", prompt)
    lines = ["Hello", "Again", "x" * 200, "/reset", "/system Be brief.", "/what", "Hi"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    chat.chat(ChatConfig(init_from=chat_model, max_new_tokens=5, device="cpu", dtype="float32"))
    out = capsys.readouterr().out
    assert "/reset forgets" in out
    assert "error: the message has" in out  # and the conversation continues
    assert [each["role"] for each in asked[2]] == ["user", "assistant", "user"]
    assert asked[-1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


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
    text = "{% if messages[0].role != 'user' %}{{ raise_exception('') }}{% endif %}{{ messages[-1].content }}<|im_end|>"
    write_json(Path(chat_model, "tokenizer_config.json"), {"chat_template": text})
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
    save_model(tmp_path / "base", make_model(opinions=1.0, n_embd=64), ByteTokenizer())
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


CONVERSATION: list[Message] = [
    {"role": "user", "content": " What is <b>2 + 2</b>? "},
    {"role": "assistant", "content": "It is 4. 😀"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "That is 6."},
]
# In the manner of well-known models: what their templates make use of.
TEMPLATES = {
    "system by default": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "thoughts of the last answer only": (
        "{%- set ns = namespace(last=0) %}{%- for message in messages[::-1] %}{%- if message.role == 'user' %}"
        "{%- set ns.last = messages|length - loop.index0 %}{%- break %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
        "{%- if message.role == 'assistant' and loop.index0 >= ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{{- message.content.strip('\n') + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "headers, a date and trimmed text": (
        "{{- bos_token }}{{- '<|start|>system<|end|>\n\n' }}{{- strftime_now('%Y') }}{{- '<|im_end|>' }}"
        "{%- for message in messages %}{{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim }}"
        "{{- '<|im_end|>' }}{%- endfor %}{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{%- endif %}"
    ),
    "blocks of generation": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] }}"
        "{{ eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' }}{% generation %}"
        "{{ message['content'] + eos_token }}{% endgeneration %}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>\n' }}{% endif %}\n{% endfor %}"
    ),
}


def with_text(template: str) -> Tokenizer:
    tokenizer = with_template(ByteTokenizer())
    tokenizer.chat_template = template
    return tokenizer


def theirs(tokenizer: Tokenizer) -> Any:
    from tokenizers import Tokenizer as Engine
    from transformers import PreTrainedTokenizerFast

    engine = Engine.from_str(tokenizer.definition)
    special = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=engine, chat_template=tokenizer.chat_template, **special)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_templates_render_as_in_transformers(name: str, prompt: bool) -> None:
    tokenizer = with_text(TEMPLATES[name])
    talk = CONVERSATION[:3] if prompt else CONVERSATION
    expected = theirs(tokenizer).apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
    assert render(tokenizer, talk, add_generation_prompt=prompt) == expected
    if prompt:
        ids = theirs(tokenizer).apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert prompt_of(tokenizer, talk) == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_counts_is_each_answer_and_its_end(name: str) -> None:
    tokenizer = with_text(TEMPLATES[name])
    ids, counted = conversation_ids(tokenizer, CONVERSATION)
    assert tokenizer.decode(ids) == render(tokenizer, CONVERSATION)
    said = tokenizer.decode([i for i, counts in zip(ids, counted, strict=True) if counts])
    thought = "<think>\n\n</think>\n\n" if "thoughts" in name else ""
    assert said == f"It is 4. 😀<|im_end|>{thought}That is 6.<|im_end|>"


def test_an_answer_ends_with_its_turn_also_for_a_model_whose_maker_names_another_end() -> None:
    tokenizer = with_text(TEMPLATES["system by default"])
    tokenizer.generation_config = {}  # as of a base model: texts end with <|endoftext|>
    ids, counted = conversation_ids(tokenizer, CONVERSATION)
    said = tokenizer.decode([i for i, counts in zip(ids, counted, strict=True) if counts])
    assert said == "It is 4. 😀That is 6."
    extended = with_template(tokenizer)
    assert extended.has_ids_of(tokenizer)
    assert extended.decode([max(extended.end_tokens)]) == "<|im_end|>"


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(DataError, match="does not take"):
        render(with_text("{{ messages.__class__.__mro__[1].__subclasses__() }}"), CONVERSATION)


def test_what_cannot_be_rendered_is_one_sentence() -> None:
    with pytest.raises(DataError, match="turns must alternate"):
        render(with_text("{{ raise_exception('turns must alternate') }}"), CONVERSATION)


@pytest.mark.parametrize(
    "plain",
    [ByteTokenizer(), CharTokenizer(sorted(set("abcdefghijklmnopqrstuvwxyz \n"))), train_bpe(["a b c"] * 9, 260)],
)
def test_any_vocabulary_becomes_one_for_conversations(plain: Tokenizer) -> None:
    tokenizer = with_template(plain)
    assert tokenizer.vocab_size == plain.vocab_size + 2
    assert tokenizer.encode("a b c").tolist() == plain.encode("a b c").tolist()
    again = from_description(tokenizer.describe())
    assert again.has_ids_of(tokenizer)
    assert (again.chat_template, again.end_tokens) == (tokenizer.chat_template, tokenizer.end_tokens)
    assert again.decode([max(again.end_tokens)]) == "<|im_end|>"
    assert with_template(tokenizer) is tokenizer


def marks_of(*lengths: int) -> np.ndarray:
    """Conversations of so many tokens, of which the last half counts."""
    return np.concatenate([[BEGINS, *[0] * (n - n // 2 - 1), *[COUNTS] * (n // 2)] for n in lengths]).astype(np.uint8)


def test_rows_hold_whole_conversations() -> None:
    lengths = [5, 9, 4, 30, 6, 7, 3]
    marks, ids = marks_of(*lengths), np.arange(sum(lengths))
    chats = Chats(ids, marks)
    rows = chats.rows(16)
    x, y, documents = map(torch.from_numpy, chats.batch(range(len(rows)), 16))
    assert x.shape == y.shape == documents.shape == (len(rows), 16)
    assert (marks[x[:, 0]] & BEGINS).all()  # a row begins with a conversation
    for row, (inputs, targets, belongs) in enumerate(zip(x, y, documents, strict=True)):
        for document in set(belongs.tolist()) - {-1}:
            part = inputs[belongs == document]
            assert (part.diff() == 1).all(), row
            assert marks[part[0]] & BEGINS
        is_target = targets >= 0
        assert (targets[is_target] == inputs[is_target] + 1).all()  # the next token of the same conversation
        assert (marks[targets[is_target]] & COUNTS).all()
    counting = np.flatnonzero(marks & COUNTS)
    of_the_long_one = (counting >= 18) & (counting < 48)
    found = set(y[y >= 0].tolist())
    assert found >= set(counting[~of_the_long_one].tolist())
    # Of the conversation of 30 tokens, the first 17 fit; they hold 2 of its 15 that count.
    assert found & set(counting[of_the_long_one].tolist()) == {33, 34}


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_neighbours_in_a_row_do_not_see_each_other(architecture: Any) -> None:
    lengths = [5, 9, 4, 6, 7, 3]
    marks, ids = marks_of(*lengths), np.random.default_rng(0).integers(61, size=sum(lengths))
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32, architecture=architecture))

    def total_loss(chats: Chats) -> Any:
        x, y, documents = map(torch.from_numpy, chats.batch(range(len(chats.rows(16))), 16))
        return model(x, y, document_ids=documents, return_logits=False)[1] * (y >= 0).sum()

    parts = zip(*(np.split(each, np.cumsum(lengths)[:-1]) for each in (ids, marks)), strict=True)
    assert total_loss(Chats(ids, marks)).item() == pytest.approx(sum(total_loss(Chats(*part)).item() for part in parts))


def test_a_conversation_without_an_answer_in_reach_is_left_out() -> None:
    assert len([part for row in Chats(np.arange(60), marks_of(40, 8, 12)).rows(16) for part in row]) == 2
    with pytest.raises(DataError, match="block_size=16"):
        Chats(np.arange(40), marks_of(40)).rows(16)


SMALL: dict[str, Any] = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}


def adapted(targets: str = "all", **shape: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, **shape)).eval()
    add_adapters(model, Adapter(3, 6.0, targets, "", ""))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):  # which starts as zero
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("shape", [{}, {"architecture": "qwen3", "n_kv_head": 2, "bias": False}])
def test_merged_and_unmerged_are_equal(shape: dict[str, Any]) -> None:
    model, ids = adapted(**shape), random_ids(2, 16)
    before = model(ids, ids)[0]
    names = set(GPT(GPTConfig(**SMALL, **shape)).state_dict())
    merged = merge_adapters(model)
    torch.testing.assert_close(merged(ids, ids)[0], before, atol=1e-5, rtol=0)
    assert set(merged.state_dict()) == names


@pytest.mark.parametrize(("targets", "count"), [("all", 8), ("attention", 4), ("mlp", 4)])
def test_only_adapters_are_trained(targets: str, count: int) -> None:
    model, ids = adapted(targets), random_ids(2, 16)
    model(ids, ids)[1].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * count


@pytest.fixture
def adapting(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A run of adapters, for conversations, on a tiny model of bytes in the folder `base`."""
    prepare_chats(tmp_path / "data")
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SMALL, "vocab_size": 257, "block_size": 128}, architecture="llama", bias=False))
    save_model(Path("base"), model, ByteTokenizer())
    return functools.partial(recipe, dataset="mine", block_size=128, lora_rank=2, init_from="base")


def test_a_run_of_adapters_resumes_bit_for_bit(adapting: Recipe) -> None:
    whole, parts = (adapting(out_dir=name, eval_interval=3) for name in ("whole", "parts"))
    assert train(whole) == train(replace(parts, max_iters=3)) == train(replace(parts, init_from="resume")) == 0
    whole, parts = (load_checkpoint(Path(config.out_dir, "ckpt.pt")) for config in (whole, parts))
    assert all(torch.equal(whole.weights[name], parts.weights[name]) for name in whole.weights)
    # Only what was trained is there: adapters, and the embedding that has got the two tokens of ChatML.
    assert {name for name in whole.weights if ".lora_" not in name} == {"transformer.wte.weight", "lm_head.weight"}
    trained, before = whole.build_model(), load_model("base").model
    assert trained.config.vocab_size == 320
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(trained.get_parameter(name), before.get_parameter(name))
    assert torch.equal(whole.build_model(merge=False).get_parameter(name), before.get_parameter(name))


def test_adapters_keep_their_settings_and_their_bases_folder(adapting: Recipe) -> None:
    config = adapting(max_iters=1)
    assert train(config) == 0
    assert train(replace(config, init_from="resume", lora_rank=5, max_iters=2)) == 0
    assert load_checkpoint(Path(config.out_dir, "ckpt.pt")).config["lora_rank"] == 2
    inside = replace(config, init_from=str(Path(config.out_dir, "best.pt")))
    assert "is where the adapters' model lies" in "".join(inside.problems())


def test_a_base_that_has_changed_is_named(adapting: Recipe) -> None:
    config = adapting(max_iters=1)
    assert train(config) == 0
    source = load_model("base")
    model, tokenizer = source.model, source.tokenizer
    torch.nn.init.zeros_(model.transformer.wte.weight)
    save_model(Path("base"), model, tokenizer)
    with pytest.raises(CheckpointError, match="have changed since"):
        load_checkpoint(Path(config.out_dir, "ckpt.pt")).build_model()
