"""The language-model loss on supervised positions only.

Hidden states are gathered before the head, so that no logits exist where nothing is trained, and are scored in chunks
whose gradients are made at once: peak memory is one chunk of logits, nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tunesmith.executors.kernel.loops import matrix

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target], float32; gradients are made in the forward pass, chunk by chunk.

    hidden [n, H], weight [V, H], targets [n]. Same products as the plain head: one forward and one (or two, where the
    head is trained) backward matmul per chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start, stop in _chunks(hidden, weight):
            part, wanted = hidden[start:stop], targets[start:stop, None]
            logps = torch.log_softmax(matrix.onto(part, weight).float(), -1)
            found = logps.gather(1, wanted)
            total -= found.sum()
            if not (wants_hidden or wants_weight):
                continue
            slope = logps.exp_()
            slope.scatter_add_(1, wanted, torch.full_like(found, -1.0))
            slope = slope.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[start:stop] = slope @ weight
            if grad_weight is not None:
                grad_weight += (slope.t() @ part.to(weight.dtype)).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
        )


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] of each position, and the entropy, both float32 [n].

    hidden [n, H], weight [V, H], targets [n]. A position's log-probability has a gradient of its own that the loss only
    scales, so it is made in the forward pass like that of the cross-entropy: nothing is computed twice, but for a head
    that is trained, whose logits are made again. The entropy carries no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logps)
        norms = torch.empty_like(logps) if wants_weight else None
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        for start, stop in _chunks(hidden, weight):
            part, wanted = hidden[start:stop], targets[start:stop, None]
            logits = matrix.onto(part, weight).float()
            logits.div_(temperature)
            norm = torch.logsumexp(logits, -1, keepdim=True)
            logps[start:stop] = (logits.gather(1, wanted) - norm)[:, 0]
            chances = (logits - norm).exp_()
            entropy[start:stop] = norm[:, 0] - torch.linalg.vecdot(chances, logits)
            if norms is not None:
                norms[start:stop] = norm[:, 0]
            if grad_hidden is not None:
                slope = chances.neg_()
                slope.scatter_add_(1, wanted, torch.ones_like(norm))
                grad_hidden[start:stop] = slope.div_(temperature).to(weight.dtype) @ weight
        saved = (hidden, weight, targets) if wants_weight else (None, None, None)
        ctx.save_for_backward(grad_hidden, norms, *saved)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, norms, hidden, weight, targets = ctx.saved_tensors
        grad_weight = None
        if norms is not None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            for start, stop in _chunks(hidden, weight):
                part, wanted = hidden[start:stop], targets[start:stop, None]
                logits = (part @ weight.t()).float().div_(ctx.temperature)
                slope = logits.sub_(norms[start:stop, None]).exp_().neg_()
                slope.scatter_add_(1, wanted, torch.ones_like(wanted, dtype=slope.dtype))
                slope.mul_(grad[start:stop, None] / ctx.temperature)
                grad_weight += (slope.to(weight.dtype).t() @ part.to(weight.dtype)).float()
            grad_weight = grad_weight.to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad[:, None].to(grad_hidden.dtype)
        return grad_hidden, grad_weight, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of positions whose logits are held at a time."""
    size = max(16, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 24) // weight.shape[0])
    for start in range(0, hidden.shape[0], size):
        yield start, min(start + size, hidden.shape[0])


def chunked_logps(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets under a bias-free linear head, and entropies: float32 [n] each."""
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    found: tuple[Tensor, Tensor] = ChunkedLogProbs.apply(hidden, weight, targets, temperature)  # type: ignore[no-untyped-call]
    return found


def plain_logps(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same from a model's own logits [n, V]."""
    every = (logits.float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(every.exp() * every).sum(-1)
    return every.gather(1, targets[:, None])[:, 0], entropy


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of a bias-free linear head over gathered hidden states [n, H]."""
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = ChunkedCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of logits [n, V]: the way for heads that do more than multiply (caps, scales, adapters)."""
    return cross_entropy(logits.float(), targets, reduction="sum")


def plain_head(head: nn.Module | None) -> bool:
    """Whether a head is one matrix and nothing else, so that `chunked_loss` may stand in for it."""
    return type(head) is nn.Linear and head.bias is None
