"""The network against the original's own class, its parts against plain ones; transformers: test_huggingface.py."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.config import GPTConfig
from nanogpt.data import document_ids_of
from nanogpt.model import GPT, Block, attend, document_mask, head_loss
from tests.conftest import import_file, random_ids

TINY: dict[str, Any] = {"block_size": 24, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embd": 32}


def noisy(model: torch.nn.Module) -> None:
    """Draw all parameters, so that biases and norms matter too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class PlainBlock(Block):
    def forward(self, x: torch.Tensor, *context: Any) -> torch.Tensor:  # type: ignore[override]
        return x + self.attn(self.ln_1(x), *context) + self.mlp(self.ln_2(x))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_block_of_ones_own_takes_its_place(architecture: str) -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8, architecture=architecture))  # type: ignore[arg-type]
    model.transformer.h[0] = PlainBlock(model.config)
    idx = torch.tensor([[1, 2, 3]])
    model(idx, idx)[1].backward()
    alone = model.generate(idx, 4, temperature=0)
    with torch.no_grad():
        for n in range(3, 7):
            assert model(alone[:, :n])[0].argmax() == alone[0, n]


@pytest.mark.parametrize("bias", [True, False])
def test_everything_equals_the_original(original: Path, bias: bool) -> None:
    ours = GPT(GPTConfig(**TINY, bias=bias))
    noisy(ours)
    module = import_file(original / "model.py")
    theirs = module.GPT(module.GPTConfig(**TINY, bias=bias, dropout=0.0))
    theirs.load_state_dict(ours.state_dict())
    assert ours.get_num_params() == theirs.get_num_params()
    assert ours.estimate_mfu(3, 0.5) == pytest.approx(theirs.estimate_mfu(3, 0.5))
    x, y = random_ids(2, 24), random_ids(2, 24, seed=1)
    y[0, :5] = -1
    (logits, loss), (their_logits, their_loss) = ours(x, y), theirs(x, y)
    loss.backward()
    their_loss.backward()
    torch.testing.assert_close(logits, their_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)
    for (name, a), (their_name, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == their_name
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5, msg=name)
    # past the block size; how random numbers become draws is each one's own
    assert torch.equal(ours.generate(x, 30, temperature=0.8, top_k=1), theirs.generate(x, 30, temperature=0.8, top_k=1))


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=4, n_embd=256))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif parameter.dim() == 1:
            assert parameter.eq(1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8) = 4
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_the_loss_is_the_same_without_logits_and_ignores_minus_one() -> None:
    model = GPT(GPTConfig(**TINY)).eval()
    x, y = random_ids(2, 9), random_ids(2, 9, seed=1)
    y[:, 4:] = -1
    logits, loss = model(x, y)
    torch.testing.assert_close(model(x)[0], logits[:, -1:])  # without targets, of the last position only
    nothing, same = model(x, y, return_logits=False)
    assert nothing is None
    torch.testing.assert_close(loss, same)
    expected = torch.nn.functional.cross_entropy(logits[:, :4].flatten(0, 1), y[:, :4].flatten())
    torch.testing.assert_close(loss, expected)


