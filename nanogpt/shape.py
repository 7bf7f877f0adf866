"""The shape of a network, and the shapes that have a name."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from nanogpt.settings import Settings, out_of_range


def _size(n_layer: int, n_head: int, n_embd: int, **others: Any) -> dict[str, Any]:
    rest = {"architecture": "gpt2", "n_kv_head": 0, "head_size": 0, "n_hidden": 0, "tied_head": True, "rope_theta": 1e4}
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **rest, "bias": True, **others}


def _llama(*size: int, **others: Any) -> dict[str, Any]:
    return _size(*size, architecture="llama", bias=False, **others)


def _qwen3(*size: int, **others: Any) -> dict[str, Any]:
    return _size(*size, architecture="qwen3", bias=False, n_kv_head=8, head_size=128, rope_theta=1e6, **others)


# the published models of the three architectures that are retrained most: all of their shape that can be chosen when
# training, except vocabulary and context
PRESETS = {
    "gpt2": _size(12, 12, 768),  # 124M parameters with GPT-2's vocabulary
    "gpt2-medium": _size(24, 16, 1024),  # 355M
    "gpt2-large": _size(36, 20, 1280),  # 774M
    "gpt2-xl": _size(48, 25, 1600),  # 1.6B
    "llama-3.2-1b": _llama(16, 32, 2048, n_kv_head=8, n_hidden=8192, rope_theta=5e5),
    "llama-3.2-3b": _llama(28, 24, 3072, n_kv_head=8, head_size=128, n_hidden=8192, rope_theta=5e5),
    "llama-2-7b": _llama(32, 32, 4096, n_kv_head=32, n_hidden=11008, tied_head=False),
    "llama-3.1-8b": _llama(32, 32, 4096, n_kv_head=8, n_hidden=14336, tied_head=False, rope_theta=5e5),
    "qwen3-0.6b": _qwen3(28, 16, 1024, n_hidden=3072),
    "qwen3-1.7b": _qwen3(28, 16, 2048, n_hidden=6144),
    "qwen3-4b": _qwen3(36, 32, 2560, n_hidden=9728),
    "qwen3-8b": _qwen3(36, 32, 4096, n_hidden=12288, tied_head=False),
}
GPT2_NAMES = [name for name in PRESETS if name.startswith("gpt2")]  # of the checkpoints that OpenAI has released


@dataclass(kw_only=True)
class Shape(Settings):
    """What one chooses of a network's shape. Defaults are GPT-2's, 124M parameters."""

    # --- model ---
    block_size: int = 1024  # context length in tokens
    n_layer: int = 12  # depth: number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels; must be a multiple of n_head
    dropout: float = 0.0  # 0 is best for pretraining; for finetuning, or several passes over few data, try 0.1 and
    # more; gpt2: of single numbers; llama, qwen3: of channels, the same ones in all tokens of a row, none of attention
    bias: bool = True  # in Linears and LayerNorms; GPT-2 has them, without is a bit better and faster
    architecture: Literal["gpt2", "llama", "qwen3"] = "gpt2"  # llama: RMSNorm, rotary positions, SwiGLU; qwen3: also
    # normalised queries and keys
    n_kv_head: int = 0  # llama, qwen3: heads of keys and values, each shared by n_head / n_kv_head heads; 0: n_head
    head_size: int = 0  # llama, qwen3: channels of a head; 0: n_embd / n_head
    n_hidden: int = 0  # channels within the MLP; 0: 4 n_embd, llama and qwen3: 8/3 n_embd, in multiples of 64
    tied_head: bool = True  # the head is the token embedding: fewer parameters, better for small models
    rope_theta: float = 10_000.0  # llama, qwen3: slowest wavelength of rotary positions / 2 pi; more for long contexts


@dataclass(kw_only=True)
class GPTConfig(Shape):
    """The shape of a network, whole: what its weights mean and nothing else.

    There are three architectures, those that other engines can run: GPT-2 (LayerNorm, learned positions, GELU, one head
    of keys and values per head), Llama (RMSNorm, rotary positions, SwiGLU), and Qwen3 (the same, queries and keys
    normalised).
    """

    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64: matrix units like round numbers
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # GPT-2: exact, or the tanh form that OpenAI's weights expect
    mlp_bias: bool | Literal["auto"] = "auto"  # in the MLP's Linears; auto: as `bias` says, and never in Qwen3
    norm_eps: float = 1e-5  # added to the variance
    rope_scaling: list[float] = field(default_factory=list)  # how Llama 3 stretches them for long contexts:
    # factor, low_freq_factor, high_freq_factor, original context; empty: not

    def __post_init__(self) -> None:
        """Resolve what follows from other fields; numpy's numbers become Python's."""
        for name, value in vars(self).items():
            setattr(self, name, value.item() if hasattr(value, "item") else value)
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head > 0:
            self.head_size = self.head_size or self.n_embd // self.n_head
        if self.architecture == "gpt2":
            self.n_hidden = self.n_hidden or 4 * self.n_embd
        else:
            self.n_hidden = self.n_hidden or -(-8 * self.n_embd // (3 * 64)) * 64
        if self.mlp_bias == "auto":
            self.mlp_bias = self.bias and self.architecture != "qwen3"

    @classmethod
    def preset(cls, name: str, **others: Any) -> "GPTConfig":
        """The shape that `PRESETS` has under `name`, with `others` as its remaining or changed fields."""
        return cls(**{**PRESETS[name], **others})

    @property
    def is_gpt2(self) -> bool:
        """Whether the blocks are GPT-2's."""
        return self.architecture == "gpt2"

    def problems(self) -> Iterator[str]:
        if wrong := list(self._wrong_types()):
            yield from wrong
            return
        for name in ("architecture", "activation"):
            if getattr(self, name) not in (known := get_args(get_type_hints(GPTConfig)[name])):
                yield f"{name}={getattr(self, name)!r}: expected {' or '.join(known)}"
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                yield f"{name}={getattr(self, name)}: expected a value above 0"
        yield from out_of_range(
            self, ">= 1", "block_size vocab_size n_layer n_head n_embd n_kv_head head_size n_hidden"
        )
        yield from out_of_range(self, "in [0, 1)", "dropout")
        if self.n_head < 1 or self.n_kv_head < 1:
            return
        if self.n_embd % self.n_head and self.head_size == self.n_embd // self.n_head:
            below = self.n_embd - self.n_embd % self.n_head
            nearest = f"{below} or {below + self.n_head}" if below else f"{self.n_head}"
            yield f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; n_embd={nearest} would be"
        if self.n_head % self.n_kv_head:
            yield f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}, which share them in groups"
        if self.is_gpt2:
            if self.n_kv_head != self.n_head:
                yield (
                    f"n_kv_head={self.n_kv_head}: GPT-2 has n_head={self.n_head} of them; use --architecture=llama "
                    "(in Python: make a new GPTConfig rather than change one)"
                )
            if self.n_embd % self.n_head == 0 and self.head_size * self.n_head != self.n_embd:
                yield f"head_size={self.head_size}: GPT-2's heads have n_embd / n_head = {self.n_embd // self.n_head}"
            if self.mlp_bias != self.bias:
                yield f"mlp_bias={self.mlp_bias}: GPT-2 has biases everywhere or nowhere; set --bias"
            if self.rope_scaling:
                yield "rope_scaling: GPT-2 has learned positions"
        if self.architecture == "qwen3" and self.mlp_bias:
            yield "mlp_bias=True: Qwen3 has none there; use --architecture=llama"
        if not self.is_gpt2 and self.head_size % 2:
            yield f"head_size={self.head_size}: rotary positions turn pairs of channels, so it must be even"
        if self.rope_scaling and (len(self.rope_scaling) != 4 or not self._is_scaling(*self.rope_scaling)):
            yield f"rope_scaling={self.rope_scaling}: expected factor, low, high and original context, low below high"

    @staticmethod
    def _is_scaling(factor: float, low: float, high: float, context: float) -> bool:
        return factor > 0 and 0 <= low < high and context > 0

    def _wrong_types(self) -> Iterator[str]:
        defaults = vars(GPTConfig())
        for name, value in vars(self).items():
            expected = type(defaults[name])
            if type(value) is not expected and not (expected is float and type(value) is int):
                yield f"{name} is {value!r}, expected {expected.__name__}"
