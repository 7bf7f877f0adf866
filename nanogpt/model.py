"""The network, whole: a GPT in one file, with its loss.

It knows nothing of files, processes, tokenizers or logging. Shapes: B batch, T time, C channels (n_embd), H heads,
D head size, V vocabulary.

Sources: GPT-2 (Radford et al. 2019) and its release, https://github.com/openai/gpt-2/blob/master/src/model.py
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from nanogpt.config import GPTConfig
from nanogpt.errors import ConfigError

Rotary = tuple[Tensor, Tensor] | None  # cosines and sines
# Takes a layer's new keys and values and returns all of its keys and values so far: see engine.KVCache.
UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None

# Of GPT-2's MLP: exact GELU, or the tanh form that OpenAI's weights expect. Llama and Qwen3 have SwiGLU instead.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with an optional bias."""

    def __init__(self, ndim: int, bias: bool, eps: float = 1e-5) -> None:
        super().__init__(ndim, eps, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)  # under FSDP, x may be in bfloat16
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    """Return the normalisation of `size` channels that belongs to the architecture."""
    return LayerNorm(size, config.bias, config.norm_eps) if config.is_gpt2 else RMSNorm(size, eps=config.norm_eps)


class Dropout(nn.Module):
    """Dropout of single values in GPT-2; elsewhere of channels, the same ones for all tokens of a row (B, T, C).

    One random number per channel costs nothing; one per value of x takes longer than anything else a CPU does here.
    Source: variational dropout, Gal and Ghahramani 2016.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.p, self.of_channels = config.dropout, not config.is_gpt2

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * F.dropout(torch.ones_like(x[:, :1]), self.p) if self.of_channels else F.dropout(x, self.p)


def rotary_frequencies(config: GPTConfig, device: torch.device | None = None) -> Tensor:
    """Return how fast each pair of channels rotates, in radians per token: (D / 2,).

    Source: Su et al. 2021; the scaling for long contexts is that of Llama 3.1.
    """
    exponents = torch.arange(0, config.head_size, 2, device=device).float() / config.head_size
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling:
        factor, low, high, context = config.rope_scaling
        # Channels that rotate often within the original context stay; those that rotate rarely slow down by `factor`.
        turns = context * frequencies / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (share + (1 - share) / factor)
    return frequencies


def rotations(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of rotary positions: (T,) or (B, T) to two of (1 or B, 1, T, D / 2)."""
    angles = positions[..., None].float() * rotary_frequencies(config, positions.device)
    angles = angles.view(-1, 1, positions.shape[-1], config.head_size // 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel n of x (B, H, T, D) against channel n + D / 2, as the weights of Llama and Qwen expect."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def positions_in(document_ids: Tensor) -> Tensor:
    """Return the position of each token in its document, from 0: document_ids (B, T) to (B, T)."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    return places - (places * begins).cummax(dim=1).values


def document_mask(document_ids: Tensor, dense: bool) -> Any:
    """Return the mask with which tokens see only their own document; document_ids: (B, T).

    Dense, a boolean tensor (B, 1, T, T); else a block mask for FlexAttention, which skips what lies between documents.
    """
    B, T = document_ids.shape
    if dense:
        return (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document_ids[b, q] == document_ids[b, k])

    return create_block_mask(visible, B, None, T, T, device=document_ids.device)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
    """Return attention of q (B, H, T, D) to k, v (B, H or H_kv, T_kv, D): causal, or as `mask` says."""
    if mask is not None and not isinstance(mask, Tensor):
        return flex_attention(q, k, v, block_mask=mask)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 512 and q.requires_grad:
        return attend_in_bfloat16(q, k, v, mask, dropout)
    # Without a mask it is a whole row, which is causal, or one new token with a cache, which sees all before it.
    is_causal = mask is None and q.shape[2] == k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=k.shape[1] < q.shape[1])


def attend_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return what `attend` returns by plain matmuls, for training in bfloat16 on CPUs.

    The backward pass of torch's fused attention for CPUs is slow: 6 layers of 384 channels, 256 tokens, take 378 ms a
    step with this and 474 ms without; at 1,024 tokens both are even.
    """
    B, H, T, D = q.shape
    visible = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask.expand(B, H, T, T).flatten(0, 1)
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -math.inf)
    q, k, v = (t.reshape(-1, T, D) for t in (q, k, v))
    p = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(dim=-1)  # (B * H, T, T)
    return (F.dropout(p, dropout) @ v).view(B, H, T, D)


