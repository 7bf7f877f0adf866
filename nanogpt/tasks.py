"""Public benchmarks that compare the likelihoods of continuations: LAMBADA and HellaSwag.

Prompts and scores are those of EleutherAI's lm-evaluation-harness (tasks lambada_openai and hellaswag), so figures
compare with published ones.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from nanogpt.device import Device
from nanogpt.errors import DataError
from nanogpt.files import parse_json
from nanogpt.metrics import with_progress
from nanogpt.model import GPT
from nanogpt.prepare import download
from nanogpt.tokenizer import Tokenizer

# where the files are published, and their SHA-256
_FILES = {
    "lambada": (
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "hellaswag": (
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
}


@dataclass(frozen=True)
class Scorer:
    """A model that says how likely it finds texts."""

    model: GPT
    tokenizer: Tokenizer
    device: Device
    batch_size: int = 32

    @torch.no_grad()
    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each `(context, continuation)`: the latter's log-likelihood in nats, and whether it is the likeliest.

        A context that is too long for the model loses its beginning.
        """
        rows = [self._ids(context, continuation) for context, continuation in pairs]
        by_length = sorted(range(len(rows)), key=lambda n: -len(rows[n][0]))  # little padding, the largest first
        results = [(0.0, False)] * len(rows)
        for first in with_progress(range(0, len(rows), self.batch_size)):
            batch = by_length[first : first + self.batch_size]
            ids = pad_sequence([rows[n][0] for n in batch], batch_first=True)
            counts = torch.tensor([rows[n][1] for n in batch])
            ends = torch.tensor([len(rows[n][0]) - 1 for n in batch])[:, None]
            places = torch.arange(ids.shape[1] - 1)
            counted = (places < ends) & (places >= ends - counts[:, None])  # (B, T)
            with self.device.autocast():
                hidden = self.model.transformer(self.device.put(ids[:, :-1]))
                logits = self.model.lm_head(hidden[self.device.put(counted)])[:, : self.tokenizer.vocab_size]
            targets = self.device.put(ids[:, 1:][counted])[:, None]
            likelihoods = logits.float().log_softmax(dim=-1).gather(1, targets)[:, 0].cpu().split(counts.tolist())
            matches = (logits.argmax(dim=-1, keepdim=True) == targets)[:, 0].cpu().split(counts.tolist())
            for n, likelihood, match in zip(batch, likelihoods, matches, strict=True):
                results[n] = likelihood.double().sum().item(), bool(match.all())
        return results

    def _ids(self, context: str, continuation: str) -> tuple[torch.Tensor, int]:
        """The ids of both, and how many of them are the continuation's."""
        stem = context.rstrip()  # tokens hold the space before a word, not the one behind it
        start = self.tokenizer.encode(stem).tolist()
        ids = self.tokenizer.encode(context + continuation).tolist()
        if not start:
            start = [self.tokenizer.end_of_text or 0]
            ids = start + ids
        count = max(len(ids) - len(start), 1)  # a token may reach back into the context
        ids = ids[-(self.model.config.block_size + 1) :]
        return torch.tensor(ids), min(count, len(ids) - 1)


def lambada(scorer: Scorer, examples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last word of a passage, given the rest (Paperno et al. 2016).

    Accuracy: all its tokens are the likeliest ones. The perplexity is per word.
    """
    parts = [example["text"].rpartition(" ") for example in examples]
    results = scorer.scores([(context, space + word) for context, space, word in parts])
    accuracy = sum(is_likeliest for _, is_likeliest in results) / len(results)
    perplexity = math.exp(-sum(likelihood for likelihood, _ in results) / len(results))
    return {"accuracy": accuracy, "perplexity": perplexity, "examples": len(results)}


def hellaswag(scorer: Scorer, examples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Which of four endings is likeliest, as such and per character (normalised) (Zellers et al. 2019)."""
    pairs, labels = [], []
    for example in examples:
        context = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
        pairs += [(_cleaned(context), " " + _cleaned(ending)) for ending in example["endings"]]
        labels.append(int(example["label"]))
    likelihoods = torch.tensor([likelihood for likelihood, _ in scorer.scores(pairs)]).view(-1, 4)
    lengths = torch.tensor([len(ending) - 1 for _, ending in pairs]).view(-1, 4)
    right = [scores.argmax(dim=1) == torch.tensor(labels) for scores in (likelihoods, likelihoods / lengths)]
    accuracy, normalised = (each.double().mean().item() for each in right)
    return {"accuracy": accuracy, "accuracy_normalised": normalised, "examples": len(labels)}


def _cleaned(text: str) -> str:
    """A text of HellaSwag without the marks that WikiHow's articles left in it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _is_passage(example: Any) -> bool:
    return isinstance(example["text"], str) and len(example["text"].split()) > 1


def _is_question(example: Any) -> bool:
    texts = [example[name] for name in ("activity_label", "ctx_a", "ctx_b")]
    endings = example["endings"]
    has_four = isinstance(endings, list) and len(endings) == 4 and all(isinstance(text, str) for text in endings)
    is_labelled = str(example["label"]) in ("0", "1", "2", "3")
    return has_four and is_labelled and all(isinstance(text, str) for text in texts) and all(map(_cleaned, endings))


TASKS = {"lambada": lambada, "hellaswag": hellaswag}
_EXPECTED = {  # in a line of the file: how it is checked, and what is said
    "lambada": (_is_passage, "a JSON object with a text of several words"),
    "hellaswag": (
        _is_question,
        "a JSON object with activity_label, ctx_a, ctx_b, four endings and a label from 0 to 3",
    ),
}


def examples_of(benchmark: str, file: str, data_dir: str, limit: int) -> list[dict[str, Any]]:
    """The examples in `file`, or in the published one, which is kept in `data_dir`. Raises `DataError`."""
    url, sha256 = _FILES[benchmark]
    is_expected, expected = _EXPECTED[benchmark]
    name = url.rpartition("/")[2]
    path = Path(file) if file else download(Path(data_dir, benchmark, name), name, url, sha256, option=benchmark)
    examples = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--{benchmark}={path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = parse_json(line)
            is_valid = is_expected(example)
        except (ValueError, TypeError, KeyError):
            is_valid = False
        if not is_valid:
            raise DataError(f"{path}, line {number}: expected {expected}, found {line[:80]!r}")
        examples.append(example)
        if len(examples) == limit:
            break
    if not examples:
        raise DataError(f"{path} is empty")
    return examples
