"""Live bytes of our own training on a CPU: foretold by the planner's forms, and counted as torch gives them out.

Each cell is a job in a process of its own: the real engine takes two optimizer steps (and evaluates, and writes answers
where the method does) on random weights, since only shapes matter. Counted is the most that c10's allocator had given
out at a time, from the profiler's [memory] events, on top of the weights that were there before; what oneDNN holds
packed is outside that allocator and added by the kernel's own figure. Foretold is `sizing.size.live` of the cell's
shape alone. Counts are kept under results/, and made anew when the kernel, torch or the cell has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure as common

KEPT = common.RESULTS / "memory_cpu.jsonl"
STEPS, EFFECTIVE = 2, 4
AT_ONCE = 2  # processes, of one thread each
MIB = 2**20

_SMALL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "head_dim": 32, "vocab_size": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama": {
        **_SMALL, "model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 704,
        "tie_word_embeddings": False,
    },
    "qwen3": {
        **_SMALL, "model_type": "qwen3", "num_key_value_heads": 4, "intermediate_size": 768,
        "tie_word_embeddings": True,
    },
    "mistral": {
        **_SMALL, "model_type": "mistral", "num_key_value_heads": 2, "intermediate_size": 640, "sliding_window": 64,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One configuration. Rows are alike: `length` tokens, the last `answer` of them supervised or written."""

    model: str
    method: str
    kind: str
    dtype: str
    checkpointing: bool
    packing: bool
    length: int
    answer: int
    micro: int = 2
    rank: int = 8
    count: int = 4  # answers to a prompt, for GRPO
    iterations: int = 1

    @property
    def sides(self) -> int:
        """Answers to a prompt."""
        return {"sft": 1, "dpo": 2, "grpo": self.count}[self.method]

    @property
    def name(self) -> str:
        """All that it is, as one word."""
        flags = ("ckpt" if self.checkpointing else "plain", "packed" if self.packing else "padded")
        sizes = f"{self.length}/{self.answer}x{self.micro}"
        return "-".join((self.model, self.method, self.kind, self.dtype, *flags, sizes))


def cells() -> list[Cell]:
    """All cells: every method with and without an adapter, checkpointing, padding, either type, over four models."""
    shapes = {  # rows: length, answer; the short ones for the 135M model
        ("smollm2", "sft"): (192, 96), ("smollm2", "dpo"): (128, 48), ("smollm2", "grpo"): (80, 24),
        ("small", "sft"): (384, 128), ("small", "dpo"): (256, 96), ("small", "grpo"): (160, 48),
    }  # fmt: skip
    grid = [
        ("smollm2", "sft", "lora", "float32", False, True), ("smollm2", "sft", "lora", "bfloat16", True, True),
        ("smollm2", "sft", "none", "float32", False, True), ("smollm2", "sft", "none", "bfloat16", True, False),
        ("smollm2", "dpo", "lora", "float32", False, True), ("smollm2", "dpo", "none", "float32", True, True),
        ("smollm2", "grpo", "lora", "float32", False, True), ("smollm2", "grpo", "none", "float32", False, True),
        ("llama", "sft", "lora", "float32", False, False), ("llama", "sft", "lora", "bfloat16", False, True),
        ("llama", "sft", "none", "float32", True, True), ("llama", "dpo", "lora", "bfloat16", True, True),
        ("llama", "dpo", "none", "bfloat16", False, False), ("llama", "grpo", "lora", "bfloat16", False, True),
        ("llama", "grpo", "none", "float32", True, False), ("llama", "grpo", "lora", "float32", True, True),
        ("qwen3", "sft", "lora", "bfloat16", False, False), ("qwen3", "sft", "none", "bfloat16", False, True),
        ("qwen3", "sft", "lora", "float32", True, True), ("qwen3", "dpo", "lora", "float32", False, False),
        ("qwen3", "dpo", "none", "float32", False, True), ("qwen3", "grpo", "lora", "float32", False, False),
        ("qwen3", "grpo", "none", "bfloat16", False, True), ("mistral", "sft", "lora", "float32", False, True),
        ("mistral", "sft", "none", "float32", False, False), ("mistral", "sft", "lora", "bfloat16", True, False),
        ("mistral", "dpo", "lora", "float32", False, True), ("mistral", "grpo", "lora", "float32", False, True),
    ]  # fmt: skip
    found = []
    for model, method, kind, dtype, checkpointing, packing in grid:
        length, answer = shapes["smollm2" if model == "smollm2" else "small", method]
        found.append(
            Cell(
                model=model, method=method, kind=kind, dtype=dtype, checkpointing=checkpointing, packing=packing,
                length=length, answer=answer,
            )
        )  # fmt: skip
    return found


