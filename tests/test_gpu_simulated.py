"""What a GPU would do, seen without one: fake tensors, fake processes, graphs that are captured and not run."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as c10d
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt import distributed, model
from nanogpt.bench import make_step
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data import Dataset
from nanogpt.device import Device
from nanogpt.distributed import Distributed, parallelize
from nanogpt.engine import Engine
from nanogpt.model import GPT, head_loss
from nanogpt.plan import memory
from nanogpt.tokenizer import ByteTokenizer
from nanogpt.train import train

Processes = Callable[[int], Distributed]
SHAPE: dict[str, Any] = {"n_layer": 12, "n_head": 2, "n_embd": 64, "block_size": 64}  # 64 processes share it evenly
DDP, FSDP = {"parallel": "ddp"}, {"parallel": "fsdp"}
ONCE, GROUPS = {**FSDP, "gather_once": True}, {**FSDP, "shard_group": 8}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compiling collects the code of graphs, and does no more. The loss has two chunks, as in a large model."""
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(graph.print_readable(print_output=False))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(model, "loss_chunk", lambda n, *_: n // 2 + 1)
    return found


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """Make this process the first of several; what it sends goes nowhere, what it receives is arbitrary."""
    make_mesh = c10d.init_device_mesh
    monkeypatch.setattr(c10d, "init_device_mesh", lambda _, shape, **names: make_mesh("cpu", shape, **names))
    monkeypatch.setattr(Device, "total_memory", lambda _: 0)
    # DDP's own exchange, of 4 bytes per parameter, would need answers.
    ddp = type("DDP", (), {"__new__": lambda _, network, **__: network})
    monkeypatch.setattr(distributed, "DistributedDataParallel", ddp)

    def start(count: int) -> Distributed:
        if count > 1:
            c10d.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        return Distributed(0, 0, count)

    yield start
    if c10d.is_initialized():
        c10d.destroy_process_group()


def a_step(dist: Distributed, micro_batches: int = 2, vocab_size: int = 256, **settings: Any) -> tuple[Any, GPT, Any]:
    """Return a function that takes a step, the model and the optimizer."""
    config = TrainConfig(**{**SHAPE, "learning_rate": 1e-3, "batch_size": 1, **settings}).with_muon_rates()
    config.gradient_accumulation_steps = micro_batches * dist.world_size
    ids, device = np.zeros(5000, np.uint16), Device("cpu", "cpu", torch.bfloat16, compile=False)
    return make_step(config, Dataset(Path(), ids, ids, ByteTokenizer(), {}), vocab_size, device, dist)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_the_whole_network_is_one_graph(architecture: Any, graphs: list[str]) -> None:
    x, kv_heads = torch.randint(128, (2, 64)), [2] if architecture == "gpt2" else [2, 1]
    for dropout, n_kv_head, *how in itertools.product([0.0, 0.1], kv_heads, [False, True], [False, True]):
        torch._dynamo.reset()
        shape = {**SHAPE, "n_layer": 1, "vocab_size": 128, "n_kv_head": n_kv_head}
        network = GPT(GPTConfig(architecture=architecture, dropout=dropout, **shape))
        network.transformer.gradient_checkpointing = how[0]
        network.compile(fullgraph=True, dynamic=False)  # raises at a break
        with torch.autocast("cpu", torch.bfloat16):
            network(x, x, document_ids=(x == 0).cumsum(1) if how[1] else None, return_logits=False)
        assert "scatter_add" not in graphs[-1]  # which the compiler fuses with nothing


def test_a_run_compiles_once_to_train_and_once_to_evaluate(
    graphs: list[str], recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whole, as on one GPU; on a CPU only the blocks are compiled.
    monkeypatch.setattr(distributed, "parallelize", lambda network, *_: network.compile(dynamic=False) or network)
    assert train(recipe(compile=True, gradient_accumulation_steps=3)) == 0
    assert len(graphs) == 2


@pytest.mark.parametrize(("architecture", "parallel"), [("gpt2", "ddp"), ("gpt2", "fsdp"), ("qwen3", "fsdp")])
def test_several_processes_compile_block_and_loss_once_each(
    architecture: Any, parallel: str, graphs: list[str], processes: Processes
) -> None:
    device, ids = Device("cpu", "cuda", torch.bfloat16, compile=True), torch.zeros(2, 65, dtype=torch.int64)
    shape = GPTConfig(architecture=architecture, vocab_size=128, **SHAPE)
    network = parallelize(GPT(shape), TrainConfig(parallel=parallel), device, processes(8))
    for training in (True, True, False, True):
        network.train(training)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            _, loss = network(ids[:, :-1], ids[:, 1:], return_logits=False)
        if training:
            loss.backward()
    assert len(graphs) == 4  # to train and to evaluate
    assert "scatter_add" not in "".join(graphs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_has_the_same_bits(dtype: torch.dtype, graphs: list[str]) -> None:
    x, weight, targets = torch.randn(50, 12), torch.randn(110, 12), torch.randint(-1, 110, (50,))
    results: list[list[Any]] = []
    for function in (head_loss, torch.compile(head_loss)):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = function(*leaves, targets)
        (3 * loss).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert len(graphs) == 1
    assert all(map(torch.equal, *results))


class Traffic(TorchDispatchMode):
    """Adds up the bytes of each kind of collective (its larger side), and counts what makes the CPU wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # so that its own operations are seen
        kind, name, *_ = str(function).split(".")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.bytes[name.strip("_")] += "c10d" in kind and max(t.numel() * t.element_size() for t in tensors)
        self.waits[name] += name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("how", "count"), [(DDP, 1), (DDP, 8), (DDP, 64), (FSDP, 8), (FSDP, 64), (ONCE, 64), (GROUPS, 64)]
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_a_step_of_several_processes_sends(optimizer: str, how: Any, count: int, processes: Processes) -> None:
    step, network, _ = a_step(processes(count), optimizer=optimizer, **how)
    step(0)
    with Traffic() as traffic:
        step(1)
    assert traffic.waits.total() == 0  # nobody asks its GPU for a number
    everything = network.get_num_params(non_embedding=False)
    blocks = sum(parameter.numel() for parameter in network.transformer.h.parameters())
    expected: dict[str, int] = {}
    if how != DDP:  # blocks travel twice in 16 bits, the rest once in 32, in both micro-batches
        expected = {"allgather_base": 2 * 4 * everything, "reduce_scatter_base": 2 * 4 * everything}
    if how == ONCE:  # all travel once
        expected = {"allgather_base": 4 * everything - 2 * blocks, "reduce_scatter_base": 4 * everything}
    if how == GROUPS:  # between groups the shards of gradients, once per step
        expected["allreduce"] = 4 * everything // 8
    if count > 1 and optimizer == "muon":  # directions in 16 bits: all of them, or those of one's own matrices, twice
        of_one = 2 * blocks * -(-12 // (8 if how == GROUPS else count)) // 12
        expected |= {"allreduce": 2 * blocks} if how == DDP else {"alltoall_base": 2 * of_one}
    sent = {name: size for name, size in traffic.bytes.items() if size > 5000}
    assert sent == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [{}, {"architecture": "llama", "gradient_checkpointing": True}, {"architecture": "qwen3", "n_kv_head": 4}],
)
def test_planned_memory_is_within_15_percent_of_tracked(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not compiled, in bfloat16, with the loss in chunks as on a GPU."""
    real = model.loss_chunk
    monkeypatch.setattr(GPT, "to", lambda network, _: network)  # which fake tensors can't
    monkeypatch.setattr(model, "loss_chunk", lambda n, vocab_size, _, dtype: real(n, vocab_size, "cuda", dtype))
    shape = {"n_layer": 4, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 12, **settings}
    with FakeTensorMode(allow_non_fake_inputs=True):
        step, network, optimizer = a_step(Distributed(), 1, 50304, **shape)
        with MemTracker() as tracker:
            tracker.track_external(network, optimizer)
            for n in range(2):
                tracker.reset_mod_stats()
                step(n)
        [used] = [values["Total"] for values in tracker.get_tracker_snapshot("peak").values()]
    planned = memory(network, 12, dtype=torch.bfloat16, gradient_checkpointing="gradient_checkpointing" in settings)
    assert planned["peak"] == pytest.approx(used, rel=0.15), planned


def test_a_static_decoding_step_reads_nothing_back_to_the_cpu() -> None:
    with FakeTensorMode(), torch.inference_mode():
        engine = Engine(GPT(GPTConfig(architecture="qwen3", n_kv_head=1, vocab_size=64, **SHAPE)), 4)
        with Traffic() as traffic:
            engine._logits(torch.zeros(2, 4, 1, dtype=torch.int64), engine.cache.length)
    assert traffic.waits.total() == 0


def test_a_budget_keeps_fewer_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    ids, device = torch.zeros(2, 64, dtype=torch.int64), Device("cpu", "cpu", torch.bfloat16, compile=True)

    def kept(budget: float) -> int:
        torch._dynamo.reset()
        network, found = GPT(GPTConfig(vocab_size=128, **SHAPE)), dict[int, torch.Tensor]()
        parallelize(network, TrainConfig(activation_memory_budget=budget), device, Distributed())
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t)
        with device.autocast(), keep:
            network(ids, ids, return_logits=False)
        return sum(tensor.nbytes for tensor in found.values())

    assert kept(0.3) < 0.7 * kept(1.0)
