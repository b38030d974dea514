"""The chunked loss against torch's own."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tunesmith.executors.kernel.loops import loss


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 12, generator=draw, requires_grad=True)
    weight = torch.randn(31, 12, generator=draw, requires_grad=True)
    return hidden, weight, torch.randint(0, 31, (50,), generator=draw)


@pytest.mark.parametrize("chunk", [16, 20, 1000])
def test_value_and_gradients_equal_the_plain_head(tensors, chunk, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", chunk * 31)
    hidden, weight, targets = tensors
    plain = cross_entropy(hidden @ weight.t(), targets, reduction="sum") / 7
    wanted = torch.autograd.grad(plain, (hidden, weight))
    ours = loss.chunked_loss(hidden, weight, targets) / 7
    found = torch.autograd.grad(ours, (hidden, weight))
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_frozen_head_gets_no_gradient(tensors):
    hidden, weight, targets = tensors
    loss.chunked_loss(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bfloat16_keeps_its_type_and_sums_in_float32(tensors):
    hidden, weight, targets = tensors
    half = hidden.detach().bfloat16().requires_grad_()
    ours = loss.chunked_loss(half, weight.detach().bfloat16(), targets)
    ours.backward()
    plain = cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    assert ours.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    assert ours.item() == pytest.approx(plain.item(), rel=2e-2)


def test_without_gradients_none_are_made(tensors, monkeypatch):
    hidden, weight, targets = tensors
    with torch.no_grad():
        value = loss.chunked_loss(hidden, weight, targets)
    assert not value.requires_grad
    assert value.item() == pytest.approx(cross_entropy(hidden @ weight.t(), targets, reduction="sum").item(), rel=1e-6)


def test_logits_far_out_stay_finite():
    hidden = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    value = loss.chunked_loss(hidden, torch.eye(2), torch.tensor([1]))
    value.backward()
    assert value.item() == pytest.approx(2000.0)
    assert torch.isfinite(hidden.grad).all()


def test_only_a_bare_matrix_is_a_plain_head():
    assert loss.plain_head(torch.nn.Linear(2, 3, bias=False))
    assert not loss.plain_head(torch.nn.Linear(2, 3, bias=True))
    assert not loss.plain_head(torch.nn.Sequential())
    assert not loss.plain_head(None)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("trained_head", [False, True])
def test_log_probabilities_equal_the_plain_head(temperature, trained_head, monkeypatch):
    """Values, entropies and gradients in chunks are those of log_softmax, whatever weight each position has."""
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 16 * 50)
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(70, 8, generator=draw, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(50, 8, generator=draw).requires_grad_(trained_head)
    targets = torch.randint(0, 50, (70,), generator=draw)
    weights = torch.randn(70, generator=draw)
    results = []
    for logps, entropy in (
        loss.chunked_logps(hidden, weight, targets, temperature),
        loss.plain_logps(hidden @ weight.t(), targets, temperature),
    ):
        for item in (hidden, weight):
            item.grad = None
        (logps * weights).sum().backward()
        results.append((logps.detach(), entropy.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).abs().max() < 5e-5
    assert not loss.chunked_logps(hidden, weight, targets, temperature)[1].requires_grad


def test_log_probabilities_without_gradients_keep_nothing():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    with torch.no_grad():
        logps, entropy = loss.chunked_logps(hidden, weight, torch.arange(5), 1.0)
    assert not logps.requires_grad
    assert logps.shape == entropy.shape == (5,)
