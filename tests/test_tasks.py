"""LAMBADA and HellaSwag, against transformers on the same weights, and against lm-evaluation-harness."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt import train
from nanogpt.config import TrainConfig
from nanogpt.errors import DataError
from nanogpt.evaluate import evaluate
from nanogpt.export import export
from nanogpt.settings import EvalConfig, ExportConfig
from nanogpt.tasks import _FILES, examples_of
from nanogpt.tokenizer import train_bpe
from tests.conftest import write_dataset

Recipe = Callable[..., TrainConfig]
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


@pytest.mark.slow
def test_scores_equal_lm_evaluation_harness(trained: tuple[str, Path]) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval accelerate")
    out_dir, folder = trained
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
    Path("tasks.yaml").write_text(
        "task: my_lambada\ndataset_path: json\ndataset_kwargs: {data_files: {test: lambada.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
        "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\nmetric_list: [{metric: perplexity, aggregation: perplexity,"
        " higher_is_better: false}, {metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    Path("hellaswag.yaml").write_text(
        "task: my_hellaswag\ndataset_path: json\ndataset_kwargs: {data_files: {test: hellaswag_rows.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\nprocess_docs: !function hellaswag_task.prepare\n"
        'doc_to_text: "{{query}}"\ndoc_to_target: "{{gold}}"\ndoc_to_choice: "choices"\nmetric_list: [{metric: acc},'
        " {metric: acc_norm}]\n"
    )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=".", include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["my_lambada", "my_hellaswag"],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    tasks = {"lambada": "lambada.jsonl", "hellaswag": "hellaswag.jsonl"}
    ours = evaluate(EvalConfig(out_dir=out_dir, device="cpu", dtype="float32", tasks=list(tasks), **tasks))  # type: ignore[arg-type]
    assert ours["lambada"]["accuracy"] == theirs["my_lambada"]["acc,none"]
    assert ours["lambada"]["perplexity"] == pytest.approx(theirs["my_lambada"]["perplexity,none"], rel=1e-4)
    assert ours["hellaswag"]["accuracy"] == theirs["my_hellaswag"]["acc,none"]
    assert ours["hellaswag"]["accuracy_normalised"] == theirs["my_hellaswag"]["acc_norm,none"]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"text": "a b"}\n\n{"text"', r"line 3: expected a JSON object with a text of several words, found '{\"text\"'"),
     ('{"text": 5}', "line 1: expected"), ('{"text": "word"}', "line 1: expected"),
     ("[]", "line 1: expected"), ("", "is empty"), ('{"txt": ""}', "line 1: expected"), (None, "No such file")],
)  # fmt: skip
def test_files_of_another_kind_are_refused(content: str | None, message: str) -> None:
    if content is not None:
        Path("file.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        examples_of("lambada", "file.jsonl", "data", 0)
    changes = [{"endings": endings} for endings in (["one"], "abcd", ["a", "b", "c", 4], ["a", "b", "c", "[x]"])]
    for change in [*changes, {"label": ""}, {"label": 7}, {"ctx_a": None}]:
        Path("file.jsonl").write_text(json.dumps({**HELLASWAG[0], **change}))
        with pytest.raises(DataError, match="expected a JSON object with activity_label, ctx_a, ctx_b, four endings"):
            examples_of("hellaswag", "file.jsonl", "data", 0)
    Path("file.jsonl").write_text('{"text": "one\u2028line only"}\n\n', encoding="utf-8")
    assert examples_of("lambada", "file.jsonl", "data", 0) == [{"text": "one\u2028line only"}]


def test_published_files_are_checked_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOGPT_DOWNLOADS", str(tmp_path))
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "not the published one"}')
    with pytest.raises(DataError, match=r"is not the file expected.*--lambada=FILE"):
        examples_of("lambada", "", "data", 0)
    content = b'{"text": "as if it were"}'
    monkeypatch.setitem(_FILES, "lambada", ("http://nowhere/lambada_test.jsonl", hashlib.sha256(content).hexdigest()))
    (tmp_path / "lambada_test.jsonl").write_bytes(content)
    assert examples_of("lambada", "", "data", 0) == [{"text": "as if it were"}]
    (tmp_path / "lambada_test.jsonl").unlink()
    assert examples_of("lambada", "", "data", 0) == [{"text": "as if it were"}]
    kept = Path("data/lambada/lambada_test.jsonl")
    kept.write_text('{"text": "my own"}')
    with pytest.raises(DataError, match=r"lambada_test\.jsonl is not the file expected.*"):
        examples_of("lambada", "", "data", 0)
    assert kept.read_text() == '{"text": "my own"}'
