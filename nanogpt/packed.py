"""A network made ready for decoding: its products in fewer bytes, laid out as the processor reads them fastest.

One row at a time, decoding is as fast as the weights can be read: half the bytes is twice the speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.model import GPT


def _has_layout() -> bool:
    """Whether torch comes with oneDNN, and this processor has what its layout for bfloat16 needs."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call, no-any-return]


class PackedLinear(nn.Module):
    """A Linear whose weight (R, C) is kept in `dtype`, in which it also computes; on CPUs in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # in bfloat16 that layout is read half as fast again; in float32 the plain one is the faster
        self.is_packed = linear.weight.device.type == "cpu" and dtype == torch.bfloat16 and _has_layout()
        weight = linear.weight.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self.is_packed else weight
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.is_packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A Linear whose weight (R, C) is kept in whole numbers from -127 to 127, with one factor per row."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.weight = (weight / scale).round().to(torch.int8)
        self.scale = scale[:, 0].to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        if rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and len(rows) <= 32:  # torch's kernel is for few
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(self.dtype)) * self.scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def pack(model: GPT, dtype: torch.dtype, int8: bool = False) -> None:
    """Replace all products of `model`, in place, by ones that compute in `dtype`; `int8`: with weights of 8 bits.

    Embeddings, norms and the residual stream stay as they are.
    """
    kind = Int8Linear if int8 else PackedLinear
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child, dtype))
