"""How good a trained model is: its loss over a whole split, LAMBADA and HellaSwag, and any other task of lm-eval.

Prompts and scores of LAMBADA and HellaSwag are those of EleutherAI's lm-evaluation-harness (lambada_openai and
hellaswag), so figures compare with published ones.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanogpt.chats import BEGINS, COUNTS, Chats
from nanogpt.checkpoint import TrainedModel, load_trained
from nanogpt.config import TrainConfig
from nanogpt.data import Ids, document_ids_of, open_dataset
from nanogpt.device import Device, choose_device
from nanogpt.errors import ConfigError, DataError
from nanogpt.lora import adapt
from nanogpt.metrics import with_progress
from nanogpt.model import GPT
from nanogpt.prepare import download, prepare_missing
from nanogpt.settings import EvalConfig
from nanogpt.tokenizer import Tokenizer

# Where the files are published, and their SHA-256.
BENCHMARKS = {
    "lambada": ("https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
                "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"),
    "hellaswag": ("https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
                  "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
}  # fmt: skip
LONGEST = 2048  # windows of models that come from elsewhere, unless asked for longer: their contexts may be huge
Example = tuple[str, list[str], int]  # a context, the completions to choose from, and which one is right


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a model; print a table, then one line of JSON, which is returned too."""
    tasks = ",".join(config.tasks or ["loss"]).split(",")
    others = [name for name in tasks if name not in ("loss", "pydoc", *BENCHMARKS)]
    device = choose_device(config)
    examples = {name: read_examples(name, config) for name in BENCHMARKS if name in tasks}
    manager: Any = None
    if others:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=config.include_path or None)
        if unknown := [name for name in others if not manager.match_tasks([name])]:
            raise ConfigError(f"no such task: {', '.join(unknown)}; ours are loss, pydoc, {', '.join(BENCHMARKS)}")
    trained = load_trained(config, device)
    if device.compile:
        trained.model.compile()
    print(trained.name)
    scorer = Scorer(trained.model, trained.tokenizer, device, config.batch_size)
    result: dict[str, Any] = {"model": trained.name}
    for task in tasks:
        if task in ("loss", "pydoc"):
            found = split_measures(replace(config, dataset=task) if task == "pydoc" else config, trained, device)
            of = f"{found['tokens']:,} targets of {found['dataset']}/{found['split']}, {found['block_size']} at a time"
            show(task, found, of)
            result |= {task: found} if task == "pydoc" else found
        elif rows := examples.get(task):
            found = {"lambada": lambada, "hellaswag": hellaswag}[task](scorer, rows)
            shares = {name: value for name, value in found.items() if "accuracy" in name}
            errors = {f"{name}_stderr": math.sqrt(p * (1 - p) / len(rows)) for name, p in shares.items()}
            show(task, found | errors, f"{len(rows):,} examples")
            result[task] = {**found, "examples": len(rows)}
    if others:
        result |= run_harness(scorer, others, manager, config.limit)
    print(json.dumps(result))
    return result


def show(task: str, measures: Mapping[str, Any], of: str) -> None:
    """Print the measures of a task, which are floats, with the standard errors of those that have a NAME_stderr."""
    for name, value in measures.items():
        if isinstance(value, float) and not name.endswith("_stderr"):
            spread = f"± {error:.4f}" if (error := measures.get(f"{name}_stderr")) else ""
            print(f"{task:10} {name.replace('_', ' '):21} {value:>12.4f} {spread:9} {of}", flush=True)


@torch.no_grad()
def whole_split_loss(
    model: GPT, tokens: Ids, block_size: int, batch_size: int, device: Device, end_of_text: int | None = None
) -> tuple[float, int]:
    """Return the mean cross-entropy in nats per token, and the number of tokens predicted.

    The split is cut into windows of `block_size` that do not overlap (the last may be shorter), so every token
    but the first is predicted exactly once. Given `end_of_text`, from its own document only.
    """
    n_targets, total = len(tokens) - 1, 0.0
    for start in with_progress(range(0, n_targets, batch_size * block_size)):
        ids = torch.from_numpy(tokens[start : start + batch_size * block_size + 1].astype(np.int64))
        missing = -(len(ids) - 1) % block_size  # fill up the last window; -1 does not count
        inputs = device.put(F.pad(ids[:-1], (0, missing)).view(-1, block_size))
        targets = device.put(F.pad(ids[1:], (0, missing), value=-1).view(-1, block_size))
        document_ids = None if end_of_text is None else document_ids_of(inputs, end_of_text)
        with device.autocast():
            _, loss = model(inputs, targets, document_ids=document_ids, return_logits=False)
        total += loss.item() * (len(ids) - 1)
    return total / n_targets, n_targets


