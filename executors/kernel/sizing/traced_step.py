"""A step of our own kernel on meta tensors. Imports torch and transformers: only a tracer's process imports this.

The step is that of `loops`: a packed batch (or a padded one) beside the gradients of the one before it, the loss in
chunks, gradients clipped, AdamW. The model is transformers' own, without weights; attention, the 4-bit base and the
optimizer are stood in for by what they allocate on CUDA.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tunesmith.executors.kernel.loops import attention, batches, loss, model, quantised
from tunesmith.executors.kernel.sizing import traced_tape as tapes
from tunesmith.executors.kernel.sizing.allocator import replay
from tunesmith.orchestrator.nouns import AdapterSpec, DataSource, JobSpec, ModelRef, TrainSpec

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WORKSPACE = 8_519_680  # cuBLAS takes it for each thread that multiplies


def load(request: Mapping[str, Any]) -> None:
    """Import what a trace needs, which takes seconds; transformers and torch fetch much of it when first called."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        _module(request, 1)  # which fails early where nobody knows the architecture
    for name in ("peft", "torch._dynamo"):
        importlib.import_module(name)


def steps(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A step for each of the depths that are asked for, and the seconds that each took."""
    found = []
    for layers in request["depths"]:
        begun = time.perf_counter()
        found.append(step(request, layers) | {"packed": request["packed"], "seconds": time.perf_counter() - begun})
    return found


def step(request: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Peaks by phase and reserved bytes of a step of the model with so many layers.

    `trace.trace` makes the request. Raises NotImplementedError where packed attention does not serve the model.
    """
    spec = _spec(request)
    tape = tapes.Tape()
    with ExitStack() as stack:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = model.ready(_module(request, layers), spec, tapes.META)
        if request["kind"] == "qlora":
            stack.enter_context(_narrow(net, HALF.get(request["dtype"], torch.float32)))
        stack.enter_context(patch.dict(loss.CHUNK_ELEMENTS, {"meta": loss.CHUNK_ELEMENTS["cuda"]}))
        stack.enter_context(patch.object(attention, "lowered", _lowered))
        stack.enter_context(patch.object(attention, "_per_document", _varlen))
        if not request["packed"]:
            stack.enter_context(_unmasked(net.causal))
        weights = [item for _, item in net.trainable()]
        stack.enter_context(tapes.cuda_like(tape))
        tape.hold(tapes.on_meta(net.outer))
        tape.phase = "optimizer"
        optimizer = tapes.AdamW(weights, eight_bit=request["optimizer"] == "adamw-8bit")
        optimizer.prepare()
        kept = [tape.take(WORKSPACE) for _ in range(2)]
        hooks = tapes.phases(_layers(net.causal), tape)
        tape.rewind()
        tape.phase = "forward"
        for item in weights:  # what the first micro-batch of a step leaves to the second
            item.grad = torch.empty_like(item)
        scored = _scored(net, _batch(request), request["head"])
        tape.phase = "head"
        scored.backward()  # type: ignore[no-untyped-call]
        del scored
        tape.phase = "optimizer"
        tapes.clipped(weights)
        optimizer.step()
        optimizer.zero_grad()
        for hook in hooks:
            hook.remove()
        del kept
    return {
        "layers": layers,
        "peaks": dict(tape.peaks),
        "reserved": replay(tape.events).reserved,
        "expandable": replay(tape.events, expandable=True).reserved,
    }


def _spec(request: Mapping[str, Any]) -> JobSpec:
    kind: Any = "lora" if request["kind"] == "qlora" else request["kind"]
    return JobSpec(
        model=ModelRef(id="traced/model"),
        data=(DataSource(source="none"),),
        method="reward" if request["head"] == "none" else "sft",
        adapter=AdapterSpec(kind=kind, rank=request["rank"], alpha=16.0, targets=tuple(request["targets"])),
        train=TrainSpec(dtype=request["dtype"], activation_checkpointing=request["checkpointing"]),
    )


def _module(request: Mapping[str, Any], layers: int) -> Any:
    """transformers' model of the config with fewer layers; no code but its own is ever run."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    given = dict(request["config"])
    shape = AutoConfig.for_model(given.pop("model_type"), **given)
    shape = shape.get_text_config()
    shape.num_hidden_layers = layers
    if getattr(shape, "layer_types", None):
        shape.layer_types = list(shape.layer_types)[:layers]
    shape.use_cache = False
    full = request["kind"] == "none"
    kind = AutoModelForCausalLM
    if request["head"] == "none":
        kind, shape.num_labels, shape.pad_token_id = AutoModelForSequenceClassification, 1, 0
    dtype = torch.float32 if full else HALF.get(request["dtype"], torch.float32)
    return kind.from_config(shape, dtype=dtype, trust_remote_code=False)


def _batch(request: Mapping[str, Any]) -> batches.Batch:
    """The fullest micro-batch: documents of the longest length, every token supervised."""
    tokens, longest = request["tokens"], min(request["longest"], request["tokens"])
    lengths = [longest] * (tokens // longest)
    if rest := tokens - sum(lengths):
        lengths.append(rest)
    rows = [
        SimpleNamespace(row=at, ids=[0] * (length + 1), labels=[0] * (length + 1)) for at, length in enumerate(lengths)
    ]
    laid = batches.packed(rows, tokens) if request["packed"] else batches.padded(rows, len(rows), 0)
    return laid[0].to(tapes.META)


def _scored(net: model.Net, batch: batches.Batch, head: str) -> Tensor:
    if head == "none":
        with net.amp():
            scores: Tensor = net.causal(**net.use(batch)).logits
        return scores.float().sum()
    if head == "logps":
        return net.token_logps(batch)[0].sum()
    return net.summed_loss(batch) / max(1, batch.weight)


def _layers(causal: Any) -> list[Any]:
    backbone = getattr(causal, causal.base_model_prefix)
    found = next((item for item in backbone.children() if isinstance(item, nn.ModuleList)), None)
    if found is None:
        raise NotImplementedError("the model's layers stand in no list")
    return list(found)


def _lowered(*items: Tensor) -> list[Tensor]:
    if not torch.is_autocast_enabled("meta"):
        return list(items)
    return [item.to(torch.get_autocast_dtype("meta")) for item in items]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Any, scale: float | None, window: int | None
) -> Tensor:
    """What one call of varlen_attn for all documents allocates: as dense attention, whatever the window."""
    return tapes.attention(query, key, value).transpose(1, 2)


@contextmanager
def _unmasked(causal: Any) -> Iterator[None]:
    """No masks for padded batches, which have padding on the right: transformers would look at values to know."""
    module = sys.modules[type(causal).__module__]
    names = [name for name in ("create_causal_mask", "create_sliding_window_causal_mask") if hasattr(module, name)]

    def none(*_: Any, **__: Any) -> None:
        return None

    stand_ins: dict[str, Any] = dict.fromkeys(names, none)
    with patch.multiple(module, **stand_ins):
        yield


class _Dequantised(torch.autograd.Function):
    """A frozen 4-bit layer without an adapter: its weight is read whole in each direction and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x @ quantised.read(weight, None).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ quantised.read(ctx.weight, None).to(grad.dtype), None


def _dequantised(packed: Any, x: Tensor) -> Tensor:
    y: Tensor = _Dequantised.apply(x, packed)  # type: ignore[no-untyped-call]
    return y


@contextmanager
def _narrow(net: model.Net, dtype: torch.dtype) -> Iterator[None]:
    """The linear layers but the head in 4 bits, as bitsandbytes holds them with doubly quantised scales."""
    for module in list(net.causal.modules()):
        if type(module) is nn.Linear and module is not net.head and not module.weight.requires_grad:
            rows, columns = module.weight.shape
            blocks = -(-rows * columns // quantised.BLOCK)
            packed: Any = nn.Parameter(
                torch.empty(rows * columns // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False
            )
            packed.quant_state = (rows, columns)
            module.weight = packed
            module.scales = nn.Buffer(torch.empty(blocks, dtype=torch.uint8, device="meta"))
            module.outer = nn.Buffer(torch.empty(-(-blocks // 256), device="meta"))
            layer: Any = module
            layer.forward = partial(_dequantised, packed)

    def read(packed: Any, _: Any) -> Tensor:
        rows, columns = packed.quant_state
        scales = packed.new_empty(-(-rows * columns // quantised.BLOCK), dtype=torch.float32)
        full: Tensor = packed.new_empty(rows, columns, dtype=dtype)
        del scales
        return full

    with patch.object(quantised, "read", read):
        yield
