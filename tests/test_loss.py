"""The loss in chunks against that of whole logits."""

import pytest
import torch

from nanogpt.loss import head_loss


def test_the_loss_in_chunks_and_its_gradients_equal_those_of_whole_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4500, 12, generator=generator, requires_grad=True)  # two chunks and a part of a third
    head = torch.randn(1100, 12, generator=generator, requires_grad=True)  # three parts to a chunk
    targets = torch.randint(-1, 1100, (4500,), generator=generator)
    targets[2000:2100] = -1
    expected = torch.nn.functional.cross_entropy(x @ head.T, targets, ignore_index=-1)
    loss = head_loss(x, head, targets)
    torch.testing.assert_close(loss, expected)
    (3 * expected).backward()  # a factor, as gradient accumulation and gradient scalers bring
    gradients = [x.grad, head.grad]
    x.grad = head.grad = None
    (3 * loss).backward()
    for mine, theirs in zip((x.grad, head.grad), gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, head, targets), expected)


def test_float16_holds_the_gradient_of_a_frequent_token() -> None:
    x = (40 + torch.rand(3000, 8)).requires_grad_()  # 3,000 rows of 40 are beyond its 65,504
    head = torch.randn(20, 8).mul_(0.02).requires_grad_()
    targets = torch.zeros(3000, dtype=torch.int64)
    torch.nn.functional.cross_entropy(x @ head.T, targets).backward()
    expected = [x.grad, head.grad]
    x.grad = head.grad = None
    with torch.autocast("cpu", torch.float16):
        loss = head_loss(x, head, targets)
    loss.backward()
    for mine, theirs in zip((x.grad, head.grad), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


def test_gradients_of_the_loss_are_not_differentiable_again() -> None:
    x, head = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = head_loss(x, head, torch.tensor([0, 1, 2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()
