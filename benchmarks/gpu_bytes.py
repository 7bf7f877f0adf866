"""How many bytes of memory does a GPU move in a micro-step, apart from matmuls and attention? Needs no GPU.

    python benchmarks/gpu_bytes.py [--original=FOLDER] [--rows=12] [--architecture=gpt2]
                                   [--low_precision_residual]

GPT-2's shape (124M), rows of 1,024 tokens, forward and backward pass in bfloat16. Nothing is computed: fake tensors go
through torch.compile as far as Inductor's scheduler, which says what each of its fused kernels reads and writes; what
is not compiled counts the inputs and outputs of each operation. FOLDER is a checkout of karpathy/nanoGPT. A GPU of
3 TB/s needs a millisecond for 3 GB. The last line is JSON. Reaches into torch's compiler: works in 2.11 and 2.13.
"""

import argparse
import copy
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bare  # noqa: F401
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt import model
from nanogpt.config import GPTConfig

SHAPE: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
NO_TRAFFIC = ("device", "empty", "empty_like", "empty_strided", "_unsafe_view", "detach", "new_empty")


class Eager(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what operations read and write, without matmuls, attention and views."""

    n_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function).split(".")[1]
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        if name.rstrip("_").endswith("mm") or "attention" in name or function.is_view or name in NO_TRAFFIC:
            return result
        if name in ("embedding", "gather", "scatter_add_"):  # which touch as much as the smaller side has
            tensors = 2 * [min(tensors, key=Tensor.numel) if name != "embedding" else result]
        self.n_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def fused_bytes(run: Callable[..., Tensor]) -> int:
    """Return what fused kernels move when `run(backend)` computes a loss and its gradients, compiled by `backend`."""
    sizes: list[int] = []

    def schedule(graph: Any, inputs: Any, is_backward: bool = False, **_: Any) -> Any:
        lowered = copy.deepcopy(graph)
        compile_fx.view_to_reshape(lowered)  # type: ignore[attr-defined, no-untyped-call]
        with torch.no_grad():
            mode = compile_fx.fake_tensor_prop(lowered, inputs)
        compile_fx.record_original_output_strides(lowered)
        with V.set_fake_mode(mode):
            compile_fx._recursive_post_grad_passes(lowered, False)
            lowering = GraphLowering(lowered, example_inputs=inputs, shape_env=mode.shape_env, is_backward=is_backward)
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
                lowering.run(*inputs)
                lowering._update_scheduler()
                nodes = lowering.scheduler.nodes
                sizes.extend(node.get_read_write_buffers_sizes() for node in nodes if not node.is_extern())

        def boxed(arguments: list[Any]) -> Any:  # takes over the list, as what aot_autograd calls must
            return graph.forward(*arguments)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    torch._dynamo.reset()
    run(functools.partial(compile_fx.compile_fx, inner_compile=schedule)).backward()  # type: ignore[no-untyped-call]
    return sum(sizes)


def ours(architecture: Any, rows: int, low_precision_residual: bool) -> dict[str, int]:
    """Return the bytes of our network by part: whole, as on one GPU; and in the parts that FSDP computes one by one."""
    real = model.loss_chunk
    model.loss_chunk = lambda n_positions, vocab_size, device, dtype: real(n_positions, vocab_size, "cuda", dtype)
    network = model.GPT(GPTConfig(**SHAPE, architecture=architecture, bias=False))
    network.transformer.low_precision_residual = low_precision_residual
    ids = torch.zeros(rows, 1025, dtype=torch.int64)
    x = torch.zeros(rows, 1024, 768, requires_grad=True)
    rotary = None if architecture == "gpt2" else model.rotations(torch.arange(1024), network.config)

    def whole(backend: Any) -> Any:
        return torch.compile(network, backend=backend, dynamic=False)(ids[:, :-1], ids[:, 1:], return_logits=False)[1]

    def block(backend: Any) -> Any:
        return torch.compile(network.transformer.h[0], backend=backend, dynamic=False)(x, rotary, None).sum()

    def loss(backend: Any) -> Any:
        function = torch.compile(model.head_loss, backend=backend, dynamic=False) if backend else model.head_loss
        return function(x.flatten(0, 1), network.lm_head.weight, ids[:, 1:].flatten())

    with torch.autocast("cpu", torch.bfloat16):
        found = {"whole": fused_bytes(whole), "block": fused_bytes(block), "loss": fused_bytes(loss)}
        with Eager() as eager:  # type: ignore[no-untyped-call]
            loss(None).backward()
        found["loss, not compiled"] = eager.n_bytes
        network.transformer.h = nn.ModuleList()
        with Eager() as eager:  # type: ignore[no-untyped-call]
            network.transformer(ids[:, :-1]).sum().backward()
        found["embedding and last norm, not compiled"] = eager.n_bytes
    one_by_one = SHAPE["n_layer"] * found["block"] + found["embedding and last norm, not compiled"]
    return {**found, "fsdp": one_by_one + found["loss"], "fsdp, loss not compiled": one_by_one
            + found["loss, not compiled"]}  # fmt: skip


def original(folder: Path, rows: int) -> int:
    """Return the bytes of the original's network."""
    spec = importlib.util.spec_from_file_location("original", folder / "model.py")
    assert spec and spec.loader  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.GPT(module.GPTConfig(**SHAPE, bias=False, dropout=0.0))
    x = torch.zeros(rows, 1024, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        return fused_bytes(lambda backend: torch.compile(network, backend=backend)(x, x)[1])  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--architecture", default="gpt2")
    parser.add_argument("--low_precision_residual", action="store_true")
    arguments = parser.parse_args()
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = ours(arguments.architecture, arguments.rows, arguments.low_precision_residual)
        if arguments.original:
            found["original"] = original(arguments.original, arguments.rows)
    for name, n_bytes in found.items():
        print(f"{name:40} {n_bytes / 1e9:6.2f} GB")
    print(json.dumps({"rows": arguments.rows, "architecture": arguments.architecture, "bytes": found}))


if __name__ == "__main__":
    main()