def split_measures(config: EvalConfig, trained: TrainedModel, device: Device) -> dict[str, Any]:
    """Return loss, perplexity and bits per byte over a whole split of a data set, or how well it knows the answers."""
    model, name = trained.model, str(config.dataset or trained.config.get("dataset", ""))
    if not name:
        raise ConfigError(f"on which data set? {trained.name} does not say; for example --dataset=shakespeare")
    data_dir = config.data_dir or trained.config.get("data_dir", "data")
    source = config.out_dir if config.init_from == "resume" else config.init_from
    source = "resume" if trained.config.get("dataset") == name else source  # What a run was trained on stays.
    prepare_missing(TrainConfig(dataset=name, data_dir=data_dir, init_from=source))  # pydoc has the model's tokenizer
    dataset = open_dataset(Path(data_dir, name))
    dataset.match_tokenizer(trained.tokenizer, trained.name)
    if dataset.chats:
        adapt(model, TrainConfig(), trained.tokenizer, dataset.tokenizer)
        scorer = Scorer(model, dataset.tokenizer, device, config.batch_size)
        return {"dataset": name, "split": config.split, "block_size": model.config.block_size,
                **answers(scorer, dataset.chats[config.split], config.limit)}  # fmt: skip
    dataset.check_length(1)
    tokens = getattr(dataset, config.split)
    own = model.config.block_size if trained.config else min(model.config.block_size, LONGEST)
    block_size = min(config.block_size or own, len(tokens) - 1)
    if block_size > model.config.block_size:
        model.crop_block_size(block_size)  # rotary positions reach further, learned ones do not
    end_of_text = dataset.tokenizer.end_of_text if trained.config.get("mask_documents") else None
    loss, n_tokens = whole_split_loss(model, tokens, block_size, config.batch_size, device, end_of_text)
    size = dataset.description.get("bytes", {}).get(config.split, 0)
    return {
        "dataset": name, "split": config.split, "block_size": block_size, "tokens": n_tokens, "loss": loss,
        "perplexity": math.exp(loss), "bits_per_byte": loss * n_tokens / math.log(2) / size if size else None,
    }  # fmt: skip


@dataclass(frozen=True)
class Scorer:
    """Computes logprobs of texts."""

    model: GPT
    tokenizer: Tokenizer
    device: Device
    batch_size: int = 32

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with a start token where the model's tokenizer adds one."""
        ids: list[int] = self.tokenizer.encode(text).tolist()
        return [self.tokenizer.bos or 0] * self.tokenizer.adds_bos + ids

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return of each (context, completion) the completion's logprob, and whether greedy decoding would write it.

        A context that is too long for the model loses its beginning.
        """
        rows = []
        for context, completion in pairs:
            # The space between context and completion belongs to the completion's first token.
            start, ids = self.encode(context.rstrip()), self.encode(context + completion)
            count = max(len(ids) - len(start), 1)  # A token may reach back into the context.
            before = [self.tokenizer.bos or 0] if count == len(ids) else []
            rows.append((before + ids, count))
        return self.scores_of_ids(rows)

    @torch.no_grad()
    def scores_of_ids(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Return the same of the last `count` of each (ids, count)."""
        ids_of = [torch.tensor(ids[-self.model.config.block_size - 1 :]) for ids, _ in rows]
        by_length = sorted(range(len(rows)), key=lambda n: -len(ids_of[n]))  # little padding, the largest first
        results = [(0.0, False)] * len(rows)
        for first in with_progress(range(0, len(rows), self.batch_size)):
            batch = by_length[first : first + self.batch_size]
            targets = [ids_of[n][1:][-rows[n][1] :] for n in batch]
            counts, ends = [len(each) for each in targets], [len(ids_of[n]) - 1 for n in batch]
            idx = pad_sequence([ids_of[n][:-1] for n in batch], batch_first=True)
            with self.device.autocast():
                x = self.model.transformer(self.device.put(idx))  # (B, T, C)
                x = torch.cat([row[end - count : end] for row, end, count in zip(x, ends, counts, strict=True)])
                logits = self.model.lm_head(x)[:, : self.tokenizer.vocab_size].float()  # (sum of counts, V)
            y = self.device.put(torch.cat(targets))[:, None]
            logprobs = logits.log_softmax(dim=-1).gather(1, y).double().cpu().split(counts)
            matches = (logits.argmax(dim=-1, keepdim=True) == y).cpu().split(counts)
            for n, logprob, match in zip(batch, logprobs, matches, strict=True):
                results[n] = logprob.sum().item(), bool(match.all())
        return results


def answers(scorer: Scorer, chats: Chats, limit: int) -> dict[str, float]:
    """Score the answers in conversations, each after all that was said before it.

    Exact match: greedy decoding writes the whole answer, and its end. The logprob is that of a whole answer, in nats.
    """
    begins = np.flatnonzero(chats.marks & BEGINS)
    edges = np.flatnonzero(np.diff(chats.marks & COUNTS > 0, prepend=False, append=False))
    rows = []
    for start, stop in edges.reshape(-1, 2)[: limit or None].tolist():
        begin = begins[begins.searchsorted(start, side="right") - 1]
        rows.append((chats.ids[begin:stop].tolist(), stop - start))
    scores, tokens = scorer.scores_of_ids(rows), sum(count for _, count in rows)
    logprob = sum(score for score, _ in scores)
    exact = sum(is_greedy for _, is_greedy in scores) / len(rows)
    return {"answers": len(rows), "tokens": tokens, "loss": -logprob / tokens, "exact_match": exact,
            "logprob": logprob / len(rows)}  # fmt: skip