# --- foretold -----------------------------------------------------------------------------------------------------


def facts_of(cell: Cell) -> Any:
    """The shape, as planning reads it from a config.json."""
    from tunesmith.executors.kernel.catalogue import from_config

    config = {**MODELS[cell.model], "max_position_embeddings": 4096, "architectures": ["LlamaForCausalLM"]}
    return from_config("bench/mine", {"hidden_act": "silu", "rms_norm_eps": 1e-6, **config})


def layout_of(cell: Cell) -> Any:
    """What is held, from the cell's numbers alone."""
    from tunesmith.executors.kernel.sizing.size import Layout

    facts = facts_of(cell)
    prompt, answer, sides = cell.length - cell.answer, cell.answer, cell.sides
    forked = cell.packing and cell.method != "sft"
    if cell.method == "sft":
        row, budget = cell.length - 1, cell.micro * cell.length
    elif cell.method == "dpo":
        row, budget = prompt + 2 * (answer - 1), 2 * cell.micro * cell.length
    else:
        row, budget = prompt + sides * (answer - 1), cell.micro * (cell.length + (sides - 1) * answer)
    rows = min(EFFECTIVE, budget // row) if cell.packing else cell.micro
    tokens = rows * row if cell.packing or cell.method == "sft" else rows * sides * cell.length
    grpo = cell.method == "grpo"
    return Layout(
        facts=facts, kind=cell.kind, rank=cell.rank, targets=tuple(facts.linears), dtype=cell.dtype, tokens=tokens,
        longest=row if cell.method == "sft" else cell.length, checkpointing=cell.checkpointing,
        head="loss" if cell.method == "sft" else "logps", scored=rows * sides * answer, packed=cell.packing,
        branched=rows * sides * (answer - 1) if forked else 0, looked=rows * sides * prompt if forked else 0,
        trees=rows, answer=answer - 1 if forked else 0, ahead=EFFECTIVE - rows, alone=rows >= EFFECTIVE,
        window=MODELS[cell.model].get("sliding_window", 0), slots=EFFECTIVE * cell.count if grpo else 0,
        cached=_cached(cell) if grpo else 0, copied=grpo, asked=not grpo,
    )  # fmt: skip


def _cached(cell: Cell) -> int:
    from tunesmith.executors.kernel.sizing.rows import Rows
    from tunesmith.orchestrator.nouns import DataSource, GrpoSpec, JobSpec, ModelRef

    grpo = GrpoSpec(num_generations=cell.count, max_completion=cell.answer)
    spec = JobSpec(model=ModelRef(id="bench/mine"), data=(DataSource(source="rows"),), method="grpo", grpo=grpo)
    rows = Rows(spec=spec, length=cell.length, packing=cell.packing, share=0.5)
    return rows.cached(EFFECTIVE, "cpu", cell.dtype)


def foretold(cell: Cell) -> dict[str, int]:
    """Live bytes by what they are."""
    from tunesmith.executors.kernel.sizing import size

    return size.live(layout_of(cell))


# --- counted ------------------------------------------------------------------------------------------------------


def net_of(cell: Cell) -> tuple[Any, Any]:
    """The spec, and a model of random weights made ready as the kernel does it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunesmith.executors.kernel.loops import model as loop
    from tunesmith.orchestrator.nouns import AdapterSpec, DataSource, DpoSpec, GrpoSpec, JobSpec, ModelRef, TrainSpec

    torch.manual_seed(0)
    values = dict(MODELS[cell.model])
    config = AutoConfig.for_model(values.pop("model_type"), **values, max_position_embeddings=4096, pad_token_id=0)
    full = cell.kind == "none"
    half = cell.dtype == "bfloat16" and not full
    module = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16 if half else torch.float32, trust_remote_code=False
    )
    spec = JobSpec(
        model=ModelRef(id="bench/mine"),
        data=(DataSource(source="rows"),),
        method=cell.method,
        adapter=AdapterSpec(kind=cell.kind, rank=cell.rank, alpha=16.0, targets=tuple(facts_of(cell).linears)),
        train=TrainSpec(
            dtype=cell.dtype, activation_checkpointing=cell.checkpointing, packing=cell.packing,
            effective_batch=EFFECTIVE, micro_batch=cell.micro, max_length=cell.length, max_steps=STEPS,
            learning_rate=1e-5, warmup_steps=0, save_steps=10_000, eval_steps=10_000, optimizer="adamw",
        ),
        dpo=DpoSpec(),
        grpo=GrpoSpec(num_generations=cell.count, max_completion=cell.answer, num_iterations=cell.iterations),
    )  # fmt: skip
    return spec, loop.ready(module, spec, torch.device("cpu"))


class Scorer:
    """A reward that no two answers share, so that all of them teach."""

    names = ("noise",)

    def score(self, prompts: Any, completions: Any, completion_ids: Any, columns: Any, step: int) -> Any:
        """One value for each completion."""
        from tunesmith.executors.kernel.rewards import Scores

        values = [
            hashlib.blake2b(repr((at, ids)).encode(), digest_size=2).digest()[0] / 255
            for at, ids in enumerate(completion_ids)
        ]
        return Scores([[value] for value in values], values, {})


def method_of(cell: Cell, spec: Any, net: Any, reporter: Any) -> Any:
    """The method over rows of the cell's lengths."""
    import torch

    from tunesmith.executors.kernel import data
    from tunesmith.executors.kernel.loops.dpo import Dpo
    from tunesmith.executors.kernel.loops.forks import Tree
    from tunesmith.executors.kernel.loops.grpo import Grpo, Judge
    from tunesmith.executors.kernel.loops.rollout import Rollout
    from tunesmith.executors.kernel.loops.sft import Sft

    draw, words, prompt = torch.Generator().manual_seed(1), MODELS[cell.model]["vocab_size"], cell.length - cell.answer

    def ids(count: int) -> list[int]:
        return torch.randint(words, (count,), generator=draw).tolist()

    layout = {"micro_batch": cell.micro, "max_length": cell.length, "packing": cell.packing, "pad_id": 0}
    numbers = range(EFFECTIVE * STEPS)
    if cell.method == "sft":
        rows = [(at, ids(cell.length)) for at in numbers]
        encoded = [data.Encoded(at, row, [-100] * prompt + row[prompt:]) for at, row in rows]
        return Sft(net, encoded, **layout)
    if cell.method == "dpo":
        trees = [Tree(at, ids(prompt), (ids(cell.answer), ids(cell.answer))) for at in numbers]
        return Dpo(net, trees, spec.dpo, **layout)
    rollout = Rollout(net, stops=frozenset(), max_completion=cell.answer, temperature=1.0, slots=EFFECTIVE * cell.count)
    if rollout.problems:
        raise RuntimeError("; ".join(rollout.problems))
    prompts = [data.Prompt(at, ids(prompt), "asked", {}) for at in numbers]
    return Grpo(
        net, prompts, spec.grpo, rollout=rollout, judge=Judge(lambda found: " ".join(map(str, found)), Scorer()),
        reporter=reporter, seed=0, **layout,
    )  # fmt: skip


def job(cell: Cell, place: Path, profiled: Any) -> int:
    """Run a cell under `profiled`, a context; the bytes of the weights, which were there before."""
    import torch

    from tunesmith.executors.kernel.control import Control
    from tunesmith.executors.kernel.loops.engine import Engine
    from tunesmith.executors.kernel.loops.methods import foresee
    from tunesmith.executors.kernel.reporter import Reporter

    torch.set_num_threads(1)
    spec, net = net_of(cell)
    tensors = [*net.outer.parameters(), *net.outer.buffers()]
    before = sum({item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}.values())
    with Reporter(place, 1) as reporter, profiled:
        method = method_of(cell, spec, net, reporter)
        facts = {"attempt": 1, "spec_hash": "0"}
        engine = Engine(
            net, method, spec.train, reporter=reporter, control=Control(place / "control"),
            checkpoints=place / "checkpoints", facts=facts, evaluation=method if cell.method != "grpo" else None,
        )  # fmt: skip
        if cell.method == "dpo" and cell.kind == "none":
            list(foresee(method, [range(len(method.rows))]))
        engine.run()
    return before


def counted(cell: Cell) -> dict[str, int]:
    """The most live bytes of a cell, in this process."""
    from torch.profiler import ProfilerActivity, profile

    seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with tempfile.TemporaryDirectory() as place:
        before = job(cell, Path(place), seen)
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return {"bytes": before + most, "weights": before}


def apart(cell: Cell) -> dict[str, int]:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--count", json.dumps(asdict(cell))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{cell.name}: {done.stderr.strip()[-2000:]}")
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def stamp(cell: Cell) -> str:
    """What a count depends on: the cell, the kernel's code and the libraries."""
    sha = hashlib.sha256(json.dumps([asdict(cell), MODELS[cell.model], STEPS, EFFECTIVE]).encode())
    code = importlib.util.find_spec("tunesmith.executors.kernel.loops")
    assert code is not None
    assert code.origin is not None
    for path in sorted(Path(code.origin).parent.glob("*.py")):
        sha.update(path.read_bytes())
    sha.update(json.dumps(common.versions("torch", "transformers", "peft")).encode())
    return sha.hexdigest()[:16]


