"""A training step on meta tensors, written down as the allocations that it would make on a GPU. Imports torch.

Meta tensors hold nothing, so that no step is too large; a fake CUDA device would end the process at the first gradient
on a torch without CUDA. What differs between a GPU and meta tensors is put right here: attention keeps and takes what
the flash and memory-efficient kernels do, never scores, and autocast works although torch has none for meta tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.executors.kernel.sizing.allocator import EMPTY, Event, rounded

META = torch.device("meta")


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down when storages on one kind of device come and go; `phase` is what the step is doing.

    events  pairs as `allocator.replay` takes them
    peaks   most bytes held at once in each phase since the last `rewind`, in whole steps of 512 bytes
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.events: list[Event] = []
        self.peaks: dict[str, int] = {}
        self.phase = "weights"
        self.now = 0
        self._names = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def rewind(self) -> None:
        """Forget the peaks so far: what follows is the step that counts."""
        self.peaks = {}

    def empty_cache(self) -> None:
        """What torch.cuda.empty_cache() is to the allocator."""
        self.events.append(EMPTY)

    def take(self, size: int) -> Callable[[], None]:
        """Write down an allocation that no tensor stands for; call the result to give it back."""
        self._names += 1
        name, counted = self._names, rounded(size)
        self.events.append((name, size))
        self.now += counted
        if self.now > self.peaks.get(self.phase, 0):
            self.peaks[self.phase] = self.now

        def give_back() -> None:
            self.events.append((name, 0))
            self.now -= counted

        return give_back

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Write down tensors that were made before: weights."""
        for tensor in tensors:
            self._note(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(result)
        return result

    def _note(self, result: Any) -> None:
        if isinstance(result, (tuple, list)):
            for item in result:
                self._note(item)
        elif isinstance(result, Tensor) and result.device.type == self.device:
            storage = result.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._seen or size == 0:
                return
            give_back = self.take(size)

            def gone(_: object) -> None:
                self._seen.pop(key, None)
                give_back()

            self._seen[key] = weakref.ref(storage, gone)


class _Attention(torch.autograd.Function):
    """What scaled-dot-product attention allocates on CUDA: [B, heads, S, D] in and out, laid out [B, S, heads, D].

    Forward keeps query, key, value, the output and a log-sum-exp for each position; a bias stays where there is one.
    Backward takes a float32 sum of the query's gradient, and gradients of key and value for each query head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        batch, heads, length, width = query.shape
        held = [] if grad.stride(-1) == 1 else [grad.contiguous()]
        laid = [item.new_empty(batch, item.shape[2], item.shape[1], item.shape[3]) for item in (query, key, value)]
        long, wide = -(-length // 128) * 128, -(-width // 32) * 32
        held.append(query.new_empty(batch, heads, long, dtype=torch.float32))
        held.append(query.new_empty(batch, heads, long, wide, dtype=torch.float32))
        if key.shape[1] != heads:
            held += [item.new_empty(batch, item.shape[2], heads, item.shape[3]) for item in (key, value)]
        del held
        one, two, three = (item.transpose(1, 2) for item in laid)
        return one, two, three, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in for torch's scaled_dot_product_attention. A mask of bools becomes a bias in the query's type."""
    if torch.is_autocast_enabled("meta"):
        dtype = torch.get_autocast_dtype("meta")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = query.new_empty(attn_mask.shape)
    out: Tensor = _Attention.apply(query, key, value, bias)  # type: ignore[no-untyped-call]
    return out


class _Autocast(TorchFunctionMode):
    """Autocast for meta tensors by CUDA's lists of operations. Casts of float32 parameters are kept until its end."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None  # None where it is off
        self.depth = 0
        self._casts: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def __call__(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> Iterator[None]:
        """What `torch.autocast("meta", ...)` gives."""
        before, self.dtype = self.dtype, (dtype or torch.bfloat16) if enabled else None
        self.depth += 1
        try:
            with self if enabled else nullcontext():  # anew: a backward pass, which recomputes, is run without it
                yield
        finally:
            self.dtype = before
            self.depth -= 1
            if not self.depth:
                self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not None:
            if func in _LOWERED and "out" not in kwargs:
                args = tuple(self._lowered(item) for item in args)
                kwargs = {name: self._lowered(item) for name, item in kwargs.items()}
            elif func in _RAISED and kwargs.get("dtype") is None:
                args = tuple(_raised(item) for item in args)
                kwargs = {name: _raised(item) for name, item in kwargs.items()}
        return func(*args, **kwargs)

    def _lowered(self, item: Any) -> Any:
        if not (isinstance(item, Tensor) and item.is_floating_point() and item.dtype != self.dtype):
            return item
        if not (isinstance(item, nn.Parameter) and item.requires_grad and item.dtype == torch.float32):
            return item.to(self.dtype)
        if item not in self._casts:
            self._casts[item] = item.to(self.dtype)
        return self._casts[item]


def _raised(item: Any) -> Any:
    half = isinstance(item, Tensor) and item.dtype in (torch.bfloat16, torch.float16)
    return item.float() if half else item


def _named(owners: tuple[Any, ...], names: str) -> frozenset[Any]:
    return frozenset(getattr(owner, name) for owner in owners for name in names.split() if hasattr(owner, name))


_OWNERS = (torch, torch.Tensor, functional, torch.linalg)
_LOWERED = _named(
    _OWNERS, "linear matmul __matmul__ __rmatmul__ mm bmm mv addmm addmv baddbmm addbmm einsum vecdot conv1d"
)
_RAISED = _named(
    _OWNERS,
    "softmax log_softmax cumsum cumprod prod sum pow rsqrt reciprocal exp expm1 log log1p log2 softplus layer_norm norm"
    " logsumexp cross_entropy nll_loss mse_loss l1_loss kl_div binary_cross_entropy_with_logits",
)


@contextmanager
def cuda_like(tape: Tape) -> Iterator[None]:
    """Within it meta tensors are treated as CUDA tensors are, and the tape is running."""
    mode = _Autocast()
    real = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.amp.is_autocast_available, torch.autocast

    def enabled(device: str | None = None) -> bool:
        return (mode.dtype is not None) if device in (None, "meta") else real[0](device)

    def dtype(device: str) -> torch.dtype:
        return mode.dtype or torch.bfloat16 if device == "meta" else real[1](device)

    def available(device: str) -> bool:
        return device == "meta" or real[2](device)

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return (mode if device_type == "meta" else real[3])(device_type, *args, **kwargs)

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (torch, "is_autocast_enabled", enabled),
            (torch, "get_autocast_dtype", dtype),
            (torch.amp, "is_autocast_available", available),
            (torch, "autocast", autocast),
            (torch.amp, "autocast", autocast),
            (functional, "scaled_dot_product_attention", attention),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        stack.enter_context(tape)
        yield


class AdamW(torch.optim.Optimizer):
    """What AdamW allocates: two moments of each weight at the first step; the fused kernel nothing else.

    Not fused, as torch runs it on CUDA by default, each group of tensors of one type has temporaries of its own size:
    the square root of the second moment, which then is what the first is divided by.
    """

    def __init__(self, weights: Iterable[Tensor], *, fused: bool = True, eight_bit: bool = False) -> None:
        super().__init__(weights, {})
        self.fused, self.eight_bit = fused, eight_bit

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """The allocations of one step."""
        self.prepare()
        if not self.fused:
            by_type: dict[torch.dtype, list[Tensor]] = {}
            for item in self._weights():
                by_type.setdefault(item.dtype, []).append(item)
            for items in by_type.values():
                roots = [torch.empty_like(item) for item in items]
                del roots

    def prepare(self) -> None:
        """Allocate the moments that are missing, as the first step does."""
        for item in self._weights():
            if not self.state[item]:
                self.state[item]["moments"] = [self._moment(item) for _ in range(2)]

    def _weights(self) -> list[Tensor]:
        return [item for group in self.param_groups for item in group["params"]]

    def _moment(self, item: Tensor) -> list[Tensor]:
        if not self.eight_bit or item.numel() < 4096:  # bitsandbytes leaves small ones as they are
            return [torch.zeros_like(item, dtype=torch.float32 if self.eight_bit else item.dtype)]
        blocks = -(-item.numel() // 256)
        return [torch.zeros_like(item, dtype=torch.uint8), item.new_zeros(blocks, dtype=torch.float32)]


def on_meta(module: nn.Module) -> list[Tensor]:
    """All weights and buffers of a module, each once, moved to where nothing is held."""
    for owner in module.modules():
        for name, item in list(owner._buffers.items()):
            if item is not None and item.device != META:
                owner._buffers[name] = torch.empty_like(item, device=META)
        for name, weight in list(owner._parameters.items()):
            if weight is not None and weight.device != META:
                empty = torch.empty_like(weight, device=META)
                owner._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    return [*module.parameters(), *module.buffers()]


def clipped(weights: Iterable[Tensor]) -> None:
    """What torch.nn.utils.clip_grad_norm_ allocates: a norm for each gradient, and their norm."""
    norms = [item.grad.new_empty(()) for item in weights if item.grad is not None]
    if norms:
        torch.stack(norms)


def phases(layers: list[Any], tape: Tape) -> list[Any]:
    """Set the tape's phase as a pass goes through the layers; returns the hooks, to be removed.

    forward, head (from the last layer's end to its gradient), last (that layer's backward), middle, first.
    """
    names = ["first", *["middle"] * (len(layers) - 2), "last"][-len(layers) :]

    def watch(index: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, (tuple, list)) else output
            if tape.phase != "forward":
                return
            if index == len(layers) - 1:
                tape.phase = "head"
            if states.requires_grad:
                states.register_hook(lambda grad: setattr(tape, "phase", names[index]))

        return hook

    return [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers)]
