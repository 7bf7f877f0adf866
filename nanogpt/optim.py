"""Which parameter is updated how, and how the learning rate goes."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt.config import TrainConfig
from nanogpt.model import GPT
from nanogpt.spread import spread_like, whole


def optimizer_for(model: GPT, config: TrainConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The optimizer that `config` asks for. dtype: in which the network computes."""
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return adamw(model, config.learning_rate, betas, config.weight_decay)
    return Muon(model, config.learning_rate, betas, config.weight_decay, config.muon_lr, config.muon_momentum, dtype)


def adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> "AdamW":
    """AdamW with decay on matrices and embeddings, none on biases and norms (two groups, in this order)."""
    groups = adamw_groups([p for p in model.parameters() if p.requires_grad], weight_decay)
    return AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def adamw_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The two groups that AdamW has."""
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, in one kernel for all tensors, but without waiting a second for torch.compile.

    torch's optimizers import that at their first call, to be left out of it; these are never compiled. State and
    groups are the same. Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        for method in vars(torch.optim.Optimizer).values():
            if function := getattr(method, "__wrapped__", None):
                function.__dict__.setdefault("__dynamo_disable", function)  # where torch looks before it imports
        super().__init__(*args, **settings)
        devices = {parameter.device.type for group in self.param_groups for parameter in group["params"]}
        self._step_supports_amp_scaling = "mps" not in devices  # whose kernel looks at nothing that a GradScaler sets

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; none if `found_inf` was set to 1. Returns what `closure` does."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            if any(p.grad is not None for p in group["params"]):
                self.update(group)
        return loss

    def update(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group."""
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                averages = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.zeros((), device=p.device), **averages}
        steps, means, squares = (
            [self.state[p][name] for p in parameters] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        bad, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)  # a GradScaler sets both
        if bad is not None and bad.device.type == "mps" and bad:
            return
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            parameters, [p.grad for p in parameters], means, squares, [], steps,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False, grad_scale=scale, found_inf=bad,
        )  # fmt: skip
        if bad is not None:
            torch._foreach_sub_(steps, [bad] * len(steps))


class Muon(AdamW):
    """Muon for the matrices of the blocks, AdamW for everything else: embeddings, head, vectors.

    AdamW treats a matrix as a bag of numbers. Muon treats it as what it is, a linear map: it takes the momentum of its
    gradient and makes all singular values 1, so that the update moves every direction by the same amount, also those
    in which gradients are small and rare. It needs one tensor of state in place of two.

    Groups: AdamW's two, then one for each shape of matrix, which are updated together as one stack. Queries, keys and
    values, and the two halves of SwiGLU, are maps of their own that share a tensor, and are cut apart. Several
    processes each compute a share of the matrices, and exchange the results.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, model: GPT, learning_rate: float, betas: tuple[float, float], weight_decay: float,
                 muon_lr: float, momentum: float, dtype: torch.dtype) -> None:  # fmt: skip
        self._dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        stacks = hidden_matrices(model)
        hidden = {id(matrix) for matrices in stacks.values() for matrix in matrices}
        groups = adamw_groups([p for p in model.parameters() if p.requires_grad and id(p) not in hidden], weight_decay)
        groups += [
            {"params": matrices, "lr_scale": muon_lr / learning_rate, "momentum": momentum, "cuts": list(cuts),
             "weight_decay": weight_decay}
            for (_, cuts), matrices in stacks.items()
        ]  # fmt: skip
        super().__init__(groups, lr=learning_rate, betas=betas, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler is to unscale the gradients itself
        listed = [id(parameter) for group in self.param_groups for parameter in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)

    def update(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group."""
        if "cuts" not in group:
            super().update(group)
            return
        if getattr(self, "found_inf", None):  # asks a GPU, and waits: only AdamW's kernel can do without
            return
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                # torch's AdamW wants to see `step` when it loads
                self.state[matrix] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(matrix)}
        averages = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov's: where the average will be
        stack = torch.stack([whole(each).to(self._dtype) for each in ahead])
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for matrix, each in zip(matrices, self._shared(stack, group["cuts"]), strict=True):
            matrix.add_(spread_like(matrix, each.to(matrix.dtype)), alpha=-group["lr"])

    def _shared(self, stack: Tensor, cuts: list[int]) -> Tensor:
        """The updates for a stack of momenta (n, R, C), of which each process computes as many."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if size == 1:
            return orthogonalised(stack, cuts)
        share = -(-len(stack) // size)
        mine = torch.zeros(share, *stack.shape[1:], dtype=stack.dtype, device=stack.device)
        part = stack[rank * share : (rank + 1) * share]
        if len(part):
            mine[: len(part)] = orthogonalised(part, cuts)
        everyone = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(everyone, mine)
        return torch.cat(everyone)[: len(stack)]


def hidden_matrices(model: GPT) -> dict[tuple[torch.Size, tuple[int, ...]], list[nn.Parameter]]:
    """The matrices of the blocks by their shape and the rows of the maps that they consist of."""
    stacks: dict[tuple[torch.Size, tuple[int, ...]], list[nn.Parameter]] = {}
    halves = [model.config.n_hidden] * (1 if model.config.is_gpt2 else 2)
    heads = [n * model.config.head_size for n in (model.config.n_head, *[model.config.n_kv_head] * 2)]
    cuts = {"attn.c_attn": heads, "mlp.c_fc": halves}
    cuts |= {f"{part}.c_proj": [model.config.n_embd] for part in ("attn", "mlp")}
    for block in model.transformer.h:
        for name, rows in cuts.items():
            weight = block.get_parameter(f"{name}.weight")
            if weight.requires_grad:
                stacks.setdefault((weight.shape, tuple(rows)), []).append(weight)
    return stacks


def orthogonalised(stack: Tensor, cuts: list[int]) -> Tensor:
    """Each matrix of a stack (n, R, C) with all singular values near 1; `cuts` (sum R): rows of the maps within one.

    A map that has more rows than columns is made larger by the root of their ratio: what it gives then changes as much
    as what a square one gives.
    """
    equal = len(set(cuts)) == 1
    maps = [stack.unflatten(1, (-1, cuts[0])).flatten(0, 1)] if equal else list(stack.split(cuts, dim=1))  # type: ignore[no-untyped-call]
    done = [newton_schulz(each) * max(1.0, each.shape[1] / each.shape[2]) ** 0.5 for each in maps]
    return done[0].reshape(stack.shape) if equal else torch.cat(done, dim=1)


def newton_schulz(stack: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix U V^T of every U S V^T in a stack (n, R, C), roughly: S becomes 0.7 to 1.2.

    Each step applies the odd polynomial a s + b s^3 + c s^5 to all singular values s at once. These coefficients lift
    small ones fast, and pay with never settling at 1, which is known not to matter. Works in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if is_tall else stack  # the smaller square is the cheaper
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # then no singular value is above 1
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step` (from 0), after a linear warm-up.

    cosine: down to min_lr along half a wave. wsd (warm up, stay, decay): constant, then straight down to min_lr over
    the last `decay_share` of lr_decay_iters. min_lr ever after.
    """
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    if config.schedule == "wsd":
        left = (config.lr_decay_iters - step) / max(config.decay_share * config.lr_decay_iters, 1e-9)
        return config.min_lr + min(left, 1.0) * (config.learning_rate - config.min_lr)
    progress = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)