def test_the_chunked_loss_and_its_gradients_equal_those_of_whole_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 12, generator=generator, requires_grad=True)
    head = torch.randn(12000, 12, generator=generator, requires_grad=True)  # enough for chunks
    targets = torch.randint(-1, 12000, (1500,), generator=generator)
    targets[700:800] = -1
    expected = torch.nn.functional.cross_entropy(x @ head.T, targets, ignore_index=-1)
    loss = head_loss(x, head, targets)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(3 * expected, (x, head))  # a factor, as accumulation and gradient scalers bring
    for mine, theirs in zip(torch.autograd.grad(3 * loss, (x, head)), gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, head, targets), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head_loss(x, head, targets)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, atol=0, rtol=2e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_spelled_out_in_bfloat16_is_attention(masked: bool, dropout: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 3, 40, 16, generator=generator) for _ in range(3)]
    q, k, v = (t.bfloat16().requires_grad_() for t in exact)
    mask = document_mask(document_ids_of(torch.arange(80).view(2, 40) % 7, 0), dense=True) if masked else None
    expected = attend(*exact, mask, 0.0)
    torch.manual_seed(0)
    outputs = [attend(q, k, v, mask, dropout) for _ in range(1000 if dropout else 1)]
    assert outputs[0].dtype == torch.bfloat16
    mean = torch.stack(outputs).float().mean(dim=0)  # dropout changes single outputs, not what is to be expected
    torch.testing.assert_close(mean, expected, atol=0.3 if dropout else 0.03, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing_but_memory(dropout: float) -> None:
    model = GPT(GPTConfig(**TINY, dropout=dropout))
    x = random_ids(2, 24)
    gradients = []
    for checkpointing in (False, True):
        model.transformer.gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        model.zero_grad()
        model(x, x)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_cropping_keeps_the_prediction_of_short_contexts() -> None:
    model = GPT(GPTConfig(**TINY)).eval()
    x = random_ids(1, 10)
    before, _ = model(x)
    model.crop_block_size(10)
    torch.testing.assert_close(model(x)[0], before)
    assert model.config.block_size == 10
    with pytest.raises(ValueError, match="a context of 11 tokens does not fit"):
        model(random_ids(1, 11))


def test_the_old_addresses_still_work() -> None:
    import model as door

    gpt = door.GPT(door.GPTConfig(**TINY))
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert gpt.generate(random_ids(1, 3), max_new_tokens=4).shape == (1, 7)


@pytest.mark.parametrize(
    ("architecture", "ends", "gradient_checkpointing"),
    [("gpt2", [0, 1, 9], True), ("gpt2", list(range(24)), False), ("llama", [7, 20], True), ("qwen3", [7, 23], False)],
)
def test_masked_documents_equal_each_document_alone(
    architecture: Any, ends: list[int], gradient_checkpointing: bool
) -> None:
    model = GPT(GPTConfig(**TINY, architecture=architecture))
    noisy(model)
    model.transformer.gradient_checkpointing = gradient_checkpointing
    idx = random_ids(1, 24)
    idx[idx == 0] = 1
    idx[0, ends] = 0  # ends a document and opens the next one
    y = torch.roll(idx, -1, dims=1)
    logits, loss = model(idx, y, document_ids=document_ids_of(idx, 0))
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    bounds = sorted({0, *ends, 24})
    alone, total = [], torch.zeros(())
    for start, stop in itertools.pairwise(bounds):
        document, document_loss = model(idx[:, start:stop], y[:, start:stop])
        alone.append(document)
        total = total + document_loss * (stop - start) / 24
    total.backward()
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_mask_of_blocks_is_the_dense_one() -> None:
    """FlexAttention's form, which CUDA takes; eager on the CPU it can be compared, forward."""
    documents = document_ids_of(random_ids(2, 256, vocab_size=50), 0)
    q, k, v = torch.randn(3, 2, 4, 256, 16, generator=torch.Generator().manual_seed(0)).unbind()
    dense, blocks = (attend(q, k, v, document_mask(documents, dense=dense), 0.0) for dense in (True, False))
    torch.testing.assert_close(dense, blocks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by_block", [False, True])
def test_the_mask_of_blocks_can_be_compiled_and_trained(by_block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that CUDA goes, traced whole or block by block; only the kernels are not there to be run."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    idx = random_ids(2, 128, vocab_size=20)

    def loss_of(in_blocks: bool) -> float:
        monkeypatch.setattr("nanogpt.model.document_mask", lambda ids, dense: document_mask(ids, dense=not in_blocks))
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=128, vocab_size=61, n_layer=2, n_head=2, n_embd=32))
        model.transformer.gradient_checkpointing = True
        for module in (model.transformer.h if by_block else [model]) if in_blocks else []:
            module.compile(backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = model(idx, idx, document_ids=document_ids_of(idx, 0), return_logits=False)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        return loss.item()

    assert loss_of(in_blocks=True) == pytest.approx(loss_of(in_blocks=False), abs=2e-2)


def test_dropout_of_numbers_and_of_channels() -> None:
    shape = {"block_size": 8, "vocab_size": 20, "n_layer": 1, "n_head": 2, "n_embd": 64, "dropout": 0.25}
    x = torch.ones(5, 8, 64)
    for architecture in ("gpt2", "llama"):
        block = GPT(GPTConfig(**shape, architecture=architecture)).transformer.h[0]  # type: ignore[arg-type]
        for drop in (block.attn.resid_dropout, block.mlp.drop):
            assert torch.equal(drop.eval()(x), x)
            dropped = drop.train()(x)
            assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
            assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.08)
            same = (dropped == dropped[:, :1]).all().item()  # in all tokens of a row, but not in all rows
            assert same == (architecture == "llama")
            assert not torch.equal(dropped[0], dropped[1])
        assert block.attn.attn_dropout == (0.25 if architecture == "gpt2" else 0.0)
