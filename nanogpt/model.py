"""The network, whole: a GPT in one file.

Knows nothing of files, processes, tokenizers or logging. Shapes in comments: B batch, T time, C channels,
H heads, D head size, V vocabulary.

Sources: GPT-2 (Radford et al. 2019) and its release, https://github.com/openai/gpt-2/blob/master/src/model.py
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from nanogpt.cache import Cache
from nanogpt.config import GPTConfig
from nanogpt.errors import ConfigError
from nanogpt.loss import head_loss

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig", "LayerNorm"]

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # new keys and values of a layer to all so far


class LayerNorm(nn.Module):
    """Layer normalisation whose bias is optional."""

    def __init__(self, ndim: int, bias: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)  # FSDP may bring both in bfloat16
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, eps=self.eps)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def norm(config: GPTConfig, size: int) -> nn.Module:
    """The normalisation of `size` channels that goes with the architecture."""
    return LayerNorm(size, config.bias, config.norm_eps) if config.is_gpt2 else RMSNorm(size, eps=config.norm_eps)


class Dropout(nn.Module):
    """GPT-2's dropout of single numbers; elsewhere of channels, the same ones for all tokens of a row (B, T, C).

    Drawing a number for every channel costs nothing, for every value of x more than all else a CPU does. Source:
    variational dropout, Gal and Ghahramani 2016.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.p, self.of_channels = config.dropout, not config.is_gpt2

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * F.dropout(torch.ones_like(x[:, :1]), self.p) if self.of_channels else F.dropout(x, self.p)


def rotary_frequencies(config: GPTConfig, device: torch.device | None = None) -> Tensor:
    """How fast each pair of channels turns, in radians per token: (D / 2,).

    Su et al. 2021; the scaling for long contexts is that of Llama 3.1.
    """
    exponents = torch.arange(0, config.head_size, 2, device=device).float() / config.head_size
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling:
        factor, low, high, context = config.rope_scaling
        turns = context * frequencies / (2 * math.pi)  # within the original context: few are stretched, many are not
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (share + (1 - share) / factor)
    return frequencies


def rotations(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which rotary positions turn pairs of channels: (T,) or (B, T) to (1 or B, 1, T, D / 2)."""
    angles = positions[..., None].float() * rotary_frequencies(config, positions.device)
    angles = angles.view(-1, 1, positions.shape[-1], config.head_size // 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel n of x (B, H, T, D) against channel n + D / 2, as Llama's and Qwen's weights expect."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
    """Attention of queries to keys and values, all (B, H, T, D), causal or as `document_mask` says."""
    if mask is not None and not isinstance(mask, Tensor):
        return flex_attention(q, k, v, block_mask=mask)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 512 and q.requires_grad:
        return attend_in_bfloat16(q, k, v, mask, dropout)
    is_causal = mask is None and q.shape[2] == k.shape[2]  # else a single query, which sees all
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=k.shape[1] < q.shape[1]
    )


def attend_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The same, spelled out: at short contexts torch's fused attention for CPUs takes 2 to 6 times as long to train."""
    B, H, T, D = q.shape
    visible = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask.expand(B, H, T, T).flatten(0, 1)
    hidden = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -math.inf)
    q, k, v = (t.reshape(-1, T, D) for t in (q, k, v))
    p = torch.baddbmm(hidden, q, k.mT, alpha=D**-0.5).softmax(dim=-1)  # (B * H, T, T)
    return (F.dropout(p, dropout) @ v).view(B, H, T, D)


def document_mask(document_ids: Tensor, dense: bool) -> Any:
    """Who may look at whom where tokens see their own document only.

    document_ids: (B, T) the number of each token's document. Returns a (B, 1, T, T) tensor of booleans, or a mask of
    blocks for FlexAttention, which leaves out what lies between documents.
    """
    B, T = document_ids.shape
    if dense:
        return (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document_ids[b, q] == document_ids[b, k])

    return create_block_mask(visible, B, None, T, T, device=document_ids.device)


