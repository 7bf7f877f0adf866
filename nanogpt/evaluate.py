"""How good a trained model is: its loss over a whole split, LAMBADA and HellaSwag, and any other task of lm-eval.

Prompts and scores of LAMBADA and HellaSwag are those of EleutherAI's lm-evaluation-harness (lambada_openai and
hellaswag), so figures compare with published ones.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from nanogpt.checkpoint import TrainedModel, load_trained
from nanogpt.data import Ids, document_ids_of, open_dataset
from nanogpt.device import Device, choose_device
from nanogpt.errors import ConfigError, DataError
from nanogpt.files import parse_json
from nanogpt.metrics import with_progress
from nanogpt.model import GPT
from nanogpt.prepare import download
from nanogpt.settings import EvalConfig
from nanogpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LONGEST = 2048  # windows of models that come from elsewhere, unless asked for longer: their contexts may be huge
# Where the files are published, their SHA-256, and what a line of them must be.
BENCHMARKS = {
    "lambada": (
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        "a JSON object with a text of several words",
    ),
    "hellaswag": (
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
        "a JSON object with activity_label, ctx_a, ctx_b, four endings and a label from 0 to 3",
    ),
}
Example = tuple[str, list[str], int]  # a context, the completions to choose from, and which one is right


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a model; print a table, then one line of JSON, which is returned too."""
    tasks = [name for word in config.tasks for name in word.split(",") if name] or ["loss"]
    others = [name for name in tasks if name not in ("loss", *BENCHMARKS)]
    device = choose_device(config)
    examples = {name: read_examples(name, config) for name in BENCHMARKS if name in tasks}
    manager = find_tasks(others, config.include_path) if others else None
    trained = load_trained(config, device)
    log.info(trained.name)
    scorer = Scorer(trained.model, trained.tokenizer, device, config.batch_size)
    result: dict[str, Any] = {"model": trained.name}
    for name in [name for name in tasks if name not in others]:
        if name == "loss":
            found = split_measures(config, trained, device)
            result |= found
            of = f"{found['tokens']:,} targets of {found['dataset']}/{found['split']}, {found['block_size']} at a time"
            measures = {"loss": "nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
        else:
            score = {"lambada": lambada, "hellaswag": hellaswag}[name]
            result[name] = found = score(scorer, examples[name])
            of = f"{found['examples']:,} examples"
            measures = {measure: measure.replace("_", ", ") for measure in found if measure != "examples"}
        for measure, words in measures.items():
            value = found[measure]
            if value is not None:
                error = math.sqrt(value * (1 - value) / found["examples"]) if "accuracy" in measure else 0.0
                print_row(name, words, value, of, error)
    if others:
        result |= run_harness(scorer, others, manager, config.limit)
    print(json.dumps(result))
    return result


def print_row(task: str, measure: str, value: float, of: str, error: float = 0.0) -> None:
    """Print a measure with its standard error, where there is one."""
    spread = f"± {error:.4f}" if error else ""
    print(f"{task:10} {measure:21} {value:>12.4f} {spread:9} {of}", flush=True)


# ---------------------------------------------------------------------------------------------------
# The loss of a whole split


@torch.no_grad()
def whole_split_loss(
    model: GPT, tokens: Ids, block_size: int, batch_size: int, device: Device, end_of_text: int | None = None
) -> tuple[float, int]:
    """Return the mean cross-entropy in nats per token, and the number of tokens predicted.

    The split is cut into windows of `block_size` that do not overlap (the last may be shorter), so every token
    but the first is predicted exactly once. Given `end_of_text`, from its own document only. The model's mode is
    left as it was.
    """
    was_training = model.training
    model.eval()
    n_targets = len(tokens) - 1
    n_windows = -(-n_targets // block_size)
    total = 0.0
    for first in with_progress(range(0, n_windows, batch_size)):
        start = first * block_size
        ids = tokens[start : start + batch_size * block_size + 1].astype(np.int64)
        if ids.max() >= model.config.vocab_size:
            raise DataError(
                f"the data holds token {ids.max()}, but the vocabulary ends at {model.config.vocab_size - 1}"
            )
        missing = -(len(ids) - 1) % block_size  # fill up the last window; -1 does not count
        x = np.concatenate([ids[:-1], np.zeros(missing, np.int64)]).reshape(-1, block_size)
        y = np.concatenate([ids[1:], np.full(missing, -1)]).reshape(-1, block_size)
        inputs, targets = device.put(torch.from_numpy(x)), device.put(torch.from_numpy(y))
        document_ids = None if end_of_text is None else document_ids_of(inputs, end_of_text)
        with device.autocast():
            _, loss = model(inputs, targets, document_ids=document_ids, return_logits=False)
        total += loss.item() * (len(ids) - 1)
    model.train(was_training)
    return total / n_targets, n_targets


def split_measures(config: EvalConfig, trained: TrainedModel, device: Device) -> dict[str, Any]:
    """Return loss, perplexity and bits per byte over a whole split of a data set."""
    model, name = trained.model, config.dataset or str(trained.config.get("dataset", ""))
    if not name:
        raise ConfigError(f"on which data set? {trained.name} does not say; for example --dataset=shakespeare")
    if "," in name:
        raise ConfigError(f"the data set {name} is a mixture: name one of its parts with --dataset=NAME")
    folder = Path(config.data_dir or trained.config.get("data_dir", "data")) / name
    dataset = open_dataset(folder)
    dataset.check_tokenizer(trained.tokenizer, trained.name)
    tokens = dataset.split(config.split)
    dataset.check_length(1)
    own = model.config.block_size if trained.config else min(model.config.block_size, LONGEST)
    block_size = min(config.block_size or own, len(tokens) - 1)
    if block_size > model.config.block_size:
        model.crop_block_size(block_size)  # rotary positions reach further, learned ones do not
    end_of_text = dataset.tokenizer.end_of_text if trained.config.get("mask_documents") else None
    loss, n_tokens = whole_split_loss(model, tokens, block_size, config.batch_size, device, end_of_text)
    size = dataset.description.get("bytes", {}).get(config.split, 0)
    result = {"dataset": name, "split": config.split, "block_size": block_size, "tokens": n_tokens, "loss": loss}
    bits_per_byte = loss * n_tokens / math.log(2) / size if size else None
    return {**result, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte}


# ---------------------------------------------------------------------------------------------------
# Benchmarks that compare the logprobs of completions


@dataclass(frozen=True)
class Scorer:
    """A model that says how probable it finds texts."""

    model: GPT
    tokenizer: Tokenizer
    device: Device
    batch_size: int = 32

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return of each (context, completion) the completion's logprob, and whether greedy decoding would write it.

        A context that is too long for the model loses its beginning.
        """
        return self.scores_of_ids([self._ids(context, completion) for context, completion in pairs])

    @torch.no_grad()
    def scores_of_ids(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Return the same of the last `count` of each (ids, count)."""
        longest = self.model.config.block_size + 1
        ids_of = [torch.tensor(ids[-longest:]) for ids, _ in rows]
        count_of = [min(count, len(ids) - 1) for ids, (_, count) in zip(ids_of, rows, strict=True)]
        by_length = sorted(range(len(rows)), key=lambda n: -len(ids_of[n]))  # little padding, the largest first
        results = [(0.0, False)] * len(rows)
        for first in with_progress(range(0, len(rows), self.batch_size)):
            batch = by_length[first : first + self.batch_size]
            ids = pad_sequence([ids_of[n] for n in batch], batch_first=True)
            counts = torch.tensor([count_of[n] for n in batch])
            ends = torch.tensor([len(ids_of[n]) - 1 for n in batch])[:, None]
            places = torch.arange(ids.shape[1] - 1)
            counted = (places < ends) & (places >= ends - counts[:, None])  # (B, T)
            with self.device.autocast():
                hidden = self.model.transformer(self.device.put(ids[:, :-1]))
                logits = self.model.lm_head(hidden[self.device.put(counted)])[:, : self.tokenizer.vocab_size]
            targets = self.device.put(ids[:, 1:][counted])[:, None]
            logprobs = logits.float().log_softmax(dim=-1).gather(1, targets)[:, 0].cpu().split(counts.tolist())
            matches = (logits.argmax(dim=-1, keepdim=True) == targets)[:, 0].cpu().split(counts.tolist())
            for n, logprob, match in zip(batch, logprobs, matches, strict=True):
                results[n] = logprob.double().sum().item(), bool(match.all())
        return results

    def _ids(self, context: str, completion: str) -> tuple[list[int], int]:
        """Return the ids of both, and how many of them are the completion's."""
        stem = context.rstrip()  # tokens hold the space before a word, not the one behind it
        start = self.tokenizer.encode(stem).tolist()
        ids = self.tokenizer.encode(context + completion).tolist()
        if not start:
            start = [self.tokenizer.end_of_text or 0]
            ids = start + ids
        return ids, max(len(ids) - len(start), 1)  # a token may reach back into the context


def lambada(scorer: Scorer, examples: Sequence[Example]) -> dict[str, float]:
    """Predict the last word of a passage (Paperno et al. 2016).

    Accuracy: greedy decoding writes all its tokens. The perplexity is per word.
    """
    results = scorer.scores([(context, word) for context, [word], _ in examples])
    accuracy = sum(is_greedy for _, is_greedy in results) / len(results)
    perplexity = math.exp(-sum(logprob for logprob, _ in results) / len(results))
    return {"accuracy": accuracy, "perplexity": perplexity, "examples": len(results)}


def hellaswag(scorer: Scorer, examples: Sequence[Example]) -> dict[str, float]:
    """Choose the most probable of four endings, as such and per character (Zellers et al. 2019)."""
    pairs = [(context, ending) for context, endings, _ in examples for ending in endings]
    labels = torch.tensor([label for _, _, label in examples])
    logprobs = torch.tensor([logprob for logprob, _ in scorer.scores(pairs)]).view(-1, 4)
    lengths = torch.tensor([len(ending) - 1 for _, ending in pairs]).view(-1, 4)
    accuracy, normalised = (
        (each.argmax(dim=1) == labels).double().mean().item() for each in (logprobs, logprobs / lengths)
    )
    return {"accuracy": accuracy, "accuracy_normalised": normalised, "examples": len(labels)}


def to_example(benchmark: str, row: dict[str, Any]) -> Example:
    """Return a line of a benchmark's file as an example. Raises `ValueError`, or what a wrong type raises."""
    if benchmark == "lambada":
        context, _, word = row["text"].rpartition(" ")
        endings, label, n = [word], 0, 1
    else:
        context = _cleaned(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
        endings, label, n = [_cleaned(ending) for ending in row["endings"]], int(row["label"]), 4
    if not context or not all(endings) or len(endings) != n or label not in range(n):
        raise ValueError(f"not an example of {benchmark}")
    return context, [f" {ending}" for ending in endings], label


def _cleaned(text: str) -> str:
    """Return a text of HellaSwag without the marks that WikiHow's articles left in it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_examples(benchmark: str, config: EvalConfig) -> list[Example]:
    """Read the file that `config` names, or the published one, which is kept in its data_dir. Raises `DataError`."""
    url, sha256, expected = BENCHMARKS[benchmark]
    file, name = getattr(config, benchmark), url.rpartition("/")[2]
    kept = Path(config.data_dir or "data", benchmark, name)
    path = Path(file) if file else download(kept, name, url, sha256, option=benchmark)
    examples: list[Example] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip() or (config.limit and len(examples) >= config.limit):
            continue
        try:
            examples.append(to_example(benchmark, parse_json(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            found = line[:80].decode("utf-8", "replace")
            raise DataError(f"{path}, line {number}: expected {expected}, found {found!r}") from None
    if not examples:
        raise DataError(f"{path} is empty")
    return examples


# ---------------------------------------------------------------------------------------------------
# Everything else: EleutherAI's lm-evaluation-harness


def find_tasks(names: Sequence[str], include_path: str) -> Any:
    """Return lm-eval's manager of tasks. Raises `ConfigError` if lm-eval, or a task of these names, is not there."""
    ours = f"nanogpt's own tasks are loss, {', '.join(BENCHMARKS)}"
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(f"{', '.join(names)}: {ours}; for others, pip install lm-eval ({error})") from error
    manager = TaskManager(include_path=include_path or None)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ConfigError(f"no such task: {', '.join(unknown)}; {ours}, and `lm-eval ls tasks` lists those of lm-eval")
    return manager


def run_harness(scorer: Scorer, names: list[str], manager: Any, limit: int) -> dict[str, Any]:
    """Run tasks of lm-eval, print their measures with standard errors, and return them by task."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    tokenizer, block_size = scorer.tokenizer, scorer.model.config.block_size

    class Adapter(LM):  # type: ignore[misc]
        """The model as lm-eval asks it."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return scorer.scores([each.args for each in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Return the logprobs of whole texts, each token predicted once, in windows of the model's context."""
            rows, owners = [], []
            for n, request in enumerate(requests):
                ids = [tokenizer.end_of_text or 0, *tokenizer.encode(request.args[0]).tolist()]
                for start in range(0, len(ids) - 1, block_size):
                    end = min(start + block_size, len(ids) - 1)
                    rows.append((ids[: end + 1], end - start))
                    owners.append(n)
            totals = [0.0] * len(requests)
            for n, (logprob, _) in zip(owners, scorer.scores_of_ids(rows), strict=True):
                totals[n] += logprob
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Return greedy completions, up to the first of each request's stop strings."""
            texts = []
            for request in with_progress(requests):
                prompt, settings = request.args
                new = settings.get("max_gen_toks", 256)
                ids = tokenizer.encode(prompt).tolist()[-max(1, block_size - new) :] or [tokenizer.end_of_text or 0]
                row = scorer.device.put(torch.tensor([ids]))
                text = tokenizer.decode(scorer.model.generate(row, new, temperature=0.0)[0, len(ids) :].tolist())
                until = settings.get("until") or []
                stops = [until] if isinstance(until, str) else until
                ends = [text.find(stop) for stop in stops if stop and stop in text]
                texts.append(text[: min(ends, default=None)])
            return texts

    found = simple_evaluate(
        model=Adapter(), tasks=names, task_manager=manager, limit=limit or None, bootstrap_iters=1000, log_samples=False
    )
    measures: dict[str, Any] = {}
    for task, values in found["results"].items():
        of = f"{found['n-samples'].get(task, {}).get('effective', 0):,} examples"
        numbers = {key.partition(",")[0]: v for key, v in values.items() if isinstance(v, float)}
        measures[task] = numbers
        for name in [name for name in numbers if not name.endswith("_stderr")]:
            print_row(task, name, numbers[name], of, numbers.get(f"{name}_stderr", 0.0))
    return measures
