"""Adapters: peft's modules and file format, plain LoRA layers running as one product."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.executors.kernel.loops import quantised
from tunesmith.executors.kernel.loops.products import LoraProduct
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import AdapterSpec

EVERY_LINEAR = "all-linear"
SCORE = "score"  # the head of a model that scores a text, as transformers names it


def linear_names(model: Any) -> list[str]:
    """Last names of all linear layers but the output head, sorted: q_proj, v_proj, down_proj..."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
    )


def targets(model: Any, wanted: Sequence[str] | str) -> list[str]:
    """The module names to adapt. Raises InputError for a name that no linear layer has."""
    known = linear_names(model)
    if wanted in ("auto", EVERY_LINEAR) or list(wanted) == [EVERY_LINEAR]:
        return known
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for want in wanted:
        if not any(name == want or name.endswith(f".{want}") for name in linear):
            raise InputError(
                f"The model has no linear layer {want!r}.",
                code="adapter.targets",
                where="adapter.targets",
                fix=f"Choose from {', '.join(known)}.",
            )
    return list(wanted)


def attach(model: Any, spec: AdapterSpec, seed: int, base_id: str, *, scores: bool = False) -> Any:
    """The model with a fresh adapter in float32, every base weight frozen: a PeftModel.

    The first values depend on the seed alone: they are drawn on the CPU, in the order of the modules. A model that
    `scores` gets no adapter on its head: the head is trained whole, in float32, and saved with the adapter.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=int(spec.rank),
        lora_alpha=int(alpha) if (alpha := float(spec.alpha)).is_integer() else alpha,
        target_modules=[name for name in targets(model, spec.targets) if not (scores and name == SCORE)],
        lora_dropout=spec.dropout,
        use_dora=spec.kind == "dora",
        bias="none",
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers 5.23 under an old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    config.base_model_name_or_path = base_id
    if scores:
        config.modules_to_save = [SCORE]
        for item in adapted.parameters():
            if item.requires_grad:
                item.data = item.data.float()
    return adapted


def save(model: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft reads them."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in sorted(state.items())}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    doc = json.loads(path.read_text())
    doc["target_modules"] = sorted(doc["target_modules"])  # a set in peft: the same adapter shall be the same bytes
    path.write_text(json.dumps(doc, indent=2, sort_keys=True) + "\n")


def load(model: Any, folder: Path) -> None:
    """Read an adapter back into the model it fits. Raises InputError where a tensor is missing or of another shape."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(str(folder / "adapter_model.safetensors"))
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {name: item.shape for name, item in saved.items()} != {name: item.shape for name, item in own.items()}:
        raise InputError(
            "The checkpoint holds another adapter than the one asked for.",
            code="checkpoint.other_task",
            where=str(folder),
            fix="Keep model, rank and targets as they were, or start a new job.",
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


def fuse(model: Any) -> int:
    """Let plain LoRA layers run as one autograd function; returns how many do.

    Layers with dropout, DoRA, merged or several adapters keep peft's own forward. State and names do not change.
    """
    from peft.tuners.lora import LoraLayer

    count = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and _plain(module):
            module.forward = _FusedForward(module, module.forward)
            count += 1
    return count


def _plain(layer: Any) -> bool:
    from peft.tuners.lora import Linear as LoraLinear

    narrow = type(layer).__name__ == "Linear4bit" and quantised.is_narrow(layer.base_layer)
    return (
        (narrow or (type(layer) is LoraLinear and type(layer.base_layer) is nn.Linear))
        and not layer.base_layer.weight.requires_grad
        and list(layer.lora_A) == ["default"]
        and not layer.lora_variant
        and isinstance(layer.lora_dropout["default"], nn.Identity)
        and layer.lora_A["default"].bias is None
        and layer.lora_B["default"].bias is None
        and not layer.fan_in_fan_out
    )


class _FusedForward:
    """Stands in for a LoRA layer's forward; hands back to peft's where the adapter is switched off or merged."""

    def __init__(self, layer: Any, usual: Any) -> None:
        self.layer = layer
        self.usual = usual

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        base = layer.base_layer
        state = getattr(base.weight, "quant_state", None)
        if layer.disable_adapters or layer.merged or args or kwargs or layer.active_adapters != ["default"]:
            if state is not None and layer.disable_adapters and not (layer.merged or args or torch.is_grad_enabled()):
                # the library has a kernel of its own for this, and a reference shall not differ from a fresh adapter
                return nn.functional.linear(x, quantised.read(base.weight, state).to(x.dtype), base.bias)
            result: Tensor = self.usual(x, *args, **kwargs)
            return result
        flat = x.reshape(-1, x.shape[-1])
        a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        out: Tensor = LoraProduct.apply(flat, base.weight, state, base.bias, a, b, scale)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], out.shape[-1])
