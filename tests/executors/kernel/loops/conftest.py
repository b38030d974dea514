"""Tiny random models, rows, and engines over them. Everything runs in float32 on one thread of a CPU."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tunesmith.executors.kernel.control import Control
from tunesmith.executors.kernel.loops import model as models
from tunesmith.executors.kernel.loops.engine import Engine
from tunesmith.executors.kernel.loops.sft import Sft
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.events import Kind, decode
from tunesmith.orchestrator.nouns import AdapterSpec, DataSource, JobSpec, ModelRef, TrainSpec

VOCABULARY = 97
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Tokens:
    """A tokenised row, as the data package makes them."""

    row: int
    ids: list[int]
    labels: list[int]


@pytest.fixture
def make_rows():
    """Rows of random tokens out of a few, so that there is something to learn; a third of each is not trained."""

    def make(count: int, seed: int = 0, low: int = 5, high: int = 24) -> list[Tokens]:
        draw = random.Random(seed)
        rows = []
        for number in range(count):
            ids = [draw.randrange(3, 19) for _ in range(draw.randint(low, high))]
            prompt = max(1, len(ids) // 3)
            rows.append(Tokens(number, ids, [-100] * prompt + ids[prompt:]))
        return rows

    return make


@pytest.fixture
def make_model():
    """A tiny random causal model of a family, always with the same weights."""

    def make(family: str = "llama", **more):
        from transformers import (
            LlamaConfig,
            LlamaForCausalLM,
            MistralConfig,
            MistralForCausalLM,
            Qwen3Config,
            Qwen3ForCausalLM,
        )

        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
        }
        kinds = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
        }
        config, kind = kinds[family]
        torch.manual_seed(7)
        return kind(config(**{**shape, **more}))

    return make


@pytest.fixture
def make_spec():
    """A resolved spec; keywords go to its train part, `adapter` to the adapter."""

    def make(adapter: dict | None = None, **train) -> JobSpec:
        base = {
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "max_length": 64,
            "effective_batch": 4,
            "micro_batch": 2,
            "packing": False,
            "dtype": "float32",
            "optimizer": "adamw",
            "activation_checkpointing": False,
            "save_steps": 1000,
            "eval_steps": 1000,
        }
        return JobSpec(
            model=ModelRef(id="tiny"),
            data=(DataSource(source="rows.jsonl"),),
            adapter=AdapterSpec(
                **{**{"kind": "lora", "rank": 4, "alpha": 8.0, "targets": ("all-linear",)}, **(adapter or {})}
            ),
            train=TrainSpec(**{**base, **train}),
        )

    return make


@pytest.fixture
def make_net(make_model):
    """A net over a tiny model; LoRA's B is filled, so that every gradient is different from zero."""

    def make(spec: JobSpec, family: str = "llama", **more) -> models.Net:
        model = make_model(family, **more)
        if spec.train.dtype == "bfloat16" and spec.adapter.kind != "none":
            model.to(torch.bfloat16)  # as `load` does
        net = models.ready(model, spec, CPU)
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, item in net.trainable():
                if "lora_B" in name:
                    item.copy_(torch.randn(item.shape, generator=draw) * 0.1)
        return net

    return make


@dataclass
class Bench:
    """An engine with the folder it writes to."""

    engine: Engine
    folder: Path
    reporter: Reporter

    def events(self, kind: Kind | None = None) -> list:
        lines = (self.folder / "events.jsonl").read_bytes().splitlines()
        return [event for event in map(decode, lines) if event is not None and kind in (None, event.kind)]

    def series(self, key: str) -> dict[int, float]:
        return {event.step: event.values[key] for event in self.events(Kind.METRIC) if key in event.values}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: item.detach().clone() for name, item in self.engine.net.trainable()}


@pytest.fixture
def make_bench(make_net, tmp_path):
    """An engine over a fresh tiny net."""
    open_reporters = []

    def make(
        spec: JobSpec, rows, *, held_out=(), name: str = "a", family: str = "llama", net=None, method=None, **more
    ) -> Bench:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        net = net or make_net(spec, family, **more)
        train = spec.train

        def sft(chosen):
            return Sft(
                net,
                chosen,
                micro_batch=train.micro_batch,
                max_length=train.max_length,
                packing=train.packing,
                pad_id=0,
            )

        reporter = Reporter(folder, 1)
        open_reporters.append(reporter)
        engine = Engine(
            net,
            method or sft(list(rows)),
            train,
            reporter=reporter,
            control=Control(folder / "control"),
            checkpoints=folder / "checkpoints",
            facts={"attempt": 1, "spec_hash": "0"},
            evaluation=sft(list(held_out)) if method is None else None,
        )
        return Bench(engine, folder, reporter)

    yield make
    for reporter in open_reporters:
        reporter.__exit__()


@pytest.fixture
def with_train():
    """A spec with other train values."""

    def change(spec: JobSpec, **train) -> JobSpec:
        return replace(spec, train=replace(spec.train, **train))

    return change


class Thirst:
    """A real shortage of memory on a machine that has enough: the model refuses what needs more than `limit`.

    What is raised is torch's own error, from inside the forward pass, as an allocator raises it. A batch of ids [B, T]
    needs its places, half as many where activations are computed twice; only passes of training are looked at, or
    only those without gradients. `once`: only the first is refused. `refused` lists what was.
    """

    def __init__(self, net, limit: float, *, training: bool = True, once: bool = False) -> None:
        self.net = net
        self.limit = limit
        self.training = training
        self.once = once
        self.refused: list[float] = []
        net.causal.get_input_embeddings().register_forward_pre_hook(self._look)

    def _look(self, module, args) -> None:
        if torch.is_grad_enabled() != self.training:
            return
        need = args[0].numel() / (2 if self.net.checkpointed else 1)
        if need > self.limit and not (self.once and self.refused):
            self.refused.append(need)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 8 GiB.")


@pytest.fixture
def thirst():
    """Makes a net thirsty: thirst(net, limit)."""
    return Thirst
