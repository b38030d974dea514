"""torch.compile of the decoder layers: tried on the real model before step one, kept only where it is exact and pays.

On a GPU a small model waits for its kernels to be launched; compiled, a layer launches a third of them. On a CPU the
time goes into matrix products, which a compiler leaves as they are: measured on SmolLM2-135M, under 1 % for 20 seconds
of compiling, so nothing is tried there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from tunesmith.executors.kernel.loops import attention
from tunesmith.executors.kernel.loops.batches import Batch
from tunesmith.executors.kernel.loops.model import Net

GAIN = 1.05  # less than that is not worth the risk of a shape that compiles anew
RUNS = 3
# Relative differences allowed, by how exact the model computes: of the loss, and of all gradients together.
APART = {True: (1e-5, 1e-4), False: (1e-2, 1e-1)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What trying came to: whether layers stay compiled, how many times faster a pass is, seconds spent; why not."""

    kept: bool
    gain: float | None
    seconds: float
    why: str = ""


class _Hidden:
    """Lengths of documents that the compiler shall not look at: it would compile anew for every number of them."""

    __slots__ = ("lengths",)

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths


class Layers:
    """A model's decoder layers, compiled while training and their own selves otherwise; `restore` undoes it.

    All layers share one compiled function. Attention stays outside of it: how a batch is packed changes every time.
    Where a later shape does not compile, the layers go on as they were; `told` hears why.
    """

    def __init__(
        self,
        layers: list[Any],
        backend: str | Callable[..., Any] = "inductor",
        told: Callable[[str], None] | None = None,
    ) -> None:
        self.layers = layers
        self.told = told
        self._own = [layer.__dict__.get("forward") for layer in layers]
        kind = type(layers[0])
        forward = getattr(kind.forward, "__wrapped__", kind.forward)  # without what checkpoints it
        self._compiled = torch.compile(forward, dynamic=True, backend=backend)
        _open_attention()
        for layer in layers:
            layer.forward = partial(self._forward, layer, layer.forward)

    def restore(self) -> None:
        """Give the layers their own forward back."""
        for layer, own in zip(self.layers, self._own, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own

    def _forward(self, layer: Any, usual: Any, *args: Any, **kwargs: Any) -> Any:
        """A layer's forward: compiled where gradients are wanted, else its own."""
        if not (layer.training and torch.is_grad_enabled()):
            return usual(*args, **kwargs)
        hidden = dict(kwargs)
        if kwargs.get("documents") is not None:
            hidden["documents"] = _Hidden(kwargs["documents"])
        try:
            if getattr(layer, "gradient_checkpointing", False):
                return layer._gradient_checkpointing_func(partial(self._compiled, layer, **hidden), *args)
            return self._compiled(layer, *args, **hidden)  # type: ignore[no-untyped-call]
        except TorchDynamoException as error:
            if self.told is None:
                raise
            self.restore()
            self.told(_first_words(error))
            return usual(*args, **kwargs)


def layers_of(net: Net) -> list[Any]:
    """The decoder layers, all of one class; empty where the model is built in another way, or needs random numbers."""
    if any(isinstance(module, nn.Dropout) and module.p for module in net.causal.modules()):
        return []  # a compiler draws masks in another order
    found = getattr(getattr(net.causal, net.causal.base_model_prefix), "layers", None)
    layers = list(found) if isinstance(found, nn.ModuleList) else []
    return layers if len({type(layer) for layer in layers}) == 1 else []


def offer(
    net: Net,
    batch: Batch,
    *,
    steps: int,
    told: Callable[[str], None],
    backend: str | Callable[..., Any] = "inductor",
) -> Verdict:
    """Try a forward and a backward pass of a real batch both ways, and keep the faster one.

    Compiled layers stay where loss and gradients agree, a pass gains enough, and `steps` such passes gain more than
    compiling took. Costs some ten passes and the compiling; gradients are cleared. No compiler's error is raised; one
    that comes up in a later step is `told`, and the layers go on as they were.
    """
    began = time.perf_counter()

    def verdict(kept: bool, gain: float | None = None, why: str = "") -> Verdict:
        return Verdict(kept, gain, time.perf_counter() - began, why)

    layers = layers_of(net)
    if not layers:
        return verdict(False, why="the model's layers are not of one kind, or drop out at random")
    batch = batch.to(net.device)
    wanted = _pass(net, batch)
    plain = min(_timed(net, batch) for _ in range(RUNS))
    compiled = Layers(layers, backend)
    try:
        start = time.perf_counter()
        found = _pass(net, batch)
        spent = time.perf_counter() - start
        apart = [float((one - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)]
        allowed = APART[net.exact]
        if not all(difference <= limit for difference, limit in zip(apart, allowed, strict=True)):
            compiled.restore()
            return verdict(False, why=f"compiled, loss and gradients differ by {apart[0]:.1e} and {apart[1]:.1e}")
        fast = min(_timed(net, batch) for _ in range(RUNS))
    except torch.OutOfMemoryError:
        compiled.restore()
        torch.cuda.empty_cache()
        return verdict(False, why="compiling ran out of memory")
    except Exception as error:  # a compiler of other people's: no toolchain, a bug, an operation it does not know
        compiled.restore()
        return verdict(False, why=f"it does not compile ({_first_words(error)})")
    gain = plain / fast
    if gain < GAIN or (plain - fast) * steps < spent:
        compiled.restore()
        return verdict(False, gain, f"compiled, it is {gain:.2f} times as fast, which {steps:,} steps do not pay for")
    compiled.told = told
    return verdict(True, gain)


def _first_words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:200]}"


def _open_attention() -> None:
    """Let packed attention be called from compiled layers, itself not compiled."""
    from transformers import AttentionInterface

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def opened(module: nn.Module, *tensors: Any, documents: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        lengths = documents.lengths if isinstance(documents, _Hidden) else documents
        query, key, value, mask = tensors
        return attention.packed_attention(module, query, key, value, mask, documents=lengths, **kwargs)

    AttentionInterface.register(attention.NAME, opened)


def _pass(net: Net, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and all gradients as one vector, on the CPU; the gradients themselves are cleared."""
    (loss := net.summed_loss(batch) / max(1, batch.weight)).backward()  # type: ignore[no-untyped-call]
    grads = [item.grad.flatten().float().cpu() for _, item in net.trainable() if item.grad is not None]
    for _, item in net.trainable():
        item.grad = None
    return loss.detach().float().cpu(), torch.cat(grads)


def _timed(net: Net, batch: Batch) -> float:
    def wait() -> None:
        if net.device.type == "cuda":
            torch.cuda.synchronize(net.device)

    wait()
    start = time.perf_counter()
    (net.summed_loss(batch) / max(1, batch.weight)).backward()  # type: ignore[no-untyped-call]
    for _, item in net.trainable():
        item.grad = None
    wait()
    return time.perf_counter() - start
