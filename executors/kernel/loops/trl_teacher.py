"""The teacher of a distillation: another model, frozen, that speaks the student's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunesmith.executors.kernel.loops import model as models
from tunesmith.executors.kernel.loops.model import Net
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import JobSpec


def load_teacher(folder: Path, spec: JobSpec, net: Net, tokenizer: Any) -> Any:
    """The teacher of a distillation, frozen, in the plan's type, beside its student.

    Raises InputError: model.unloadable, and distill.vocabulary where its tokens are not the student's.
    """
    from transformers import AutoTokenizer

    dtype = models.HALF.get(str(spec.train.dtype), torch.float32)
    teacher = models.read(folder, str(spec.distill.teacher), dtype, where="distill.teacher")
    teacher.requires_grad_(False).eval().to(net.device)
    mine = net.causal.config.get_text_config().vocab_size
    theirs = teacher.config.get_text_config().vocab_size
    try:
        other = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError):
        other = None
    if mine != theirs or (other is not None and other.get_vocab() != tokenizer.get_vocab()):
        raise InputError(
            f"The teacher {spec.distill.teacher!r} does not speak the student's tokens.",
            code="distill.vocabulary",
            why=f"Their probabilities are compared token by token: {theirs:,} tokens there, {mine:,} here."
            if mine != theirs
            else "Their tokenizers give different numbers to the same tokens.",
            where="distill.teacher",
            fix="Choose a teacher of the student's own family.",
        )
    return teacher


def no_teacher() -> InputError:
    """The error for a distillation without a teacher."""
    return InputError(
        "Distillation needs a teacher.",
        code="distill.teacher",
        why="The student learns what another model thinks of its own words.",
        where="distill.teacher",
        fix="Set distill.teacher to a larger model of the same family.",
    )
