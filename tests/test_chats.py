"""Conversations: rendered as transformers renders them, what of them counts, and how they fill the rows of a batch."""

from typing import Any

import numpy as np
import pytest
import torch

from nanogpt.chats import BEGINS, COUNTS, Chats, Message, conversation_ids, prompt_of, render, with_template
from nanogpt.errors import DataError
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, from_description, train_bpe

TALK: list[Message] = [
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
    talk = TALK[:3] if prompt else TALK
    expected = theirs(tokenizer).apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
    assert render(tokenizer, talk, add_generation_prompt=prompt) == expected
    if prompt:
        ids = theirs(tokenizer).apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert prompt_of(tokenizer, talk) == ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_counts_is_each_answer_and_its_end(name: str) -> None:
    tokenizer = with_text(TEMPLATES[name])
    ids, counted = conversation_ids(tokenizer, TALK)
    assert tokenizer.decode(ids) == render(tokenizer, TALK)
    said = tokenizer.decode([i for i, counts in zip(ids, counted, strict=True) if counts])
    thought = "<think>\n\n</think>\n\n" if "thoughts" in name else ""
    assert said == f"It is 4. 😀<|im_end|>{thought}That is 6.<|im_end|>"


def test_an_answer_ends_with_its_turn_also_for_a_model_whose_maker_names_another_end() -> None:
    tokenizer = with_text(TEMPLATES["system by default"])
    tokenizer.generation_config = {}  # as of a base model: texts end with <|endoftext|>
    ids, counted = conversation_ids(tokenizer, TALK)
    said = tokenizer.decode([i for i, counts in zip(ids, counted, strict=True) if counts])
    assert said == "It is 4. 😀That is 6."
    extended = with_template(tokenizer)
    assert extended.has_ids_of(tokenizer)
    assert extended.decode([max(extended.end_tokens)]) == "<|im_end|>"


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(DataError, match="does not take"):
        render(with_text("{{ messages.__class__.__mro__[1].__subclasses__() }}"), TALK)


def test_what_cannot_be_rendered_is_one_sentence() -> None:
    with pytest.raises(DataError, match="no chat template"):
        render(ByteTokenizer(), TALK)
    with pytest.raises(DataError, match="turns must alternate"):
        render(with_text("{{ raise_exception('turns must alternate') }}"), TALK)


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


def test_a_conversation_without_an_answer_in_reach_is_left_out() -> None:
    assert len([part for row in Chats(np.arange(60), marks_of(40, 8, 12)).rows(16) for part in row]) == 2
    with pytest.raises(DataError, match="block_size=16"):
        Chats(np.arange(40), marks_of(40)).rows(16)