def _known() -> dict[str, dict[str, int]]:
    if not KEPT.exists():
        return {}
    lines = (json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines())
    return {line["stamp"]: line["counted"] for line in lines}


def measure(chosen: Sequence[Cell] | None = None, *, again: bool = False) -> dict[str, Any]:
    """Count and foretell; prints a line for each cell. Errors in percent of what was counted."""
    known: Mapping[str, dict[str, int]] = {} if again else _known()
    errors = []
    every = cells() if chosen is None else list(chosen)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for cell, found in zip(every, pool.map(lambda cell: known.get(stamp(cell)) or apart(cell), every), strict=True):
            if stamp(cell) not in known:
                _keep(cell, found)
            parts = foretold(cell)
            said = sum(parts.values())
            errors.append(100 * (said / found["bytes"] - 1))
            told = " ".join(f"{name} {value / MIB:.1f}" for name, value in parts.items() if value)
            print(
                f"{cell.name:54} {found['bytes'] / MIB:8.1f} MiB, foretold {said / MIB:8.1f}"
                f"  {errors[-1]:+6.2f} %   {told}",
                flush=True,
            )
    sizes = [abs(error) for error in errors]
    return {
        "mean_abs_error_percent": round(sum(sizes) / len(sizes), 3),
        "max_abs_error_percent": round(max(sizes), 3),
        "cells": len(sizes),
    }


def _keep(cell: Cell, found: dict[str, int]) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    with KEPT.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stamp": stamp(cell), "cell": cell.name, "counted": found}) + "\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="count anew what is known")
    parser.add_argument("--only", default="", help="only cells whose name has this in it")
    parser.add_argument("--count", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.count:
        print(json.dumps(counted(Cell(**json.loads(asked.count)))))
        return
    chosen = [cell for cell in cells() if asked.only in cell.name]
    common.close("memory_cpu", measure(chosen, again=asked.again), "torch", "transformers", "peft")


if __name__ == "__main__":
    main()
