"""Look inside a trained model: its parameters, the loss of every token of a text, what its heads look at."""

import html
import math
from collections.abc import Callable, Sequence
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
from nanogpt.tokenizer import Tokenizer

_FULL = 6.0  # nats at which the colour is full
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.9 ui-monospace, "DejaVu Sans Mono", monospace; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#fbfaf8, #16171a); color: light-dark(#1f2328, #e6e6e3); }
p { font-family: system-ui, sans-serif; }
div { white-space: pre-wrap; overflow-wrap: anywhere; }
span { background: color-mix(in srgb, light-dark(#f08a24, #9c4a0b) var(--p), transparent); border-radius: 0.2rem; }
"""


def inspect(config: InspectConfig) -> None:
    """Print the parameters of a model; of a text, write the loss of each token and draw where each head looks.

    Of a text longer than the model's context, that is its beginning. Raises `ConfigError` if it is too short.
    """
    trained = load_trained(config, Device("cpu", "cpu", torch.float32, compile=False))
    model, tokenizer = trained.model, trained.tokenizer
    ids = prompt_ids(read_prompt(config.text), tokenizer)
    if len(ids) < 2:
        raise ConfigError(f"text has {len(ids)} tokens, and the first one has no loss: expected at least 2")
    if len(ids) > model.config.block_size:
        print(f"of {len(ids):,} tokens the first {model.config.block_size:,}, the model's context")
        ids = ids[: model.config.block_size]
    print(f"{trained.name}, {model.get_num_params() / 1e6:.2f}M parameters")
    parameters = [
        (name, " x ".join(map(str, p.shape)), str(p.dtype).removeprefix("torch."), f"{p.norm().item():.3f}")
        for name, p in model.named_parameters()
    ]
    print_table([("parameter", "shape", "dtype", "norm"), *parameters])
    folder = Path(config.output or (config.out_dir if config.init_from == "resume" else "."))
    losses, attention = look(model, ids)
    with atomic_write(folder / "tokens.html") as file:
        file.write(coloured(ids, losses, tokenizer, trained.name).encode())
    print(f"wrote {folder / 'tokens.html'}: {sum(losses) / len(losses):.4f} nats per token")
    draw_attention(folder / "attention.png", ids, attention, tokenizer)
    print(f"drew {folder / 'attention.png'}: {len(attention)} layers of {attention[0].shape[0]} heads")


class _Attention(TorchFunctionMode):
    """Records the attention weights at every call of torch's attention within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []  # (H, T, T) for each layer

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            q, k = arguments[0][0], arguments[1][0]  # (H, T, D)
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            self.seen.append(scores.masked_fill(hidden, -math.inf).softmax(dim=-1))
        return function(*arguments, **(named or {}))


@torch.no_grad()
def look(model: GPT, ids: Sequence[int]) -> tuple[list[float], list[Tensor]]:
    """Return the loss of each token but the first, in nats, and each layer's attention (H, T, T)."""
    row = torch.tensor([list(ids)])
    with _Attention() as attention:
        logits, _ = model(row, targets=row)  # (1, T, V)
    losses = F.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="none")
    return losses.tolist(), attention.seen


def coloured(ids: Sequence[int], losses: Sequence[float], tokenizer: Tokenizer, name: str) -> str:
    """Return a page of HTML that shows a text, each token tinted by its loss."""
    first, *texts = list(tokenizer.decode_stream(ids))[: len(ids)]
    spans = [html.escape(first)]
    for text, loss in zip(texts, losses, strict=True):
        title = f"{loss:.3f} nats, {100 * math.exp(-loss):.2g} %"
        share = f"{100 * min(1.0, loss / _FULL):.0f}%"
        spans.append(f'<span style="--p: {share}" title="{title}">{html.escape(text)}</span>')
    about = (
        f"{name}: {sum(losses) / len(losses):.4f} nats per token. The stronger the colour, the more surprising the "
        f"token (full at {_FULL:g} nats); point at one for its number."
    )
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(name)}</title>'
    return f"{head}\n<style>{_STYLE}</style>\n<p>{html.escape(about)}</p>\n<div>{''.join(spans)}</div>\n"


def draw_attention(path: Path, ids: Sequence[int], attention: Sequence[Tensor], tokenizer: Tokenizer) -> None:
    """Draw a panel for every head: each row is a token, and shows how much it looks at those before it."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    L, H, T = len(attention), attention[0].shape[0], len(ids)
    names = [repr(tokenizer.decode([token]))[1:-1] for token in ids] if T <= 40 else []
    side = max(2.2, 0.13 * len(names))  # inches; 0.13 for a label of 8 points
    figure = Figure(figsize=(min(side * H + 1, 60), min(side * L + 1, 60)), layout="constrained")
    panels = figure.subplots(L, H, squeeze=False, sharex=True, sharey=True)
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # most weights are small
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    for n, axes in enumerate(panels.flat):
        weights = attention[n // H][n % H].masked_fill(hidden, math.nan)  # what is hidden has no colour
        image = axes.imshow(weights.numpy(), cmap="viridis_r", norm=norm)
        axes.set_title(f"layer {n // H}, head {n % H}", fontsize=9)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=8, length=0)
        axes.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(image, ax=panels, shrink=min(1.0, 3 / L), pad=0.01)
    bar.set_label("share of a row's attention")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