class CausalSelfAttention(nn.Module):
    """Each token looks at itself and the tokens before it, with several heads side by side."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        D, self.qkv_heads = config.head_size, [config.n_head, config.n_kv_head, config.n_kv_head]
        self.resid_dropout = Dropout(config)
        self.attn_dropout = config.dropout if config.is_gpt2 else 0.0  # of the probabilities
        # Queries, keys and values of all heads in one matmul: a large one is faster than three small ones.
        self.c_attn = nn.Linear(config.n_embd, sum(self.qkv_heads) * D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_head * D, config.n_embd, bias=bool(config.out_bias))
        has_qk_norm = config.architecture == "qwen3"
        self.q_norm = RMSNorm(D, eps=config.norm_eps) if has_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, eps=config.norm_eps) if has_qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary = None, mask: Any = None, update_cache: UpdateCache = None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, sum(self.qkv_heads), -1)
        q, k, v = qkv.transpose(1, 2).split(self.qkv_heads, dim=1)  # (B, H, T, D); keys and values (B, H_kv, T, D)
        if rotary:  # in float32, which the angles of far positions need
            q = rotate(self.q_norm(q.float()), *rotary).to(q.dtype)
            k = rotate(self.k_norm(k.float()), *rotary).to(k.dtype)
        uses_flash = q.is_cuda and mask is None and q.dtype == torch.bfloat16
        if update_cache:
            k, v = update_cache(k, v)  # with those of the tokens before
        elif k.shape[1] < q.shape[1] and not uses_flash:  # other kernels are faster with copies of the shared heads
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        y = attend(q, k, v, mask, self.attn_dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.resid_dropout(self.c_proj(y))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """The feed-forward part, for each token alone: GELU in GPT-2, else SwiGLU, whose c_fc holds gate and value."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        bias = bool(config.mlp_bias)
        self.is_gated = not config.is_gpt2
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden * (2 if self.is_gated else 1), bias=bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=bias)
        self.activation = ACTIVATIONS[config.activation]
        self.drop = Dropout(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.is_gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = self.activation(x)
        return self.drop(self.c_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: in attention tokens exchange information, in the MLP each digests it; both add to what comes in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Rotary = None, mask: Any = None, update_cache: UpdateCache = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, mask, update_cache)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Everything between token ids (B, T) and the head, (B, T, C): embeddings, blocks, final norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # init_weights draws the values; nn.Embedding's own draw would load torch's compiler on `meta`, for 1.5 s.
        V, T, C = config.vocab_size, config.block_size, config.n_embd
        self.wte = nn.Embedding(V, C, _weight=torch.empty(V, C))
        if config.is_gpt2:
            self.wpe = nn.Embedding(T, C, _weight=torch.empty(T, C))
        self.drop = Dropout(config)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)
        self.gradient_checkpointing = False  # recompute each block in the backward pass, to save memory
        self.low_precision_residual = False  # in the dtype of the matmuls, where autocast is on
        self.is_compiled = False  # or the blocks are

    def forward(self, idx: Tensor, document_ids: Tensor | None = None, cache: Any = None) -> Tensor:
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"a context of {T} tokens does not fit block_size={self.config.block_size}")
        mask = None
        positions = torch.arange(T, device=idx.device)
        if cache is not None:
            positions, mask = cache.positions, cache.mask
        elif document_ids is not None:
            positions = positions_in(document_ids)
            # FlexAttention is fast only when compiled for CUDA, and supports neither dropout nor head sizes below 16.
            has_dropout = self.training and self.drop.p > 0 and self.config.is_gpt2
            use_flex = idx.is_cuda and self.is_compiled and self.config.head_size >= 16 and not has_dropout
            mask = document_mask(document_ids, dense=not use_flex)
        x: Tensor = self.wte(idx)  # (B, T, C)
        if self.config.is_gpt2:
            x = x + self.wpe(positions)
        rotary = None if self.config.is_gpt2 else rotations(positions, self.config)
        x = self.drop(x)
        if self.low_precision_residual and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for n, block in enumerate(self.h):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotary, mask, use_reentrant=False, preserve_rng_state=self.drop.p > 0)
            else:
                x = block(x, rotary, mask, None if cache is None else partial(cache.append, n))
        return self.ln_f(x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A decoder-only transformer. Parameters are named as in the original nanoGPT, so that its checkpoints load.

    zero_init: start with blocks that add nothing. Raises `ConfigError` for an inconsistent `config`.
    """

    adapter: Any = None  # of low rank, beside weights that are frozen: see lora.py

    def __init__(self, config: GPTConfig, zero_init: bool = False) -> None:
        super().__init__()
        if problems := list(config.problems()):
            raise ConfigError("; ".join(problems))
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.head_loss = head_loss  # `parallelize` puts its compiled form here
        if not self.lm_head.weight.is_meta:
            self.init_weights(zero_init)

    def tie_weights(self) -> None:
        """Let the head and the token embedding share one matrix."""
        if self.config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self, zero_init: bool = False) -> None:
        """Draw all weights anew as GPT-2 does; with `zero_init`, c_proj is zero."""
        # 2 * n_layer branches add up in the residual stream: smaller ones keep the variance of the sum.
        residual_std = 0.0 if zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *,
        document_ids: Tensor | None = None, return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Predict the token after each position; returns (logits, loss).

        idx: (B, T) token ids, T <= block_size. targets: (B, T) the ids to predict; -1 does not count.
        document_ids: (B, T), equal for tokens that may see each other; without it a row is one document.
        Without targets: logits (B, 1, V) of the last position only, and None. With targets: logits (B, T, V), or None
        if `return_logits` is False, and the mean cross-entropy in nats.
        """
        x = self.transformer(idx, document_ids)  # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        if not return_logits:
            return None, self.head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: Mapping[str, Tensor]) -> "GPT":
        """Build a model around existing tensors, without copying them. Raises `RuntimeError` if they don't fit."""
        with torch.device("meta"):
            model = cls(config)
        # torch's own message would list every tensor.
        expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: list(getattr(tensor, "shape", [])) for name, tensor in weights.items()}
        if wrong := sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name)):
            sizes = f"expected {expected.get(wrong[0], 'none')}, found {found.get(wrong[0], 'none')}"
            raise RuntimeError(f"{len(wrong)} tensors do not fit the shape, as {wrong[0]}: {sizes}")
        model.load_state_dict(weights, assign=True)
        model.tie_weights()  # assigning unties them
        return model.requires_grad_()

    def crop_block_size(self, block_size: int) -> None:
        """Set the context length; raises `ConfigError` if the model has fewer learned positions."""
        if self.config.is_gpt2:
            if block_size > self.config.block_size:
                raise ConfigError(f"block_size={block_size} exceeds the model's {self.config.block_size} positions")
            kept = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe = nn.Embedding(block_size, self.config.n_embd, _weight=kept)
        self.config.block_size = block_size

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Return the number of parameters; by default without the positions, as the original counts them."""
        positions = self.transformer.wpe.weight.numel() if non_embedding and self.config.is_gpt2 else 0
        return sum(parameter.numel() for parameter in self.parameters()) - positions

    def flops_per_token(self) -> int:
        """Return the floating-point operations to train on one token, forward and backward (PaLM, appendix B)."""
        config = self.config
        embedding = 0 if config.tied_head else config.vocab_size * config.n_embd  # looked up, not multiplied
        attention = 12 * config.n_layer * config.n_head * config.head_size * config.block_size
        frozen = sum(parameter.numel() for parameter in self.transformer.h.parameters() if not parameter.requires_grad)
        return 6 * (self.get_num_params() - embedding) - 2 * frozen + attention  # no gradient of what is frozen

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Return the share of `peak_flops` that is reached when `fwdbwd_per_iter` rows take `dt` seconds."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    # People call these from notebooks and old scripts; each hands over to the module that does it.

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, float] | None = None) -> "GPT":
        """Load GPT-2's released weights, or others, on the CPU: see `nanogpt.checkpoint.load_model`."""
        from nanogpt.checkpoint import load_model

        if others := set(override_args or {}) - {"dropout"}:
            raise ConfigError(f"override_args: {', '.join(sorted(others))} can't be overridden; dropout can")
        return load_model(model_type, dropout=(override_args or {}).get("dropout", 0.0)).model

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Append `max_new_tokens` sampled tokens to each row of idx (B, T): see `nanogpt.engine`."""
        from nanogpt.engine import generate

        return generate(self, idx, max_new_tokens, temperature, top_k)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.Optimizer:
        """Return AdamW over this model's parameters, see `nanogpt.optim`; `device_type` is for old scripts."""
        from nanogpt.optim import decay_groups

        groups = decay_groups(self.parameters(), weight_decay)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def linear_maps(config: GPTConfig) -> dict[str, list[int]]:
    """Return the matrices of a block, in the order in which checkpoints number them, with the rows of their maps.

    Queries, keys and values, and the gate and value of SwiGLU, are linear maps of their own that share a matrix.
    """
    heads = [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    hidden = [config.n_hidden] * (1 if config.is_gpt2 else 2)
    return {"attn.c_attn": heads, "mlp.c_fc": hidden, "attn.c_proj": [config.n_embd], "mlp.c_proj": [config.n_embd]}


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of logits x @ weight.T; targets of -1 do not count.

    x: (N, C), weight: (V, C), targets: (N,).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    chunk = loss_chunk(len(x), len(weight), device, dtype)
    if chunk == len(x):
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1)
    needs_gradients = torch.is_grad_enabled()  # asked here: within ChunkedLoss.forward it never is
    return ChunkedLoss.apply(x, weight, targets, dtype, chunk, needs_gradients)  # type: ignore[no-any-return, no-untyped-call]


