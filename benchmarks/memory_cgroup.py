"""Whether a plan's choice trains within a limit that the kernel of the operating system enforces: a memory cgroup.

Random jobs are planned for a CPU with a random limit of memory, between what the smallest step and the fastest one are
said to need, and what is chosen runs in a cgroup (v1 or v2) of that limit: it must not be killed. Where the plan says
that memory kept the micro-batch from being larger, the next larger one runs in the same cgroup, and should be killed.
Needs the right to make a cgroup (root, or a delegated folder in TUNESMITH_CGROUP).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

GIB = 2**30
V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
STEPS = 2
# Small random models: type, hidden, intermediate, layers, heads, heads of keys.
SHAPES: dict[str, tuple[str, int, int, int, int, int]] = {
    "llama-6x512": ("llama", 512, 1408, 6, 8, 4),
    "qwen3-10x384": ("qwen3", 384, 1024, 10, 6, 2),
    "mistral-4x768": ("mistral", 768, 2048, 4, 12, 4),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One random job: what it trains and on what. `share` places its memory between the least and the most of use."""

    number: int
    model: str
    method: str
    adapter: str
    length: int
    effective: int
    share: float

    @property
    def name(self) -> str:
        what = f"{self.number:2} {self.model:13} {self.method:4} {self.adapter:4}"
        return f"{what} {self.length:5} tokens x {self.effective:2}"


class Cgroup:
    """A memory cgroup of its own, without swap; a process is put into it before it becomes the job."""

    def __init__(self) -> None:
        given = os.environ.get("TUNESMITH_CGROUP")
        self.second = (V2 / "cgroup.controllers").exists()
        parent = Path(given) if given else (V2 if self.second else V1)
        self.folder = parent / f"tunesmith-{os.getpid()}"

    def __enter__(self) -> Cgroup:
        self.folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.rmdir()

    def run(self, command: list[str], limit: int, log: Path, **more: Any) -> tuple[int, bool]:
        """(exit code, whether the limit killed something)."""
        names = ("memory.max", "memory.swap.max") if self.second else ("memory.limit_in_bytes", None)
        (self.folder / names[0]).write_text(str(limit))
        if names[1]:
            with contextlib.suppress(OSError):
                (self.folder / names[1]).write_text("0")
        before = self._killed()
        entered = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        with log.open("wb") as out:
            code = subprocess.run(["sh", "-c", entered, "sh", *command], stdout=out, stderr=out, check=False, **more)
        return code.returncode, self._killed() > before

    def most(self) -> int:
        """The most bytes that were charged since the last call, page cache included."""
        path = self.folder / ("memory.peak" if self.second else "memory.max_usage_in_bytes")
        try:
            most = int(path.read_text())
            if not self.second:
                path.write_text("0")
        except OSError:
            return 0
        return most

    def _killed(self) -> int:
        text = (self.folder / ("memory.events" if self.second else "memory.oom_control")).read_text()
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)


