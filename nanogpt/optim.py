"""Which parameter is optimized how: AdamW, Muon or another optimizer of torch, and the learning-rate schedule."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from nanogpt.config import TrainConfig
from nanogpt.device import without_compiler
from nanogpt.errors import ConfigError
from nanogpt.model import GPT, linear_maps


def make_optimizer(model: GPT, config: TrainConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names; dtype: of the matmuls. Raises `ConfigError` for an unknown one."""
    if config.optimizer == "muon":
        return Muon(model, config, dtype)
    unfit = ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # need closures, sparse gradients, or matrices only
    found = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name not in unfit}
    kinds = {name.lower(): kind for name, kind in found.items()}
    if (kind := kinds.get(config.optimizer)) is None:
        raise ConfigError(
            f"optimizer={config.optimizer!r}: expected muon, or one of torch's: {', '.join(sorted(kinds))}"
        )
    # Each optimizer of torch gets those of our settings that it has.
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "momentum": config.beta1}
    if config.optimizer in ("adamw", "adam"):
        settings["fused"] = True  # one kernel for all tensors
    settings = {name: value for name, value in settings.items() if name in inspect.signature(kind).parameters}
    return without_compiler(kind)(decay_groups(model.parameters(), config.weight_decay), **settings)  # type: ignore[no-any-return]


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices and embeddings, which decay; biases and norms, which do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def step_if_finite(optimizer: torch.optim.Optimizer, is_finite: Tensor) -> None:
    """Step unless `is_finite` () is False. Fused Adam reads it on the device, so that no GPU has to wait."""
    if isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["fused"] and is_finite.device.type != "mps":
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif is_finite:
        optimizer.step()


class Muon(without_compiler(torch.optim.AdamW)):  # type: ignore[misc]
    """Muon for the matrices of the blocks, AdamW for everything else: embeddings, head, vectors.

    AdamW treats a matrix as a bag of numbers. Muon treats it as what it is, a linear map: it takes the momentum of its
    gradient and makes all singular values 1, so that a step moves every direction by the same amount, also those in
    which gradients are small and rare. It needs one tensor of state in place of two.

    Parameter groups: AdamW's two, then one for each matrix of a block. Queries, keys and values, and the two halves of
    SwiGLU, are linear maps of their own that share a tensor; `cuts` are the numbers of rows of each.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, model: GPT, config: TrainConfig, dtype: torch.dtype) -> None:
        blocks = model.transformer.h
        matrices: list[dict[str, Any]] = [
            {"params": [block.get_parameter(f"{name}.weight") for block in blocks], "cuts": cuts}
            for name, cuts in linear_maps(model.config).items()
        ]
        hidden = {id(matrix) for group in matrices for matrix in group["params"]}
        groups = decay_groups([p for p in model.parameters() if id(p) not in hidden], config.weight_decay)
        scale = config.muon_lr / config.learning_rate
        shared = {"lr_scale": scale, "momentum": config.muon_momentum, "weight_decay": config.weight_decay}
        groups += [{**group, **shared} for group in matrices]
        super().__init__(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step all parameters that have a gradient; none if the attribute `found_inf` is 1."""
        for group in self.param_groups:
            if "cuts" in group:
                self.step_matrices(group)
        return super().step(closure)  # AdamW skips parameters without a gradient

    def step_matrices(self, group: dict[str, Any]) -> None:
        """Step the matrices of a group, which all have one shape, and drop their gradients."""
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        if not matrices:
            return
        is_bad = getattr(self, "found_inf", None)
        rate = group["lr"] if is_bad is None else group["lr"] * (1 - is_bad)
        mesh = getattr(matrices[0], "device_mesh", None)  # of FSDP; then this process has some rows of each matrix
        directions = []
        for matrix in matrices:
            state = self.state[matrix]
            if not state:  # torch's AdamW expects `step` when it loads a state
                state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(matrix))
            momentum, gradient = (t.to_local() if mesh else t for t in (state["momentum_buffer"], matrix.grad))
            gradient = gradient if is_bad is None else torch.where(is_bad > 0, momentum, gradient)
            momentum.lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(momentum, group["momentum"]).to(self.dtype))  # Nesterov's
            matrix.grad = None
        for matrix, direction in zip(matrices, orthogonalize_together(directions, group["cuts"], mesh), strict=True):
            weight = matrix.to_local() if mesh else matrix
            weight.mul_(1 - rate * group["weight_decay"])
            weight.sub_(direction.to(weight.dtype) * rate)


def orthogonalize_together(matrices: list[Tensor], cuts: list[int], mesh: Any) -> Tensor:
    """Orthogonalize n matrices (R, C), of which each process computes some; with FSDP's mesh, each passes its rows."""
    stack = torch.stack(matrices)
    if not c10d.is_initialized() or c10d.get_world_size() == 1:
        return orthogonalize(stack, cuts)
    group = mesh and mesh.get_group(mesh.ndim - 1)
    rank, size, (n, r, C), R = c10d.get_rank(group), c10d.get_world_size(group), stack.shape, sum(cuts)
    count, height = -(-n // size), -(-R // size)  # matrices that a process computes, rows that FSDP gives it
    if mesh is None:
        for k, matrix in enumerate(stack):
            matrix.copy_(orthogonalize(matrix[None], cuts)[0] if k // count == rank else torch.zeros_like(matrix))
        c10d.all_reduce(stack)
        return stack
    # One all-to-all brings each process all rows of its matrices, another takes the new rows back. If each process held
    # all matrices of a shape, 8 billion parameters on 64 GPUs would take 10 GB more on each of them.
    shards = nn.functional.pad(stack, (0, 0, 0, height - r, 0, size * count - n))  # equal sizes in all processes
    received = torch.empty_like(shards)
    c10d.all_to_all_single(received, shards, group=group)
    whole = received.view(size, count, height, C).transpose(0, 1).flatten(1, 2)  # (count, R and padding, C)
    for matrix in whole:
        matrix[:R] = orthogonalize(matrix[None, :R], cuts)[0]
    c10d.all_to_all_single(shards, whole.view(count, size, height, C).transpose(0, 1).flatten(0, 1), group=group)
    return shards[:n, :r]


def orthogonalize(stack: Tensor, cuts: list[int]) -> Tensor:
    """Return each linear map in a stack (n, R, C) with all singular values near 1; `cuts` (sum R): rows of each map.

    A map with more rows than columns is scaled up by the root of their ratio, so that its outputs change as much as
    those of a square one.
    """
    is_even = len(set(cuts)) == 1
    maps = [stack.unflatten(1, (-1, cuts[0])).flatten(0, 1)] if is_even else list(stack.split(cuts, dim=1))  # type: ignore[no-untyped-call]
    done = [newton_schulz(each) * max(1.0, each.shape[1] / each.shape[2]) ** 0.5 for each in maps]
    return done[0].reshape(stack.shape) if is_even else torch.cat(done, dim=1)


def newton_schulz(stack: Tensor, steps: int = 5) -> Tensor:
    """Return roughly the nearest orthogonal matrix U V^T of every U S V^T in a stack (n, R, C): S becomes 0.7 to 1.2.

    Each step applies the odd polynomial a s + b s^3 + c s^5 to all singular values s at once. These coefficients lift
    small ones fast, at the price of never settling at 1, which does not matter. Works in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if is_tall else stack  # the smaller square is the cheaper one
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # now no singular value is above 1
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of `step` (from 0), after a linear warm-up.

    cosine: down to min_lr along half a wave. wsd (warm up, stay, decay): constant, then straight down to min_lr over
    the last `decay_share` of lr_decay_iters. Afterwards min_lr.
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
