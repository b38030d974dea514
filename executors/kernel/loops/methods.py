"""Which method a spec means, over tokenised rows: the one place that knows SFT, DPO and GRPO by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.executors.kernel import data
from tunesmith.executors.kernel.loops import model, reference
from tunesmith.executors.kernel.loops.batches import Row
from tunesmith.executors.kernel.loops.dpo import Dpo
from tunesmith.executors.kernel.loops.forks import Tree
from tunesmith.executors.kernel.loops.grpo import Grpo, Judge, Scorer
from tunesmith.executors.kernel.loops.method import Method, Turn
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.executors.kernel.loops.ranks import ALONE, Ranks
from tunesmith.executors.kernel.loops.reference import Reference
from tunesmith.executors.kernel.loops.rollout import TESTED, WRITTEN, Rollout
from tunesmith.executors.kernel.loops.sft import Sft
from tunesmith.executors.kernel.loops.vllm import Vllm
from tunesmith.executors.kernel.reporter import Reporter
from tunesmith.orchestrator.nouns import JobSpec

OWN = ("sft", "dpo", "grpo")
SLOTS = {"cpu": 64, "cuda": 256}  # sequences written at a time; more do not go faster


@dataclass(frozen=True, slots=True)
class Setting:
    """What methods are made of, beside their rows. `model_folder` holds the weights that training begins with."""

    spec: JobSpec
    net: Net
    tokenizer: Any
    pad_id: int
    model_folder: Path
    cache: Path
    reporter: Reporter
    stopped: Callable[[], bool]
    scorer: Scorer | None = None
    ranks: Ranks = ALONE


def probes(spec: JobSpec, rows: Sequence[Any]) -> list[Row]:
    """Some rows as plain token sequences, for the self-test."""
    few = rows[:16]
    if spec.method == "sft":
        return list(few)
    if spec.method == "dpo":
        wholes = [(pair.row, [*pair.prompt, *pair.chosen]) for pair in few]
    else:
        wholes = [(prompt.row, list(prompt.ids)) for prompt in few]
    return [data.Encoded(row, ids, ids) for row, ids in wholes]


def make(setting: Setting, train: Sequence[Any], held_out: Sequence[Any]) -> tuple[Method, Method]:
    """The method over its training rows, and the same over those held out."""
    if setting.spec.method == "dpo":
        return _dpo(setting, train), _dpo(setting, held_out)
    if setting.spec.method == "grpo":
        return _grpo(setting, train, held_out)
    return _sft(setting, train), _sft(setting, held_out)


def _layout(setting: Setting) -> dict[str, Any]:
    train = setting.spec.train
    return {
        "micro_batch": int(train.micro_batch),
        "max_length": int(train.max_length),
        "packing": train.packing is True,
        "pad_id": setting.pad_id,
        "ranks": setting.ranks,
    }


def _sft(setting: Setting, rows: Sequence[Any]) -> Sft:
    return Sft(setting.net, rows, **_layout(setting))


def _dpo(setting: Setting, rows: Sequence[Any]) -> Dpo:
    trees = [Tree(pair.row, pair.prompt, (pair.chosen, pair.rejected), pair.unscored) for pair in rows]
    path = None
    if setting.spec.dpo.reference == "base" and trees:
        name = reference.key(trees, *_identity(setting))
        path = setting.cache / "reference" / f"{name}.safetensors"
    table = Reference(path, len(trees), 2, ranks=setting.ranks)
    return Dpo(setting.net, trees, setting.spec.dpo, reference=table, **_layout(setting))


def _identity(setting: Setting) -> tuple[str, ...]:
    """What the reference's opinion depends on, but for the rows: the weights, and the types they compute in."""
    net = setting.net
    files = hashlib.sha256()
    for path in sorted(setting.model_folder.iterdir()):
        if path.suffix == ".safetensors":
            stat = path.stat()
            files.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        elif path.name == "config.json":
            files.update(path.read_bytes())
    kind = str(setting.spec.adapter.kind)
    return (files.hexdigest(), str(net.head.weight.dtype), str(net.autocast), kind, net.device.type, torch.__version__)


def _grpo(setting: Setting, train: Sequence[Any], held_out: Sequence[Any]) -> tuple[Grpo, Grpo]:
    scorer = setting.scorer
    assert scorer is not None
    spec, net, tokenizer = setting.spec, setting.net, setting.tokenizer
    answers = int(spec.train.effective_batch) * spec.grpo.num_generations
    slots = min(answers, SLOTS.get(net.device.type, 64))
    rollout = Rollout(
        net,
        stops=data.stop_tokens(tokenizer),
        max_completion=spec.grpo.max_completion,
        temperature=spec.grpo.temperature,
        slots=slots,
        engine=_vllm(setting, [*train, *held_out], slots) if spec.grpo.vllm else None,
    )
    for problem in rollout.problems:
        setting.reporter.alert("grpo.rollout", problem)

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def method(rows: Sequence[Any], frozen: Net | None) -> Grpo:
        return Grpo(
            net,
            rows,
            spec.grpo,
            rollout=rollout,
            judge=Judge(text, scorer),
            reporter=setting.reporter,
            seed=spec.train.seed,
            frozen=frozen,
            stopped=setting.stopped,
            **_layout(setting),
        )

    frozen = _frozen(setting) if spec.grpo.beta and not net.adapted else None
    return method(train, frozen), method(held_out, None)


def _vllm(setting: Setting, rows: Sequence[Any], slots: int) -> Callable[[], Vllm]:
    """What makes vLLM, with room for these prompts and for those of the rollout's self-test."""
    spec = setting.spec.grpo
    longest = max(length for _, length in TESTED)
    longest = max([longest, *(len(row.ids) for row in rows)])
    sizes = {"slots": slots, "limit": max(spec.max_completion, WRITTEN), "longest": longest}
    return partial(Vllm, setting.net, setting.model_folder, **sizes, temperature=spec.temperature, share=spec.vllm)


def _frozen(setting: Setting) -> Net:
    """The model that training begins with, once more, where an adapter cannot simply be switched off."""
    found = model.load(setting.model_folder, setting.spec, setting.net.device)
    found.outer.requires_grad_(False).eval()
    found.packed, found.forked, found.chunked = setting.net.packed, setting.net.forked, setting.net.chunked
    return found


def foresee(method: Method, picked: Iterator[Sequence[int]]) -> Iterator[int]:
    """Ask the reference about every row of a run, before training changes the model; yields the rows done so far.

    Only DPO with all weights needs it: an adapter can be switched off at any time.
    """
    if not isinstance(method, Dpo) or method.net.adapted:
        return
    done = 0
    for rows in picked:
        method.foresee(method.ranks.share(rows), Turn(0, 0, training=False))
        done += len(rows)
        yield done
    method.reference.share()
    method.reference.flush()
