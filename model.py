"""The network under its old address, for scripts that say `from model import GPT, GPTConfig`."""

from nanogpt.config import GPTConfig
from nanogpt.model import GPT, MLP, Block, CausalSelfAttention, LayerNorm

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig", "LayerNorm"]
