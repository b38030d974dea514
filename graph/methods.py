"""What a method needs of its spec: what must be asked first, and combinations that nothing can come of.

Each refusal names the key, the reason and the way out. What a method needs of the data is told by the data's columns
(executors/kernel/data/formats.py), what it needs of a device by sizing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from tunesmith.executors.kernel.catalogue import ModelFacts
from tunesmith.graph import settings
from tunesmith.orchestrator.nouns import Finding, JobSpec, Level, Question

OWN = ("sft", "dpo", "grpo")  # methods with loops of our own, as in executors/kernel/run.py
READERS = {  # the sections of a spec that belong to methods, and who reads them
    "dpo": ("dpo",),
    "grpo": ("grpo", "rloo"),
    "kto": ("kto",),
    "distill": ("distill",),
}
UNREAD = {"rloo": ("loss", "scale_rewards")}  # keys of a section that one of its readers passes over
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def questions(docs: Sequence[Mapping[str, Any]]) -> list[Question]:
    """What a method cannot do without, and nobody but the user knows."""
    asked = []
    for index, doc in enumerate(docs):
        if doc.get("method") == "distill" and not settings.get(doc, "distill.teacher"):
            field = f"stages.{index}.distill.teacher" if len(docs) > 1 else "distill.teacher"
            text = "Which model is the teacher? It must have the same vocabulary."
            asked.append(Question(field=field, text=text))
    return asked


def misfits(spec: JobSpec) -> list[Finding]:
    """Values that contradict each other, or that the method does not read."""
    found = [*_unread(spec), *_alone(spec)]
    check = {"dpo": _dpo, "grpo": _sampled, "rloo": _sampled, "distill": _sampled}.get(spec.method)
    return [*found, *(check(spec) if check else ())]


def teacher_misfit(student: ModelFacts, teacher: ModelFacts) -> Finding | None:
    """Why one model cannot teach another; None where it can, as far as their shapes say."""
    if student.vocabulary == teacher.vocabulary:
        return None
    return _finding(
        "error",
        "distill.vocabulary",
        f"{teacher.id[:100]} cannot teach {student.id[:100]}: it has {teacher.vocabulary:,} tokens, and the student "
        f"{student.vocabulary:,}; what the student learns is a probability for each of them.",
        "distill.teacher",
        "Choose a teacher of the student's family, or train on the teacher's answers with sft.",
    )


def _finding(level: Level, code: str, message: str, where: str, fix: str) -> Finding:
    return Finding(level=level, code=code, message=message, where=where, fix=fix)


def _unread(spec: JobSpec) -> list[Finding]:
    found = []
    for section, readers in READERS.items():
        given = getattr(spec, section)
        usual = type(given)()
        changed = [item.name for item in fields(given) if getattr(given, item.name) != getattr(usual, item.name)]
        if spec.method in readers:
            changed = [name for name in changed if name in UNREAD.get(spec.method, ())]
        if changed:
            keys = ", ".join(f"{section}.{name}" for name in changed)
            fix = f"Leave it out, or set method to {' or '.join(readers)}."
            found.append(_finding("warning", "spec.unused", f"{spec.method} does not read {keys}.", section, fix))
    return found


def _alone(spec: JobSpec) -> list[Finding]:
    """Methods that TRL trains do not share a step between devices."""
    wanted = spec.hardware
    many = isinstance(wanted, Mapping) and any(_count(wanted.get(name)) > 1 for name in ("gpus", "processes"))
    if spec.method in OWN or not many:
        return []
    message = f"{spec.method} runs on one device: TRL trains it, and only our own loops share a step between processes."
    return [_finding("error", "hardware.gpus", message, "hardware", f"Leave hardware out, or use {', '.join(OWN)}.")]


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _dpo(spec: JobSpec) -> list[Finding]:
    dpo, key = spec.dpo, "dpo.label_smoothing"
    if dpo.loss == "exo_pair" and not dpo.label_smoothing:
        why = "The loss exo_pair needs label smoothing: it compares with labels that err now and then."
        return [_finding("error", key, why, key, "Set dpo.label_smoothing to 0.001, as its authors do.")]
    if dpo.label_smoothing and dpo.loss not in SMOOTHED:
        message = f"The loss {dpo.loss} does not read {key}."
        fix = f"Leave it out, or set dpo.loss to {', '.join(SMOOTHED[:-1])} or {SMOOTHED[-1]}."
        return [_finding("warning", "spec.unused", message, key, fix)]
    return []


def _sampled(spec: JobSpec) -> list[Finding]:
    found = []
    section = "distill" if spec.method == "distill" else "grpo"
    most, length = getattr(spec, section).max_completion, spec.train.max_length
    if isinstance(length, int) and length <= most:
        message = (
            f"train.max_length={length:,} counts the prompt and what is written after it, and "
            f"{section}.max_completion={most:,} leaves no room for a prompt."
        )
        fix = f"Raise train.max_length, leave it to auto, or lower {section}.max_completion."
        found.append(_finding("error", "train.max_length", message, "train.max_length", fix))
    weights, rewards = spec.grpo.reward_weights, spec.grpo.rewards
    if section == "grpo" and weights and "auto" not in rewards and len(weights) != len(rewards):
        message = f"There are {len(weights)} grpo.reward_weights for {len(rewards)} rewards."
        fix = "Give one number for each reward, or none: then each counts 1."
        found.append(_finding("error", "grpo.reward_weights", message, "grpo.reward_weights", fix))
    return found