def positions_in(document_ids: Tensor) -> Tensor:
    """The position of each token in its document, from 0; (B, T) numbers of documents to (B, T) positions."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    return places - (places * begins).cummax(dim=1).values


class CausalSelfAttention(nn.Module):
    """Each token looks at itself and the tokens before it, with several heads side by side."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        D, self.heads = config.head_size, [config.n_head, config.n_kv_head, config.n_kv_head]
        self.drop = Dropout(config)
        self.dropout = config.dropout if config.is_gpt2 else 0.0  # of attention
        # queries, keys and values of all heads in one product: one large multiplication beats three
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_head * D, config.n_embd, bias=config.bias)
        normalised = config.architecture == "qwen3"
        self.q_norm = RMSNorm(D, eps=config.norm_eps) if normalised else nn.Identity()
        self.k_norm = RMSNorm(D, eps=config.norm_eps) if normalised else nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, mask: Any = None, remember: Remember | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, sum(self.heads), -1)
        q, k, v = qkv.transpose(1, 2).split(self.heads, dim=1)  # (B, H, T, D), keys and values (B, H_kv, T, D)
        if rotary:  # in float32, as angles of far positions need
            q = rotate(self.q_norm(q.float()), *rotary).to(q.dtype)
            k = rotate(self.k_norm(k.float()), *rotary).to(k.dtype)
        if remember:
            k, v = remember(k, v)  # with those of the tokens before; not copied for each query that shares them
        elif k.shape[1] < q.shape[1]:  # a group of query heads shares each of the others
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.drop(self.c_proj(y))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two matrices with a nonlinearity between them, for every token alone; in SwiGLU a third one gates it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        bias = bool(config.mlp_bias)
        self.is_gated = not config.is_gpt2
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden * (1 + self.is_gated), bias=bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.drop = Dropout(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.is_gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = self.gelu(x)
        return self.drop(self.c_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: tokens exchange information, then each one digests it. Both add to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, mask: Any = None, remember: Remember | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotary, mask, remember)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Everything between token ids and the head: embeddings, blocks, final norm. (B, T) ids to (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.is_gpt2:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config, config.n_embd)
        self.gradient_checkpointing = False  # recompute each block in the backward pass, to save memory

    def forward(self, idx: Tensor, document_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        _, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"a context of {T} tokens does not fit block_size={self.config.block_size}")
        mask = rotary = None
        positions = torch.arange(T, device=idx.device)
        if cache is not None:
            positions, mask = cache.positions, cache.mask
        elif document_ids is not None:
            positions = positions_in(document_ids)
            # FlexAttention is fast where it is compiled, on CUDA, and knows neither dropout nor heads below 16 channels
            in_blocks = idx.is_cuda and torch.compiler.is_compiling() and self.config.head_size >= 16
            in_blocks = in_blocks and not (self.training and self.drop.p and self.config.is_gpt2)
            mask = document_mask(document_ids, dense=not in_blocks)
        x: Tensor = self.wte(idx)  # (B, T, C)
        if self.config.is_gpt2:
            x = x + self.wpe(positions)
        else:
            rotary = rotations(positions, self.config)
        x = self.drop(x)
        # what a block must know beside x: in GPT-2, nothing
        context: dict[str, Any] = {name: v for name, v in (("rotary", rotary), ("mask", mask)) if v is not None}
        for n, block in enumerate(self.h):
            if cache is not None:
                x = block(x, **context, remember=partial(cache.append, n))
            elif self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, **context, use_reentrant=False)
            else:
                x = block(x, **context)
        return self.ln_f(x)  # type: ignore[no-any-return]


