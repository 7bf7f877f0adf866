"""Track `small`: an embedding of each pair of neighbouring characters beside the one of each character.

With 65 characters there are 4,225 pairs, so the table has every one of them, and what follows a pair need not be
learned by attention: 100 steps are as good as 165. No other engine loads such a model, and it does not decode with a
cache: that is why it is a record, not a setting.
"""

import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanogpt import train
from nanogpt.cli import run
from nanogpt.config import GPTConfig
from nanogpt.model import GPT


class PairEmbedding(nn.Embedding):
    """The embedding of a token plus that of the pair that it forms with the token before it."""

    def __init__(self, vocab_size: int, n_embd: int) -> None:
        super().__init__(vocab_size, n_embd)
        self.pairs = nn.Embedding(vocab_size**2, n_embd)

    def forward(self, idx: Tensor) -> Tensor:
        """Return the embeddings (B, T, C) of idx (B, T); the first token of a row follows token 0."""
        before = F.pad(idx[:, :-1], (1, 0))
        pairs: Tensor = self.pairs(before * self.num_embeddings + idx)
        return super().forward(idx) + pairs


class Model(GPT):
    """GPT with pairs."""

    def __init__(self, config: GPTConfig, zero_init: bool = False) -> None:
        super().__init__(config, zero_init)
        self.transformer.wte = PairEmbedding(config.vocab_size, config.n_embd)
        if not self.lm_head.weight.is_meta:
            self.init_weights(zero_init)


if __name__ == "__main__":
    vars(train)["GPT"] = Model
    steps = ["--max_iters=100", "--lr_decay_iters=100", "--eval_interval=100"]
    run("train", [str(ROOT / "config" / "train_shakespeare_char_fast.py"), *steps, *sys.argv[1:]])
