"""The loss of a whole split; benchmarks, against transformers and lm-eval on the same weights."""

import functools
import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt import train
from nanogpt.config import GPTConfig
from nanogpt.device import Device
from nanogpt.errors import ConfigError, DataError
from nanogpt.evaluate import BENCHMARKS, Scorer, evaluate, read_examples, whole_split_loss
from nanogpt.export import export
from nanogpt.model import GPT
from nanogpt.settings import EvalConfig, ExportConfig
from nanogpt.tokenizer import train_bpe
from tests.conftest import Recipe, random_ids, write_dataset, write_llama

CPU = Device("cpu", "cpu", torch.float32, False)
HELLASWAG = [
    {"activity_label": "Baking", "ctx_a": "A woman stands in a kitchen.", "ctx_b": "she", "label": "2",
     "endings": ["throws the oven out.", "sings [title] to a cake.", "opens the oven door.", "[step] runs  away."]},
    {"activity_label": "How to row", "ctx_a": "[header] Go in [title] Step into the boat.", "ctx_b": "", "label": 0,
     "endings": ["Sit down and take the oars.", "Eat the boat.", "Sleep.", "Stand up [substeps] and jump."]},
    {"activity_label": "Chess", "ctx_a": "Two men sit at a table.", "ctx_b": "one of them", "label": 3,
     "endings": ["is the table.", "flies to the ceiling and stays.", "melts.", "moves a pawn."]},
    {"activity_label": "Sport", "ctx_a": "The runners wait for the shot.", "ctx_b": "they", "label": 1,
     "endings": ["are fish.", "start to run down the track.", "knit.", "wait for the shot of the shot of it."]},
]  # fmt: skip


@pytest.mark.parametrize("n_tokens", [2, 9, 10, 65])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_target_counts_once(n_tokens: int, batch_size: int) -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=61, n_layer=1, n_head=2, n_embd=16))
    tokens, total = random_ids(n_tokens), 0.0
    model.eval()
    for start in range(0, n_tokens - 1, 8):  # window by window, plainly
        window = tokens[start : start + 9]
        total += model(window[None, :-1], window[None, 1:])[1].item() * (len(window) - 1)
    loss, count = whole_split_loss(model, tokens.numpy().astype("uint16"), 8, batch_size, CPU)
    assert count == n_tokens - 1
    assert loss == pytest.approx(total / count, abs=1e-5)