def lambada(scorer: Scorer, examples: Sequence[Example]) -> dict[str, float]:
    """Predict the last word of a passage, all its tokens, by greedy decoding (Paperno et al. 2016)."""
    results = scorer.scores([(context, word) for context, [word], _ in examples])
    accuracy = sum(is_greedy for _, is_greedy in results) / len(results)
    logprob = sum(logprob for logprob, _ in results)
    return {"accuracy": accuracy, "perplexity": math.exp(-logprob / len(results))}  # per word


def hellaswag(scorer: Scorer, examples: Sequence[Example]) -> dict[str, float]:
    """Choose the most probable of four endings, as such and per character (Zellers et al. 2019)."""
    pairs = [(context, ending) for context, endings, _ in examples for ending in endings]
    labels = torch.tensor([label for _, _, label in examples])
    logprobs = torch.tensor([logprob for logprob, _ in scorer.scores(pairs)]).view(-1, 4)
    lengths = torch.tensor([len(ending) - 1 for _, ending in pairs]).view(-1, 4)
    measures = {"accuracy": logprobs, "accuracy_normalised": logprobs / lengths}
    return {name: (each.argmax(dim=1) == labels).double().mean().item() for name, each in measures.items()}


def to_example(benchmark: str, row: dict[str, Any]) -> Example:
    """Return a line of a benchmark's file as an example; HellaSwag's without the marks that WikiHow left in it."""
    if benchmark == "lambada":
        context, _, word = row["text"].rpartition(" ")
        return context, [f" {word}"], 0
    context = row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize()
    texts = [text.strip().replace(" [title]", ". ") for text in (context, *row["endings"])]
    context, *endings = (re.sub(r"\[.*?\]", "", text).replace("  ", " ") for text in texts)
    return context, [f" {ending}" for ending in endings], int(row["label"])


def read_examples(name: str, config: EvalConfig) -> list[Example]:
    """Read the file that `config` names, or the published one, which is kept in its data_dir. Raises `DataError`."""
    url, sha256 = BENCHMARKS[name]
    file, published = getattr(config, name), url.rpartition("/")[2]
    kept = Path(config.data_dir or "data", name, published)
    path = Path(file) if file else download(kept, published, url, sha256, option=name)
    lines = [line for line in path.read_bytes().splitlines() if line]
    try:
        return [to_example(name, json.loads(line)) for line in lines[: config.limit or None]]
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(f"{path} is no file like {published}: {error!r}") from error


def run_harness(scorer: Scorer, names: list[str], manager: Any, limit: int) -> dict[str, Any]:
    """Run tasks of lm-eval, print their measures with standard errors, and return them by task."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer, block_size = scorer.tokenizer, scorer.model.config.block_size

    class Harness(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return scorer.scores([each.args for each in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Return the logprobs of whole texts, each token predicted once, in windows of the model's context."""
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(scorer.encode(request.args[0]), tokenizer.bos or 0, block_size, 1)
                pairs = map(make_disjoint_window, windows)
                scores = scorer.scores_of_ids([(before + targets, len(targets)) for before, targets in pairs])
                totals.append(sum(logprob for logprob, _ in scores))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Return greedy completions, up to the model's end or the first of each request's stop strings."""
            texts = []
            for prompt, settings in with_progress([each.args for each in requests]):
                new, until = settings.get("max_gen_toks", 256), settings.get("until") or []
                # Like lm-eval, leave space for the answer; but at least half of a small context is for the prompt.
                ids = scorer.encode(prompt)[-max(block_size - new, block_size // 2, 1) :] or [tokenizer.bos or 0]
                row = scorer.model.generate(scorer.device.put(torch.tensor([ids])), new, temperature=0.0)[0, len(ids) :]
                text = tokenizer.decode(list(takewhile(lambda token: token not in tokenizer.end_tokens, row.tolist())))
                for stop in filter(None, [until] if isinstance(until, str) else until):
                    text = text.split(stop)[0]
                texts.append(text)
            return texts

    found = simple_evaluate(
        model=Harness(), tasks=names, task_manager=manager, limit=limit or None, bootstrap_iters=1000, log_samples=False
    )
    measures: dict[str, Any] = {}
    for task, values in found["results"].items():
        measures[task] = {key.partition(",")[0]: v for key, v in values.items() if isinstance(v, float)}
        show(task, measures[task], f"{found['n-samples'].get(task, {}).get('effective', 0):,} examples")
    return measures