def model_folder(name: str, place: Path) -> Path:
    """SmolLM2-135M, or a small random model that shares its tokenizer."""
    import sides

    real, tokenizer = sides.smollm2()
    if name not in SHAPES:
        return real
    folder = place / name
    if not folder.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        model_type, hidden, intermediate, layers, heads, narrow = SHAPES[name]
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            model_type, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=narrow, head_dim=64, vocab_size=len(tokenizer),
            tie_word_embeddings=True, max_position_embeddings=8192, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            **({"sliding_window": 256} if model_type == "mistral" else {}),
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def rows(job: Job, path: Path, tokenizer: Any) -> None:
    """Rows of which most are nearly as long as a row may be."""
    draw = random.Random(job.number)
    words = [
        word for line in (measure.ROOT / "README.md").read_text(encoding="utf-8").splitlines() for word in line.split()
    ]

    def text(tokens: int) -> str:
        chosen = " ".join(draw.choice(words) for _ in range(tokens))
        return str(tokenizer.decode(tokenizer(chosen)["input_ids"][:tokens]))

    lines: list[dict[str, Any]] = []
    for _ in range(3 * job.effective + 4):
        whole = draw.randint(int(0.6 * job.length), job.length - 48)
        half = whole // 2
        prompt = text(half)
        if job.method == "sft":
            lines.append({"prompt": prompt, "completion": text(whole - half)})
        elif job.method == "dpo":
            lines.append(
                {"prompt": prompt, "chosen": text(whole - half), "rejected": text(draw.randint(8, whole - half))}
            )
        else:
            lines.append({"prompt": prompt, "answer": str(draw.randint(1, 9))})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def document(job: Job, model: Path, data: Path) -> dict[str, Any]:
    """The spec that a person would write, with what memory decides left to the planner."""
    spec: dict[str, Any] = {
        "method": job.method,
        "model": {"id": str(model)},
        "data": [{"source": str(data)}],
        "eval": {"fraction": 0},
        "adapter": {"kind": job.adapter},
        "train": {"max_steps": STEPS, "effective_batch": job.effective, "max_length": job.length},
    }
    if job.method == "grpo":
        spec["grpo"] = {"num_generations": 4, "max_completion": job.length // 4, "rewards": ["length:200 characters"]}
    return spec


def planned(spec: dict[str, Any], limit: int, home: Path) -> Any:
    """The stage of the plan for this machine's CPU with so much memory."""
    from tunesmith.executors.local import device
    from tunesmith.graph import planning
    from tunesmith.orchestrator.nouns import Request

    (cpu,) = [item for item in device.devices() if item.kind == "cpu"]
    small = replace(cpu, memory_bytes=limit)
    plan = planning.plan(Request(spec=spec, cwd=str(home)), devices=lambda _: [small], cache=home / "cache")
    assert plan.stages, plan.findings
    return plan.stages[0]


def limit_of(job: Job, spec: dict[str, Any], home: Path) -> int:
    """Bytes between those that a plan asks for with one row at a time, checkpointed, and with all that is fast."""
    from tunesmith.executors.kernel.sizing.size import SAFE_SHARE

    least = {**spec, "train": {**spec["train"], "micro_batch": 1, "activation_checkpointing": True}}
    low, high = (planned(some, 64 * GIB, home).size.peak_bytes.high for some in (least, spec))
    return int((low + job.share * (max(low, high) - low)) / SAFE_SHARE["cpu"]) + 1


def trained(spec: Any, stage: Any, job: str, limit: int, group: Cgroup, home: Path) -> tuple[bool, bool, int]:
    """(whether it ran to its end, whether the limit killed it, the most bytes charged to it)."""
    from tunesmith.orchestrator.nouns import Attempt
    from tunesmith.orchestrator.plain import plain

    folder = home / "jobs" / job / "attempts" / "1"
    folder.mkdir(parents=True)
    attempt = Attempt(job=job, number=1, spec=spec, plan_hash="p", reward_hashes=stage.reward_hashes)
    (folder / "attempt.json").write_text(json.dumps(plain(attempt)), encoding="utf-8")
    env = {**os.environ, "TUNESMITH_HOME": str(home)}
    group.most()
    command = [sys.executable, "-P", "-m", "tunesmith.executors.kernel", str(folder)]
    code, killed = group.run(command, limit, folder / "log", env=env, cwd=home)
    most = group.most()
    if code and not killed:
        print((folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
    shutil.rmtree(folder)
    return code == 0, killed, most


def drawn(seed: int) -> Iterator[Job]:
    """Random jobs without end."""
    draw = random.Random(seed)
    number = 0
    while True:
        number += 1
        method = draw.choice(["sft", "sft", "dpo", "grpo"])
        yield Job(
            number,
            draw.choice(["smollm2-135m", *SHAPES]),
            method,
            draw.choice(["lora", "lora", "none"]),
            draw.choice([256, 384, 512, 768, 1024]),
            draw.choice([8, 16] if method == "sft" else [4, 8]),
            draw.uniform(0.05, 0.95),
        )


def larger(stage: Any) -> int | None:
    """The next micro-batch that splits the step more coarsely; None where all rows go at once."""
    micro, effective = int(stage.spec.train.micro_batch), int(stage.spec.train.effective_batch)
    sizes = sorted({-(-effective // count) for count in range(1, effective + 1)})
    return next((size for size in sizes if size > micro), None)


def measured(count: int, seed: int) -> dict[str, Any]:
    """Run jobs until `count` were planned to fit, and tell how they fared."""
    import sides

    _, tokenizer = sides.smollm2()
    survived = tight = refused = 0
    margins, cells = [], []
    with tempfile.TemporaryDirectory() as place, Cgroup() as group:
        home = Path(place)
        for job in drawn(seed):
            if len(cells) == count:
                break
            model, data = model_folder(job.model, home), home / "rows.jsonl"
            rows(job, data, tokenizer)
            spec = document(job, model, data)
            limit = limit_of(job, spec, home)
            stage = planned(spec, limit, home)
            if stage.size is None or not stage.size.fits:
                refused += 1
                print(f"{job.name} in {limit / GIB:.2f} GiB: refused: {_why_not(stage)}", flush=True)
                continue
            chosen = stage.spec
            ended, killed, most = trained(chosen, stage, f"j-{job.number:05d}a", limit, group, home)
            survived += ended and not killed
            margins.append(most / stage.size.peak_bytes.expected)
            more, failed, why = larger(stage), False, ""
            reason = next((item.why for item in stage.resolved if item.key == "train.micro_batch"), "")
            if more is None or "would need" not in reason:
                why = reason or "all rows of a step go at once"
            else:
                wider = replace(chosen, train=replace(chosen.train, micro_batch=more))
                fine, killed_too, _ = trained(wider, stage, f"j-{job.number:05d}b", limit, group, home)
                failed = killed_too or not fine
            tight += failed or bool(why)
            fate = "trained" if ended and not killed else "KILLED"
            after = f"{more} fails" if failed else why or f"{more} trains too"
            print(
                f"{job.name} in {limit / GIB:.2f} GiB: micro-batch {chosen.train.micro_batch}, checkpointing"
                f" {'on' if chosen.train.activation_checkpointing else 'off'}: {fate},"
                f" most {most / GIB:.2f} of expected {stage.size.peak_bytes.expected / GIB:.2f} GiB; {after}",
                flush=True,
            )
            cells.append(job.number)
    return {
        "survived": survived,
        "tight": tight,
        "cells": len(cells),
        "refused": refused,
        "most_over_expected": [round(min(margins), 3), round(max(margins), 3)],
    }


def _why_not(stage: Any) -> str:
    found = [item.message for item in stage.findings if item.code == "size.does_not_fit"]
    return found[0][:160] if found else "for another reason"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and exit with 1 where fewer trained than must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("TUNESMITH_SEED", "1")))
    asked = parser.parse_args(arguments)
    found = measured(asked.count, asked.seed)
    print(json.dumps({"benchmark": "memory_cgroup", **found, "machine": measure.machine()}))
    return 0 if found["survived"] == asked.count and found["tight"] >= 0.8 * asked.count else 1


if __name__ == "__main__":
    raise SystemExit(main())
