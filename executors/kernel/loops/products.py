"""The product of an adapted linear layer, as one autograd function over a frozen weight, full or in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.executors.kernel.loops import matrix, quantised


class LoraProduct(torch.autograd.Function):
    """x @ W.T + scale * (x @ A.T) @ B.T, W frozen; the two small factors are cast to x's type and graded in their own.

    x [n, in], W [out, in], A [r, in], B [out, r]. With a `state` the weight comes packed in 4 bits: it is read in the
    forward pass and again in the backward pass, and never kept. Keeps x and x @ A.T, nothing of [n, out].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        w = _full(weight, state, x)
        small = x @ a.to(x.dtype).t()
        y = matrix.onto(x, w)
        if bias is not None:
            y += bias
        y.addmm_(small, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, small)
        ctx.state, ctx.scale = state, scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, small = ctx.saved_tensors
        through = (grad @ b.to(grad.dtype)) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _full(weight, ctx.state, grad)).addmm_(through, a.to(grad.dtype))
        grad_a = (through.t() @ x).to(a.dtype)
        grad_b = (grad.t() @ small).to(b.dtype) * ctx.scale
        return grad_x, None, None, None, grad_a, grad_b, None


def _full(weight: Tensor, state: Any, like: Tensor) -> Tensor:
    return weight if state is None else quantised.read(weight, state).to(like.dtype)
