"""The loss of a whole split; LAMBADA and HellaSwag, against transformers on the same weights and against lm-eval."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt import train
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.device import Device
from nanogpt.errors import ConfigError, DataError
from nanogpt.evaluate import BENCHMARKS, evaluate, read_examples, whole_split_loss
from nanogpt.export import export
from nanogpt.model import GPT
from nanogpt.settings import EvalConfig, ExportConfig
from nanogpt.tokenizer import train_bpe
from tests.conftest import random_ids, write_dataset

Recipe = Callable[..., TrainConfig]
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


@pytest.mark.parametrize("n_tokens", [2, 8, 9, 10, 50, 65])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_target_counts_once(n_tokens: int, batch_size: int) -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=61, n_layer=1, n_head=2, n_embd=16))
    tokens = random_ids(n_tokens)
    total = 0.0
    model.eval()
    for start in range(0, n_tokens - 1, 8):  # window by window, plainly
        window = tokens[start : start + 9]
        total += model(window[None, :-1], window[None, 1:])[1].item() * (len(window) - 1)
    model.train()
    loss, count = whole_split_loss(model, tokens.numpy().astype("uint16"), 8, batch_size, CPU)
    assert count == n_tokens - 1
    assert loss == pytest.approx(total / count, abs=1e-5)
    assert model.training


def test_the_program_prints_a_line_of_json(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe()
    train.train(config)
    result = evaluate(EvalConfig(out_dir=config.out_dir, data_dir=config.data_dir, device="cpu", dtype="float32"))
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == result
    assert (result["dataset"], result["split"], result["tokens"], result["block_size"]) == ("tiny", "val", 719, 16)
    assert out[-2].split()[:3] == ["loss", "perplexity", f"{math.exp(result['loss']):.4f}"]


def test_data_dir_is_where_an_originals_checkpoint_has_its_characters(recipe: Recipe, data_dir: Path) -> None:
    train.train(recipe(max_iters=1))
    export(ExportConfig(out_dir="out", output="flat.pt", to="flat"))
    data_dir.rename("elsewhere")
    for source in ({"init_from": "flat.pt", "dataset": "tiny"}, {"checkpoint": "flat.pt"}):
        result = evaluate(EvalConfig(**source, data_dir="elsewhere", device="cpu"))  # type: ignore[arg-type]
        assert result["tokens"] == 719


def test_mismatches_are_refused(recipe: Recipe) -> None:
    config = recipe()
    train.train(config)
    common = {"out_dir": config.out_dir, "data_dir": config.data_dir, "device": "cpu"}
    with pytest.raises(ConfigError, match="block_size=17 exceeds the model's 16"):
        evaluate(EvalConfig(**common, block_size=17))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"nowhere holds no train\.bin and val\.bin"):
        evaluate(EvalConfig(**common, dataset="nowhere"))  # type: ignore[arg-type]


def test_an_id_outside_the_vocabulary_is_one_message() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=16))
    with pytest.raises(DataError, match="the data holds token 60, but the vocabulary ends at 9"):
        whole_split_loss(model, torch.tensor([60] * 9).numpy(), 8, 4, CPU)


@pytest.fixture
def trained(recipe: Recipe, data_dir: Path, downloads: Path, tmp_path: Path) -> tuple[str, Path]:
    """A model that knows some last words of LAMBADA by heart, exported: its run folder, and that of transformers."""
    lines = (downloads / "lambada_test.jsonl").read_text().splitlines()[:12]
    (tmp_path / "lambada.jsonl").write_text("\n".join(lines))
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(json.dumps(example) for example in HELLASWAG))
    texts = [json.loads(line)["text"] for line in lines]
    tokenizer = train_bpe(texts, 400)
    ids = np.concatenate([tokenizer.encode(text)[-40:] for text in texts])
    write_dataset(data_dir / "novels", tokenizer, ids, ids[:200])
    config = recipe(dataset="novels", max_iters=150, eval_interval=150, lr_decay_iters=150, batch_size=16, n_embd=64,
                    block_size=64, learning_rate=1e-2, log_interval=50)  # fmt: skip
    train.train(config)
    export(ExportConfig(out_dir=config.out_dir, output=str(tmp_path / "exported")))
    return config.out_dir, tmp_path / "exported"


def likelihoods(folder: Path) -> Callable[[str, str], tuple[float, bool]]:
    """A scorer on transformers, one example at a time, plainly."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def score(context: str, continuation: str) -> tuple[float, bool]:
        start, ids = tokenizer(context).input_ids, tokenizer(context + continuation).input_ids
        n, ids = len(ids) - len(start), ids[-65:]
        with torch.no_grad():
            chances = model(torch.tensor([ids[:-1]])).logits[0, -n:].log_softmax(dim=-1)
        targets = torch.tensor(ids[-n:])
        return chances.gather(1, targets[:, None]).sum().item(), bool((chances.argmax(dim=-1) == targets).all())

    return score


