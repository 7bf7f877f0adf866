"""Look inside a trained model: its parameters, the loss of every token of a text, what its heads look at."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanogpt.checkpoint import load_trained
from nanogpt.device import Device
from nanogpt.errors import ConfigError
from nanogpt.files import atomic_write
from nanogpt.model import GPT
from nanogpt.plot import print_table
from nanogpt.sample import prompt_ids, read_prompt
from nanogpt.settings import InspectConfig
from nanogpt.tokenizer import TextDecoder, Tokenizer

_PAGE = """<!doctype html><meta charset="utf-8"><style>:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.9 monospace; max-width: 60rem; margin: 2rem auto; }}
div {{ white-space: pre-wrap; overflow-wrap: anywhere; }}</style>
<p>{about}. The stronger the colour, the higher the loss, up to 6 nats; point at a token for its number.</p>
<div>{text}</div>
"""


def inspect(config: InspectConfig) -> None:
    """Print the parameters of a model; of a text, write the loss of each token and draw where each head looks."""
    trained = load_trained(config, Device("cpu", "cpu", torch.float32, compile=False))
    model, tokenizer = trained.model, trained.tokenizer
    ids = prompt_ids(read_prompt(config.text), tokenizer)[: model.config.block_size]
    if len(ids) < 2:
        raise ConfigError(f"text has {len(ids)} tokens, and the first one has no loss: expected at least 2")
    print(f"{trained.name}, {model.get_num_params() / 1e6:.2f}M parameters")
    parameters = [
        (name, " x ".join(map(str, p.shape)), str(p.dtype).removeprefix("torch."), f"{p.norm().item():.3f}")
        for name, p in model.named_parameters()
    ]
    print_table([("parameter", "shape", "dtype", "norm"), *parameters])
    folder = Path(config.output or (config.out_dir if config.init_from == "resume" else "."))
    losses, attention = look(model, ids)
    about = f"{sum(losses) / len(losses):.4f} nats per token over {len(ids)} tokens"
    with atomic_write(folder / "tokens.html") as file:
        file.write(page_of_tokens(ids, losses, tokenizer, f"{trained.name}: {about}").encode())
    print(f"wrote {folder / 'tokens.html'}: {about}")
    draw_attention(folder / "attention.png", ids, attention, tokenizer)
    print(f"drew {folder / 'attention.png'}: {len(attention)} layers of {len(attention[0])} heads")


class _Attention(TorchFunctionMode):
    """Records the attention weights at every call of torch's attention within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []  # (H, T, T) for each layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[0][0], args[1][0]  # (H, T, D)
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            self.seen.append(scores.masked_fill(hidden, -math.inf).softmax(dim=-1))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def look(model: GPT, ids: Sequence[int]) -> tuple[list[float], list[Tensor]]:
    """Return the loss of each token but the first, in nats, and each layer's attention (H, T, T)."""
    row = torch.tensor([list(ids)])
    with _Attention() as attention:
        logits, _ = model(row, targets=row)  # (1, T, V)
    losses = F.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="none")
    return losses.tolist(), attention.seen


def page_of_tokens(ids: Sequence[int], losses: Sequence[float], tokenizer: Tokenizer, about: str) -> str:
    """Return a page of HTML that shows a text, each token tinted by its loss."""
    decoder = TextDecoder(tokenizer)
    first, *texts = [decoder.decode([i]) for i in ids]
    spans = [html.escape(first)]
    for text, loss in zip(texts, losses, strict=True):
        style = f"background: rgb(240 138 36 / {min(100, 100 * loss / 6):.0f}%)"
        spans.append(f'<span style="{style}" title="{loss:.3f} nats">{html.escape(text)}</span>')
    return _PAGE.format(about=html.escape(about), text="".join(spans))


def draw_attention(path: Path, ids: Sequence[int], attention: Sequence[Tensor], tokenizer: Tokenizer) -> None:
    """Draw a panel for every head: each row is a token, and shows how much it looks at those before it."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    L, H = len(attention), len(attention[0])
    names = [repr(tokenizer.decode([token]))[1:-1] for token in ids] if len(ids) <= 40 else []
    side = max(2.2, 0.13 * len(names))  # inches; 0.13 for a label of 8 points
    figure = Figure(figsize=(min(side * H + 1, 60), min(side * L + 1, 60)), layout="constrained")
    panels = figure.subplots(L, H, squeeze=False, sharex=True, sharey=True)
    for n, axes in enumerate(panels.flat):
        # PowerNorm, because most weights are small.
        image = axes.imshow(attention[n // H][n % H].numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        axes.set_title(f"layer {n // H}, head {n % H}", fontsize=9)
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=90)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=panels, shrink=min(1.0, 3 / L), pad=0.01, label="share of a row's attention")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
