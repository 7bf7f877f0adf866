"""How the network fares: what an update does to it, layer by layer, and how large its activations get."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nanogpt.infer.text import eager
from nanogpt.spread import whole
from nanogpt.start import Run


class Checkup:
    """Looks at one update: at the gradients before they are clipped, then at what the step has made of the weights.

    It keeps a copy of the weights between the two, when the activations of the backward pass are gone.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @torch.no_grad()
    def before_step(self) -> None:
        """Gradients are there, and not yet clipped."""
        named = dict(self.run.model.named_parameters())
        self.gradients = {name: whole(p.grad.norm()) for name, p in named.items() if p.grad is not None}
        self.weights = {name: p.detach().clone() for name, p in named.items()}

    @torch.no_grad()
    def values(self, x: Tensor, document_ids: Tensor | None) -> dict[str, float]:
        """What is to be recorded after the step; the activations are those of inputs x (B, T).

        A healthy update changes a layer by about a thousandth of its norm.
        """
        named = dict(self.run.model.named_parameters())
        weights = {name: whole(before.norm()) for name, before in self.weights.items()}
        changes = {name: whole(before.sub_(named[name]).norm()) for name, before in self.weights.items()}
        self.weights = {}
        layers: dict[str, list[str]] = {}
        for name in named:
            layers.setdefault(_layer(name), []).append(name)
        values = {"health/activation_max": self._largest_activation(x, document_ids)}
        for layer, names in layers.items():
            values[f"grad_norm/{layer}"] = _root(self.gradients[name] for name in names if name in self.gradients)
            values[f"update_ratio/{layer}"] = _root(changes[name] for name in names) / max(
                _root(weights[name] for name in names), 1e-12
            )
        ratios = torch.stack([changes[name] / weights[name] for name, p in named.items() if p.dim() >= 2])
        values["health/update_ratio"] = ratios.median().item()
        values["health/update_ratio_max"] = ratios.max().item()
        return values

    def _largest_activation(self, x: Tensor, document_ids: Tensor | None) -> float:
        """The largest value in the residual stream."""
        largest: list[Tensor] = []

        def note(module: Any, inputs: Any, output: Tensor) -> None:
            largest.append(output.abs().max().float())

        hooks = [block.register_forward_hook(note) for block in self.run.model.transformer.h]
        self.run.model.eval()
        with self.run.device.autocast(), eager(self.run.model):
            self.run.model(x, document_ids=document_ids)
        self.run.model.train()
        for hook in hooks:
            hook.remove()
        return torch.stack(largest).max().item()


def _layer(name: str) -> str:
    """The layer of a parameter: `h.3` for those of the fourth block, else the module's name."""
    parts = name.removeprefix("transformer.").split(".")
    return ".".join(parts[:2]) if parts[0] == "h" else parts[0]


def _root(norms: Iterable[Tensor]) -> float:
    """The norm of several tensors together."""
    together = [norm.float() for norm in norms]
    return torch.stack(together).norm().item() if together else 0.0