def test_scores_equal_transformers(trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out_dir, folder = trained
    files = {"lambada": "lambada.jsonl", "hellaswag": "hellaswag.jsonl"}
    config = EvalConfig(out_dir=out_dir, device="cpu", dtype="float32", tasks=["loss", *files], batch_size=7, **files)  # type: ignore[arg-type]
    result = evaluate(config)
    table = capsys.readouterr().out
    assert json.loads(table.splitlines()[-1]) == result
    assert re.search(r"lambada +accuracy +0\.\d{4} ± 0\.\d{4} +12 examples", table)
    score = likelihoods(folder)
    texts = [json.loads(line)["text"] for line in Path("lambada.jsonl").read_text().splitlines()]
    words = [score(text.rsplit(" ", 1)[0], " " + text.rsplit(" ", 1)[1]) for text in texts]
    accuracy = sum(right for _, right in words) / 12
    assert 0 < accuracy < 1
    assert result["lambada"]["accuracy"] == accuracy
    assert result["lambada"]["perplexity"] == pytest.approx(math.exp(-sum(x for x, _ in words) / 12), rel=1e-4)

    contexts = ["Baking: A woman stands in a kitchen. She", "How to row:  Go in. Step into the boat. ",
                "Chess: Two men sit at a table. One of them", "Sport: The runners wait for the shot. They"]  # fmt: skip
    right = {"accuracy": 0, "accuracy_normalised": 0}
    for example, context in zip(HELLASWAG, contexts, strict=True):
        endings = [
            re.sub(r"\[.*?\]", "", str(text).replace(" [title]", ". ")).replace("  ", " ")
            for text in example["endings"]
        ]
        chances = [score(context.rstrip(), context[len(context.rstrip()) :] + " " + ending)[0] for ending in endings]
        right["accuracy"] += int(np.argmax(chances)) == int(str(example["label"]))
        per_character = [chance / len(ending) for chance, ending in zip(chances, endings, strict=True)]
        right["accuracy_normalised"] += int(np.argmax(per_character)) == int(str(example["label"]))
    assert result["hellaswag"] == {"examples": 4, **{name: count / 4 for name, count in right.items()}}
    loaded = evaluate(EvalConfig(init_from=str(folder), device="cpu", dtype="float32", tasks=["lambada"],
                                 lambada="lambada.jsonl", limit=9))  # fmt: skip
    assert loaded["lambada"]["examples"] == 9


@pytest.fixture
def task_files() -> None:
    """LAMBADA and HellaSwag as lm-eval defines them, a perplexity and a generation, all from files of this folder."""
    Path("hellaswag_task.py").write_text(
        "import re\n\n\ndef clean(text):\n"
        '    return re.sub(r"\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")\n\n\n'
        "def prepare(rows):\n"
        "    def one(row):\n"
        '        text = row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()\n'
        '        endings = [clean(ending) for ending in row["endings"]]\n'
        '        return {"query": clean(text), "choices": endings, "gold": int(row["label"])}\n\n'
        "    return rows.map(one)\n"
    )
    rows = [{**example, "label": str(example["label"])} for example in HELLASWAG]
    Path("hellaswag_rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = "dataset_path: json\ndataset_kwargs: {data_files: {test: lambada.jsonl}}\ntest_split: test\n"
    Path("lambada.yaml").write_text(
        f"task: my_lambada\n{source}"
        "output_type: loglikelihood\ndoc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
        "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\nmetric_list: [{metric: perplexity, aggregation: perplexity,"
        " higher_is_better: false}, {metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    Path("hellaswag.yaml").write_text(
        f"task: my_hellaswag\n{source.replace('lambada', 'hellaswag_rows')}"
        "output_type: multiple_choice\nprocess_docs: !function hellaswag_task.prepare\n"
        'doc_to_text: "{{query}}"\ndoc_to_target: "{{gold}}"\ndoc_to_choice: "choices"\nmetric_list: [{metric: acc},'
        " {metric: acc_norm}]\n"
    )
    Path("rolling.yaml").write_text(
        f"task: my_rolling\n{source}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]\n'
    )
    Path("answers.yaml").write_text(
        f"task: my_answers\n{source}output_type: generate_until\n"
        "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\ndoc_to_target: \"{{text.split(' ')[-1]}}\"\n"
        "generation_kwargs: {until: ['.', ' the'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n"
        "filter_list: [{name: first, filter: [{function: regex, regex_pattern: '(\\S+)'}, {function: take_first}]}]\n"
    )


TASKS = ["my_lambada", "my_hellaswag", "my_rolling", "my_answers"]


def test_tasks_of_lm_eval(
    trained: tuple[str, Path], task_files: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    common: Any = {"out_dir": trained[0], "device": "cpu", "dtype": "float32", "lambada": "lambada.jsonl",
                   "hellaswag": "hellaswag.jsonl", "include_path": "."}  # fmt: skip
    result = evaluate(EvalConfig(**common, tasks=["lambada", "hellaswag", ",".join(TASKS)]))
    table = capsys.readouterr().out
    assert result["my_lambada"]["acc"] == result["lambada"]["accuracy"]
    assert result["my_lambada"]["perplexity"] == pytest.approx(result["lambada"]["perplexity"], rel=1e-4)
    assert result["my_hellaswag"]["acc"] == result["hellaswag"]["accuracy"]
    assert result["my_hellaswag"]["acc_norm"] == result["hellaswag"]["accuracy_normalised"]
    assert result["my_rolling"]["byte_perplexity"] > 1
    assert 0 <= result["my_answers"]["exact_match"] <= 1
    assert re.search(r"my_lambada +acc +0\.\d{4} ± 0\.\d{4} +12 examples", table)
    with pytest.raises(ConfigError, match="no such task: foo; nanogpt's own tasks are loss, lambada, hellaswag"):
        evaluate(EvalConfig(**common, tasks=["foo,my_lambada"]))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"arc_easy: .* pip install lm-eval"):
        evaluate(EvalConfig(**common, tasks=["loss", "arc_easy"]))


@pytest.mark.slow
def test_scores_equal_lm_evaluation_harness(trained: tuple[str, Path], task_files: None) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval")
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from lm_eval.tasks import TaskManager

    out_dir, folder = trained
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32,max_length=64",
        tasks=TASKS,
        task_manager=TaskManager(include_path=".", include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    ours = evaluate(EvalConfig(out_dir=out_dir, device="cpu", dtype="float32", tasks=TASKS, include_path="."))
    for task in TASKS:
        expected = {key.partition(",")[0]: value for key, value in theirs[task].items() if isinstance(value, float)}
        assert {name: ours[task][name] for name in expected if "stderr" not in name} == pytest.approx(
            {name: value for name, value in expected.items() if "stderr" not in name}, rel=1e-4
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "a b"}\n\n{"text"', r"line 3: expected a JSON object with a text of several words, found '{\"text\"'"),
     ('{"text": 5}', "line 1: expected"), ('{"text": "word"}', "line 1: expected"),
     ("[]", "line 1: expected"), ("", "is empty"), ('{"txt": ""}', "line 1: expected"), (None, "No such file")],
)  # fmt: skip
def test_files_of_another_kind_are_refused(content: str | None, message: str) -> None:
    if content is not None:
        Path("file.jsonl").write_text(content)
    config = EvalConfig(lambada="file.jsonl", hellaswag="file.jsonl")
    with pytest.raises((DataError, OSError), match=message):
        read_examples("lambada", config)
    changes = [{"endings": endings} for endings in (["one"], ["a", "b", "c", 4], ["a", "b", "c", "[x]"])]
    for change in [*changes, {"label": ""}, {"label": 7}, {"ctx_a": None}]:
        Path("file.jsonl").write_text(json.dumps({**HELLASWAG[0], **change}))
        with pytest.raises(DataError, match="expected a JSON object with activity_label, ctx_a, ctx_b, four endings"):
            read_examples("hellaswag", config)
    Path("file.jsonl").write_text('{"text": "one\u2028line only"}\n\n', encoding="utf-8")
    assert read_examples("lambada", config) == [("one\u2028line", [" only"], 0)]


def test_published_files_are_checked_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOGPT_DOWNLOADS", str(tmp_path))
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "not the published one"}')
    with pytest.raises(DataError, match=r"33 bytes that are not the file expected.*--lambada=FILE"):
        read_examples("lambada", EvalConfig())
    content, examples = b'{"text": "as if it were"}', [("as if it", [" were"], 0)]
    about = ("http://nowhere/lambada_test.jsonl", hashlib.sha256(content).hexdigest(), "a text")
    monkeypatch.setitem(BENCHMARKS, "lambada", about)
    (tmp_path / "lambada_test.jsonl").write_bytes(content)
    assert read_examples("lambada", EvalConfig()) == examples
    (tmp_path / "lambada_test.jsonl").unlink()
    assert read_examples("lambada", EvalConfig()) == examples
    kept = Path("data/lambada/lambada_test.jsonl")
    kept.write_text('{"text": "my own"}')
    with pytest.raises(DataError, match=r"lambada_test\.jsonl has 18 bytes that are not the file"):
        read_examples("lambada", EvalConfig())
    assert kept.read_text() == '{"text": "my own"}'
