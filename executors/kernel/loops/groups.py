"""What was written for the prompts of a step, and how it was judged: the state of GRPO between optimizer steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.orchestrator.errors import InputError

_FILE = "rollouts.json"
_TENSORS = ("sampled", "old", "reference")


@dataclass(slots=True)
class Written:
    """One answer: its tokens, whether it came to an end, and its advantage.

    sampled    log-probabilities as the rollout saw them, float32, one a token
    old        the same by the trainer before the first update, None until they are known
    reference  the same by the reference model, where there is one
    """

    ids: list[int]
    ended: bool
    gain: float
    sampled: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A row, by its place among the rows of the method, and the answers written for it."""

    at: int
    written: tuple[Written, ...]


def plain(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Groups as JSON-ready values. float32 survives as decimal text, bit for bit."""
    return [{"at": group.at, "written": [_doc(item) for item in group.written]} for group in groups]


def read(docs: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The groups that `plain` wrote."""
    return [Group(doc["at"], tuple(_written(item) for item in doc["written"])) for doc in docs]


def _doc(item: Written) -> dict[str, Any]:
    known = {name: value.tolist() for name in _TENSORS if (value := getattr(item, name)) is not None}
    return {"ids": item.ids, "ended": item.ended, "gain": item.gain, **known}


def _written(doc: Mapping[str, Any]) -> Written:
    tensors = {name: torch.tensor(doc[name], dtype=torch.float32) for name in _TENSORS if name in doc}
    return Written(ids=list(doc["ids"]), ended=doc["ended"], gain=doc["gain"], **tensors)


def save(folder: Path, groups: Sequence[Group], about: int) -> None:
    """Write groups into a checkpoint folder; `about` is the round of rollouts they belong to."""
    (folder / _FILE).write_text(json.dumps({"about": about, "groups": plain(groups)}), encoding="utf-8")


def load(folder: Path, about: int) -> list[Group]:
    """Read back what `save` wrote from a verified folder. InputError where it is of another round, or missing."""
    try:
        doc = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        doc = {"about": None}
    if doc["about"] != about:
        raise InputError(
            "The checkpoint does not hold the answers that its step was trained on.",
            code="checkpoint.other_task",
            where=str(folder),
            fix="Keep grpo.num_iterations as it was, or start a new job.",
        )
    return read(doc["groups"])


def merged(parts: Iterable[Sequence[Group]], order: Sequence[int]) -> list[Group]:
    """The groups of all ranks in the order of the rows picked; a row picked twice has two groups."""
    waiting: dict[int, list[Group]] = {}
    for part in parts:
        for group in part:
            waiting.setdefault(group.at, []).append(group)
    return [waiting[at].pop(0) for at in order]


def completed(parts: Iterable[Sequence[Group]]) -> list[Group]:
    """The same groups as several ranks know them: whoever computed an answer's log-probabilities has them."""
    first, *others = parts
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            for item, found in zip(mine.written, theirs.written, strict=True):
                item.old = found.old if item.old is None else item.old
                item.reference = found.reference if item.reference is None else item.reference
    return list(first)