def loss_chunk(n_positions: int, vocab_size: int, device: str, dtype: torch.dtype) -> int:
    """Return for how many positions logits are computed at a time: for all of them where that takes little memory.

    Never in float16: chunks compute gradients before the loss scale is applied, so that small ones would underflow.
    """
    if n_positions * vocab_size < 2**24 or dtype == torch.float16:
        return n_positions
    return min(n_positions, 512 if device == "cpu" else max(1024, 2**28 // vocab_size))


class ChunkedLoss(torch.autograd.Function):
    """The loss in chunks of positions. Gradients are computed while a chunk's logits exist, so that none are kept.

    At GPT-2's vocabulary the logits of a batch need more memory than all blocks: 4,096 positions 2.2 GB, in chunks 0.5.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunk: int, needs_gradients: bool
    ) -> Tensor:
        head, loss = weight.to(dtype), torch.zeros((), device=x.device)
        grad_x = torch.zeros_like(x) if needs_gradients else None
        grad_head = torch.zeros_like(weight) if needs_gradients and ctx.needs_input_grad[1] else None
        for n in range(0, len(x), chunk):
            x_chunk, y = x[n : n + chunk].to(dtype), targets[n : n + chunk, None]
            is_target, y = y >= 0, y.clamp(min=0)  # -1 does not count
            # In float32 whatever the matmuls compute in: a sum over V terms needs the digits.
            logprobs = F.log_softmax(x_chunk @ head.T, dim=1, dtype=torch.float32)
            loss -= (logprobs.gather(1, y) * is_target).sum()
            if grad_x is None:
                continue
            if torch.compiler.is_compiling():  # Inductor fuses a comparison, but no scatter: 16 % less memory traffic
                grad = (logprobs.exp() - (torch.arange(len(weight), device=x.device) == y).float()) * is_target
            else:
                grad = logprobs.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=torch.float32)).mul_(is_target)
            grad = grad.to(dtype)
            grad_x[n : n + chunk] = grad @ head
            if grad_head is not None and dtype == weight.dtype:
                grad_head.addmm_(grad.T, x_chunk)
            elif grad_head is not None:  # it is not frozen
                grad_head += grad.T @ x_chunk
            del logprobs, grad  # or they stay while the next chunk is computed: 6 bytes per logit
        n_targets = (targets >= 0).sum().clamp(min=1)
        ctx.save_for_backward(grad_x, grad_head, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_head, n_targets = ctx.saved_tensors
        factor = grad / n_targets
        return grad_x * factor, None if grad_head is None else grad_head.mul_(factor), None, None, None, None
