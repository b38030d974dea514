"""The language-model loss on supervised positions only.

Hidden states are gathered before the head, so that no logits exist where nothing is trained, and are scored in chunks
whose gradients are made at once: peak memory is one chunk of logits, nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target], float32; gradients are made in the forward pass, chunk by chunk.

    hidden [n, H], weight [V, H], targets [n]. Same products as the plain head: one forward and one (or two, where the
    head is trained) backward matmul per chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        size = max(16, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 24) // weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, hidden.shape[0], size):
            part, wanted = hidden[start : start + size], targets[start : start + size, None]
            logits = (part @ weight.t()).float()
            norm = torch.logsumexp(logits, -1, keepdim=True)
            total += (norm - logits.gather(1, wanted)).sum()
            if not (wants_hidden or wants_weight):
                continue
            slope = logits.sub_(norm).exp_()
            slope.scatter_add_(1, wanted, torch.full_like(norm, -1.0))
            slope = slope.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + size] = slope @ weight
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