def test_the_program_prints_a_line_of_json(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(EvalConfig(out_dir=str(trained), data_dir="data", device="cpu", dtype="float32"))
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == result
    assert (result["dataset"], result["split"], result["tokens"], result["block_size"]) == ("tiny", "val", 719, 16)
    assert evaluate(EvalConfig(init_from=str(trained), data_dir="data", device="cpu", dtype="float32")) == result
    assert out[-2].split()[:3] == ["loss", "perplexity", f"{math.exp(result['loss']):.4f}"]


def test_data_dir_is_where_an_originals_checkpoint_has_its_characters(trained: Path, data_dir: Path) -> None:
    content = torch.load(trained / "best.pt", weights_only=True)
    del content["nanogpt"]
    torch.save(content, "flat.pt")
    data_dir.rename("elsewhere")
    settings: dict[str, Any] = {"data_dir": "elsewhere", "device": "cpu"}
    for source in ({"init_from": "flat.pt", "dataset": "tiny"}, {"checkpoint": "flat.pt"}):
        assert evaluate(EvalConfig(**source, **settings))["tokens"] == 719
    with pytest.raises(ConfigError, match="block_size=17 exceeds the model's 16"):
        evaluate(EvalConfig(**settings, block_size=17))


def train_by_heart(recipe: Recipe, data_dir: Path) -> str:
    """The folder of a run that knows some last words of LAMBADA."""
    texts = [json.loads(line)["text"] for line in Path("lambada.jsonl").read_text().splitlines()]
    tokenizer = train_bpe(texts, 400)
    ids = np.concatenate([tokenizer.encode(text)[-40:] for text in texts])
    write_dataset(data_dir / "novels", tokenizer, ids, ids[:200])
    config = recipe(dataset="novels", max_iters=150, eval_interval=150, lr_decay_iters=150, batch_size=16, n_embd=64,
                    block_size=64, learning_rate=1e-2, log_interval=50)  # fmt: skip
    train.train(config)
    return config.out_dir


@pytest.mark.parametrize(
    ("context", "completion", "first"), [("Ans", "wer", True), ("hello wor", "ld", False), ("", " world", True)]
)
def test_a_token_that_reaches_back_into_the_context(context: str, completion: str, first: bool) -> None:
    """Where lm-eval ends with `assert len(continuation_enc) > 0`."""
    tokenizer = train_bpe(["Answer hello world " * 50], 300)
    model = GPT(GPTConfig(block_size=8, vocab_size=tokenizer.padded_vocab_size, n_layer=1, n_head=2, n_embd=16)).eval()
    ids = tokenizer.encode(context + completion).tolist()
    assert len(ids) <= len(tokenizer.encode(context)) or not context
    ids = torch.tensor([[tokenizer.end_of_text] * first + ids])
    with torch.no_grad():
        logprobs = model(ids, targets=ids)[0][0, -2, : tokenizer.vocab_size].log_softmax(0)
    [(score, _)] = Scorer(model, tokenizer, CPU).scores([(context, completion)])
    assert score == pytest.approx(logprobs[ids[0, -1]].item(), abs=1e-5)


@pytest.fixture
def task_files(downloads: Path) -> None:
    """LAMBADA and HellaSwag as lm-eval defines them, a perplexity and a generation, all from files of this folder."""
    datasets = pytest.importorskip("datasets")
    theirs = pytest.importorskip("lm_eval.tasks.hellaswag.utils", reason="pip install lm-eval")
    Path("lambada.jsonl").write_text("\n".join((downloads / "lambada_test.jsonl").read_text().splitlines()[:12]))
    Path("hellaswag.jsonl").write_text("\n".join(json.dumps(example) for example in HELLASWAG))
    rows = [{**example, "label": str(example["label"])} for example in HELLASWAG]
    theirs.process_docs(datasets.Dataset.from_list(rows)).to_json("rows.jsonl")
    source = "dataset_path: json\ndataset_kwargs: {data_files: {test: lambada.jsonl}}\ntest_split: test\n"
    context = "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
    Path("lambada.yaml").write_text(
        f"task: my_lambada\n{source}{context}output_type: loglikelihood\n"
        "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\nmetric_list: [{metric: perplexity, aggregation: perplexity,"
        " higher_is_better: false}, {metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    Path("hellaswag.yaml").write_text(
        f"task: my_hellaswag\n{source.replace('lambada', 'rows')}output_type: multiple_choice\n"
        'doc_to_text: "{{query}}"\ndoc_to_target: "{{gold}}"\ndoc_to_choice: "choices"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    Path("rolling.yaml").write_text(
        f'task: my_rolling\n{source}doc_to_text: ""\noutput_type: loglikelihood_rolling\n'
        'doc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]\n'
    )
    Path("answers.yaml").write_text(
        f"task: my_answers\n{source}{context}output_type: generate_until\n"
        "doc_to_target: \"{{text.split(' ')[-1]}}\"\n"
        "generation_kwargs: {until: ['.', ' the'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n"
        "filter_list: [{name: first, filter: [{function: regex, regex_pattern: '(\\S+)'}, {function: take_first}]}]\n"
    )


TASKS = ["my_lambada", "my_hellaswag", "my_rolling", "my_answers"]


@pytest.mark.usefixtures("task_files")
@pytest.mark.parametrize("starts", [False, True])
def test_scores_equal_lm_evaluation_harness(
    starts: bool, recipe: Recipe, data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On transformers with the same weights: a model of ours, and one whose tokenizer adds a start token."""
    lm_eval, tasks = (pytest.importorskip(name, reason="pip install lm-eval") for name in ("lm_eval", "lm_eval.tasks"))
    pytest.importorskip("accelerate", reason="pip install accelerate")
    # Without the thousands of tasks that come with it, which take 10 seconds to find.
    manager = functools.partial(tasks.TaskManager, include_path=".", include_defaults=False)
    if starts:
        write_llama(Path("m"))
    else:
        export(ExportConfig(out_dir=train_by_heart(recipe, data_dir), output="m"))
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained=m,dtype=float32,max_length={512 if starts else 64}", tasks=TASKS,
        task_manager=manager(), device="cpu", bootstrap_iters=0,
    )["results"]  # fmt: skip
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path: manager())
    config = EvalConfig(init_from="m", device="cpu", dtype="float32", lambada="lambada.jsonl", batch_size=7,
                        hellaswag="hellaswag.jsonl", tasks=["lambada", "hellaswag", ",".join(TASKS)])  # fmt: skip
    ours = evaluate(config)
    assert re.search(r"my_lambada +acc +0\.\d{4} .*12 examples", capsys.readouterr().out)
    for task in TASKS:
        expected = {key.partition(",")[0]: value for key, value in theirs[task].items() if isinstance(value, float)}
        expected = {name: value for name, value in expected.items() if "stderr" not in name}
        assert {name: ours[task][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert ours["my_lambada"]["acc"] == ours["lambada"]["accuracy"]
    assert ours["my_lambada"]["perplexity"] == pytest.approx(ours["lambada"]["perplexity"], rel=1e-4)
    assert ours["my_hellaswag"]["acc"] == ours["hellaswag"]["accuracy"]
    assert ours["my_hellaswag"]["acc_norm"] == ours["hellaswag"]["accuracy_normalised"]
    assert evaluate(replace(config, tasks=["lambada"], limit=9))["lambada"]["examples"] == 9
    with pytest.raises(ConfigError, match="no such task: foo; ours are loss, pydoc, lambada, hellaswag"):
        evaluate(replace(config, tasks=["foo,my_lambada"]))


def test_a_file_is_read_line_by_line() -> None:
    Path("file.jsonl").write_text('{"text": "one\u2028line only"}\n\n', encoding="utf-8")
    assert read_examples("lambada", EvalConfig(lambada="file.jsonl")) == [("one\u2028line", [" only"], 0)]


def test_published_files_are_checked_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOGPT_DOWNLOADS", str(tmp_path))
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "as if it were"}')
    with pytest.raises(DataError, match=r"25 bytes that are not the file expected.*--lambada=FILE"):
        read_examples("lambada", EvalConfig())
    checksum = hashlib.sha256(b'{"text": "as if it were"}').hexdigest()
    monkeypatch.setitem(BENCHMARKS, "lambada", ("http://nowhere/lambada_test.jsonl", checksum))
    assert read_examples("lambada", EvalConfig()) == [("as if it", [" were"], 0)]
    (tmp_path / "lambada_test.jsonl").unlink()
    assert read_examples("lambada", EvalConfig()) == [("as if it", [" were"], 0)]
