"""What the training benchmarks share: one model, the same token ids for both sides, and steps taken strictly in turn.

Each side trains on a stack of its own and stands still between its optimizer steps; `take` lets one of them take one
step and gives its seconds. So all meet the same machine at the same moment, and nothing but steps is timed. They share
one thread: OpenMP keeps a team for every thread that computes, and with more threads than cores no team waits for its
next operation awake, which makes small operations up to twice as slow, unlike in anybody's real run.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
from greenlet import greenlet

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DATA = measure.ROOT.parent / "shared" / "data"
RANK, ALPHA, SEED = 16, 32, 7


class Side:
    """Something that trains a step at a time. `train(gate)` must call `gate()` before every step and after the last."""

    def __init__(self, name: str, train: Callable[[Callable[[], None]], None]) -> None:
        self.name = name
        self.seconds: list[float] = []
        self._ending = False
        self._course = greenlet(train)
        self._course.switch(self._gate)

    def take(self) -> float:
        """Let it take one step; the seconds that the step took."""
        begun = time.perf_counter()
        self._course.switch()
        self.seconds.append(time.perf_counter() - begun)
        return self.seconds[-1]

    def end(self) -> None:
        """Let it run to its end and forget what it held."""
        self._ending = True
        while not self._course.dead:
            self._course.switch()
        del self._course
        gc.collect()

    def _gate(self) -> None:
        if not self._ending:
            assert self._course.parent is not None
            self._course.parent.switch()


def take_turns(sides: Sequence[Side], steps: int) -> None:
    """Every side one step, in turn, `steps` times; the first step of each is a warm-up that does not count."""
    for step in range(steps):
        for side in sides:
            side.take()
            print(f"step {step + 1:2} of {steps}  {side.name:22} {side.seconds[-1]:8.2f} s", flush=True)
    for side in sides:
        side.seconds = side.seconds[1:]


def smollm2() -> tuple[Path, Any]:
    """The folder of SmolLM2-135M-Instruct and its tokenizer."""
    from transformers import AutoTokenizer

    from tunesmith.executors.kernel import weights
    from tunesmith.orchestrator.nouns import ModelRef

    home = Path(os.environ.get("TUNESMITH_HOME") or tempfile.gettempdir()) / "cache"
    folder = weights.locate(ModelRef(id="smollm2-135m"), home)
    return folder, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def spec_of(folder: Path, **changes: Any) -> Any:
    """A resolved spec for the kernel: LoRA r16 on all linear layers, float32 unless the CPU multiplies bfloat16."""
    from tunesmith.executors.kernel.sizing.defaults import cpu_prefers_bf16
    from tunesmith.orchestrator.nouns import AdapterSpec, DataSource, JobSpec, ModelRef, TrainSpec

    train = {
        "learning_rate": 2e-4,
        "scheduler": "constant",
        "warmup_steps": 0,
        "max_length": 1024,
        "effective_batch": 8,
        "micro_batch": 2,
        "packing": True,
        "dtype": "bfloat16" if cpu_prefers_bf16() else "float32",
        "optimizer": "adamw",
        "activation_checkpointing": False,
        "save_steps": 10_000,
        "eval_steps": 10_000,
        "seed": SEED,
        **changes.pop("train", {}),
    }
    return JobSpec(
        model=ModelRef(id=str(folder)),
        data=(DataSource(source="rows"),),
        adapter=AdapterSpec(kind="lora", rank=RANK, alpha=float(ALPHA), targets=("all-linear",)),
        train=TrainSpec(**train),
        **changes,
    )


def our_side(name: str, method_of: Callable[[Any], Any], spec: Any, folder: Path, kept: dict[str, Any]) -> Side:
    """Our engine over the rows of `method_of(net, reporter)`, in their order; what it logs goes into `kept[name]`."""
    import torch

    from tunesmith.executors.kernel.control import Control
    from tunesmith.executors.kernel.loops import model
    from tunesmith.executors.kernel.loops.engine import Engine
    from tunesmith.executors.kernel.reporter import Reporter

    def train(gate: Callable[[], None]) -> None:
        with tempfile.TemporaryDirectory() as place, Reporter(Path(place), 1) as reporter:
            net = model.load(folder, spec, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            method = method_of(net, reporter)
            engine = Engine(
                net,
                method,
                spec.train,
                reporter=reporter,
                control=Control(Path(place) / "control"),
                checkpoints=Path(place) / "checkpoints",
                facts={"attempt": 1, "spec_hash": "0"},
            )
            size = int(spec.train.effective_batch)
            engine.sampler.step = lambda step: [at % len(method.rows) for at in range(step * size, (step + 1) * size)]
            step = engine._step

            def timed() -> None:
                gate()
                step()

            engine._step = timed
            reporter.listeners.append(lambda event: kept.setdefault(name, []).append(event))
            engine.run()
            kept[f"{name} net"] = net
            gate()

    return Side(name, train)


def trl_side(name: str, make: Callable[[Any], Any], kept: dict[str, Any]) -> Side:
    """One of TRL's trainers, made by `make(callback)`; its logs go into `kept[name]`."""
    from transformers import TrainerCallback

    def train(gate: Callable[[], None]) -> None:
        class Turns(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                gate()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
                kept.setdefault(name, []).append(dict(logs))

        trainer = make(Turns())
        trainer.train()
        kept[f"{name} model"] = trainer.model
        gate()

    return Side(name, train)


def common(folder: Path, steps: int, place: str) -> dict[str, Any]:
    """Settings that both of TRL's variants share: the same steps, rate and schedule as ours, and no files."""
    import torch

    return {
        "output_dir": place,
        "use_cpu": not torch.cuda.is_available(),
        "max_steps": steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


def faster_type() -> str:
    """Which of float32 and bfloat16 multiplies matrices of the model's shapes faster here, forward and backward."""
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    took = dict.fromkeys(("float32", "bfloat16"), float("inf"))
    for name in [*took] * 40:  # in turn, and often: the least of few is no measure on a machine that is not quiet
        dtype = getattr(torch, name)
        x = torch.randn(512, 576, device=place, dtype=dtype, requires_grad=True)
        w = torch.randn(1536, 576, device=place, dtype=dtype)
        begun = time.perf_counter()
        float((x @ w.t()).sum().backward() or 0)
        float(x.grad.float().sum())  # type: ignore[union-attr]
        took[name] = min(took[name], time.perf_counter() - begun)
    print("a product takes " + ", ".join(f"{took[name] * 1e3:.2f} ms in {name}" for name in took), flush=True)
    return min(took, key=lambda name: took[name])


def lora() -> Any:
    """The adapter that both train."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def device() -> str:
    """What it ran on, in words."""
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else measure.machine()


def quiet() -> None:
    """Keep the libraries' progress and warnings out of the output."""
    import logging
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
