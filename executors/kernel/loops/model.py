"""The model in training: loaded, adapted, and asked for its loss on a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.executors.kernel import catalogue
from tunesmith.executors.kernel.loops import adapter, attention, loss, quantised
from tunesmith.executors.kernel.loops.batches import Batch
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import JobSpec

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Net:
    """A causal language model with what is trained of it.

    outer   what is saved: the PeftModel, or the model itself
    causal  the ...ForCausalLM with its head, adapters inside
    An adapter trains in float32 on a frozen base of the asked type. Full weights train in float32 under autocast.
    `checkpointed` says whether activations are computed twice instead of being kept.
    `packed`, `forked` and `chunked` say whether batches may be packed, whether prompts may be shared, and whether the
    head is scored in chunks; the self-test in `selftest.py` takes them back where the model computes something else.
    """

    def __init__(self, outer: Any, *, adapted: bool, device: torch.device, autocast: torch.dtype | None = None) -> None:
        self.outer = outer
        self.adapted = adapted
        self.causal: Any = outer.get_base_model() if adapted else outer
        self.device = device
        self.autocast = autocast
        self.head: Any = self.causal.get_output_embeddings()
        self.checkpointed = False
        self.packed = True
        self.forked = True
        self.chunked = loss.plain_head(self.head)
        self._usual_attention = self.causal.config._attn_implementation

    def checkpoint(self) -> None:
        """Keep each layer's input only, and compute the rest again in the backward pass. ValueError where it cannot."""
        how = {"use_reentrant": False}
        if hasattr(self.causal, "activation_checkpointing_enable"):
            self.causal.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        else:  # transformers before 5.20
            self.causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        self.checkpointed = True

    @property
    def exact(self) -> bool:
        """Whether all of it is computed in float32."""
        floats = (item for item in self.causal.parameters() if item.is_floating_point())
        return self.autocast is None and all(item.dtype == torch.float32 for item in floats)

    def amp(self) -> AbstractContextManager[Any]:
        """Autocast where the weights are float32 and the work is not."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)

    def use(self, batch: Batch) -> dict[str, Any]:
        """The model's inputs for a batch, its attention set to the batch's layout."""
        wanted = self._usual_attention if batch.documents is None else attention.NAME
        if self.causal.config._attn_implementation != wanted:
            self.causal.set_attn_implementation(wanted)
        inputs: dict[str, Any] = {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False}
        if batch.documents is not None:
            inputs |= {"documents": batch.documents, "bounds": batch.bounds, "forks": batch.forks}
        return inputs

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states that predict the supervised tokens, [n, H]."""
        backbone = getattr(self.causal, self.causal.base_model_prefix)
        states: Tensor = backbone(**self.use(batch)).last_hidden_state
        return states.reshape(-1, states.shape[-1]).index_select(0, batch.picks)

    def logits(self, batch: Batch) -> Tensor:
        """The model's own logits for the supervised tokens, [n, V]: its forward, its head fed those states only."""

        def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].reshape(-1, args[0].shape[-1]).index_select(0, batch.picks), *args[1:])

        hook = self.head.register_forward_pre_hook(gather)
        try:
            logits: Tensor = self.causal(**self.use(batch)).logits
        finally:
            hook.remove()
        return logits.reshape(-1, logits.shape[-1])

    def summed_loss(self, batch: Batch) -> Tensor:
        """Summed cross-entropy over the batch's supervised tokens, float32."""
        with self.amp():
            if self.chunked:
                return loss.chunked_loss(self.hidden(batch), self.head.weight, batch.targets)
            return loss.plain_loss(self.logits(batch), batch.targets)

    def token_logps(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the batch's targets and entropies at their places, float32 [n] each."""
        with self.amp():
            if self.chunked:
                return loss.chunked_logps(self.hidden(batch), self.head.weight, batch.targets, temperature)
            return loss.plain_logps(self.logits(batch), batch.targets, temperature)

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """The model without its adapter and without gradients: the reference that an adapter is compared with."""
        with torch.no_grad(), self.outer.disable_adapter():
            yield

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by name, in the model's order; a tied weight comes once."""
        return ((name, item) for name, item in self.outer.named_parameters() if item.requires_grad)

    def finite(self) -> bool:
        """Whether every trained weight is a number. Waits for the device."""
        norms = torch._foreach_norm([item.detach() for _, item in self.trainable()], torch.inf)
        return bool(torch.isfinite(torch.stack(norms)).all())

    def save(self, folder: Path) -> None:
        """Write the adapter as peft does, or the whole model as transformers does."""
        if self.adapted:
            adapter.save(self.outer, folder)
        else:
            self.causal.set_attn_implementation(self._usual_attention)
            self.outer.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, bit for bit. InputError where it belongs to another model."""
        if self.adapted:
            adapter.load(self.outer, folder)
            return
        from safetensors.torch import load_file

        own = dict(self.outer.named_parameters())
        seen = set()
        with torch.no_grad():
            for file in sorted(folder.glob("model*.safetensors")):
                for name, tensor in load_file(str(file)).items():
                    if name in own and own[name].shape == tensor.shape:
                        own[name].copy_(tensor)
                        seen.add(name)
        if seen != set(own):
            raise InputError(
                "The checkpoint holds another model than the one asked for.",
                code="checkpoint.other_task",
                where=str(folder),
                fix="Keep the model as it was, or start a new job.",
            )


def load(folder: Path, spec: JobSpec, device: torch.device) -> Net:
    """The model in `folder`, adapted and frozen as the spec says, on the device.

    For the method reward it scores a text instead of continuing it: a new head with one output stands in for its own.
    `folder` holds config.json and safetensors; no code of the model's is ever run. Raises InputError for what
    transformers cannot load and for a type the device cannot train in.
    """
    train = spec.train
    half = HALF.get(str(train.dtype))
    if half is torch.float16 and device.type == "cpu":
        raise InputError(
            "float16 cannot be trained on a CPU.",
            code="train.dtype",
            where="train.dtype",
            fix="Set bfloat16 or float32.",
        )
    if spec.method == "reward":
        torch.manual_seed(train.seed)  # the new head's first values
    dtype = torch.float32 if spec.adapter.kind == "none" or half is None else half
    narrow = device if spec.adapter.kind == "qlora" else None
    return ready(read(folder, spec.model.id, dtype, scores=spec.method == "reward", narrow=narrow), spec, device)


def read(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    *,
    scores: bool = False,
    where: str = "model.id",
    narrow: torch.device | None = None,
) -> Any:
    """transformers' model of a folder, on the CPU: causal, or with a head of one output where it `scores`.

    `name` is what the user called it, at `where` in the spec. With `narrow` its linear layers are held in 4 bits, and
    all of it on that device. Raises InputError (model.unloadable, adapter.qlora).
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    attention.register()
    more: dict[str, Any] = {"num_labels": 1} if scores else {}
    if narrow is not None:
        more |= quantised.reading(folder, dtype, narrow)
    verbosity = logging.get_verbosity()
    if scores:
        logging.set_verbosity_error()  # it would report the missing head, which is meant to be new
    try:
        model, info = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_pretrained(
            str(folder),
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    except Exception as error:  # a strangers' config and weights: transformers and safetensors may raise anything
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise
        raise _unloadable(name, where, _first_line(error)) from error
    finally:
        logging.set_verbosity(verbosity)
    absent = sorted({*map(str, info["missing_keys"]), *(str(item[0]) for item in info["mismatched_keys"])})
    absent = [each for each in absent if not (scores and each.startswith(f"{adapter.SCORE}."))]
    if absent:  # transformers would train them from random values
        why = f"{len(absent):,} of its weights are missing or of another shape, such as {absent[0]}."
        raise _unloadable(name, where, why)
    return model


def ready(model: Any, spec: JobSpec, device: torch.device) -> Net:
    """A loaded model with adapter, frozen weights, activation checkpointing and device as the spec says.

    The model's own dropout is turned off: it would keep attention from being packed, and make what DPO and GRPO compare
    noisy. An adapter's is the user's to ask for.
    """
    attention.register()
    _without_dropout(model)
    train = spec.train
    full = spec.adapter.kind == "none"
    half = HALF.get(str(train.dtype))
    scores = spec.method == "reward"
    fused = False
    if full:
        outer = model
        outer.requires_grad_(True)
    else:
        known = catalogue.find(spec.model.id)
        base_id = known.id if known else spec.model.id
        if spec.adapter.kind == "qlora":
            quantised.quantise(model, half or torch.float32, device)
        outer = adapter.attach(model, spec.adapter, train.seed, base_id, scores=scores)
        fused = adapter.fuse(outer) > 0
    outer.to(device)
    outer.train()
    net = Net(outer, adapted=not full, device=device, autocast=None if fused and not scores else half)
    if train.activation_checkpointing is True:
        net.checkpoint()
    return net


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _unloadable(name: str, where: str, why: str) -> InputError:
    return InputError(
        f"The model {name!r} cannot be loaded.",
        code="model.unloadable",
        why=why,
        where=where,
        fix="Use a causal language model in safetensors whose architecture transformers knows.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
