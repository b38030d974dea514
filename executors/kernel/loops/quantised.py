"""The 4-bit base of QLoRA: bitsandbytes' double-quantised NF4 linears, read back one layer at a time.

Embeddings, norms and the head stay as they are; so do the experts of a mixture, which are no linear layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.orchestrator.errors import InputError

KIND = "nf4"
BLOCK = 64  # values that share a scale


def reading(folder: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told so that each layer is quantised on the device as it is read.

    Beside what is kept, one full layer is held at a time, on the host or on the device. Weights that are quantised in
    the file are read as they are. Raises InputError (adapter.qlora) where bitsandbytes is missing or does not know the
    device.
    """
    _library(device)
    from transformers import BitsAndBytesConfig

    if _quantised_file(folder):
        return {"device_map": {"": device}}
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=KIND, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": how, "device_map": {"": device}}


def quantise(model: Any, dtype: torch.dtype, device: torch.device) -> int:
    """See that a model's linear layers but its heads are 4-bit ones on the device; how many are.

    A model read with `reading` is left as it is; another is quantised in place, to the same bits. Raises InputError
    (adapter.qlora) where the model was quantised in another way, has no linear layer, or, on a CPU, rows that
    break a block.
    """
    library = _library(device)
    if getattr(model.config, "quantization_config", None) is None:
        from transformers.quantizers.base import get_keys_to_not_convert

        kept = set(get_keys_to_not_convert(model))
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name not in kept:
                model.set_submodule(name, _narrowed(library, module, dtype, device))
        model.is_loaded_in_4bit = True  # peft asks for it
    found = [module for module in model.modules() if isinstance(module, library.nn.Linear4bit)]
    if not found or any(module.weight.quant_type != KIND for module in found):
        raise InputError(
            "The model cannot be held in 4 bits.",
            code="adapter.qlora",
            why=f"It has no linear layers in {KIND.upper()}; its weights may be quantised in another way.",
            where="adapter.kind",
            fix="Set adapter.kind to lora, or use the model's plain weights.",
        )
    odd = [module for module in found if module.in_features % BLOCK and module.weight.device.type == "cpu"]
    if odd:  # bitsandbytes 0.50 with AVX-512 begins a block anew with every row, which it did not in quantising
        raise InputError(
            "The model cannot be held in 4 bits on a CPU.",
            code="adapter.qlora",
            why=f"It has rows of {odd[0].in_features}, no multiple of {BLOCK}; bitsandbytes misreads those.",
            where="adapter.kind",
            fix="Set adapter.kind to lora.",
        )
    for module in found:
        # On CPUs with avx512_bf16 the library repacks a weight in its first evaluation and then multiplies in bfloat16,
        # in training too, where that product has no gradient.
        module.support_avx512bf16_for_cpu = False
    return len(found)


def is_narrow(layer: nn.Module) -> bool:
    """Whether a layer is a 4-bit linear one. Cheap, and without bitsandbytes where nothing has loaded it."""
    return type(getattr(layer, "weight", None)).__name__ == "Params4bit"


def dequantised(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer, or of the one that an adapter wraps: a fresh tensor where it is 4-bit."""
    wrapper: Any = layer
    base: Any = wrapper.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight: Tensor = base.weight
    return read(weight, base.weight.quant_state) if is_narrow(base) else weight.detach()


def read(packed: Tensor, state: Any) -> Tensor:
    """The full weight [out, in] of packed 4-bit values, in the type they were quantised from; a few per cent of the
    product that it goes into."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(packed.detach(), state)
    return weight


def _quantised_file(folder: Path) -> bool:
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False  # transformers will say what is wrong with it


def _narrowed(library: Any, layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    with torch.device("meta"):
        narrow: nn.Module = library.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type=KIND
        )
    narrow.weight = library.nn.Params4bit(
        layer.weight.detach().to(dtype), requires_grad=False, quant_type=KIND, module=narrow
    ).to(device)
    if layer.bias is not None:
        narrow.bias = nn.Parameter(layer.bias.detach().to(device, dtype), requires_grad=False)
    return narrow


def _library(device: torch.device) -> Any:
    try:
        import bitsandbytes

        if device.type not in bitsandbytes.supported_torch_devices:
            raise ImportError(f"it does not know the device {device.type}")
    except ImportError as error:
        raise InputError(
            "A base in 4 bits is not available here.",
            code="adapter.qlora",
            why=f"bitsandbytes: {str(error).splitlines()[0][:200]}.",
            where="adapter.kind",
            fix="Install it (pip install 'tunesmith[train]'), or set adapter.kind to lora.",
        ) from error
    return bitsandbytes
