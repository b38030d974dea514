"""One training step in the order in which other trainers do it, written down on a tape of allocations.

`LOOP` is the loop of PEFT's method comparison: no checkpointing, no autocast, padded batches, all logits, gradients of
the last step dropped as the next begins. `TRL` is TRL 1.16 at its defaults: checkpointing, autocast to bfloat16, no
padding, a head that scores tiles, gradients dropped when the step is over.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from tunesmith.executors.kernel.sizing.traced_tape import Tape

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = {
    "llama-3.2-3b": (28, 3072, 24, 8, 128, 8192, 128256, True),
    "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256, False),
    "llama-3.1-70b": (80, 8192, 64, 8, 128, 28672, 128256, False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is trained and in which order. `adapter` holds LoraConfig's arguments, None for all weights."""

    adapter: Mapping[str, Any] | None
    batch: int
    lengths: tuple[int, ...]  # of the padded batches, a step each
    checkpointing: bool
    amp: bool
    tiled: bool  # TRL's head, else all logits
    padded: bool
    early: bool  # whether gradients stay until the next step begins
    fused: bool = False  # the optimizer
    narrow: bool = False  # the base in 4 bits

    def but(self, **changes: object) -> Order:
        """The same with some things changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


LOOP = Order(adapter=None, batch=4, lengths=(), checkpointing=False, amp=False, tiled=False, padded=True, early=True)
TRL = Order(
    adapter={"r": 16, "lora_alpha": 32, "target_modules": list(LINEAR)}, batch=2, lengths=(2048, 2048),
    checkpointing=True, amp=True, tiled=True, padded=False, early=False, fused=True,
)  # fmt: skip


def config(name: str, layers: int | None = None) -> Any:
    """transformers' config of a Llama by its name in SHAPES."""
    from transformers import LlamaConfig

    depth, hidden, heads, kv_heads, head_dim, intermediate, vocabulary, tied = SHAPES[name]
    return LlamaConfig(
        num_hidden_layers=layers or depth, hidden_size=hidden, num_attention_heads=heads, head_dim=head_dim,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=tied,
        use_cache=False,
    )  # fmt: skip


def trace(shape: Any, order: Order) -> Tape:
    """The tape of a step for each of the order's lengths; its peaks are the last step's.

    Before the last step the cache is emptied, as PEFT's loop does every tenth step, right before the longest batches.
    """
    import torch

    from tunesmith.executors.kernel.sizing import traced_tape as tapes

    model = _model(shape, order)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    tape = tapes.Tape()
    weights = [item for item in model.parameters() if item.requires_grad]
    optimizer = tapes.AdamW(weights, fused=order.fused)
    with tapes.cuda_like(tape), _head(order), _mask(causal, order) as masks:
        tape.hold(tapes.on_meta(model))
        tape.phase = "workspaces"
        workspaces = [tape.take(8_519_680) for _ in range(2)]  # cuBLAS, for each thread that multiplies
        hooks = tapes.phases(list(causal.model.layers), tape)
        for number, length in enumerate(order.lengths):
            if number and number == len(order.lengths) - 1:
                tape.empty_cache()
            tape.rewind()
            tape.phase = "forward"
            ids = torch.zeros(order.batch, length, dtype=torch.int64, device="meta")
            labels = ids.clone()
            masks["shape"] = (order.batch, 1, length, length)
            if order.early:
                optimizer.zero_grad()
            inputs: dict[str, Any] = {"input_ids": ids, "labels": labels, "use_cache": False}
            with torch.autocast("meta", dtype=torch.bfloat16) if order.amp else nullcontext():
                if order.tiled:
                    loss = -model(**inputs, fused_lm_head=True).log_probs.sum() / 100.0
                    out = None
                else:
                    out = model(**inputs, num_items_in_batch=order.batch * length)
                    loss = out.loss
            if out is not None and order.amp and out.logits.dtype != torch.float32:
                out["logits"] = out.logits.float()  # accelerate's convert_outputs_to_fp32
            tape.phase = "head"
            loss.backward()
            tape.phase = "optimizer"
            tapes.clipped(weights)
            optimizer.step()
            if not order.early:
                optimizer.zero_grad()
            del out, loss, ids, labels, inputs
        for hook in hooks:
            hook.remove()
        del workspaces
    return tape


def live_peaks(name: str, order: Order) -> dict[str, int]:
    """Most live bytes in each phase of a model in SHAPES, from two and three of its layers."""
    two, three = (trace(config(name, layers), order).peaks for layers in (2, 3))
    return {phase: two[phase] + (SHAPES[name][0] - 2) * (three[phase] - two[phase]) for phase in two}


def _model(shape: Any, order: Order) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa")
        if order.tiled:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if order.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if order.adapter is not None:
                model.enable_input_require_grads()
        if order.adapter is not None and order.narrow:
            _narrowed(model, order.adapter)
        elif order.adapter is not None:
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **order.adapter))
    return model.train()


@contextmanager
def _head(order: Order) -> Iterator[None]:
    """TRL's head with its Triton kernels, which take nothing beside the tile, in place of its fallback."""
    if not order.tiled:
        yield
        return
    import trl.kernels.chunked_logprob as kernels

    def nothing(*_: Any, **__: Any) -> None:
        return None

    names = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    with patch.multiple(kernels, **dict.fromkeys(names, nothing)):
        yield


@contextmanager
def _mask(causal: Any, order: Order) -> Iterator[dict[str, Any]]:
    """The attention mask as it is made for a padded batch, or for one without padding: none.

    transformers looks at the values of a mask to know; those of a meta tensor it cannot see.
    """
    import torch

    found: dict[str, Any] = {}

    def make(*_: Any, **__: Any) -> Any:
        return torch.ones(found["shape"], dtype=torch.bool, device="meta") if order.padded else None

    with patch.object(sys.modules[type(causal).__module__], "create_causal_mask", make):
        yield found


def _narrowed(model: Any, adapter: Mapping[str, Any]) -> None:
    """Linear layers in 4 bits with an adapter as peft's Linear4bit runs it: each dequantised whole, twice a pass."""
    import torch
    from torch import nn

    class Dequantised(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, rows: int, columns: int) -> Any:
            ctx.shape = (rows, columns)
            return nn.functional.linear(x, x.new_empty(rows, columns))

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return torch.matmul(grad, grad.new_empty(*ctx.shape)), None, None

    class Narrow(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            rows, columns = linear.weight.shape
            self.shape, count, rank = (rows, columns), rows * columns, adapter["r"]
            self.weight = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
            self.scales = nn.Buffer(torch.empty(-(-count // 64), dtype=torch.uint8))  # of 64 weights
            self.outer = nn.Buffer(torch.empty(-(-count // (64 * 256))))  # of 256 scales
            self.code = nn.Buffer(torch.empty(16))
            half = {"bias": False, "dtype": torch.bfloat16}  # as TRL casts the adapter of a quantised model
            self.a, self.b = nn.Linear(columns, rank, **half), nn.Linear(rank, rows, **half)

        def forward(self, x: Any) -> Any:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            result = Dequantised.apply(x, *self.shape).clone()
            return result + self.b(self.a(x)) * 2.0

    for weight in model.parameters():
        weight.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in adapter["target_modules"]:
                setattr(module, name, Narrow(child))
