"""The model that writes answers: the one in training with its adapter merged in, and no other weight copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.executors.kernel.loops import matrix, quantised
from tunesmith.executors.kernel.loops.model import Net

PIECE, FEW = 512, 32


class Merged:
    """A second model over the tensors of `net.causal`, for inference.

    Layers with an adapter become plain linear layers with weights of their own: W + scale * B @ A, in the type of W; a
    4-bit base is read back into the type it was quantised from. Full weights in float32 under autocast get a copy of
    their linear layers in the type that autocast computes in; in float32 nothing is copied. All else is shared: norms,
    embeddings, head, layers that are not adapted, and adapters of another make, which keep peft's own forward. On a CPU
    the merged weights lie packed (matrix.Packed).
    """

    def __init__(self, net: Net) -> None:
        self.net = net
        self._layers: list[tuple[Any, Tensor | matrix.Packed]] = []
        self._bytes = 0
        self._casts: list[tuple[Tensor, Tensor]] = []
        shared: dict[int, Any] = {}
        for item in _tensors(net.causal):
            shared[id(item)] = item
        for module in net.causal.modules():
            if _mergeable(module):
                base = module.base_layer
                weight = quantised.dequantised(base)
                packed = net.autocast is None and matrix.Packed.possible(weight.dtype, weight.device)
                shared[id(module)] = own = _linear(weight.shape, weight.dtype, weight.device, base.bias, empty=packed)
                if packed:
                    own.forward = matrix.Packed(base.bias)  # type: ignore[method-assign, assignment]
                self._layers.append((module, own.forward if packed else own.weight))  # type: ignore[arg-type]
                self._bytes += weight.numel() * weight.element_size()
            elif not net.adapted and net.autocast is not None and type(module) is nn.Linear:
                weight = module.weight
                shared[id(module)] = own = _linear(weight.shape, net.autocast, weight.device, module.bias)
                self._casts.append((module.weight, own.weight))
                self._bytes += own.weight.numel() * own.weight.element_size()
        self.model: Any = copy.deepcopy(net.causal, shared)
        self.model.eval()
        self.head: Any = self.model.get_output_embeddings()
        whole = type(self.head) is nn.Linear and not isinstance(self.head.forward, matrix.Packed)
        if whole and self.head.weight.device.type == "cpu":
            self.head.forward = _Pieces(self.head)
        self._trained = [item for _, item in net.trainable()]
        self._versions: list[int] = []
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge the weights as they are now, in place. Costs one product of rank r for each adapted layer."""
        room = _Room()
        for layer, own in self._layers:
            if isinstance(own, matrix.Packed):
                own.pack(_merge(layer, room=room))
            else:
                _merge(layer, own)
        if self._casts:
            torch._foreach_copy_([own for _, own in self._casts], [weight for weight, _ in self._casts])
        self._versions = [item._version for item in self._trained]

    @property
    def stale(self) -> bool:
        """Whether a trained weight was changed in place since the last `refresh`. Compares counters, not values."""
        return [item._version for item in self._trained] != self._versions

    @property
    def own_bytes(self) -> int:
        """Bytes of the weights that are not shared."""
        return self._bytes


def _tensors(model: nn.Module) -> Iterator[Any]:
    """All that a copy of the model shall share: parameters, buffers, and what bitsandbytes keeps beside its weights."""
    for item in chain(model.parameters(), model.buffers()):
        yield item
        state = getattr(item, "quant_state", None)
        if state is not None:
            yield state


def _mergeable(module: Any) -> bool:
    """Whether a module is a linear layer with one LoRA or DoRA adapter and nothing else."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    if not isinstance(module, LoraLayer) or list(module.lora_A) != ["default"] or module.merged:
        return False
    base, variant = module.get_base_layer(), module.lora_variant.get("default")
    plain = type(module) is LoraLinear and type(base) is nn.Linear and not module.fan_in_fan_out
    if not plain and not (quantised.is_narrow(base) and variant is None):
        return False
    if variant is not None and not isinstance(variant, DoraLinearVariant):
        return False
    return module.lora_A["default"].bias is None and module.lora_B["default"].bias is None


class _Room:
    """Memory on a CPU for one matrix at a time, in float32 and in another type, grown as asked.

    To take fresh memory for every matrix costs up to five times as long as the product that fills it.
    """

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def of(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A matrix of this shape, with whatever the last one left in it."""
        held = self._held.get(dtype)
        if held is None or held.numel() < like.numel():
            self._held[dtype] = held = torch.empty(like.numel(), dtype=dtype)
        return held[: like.numel()].view(like.shape)


def _merge(layer: Any, own: Tensor | None = None, room: _Room | None = None) -> Tensor:
    """The layer's weight with its adapter, in the weight's type; in `own`, or else in `room`, if there is one."""
    variant = layer.lora_variant.get("default")
    if variant is not None:  # DoRA, as peft merges it; the norm it remembers is for taking the adapter out again
        merged: Tensor = variant.merge_safe(layer, "default", layer.base_layer.weight)
        layer._cache_pop("default-weight_norm")
    else:
        weight, scale = quantised.dequantised(layer), layer.scaling["default"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if a.dtype == b.dtype == weight.dtype and (own is None or own.dtype == weight.dtype):
            return torch.addmm(weight, b, a, alpha=scale, out=own)
        if room is not None and own is None and weight.dtype != torch.float32:
            own = room.of(weight, weight.dtype)
            merged = room.of(weight, torch.float32).copy_(weight).addmm_(b.float(), a.float(), alpha=scale)
        else:
            merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
    return merged if own is None else own.copy_(merged)


def _linear(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, bias: nn.Parameter | None, *, empty: bool = False
) -> nn.Linear:
    """A linear layer with a weight [out, in] of its own, not yet filled, and a shared bias.

    Where it shall be `empty`, a weight of that shape which takes no memory.
    """
    with torch.device("meta"):
        linear = nn.Linear(shape[1], shape[0], bias=False)
    weight = torch.empty((1, 1) if empty else shape, dtype=dtype, device=device).expand(shape)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear


class _Pieces:
    """A head's forward on a CPU, a piece of the vocabulary at a time.

    One product of many rows over a whole vocabulary runs at two thirds of a layer's speed there, since it packs all the
    weights first: for 64 rows of SmolLM2-135M 38 against 58 GFLOP/s on one core. For a few rows pieces only cost calls:
    16 rows in bfloat16 take 5.3 ms in pieces and 2.4 ms at once.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def __call__(self, states: Tensor) -> Tensor:
        weight, bias = self.head.weight, self.head.bias
        flat = states.reshape(-1, states.shape[-1])
        few = flat.dtype != torch.float32 and flat.shape[0] <= FEW
        if few or flat.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(states, weight, bias)
        out = flat.new_empty(flat.shape[0], weight.shape[0])
        for start in range(0, weight.shape[0], PIECE):
            torch.mm(flat, weight[start : start + PIECE].t(), out=out[:, start : start + PIECE])
        if bias is not None:
            out += bias
        return out.view(*states.shape[:-1], -1)