class _NothingDrawn(TorchFunctionMode):
    """Within the block, modules are made without first values; on the device `meta` these cost a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class GPT(nn.Module):
    """A decoder-only transformer. Parameter names are those of the original nanoGPT, so its checkpoints load.

    zero_init: start with blocks that add nothing. Raises `ConfigError` for an inconsistent `config`.
    """

    def __init__(self, config: GPTConfig, zero_init: bool = False) -> None:
        super().__init__()
        if problems := list(config.problems()):
            raise ConfigError("; ".join(problems))
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights(zero_init)

    def tie_weights(self) -> None:
        """Let head and token embedding share one matrix: a token is recognised by what it is embedded as."""
        if self.config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self, zero_init: bool = False) -> None:
        """Draw all weights anew from torch's random stream, as GPT-2 does; but for c_proj, if that is to be zero."""
        # 2 n_layer branches add up to the stream
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
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict the token after each position.

        idx: (B, T) token ids, T <= block_size. targets: (B, T) the ids to predict, -1 where none counts.
        document_ids: (B, T) numbers, equal for tokens that may see each other; without, a row is one document.
        Returns `(logits, loss)`. Without targets: logits (B, 1, V) of the last position only, and None. With
        targets: logits (B, T, V), or None if `return_logits` is False, and the mean cross-entropy in nats.
        """
        x = self.transformer(idx, document_ids)  # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        if not return_logits:
            return None, head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: Mapping[str, Tensor]) -> "GPT":
        """A model around tensors that are there already: nothing is copied, no random number is drawn.

        Raises `RuntimeError` if they don't fit `config`.
        """
        with torch.device("meta"), _NothingDrawn():
            model = cls(config)
        for name, parameter in model.state_dict().items():
            if name in weights and (shape := tuple(weights[name].shape)) != tuple(parameter.shape):
                raise RuntimeError(f"{name} has shape {shape}, expected {tuple(parameter.shape)}")
        model.load_state_dict(weights, assign=True)
        model.tie_weights()  # assigning has untied them
        return model.requires_grad_()

    def crop_block_size(self, block_size: int) -> None:
        """Work with contexts of `block_size`: learned positions from there on are forgotten, rotary ones computed."""
        if self.config.is_gpt2 and block_size > self.config.block_size:
            raise ConfigError(
                f"block_size={block_size} exceeds the model's {self.config.block_size}: learned positions end there"
            )
        self.config.block_size = block_size
        if not self.config.is_gpt2:
            return
        kept = self.transformer.wpe.weight[:block_size].detach().clone()
        self.transformer.wpe = nn.Embedding(block_size, self.config.n_embd, _weight=kept)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; by default without the positions' (the tokens' are the head's too, and count)."""
        positions = self.transformer.wpe.weight.numel() if non_embedding and self.config.is_gpt2 else 0
        return sum(parameter.numel() for parameter in self.parameters()) - positions

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token: forward and backward (PaLM, appendix B)."""
        config = self.config
        embedding = 0 if config.tied_head else config.vocab_size * config.n_embd  # looked up, not multiplied
        attention = 12 * config.n_layer * config.n_head * config.head_size * config.block_size
        return 6 * (self.get_num_params() - embedding) + attention

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 312e12) -> float:
        """Share of `peak_flops` (default: an A100 in bfloat16) used by so many rows in `dt` seconds."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    # What people call from a notebook or an old script; each is one line that hands over.

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict[str, float] | None = None) -> "GPT":
        """GPT-2's released weights, or others, on the CPU; see `nanogpt.interop.huggingface`. Overrides: `dropout`."""
        from nanogpt.interop.huggingface import load_pretrained

        if others := set(override_args or {}) - {"dropout"}:
            raise ConfigError(f"override_args: {', '.join(sorted(others))} can't be overridden; dropout can")
        return load_pretrained(model_type, dropout=(override_args or {}).get("dropout", 0.0)).model

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Append `max_new_tokens` sampled tokens to each row of idx (B, T): see `nanogpt.infer.engine`."""
        from nanogpt.infer.engine import stream

        return torch.cat([idx, *stream(self, idx, max_new_tokens, temperature=temperature, top_k=top_k)], dim=1)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: Sequence[float], device_type: str
    ) -> torch.optim.Optimizer:
        """AdamW over this model's parameters: see `nanogpt.optim`."""
        from nanogpt.optim import adamw

        return adamw(self, learning_rate, (betas[0], betas[1]), weight_decay)
