"""Tensors that are spread over the processes of a run (DTensors), and whole ones."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes, as one; all must ask."""
    gathered: Tensor = tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def spread_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor that belongs to a parameter, such as an average of its gradients, spread as that is."""
    if not is_spread(parameter) or is_spread(value) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def is_spread(tensor: Tensor) -> bool:
    """Whether each process holds a share of `tensor` only."""
    return hasattr(tensor, "full_tensor")  # a DTensor; to import that class takes half a second
