"""From a spec to its rewards: entries with their weights, the hashes of their files, and the functions themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.executors.kernel.rewards import asking, built_in, files
from tunesmith.executors.kernel.rewards.call import Reward
from tunesmith.executors.kernel.rewards.entry import Entry, parse
from tunesmith.executors.kernel.rewards.guard import Guard
from tunesmith.executors.kernel.rewards.guarded import missing
from tunesmith.executors.kernel.rewards.score import Rewards
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import GrpoSpec, JobSpec

METHODS = ("grpo", "rloo")  # methods that are taught by rewards

_LOOKS: dict[str, Callable[[Entry], Callable[..., Any]]] = {
    "number": built_in.number,
    "exact": built_in.exact,
    "json": built_in.json_text,
    "length": built_in.length,
    "think": built_in.think,
}
_ASKS: dict[str, Callable[[Entry, Guard], Callable[..., Any]]] = {
    "boxed": asking.boxed,
    "regex": asking.regex,
    "json": asking.schema,
    "reasoning-gym": asking.gym,
}
_MODULES = {"boxed": "math_verify", "json": "jsonschema", "reasoning-gym": "reasoning_gym"}


def entries(spec: GrpoSpec) -> list[Entry]:
    """The rewards of a spec with their weights. Raises InputError: those of `parse`, reward.none, reward.weights."""
    found = [parse(text) for text in spec.rewards]
    if not found:
        raise InputError("There is no reward.", code="reward.none", where="grpo.rewards", fix="Name one, or auto.")
    weights = spec.reward_weights
    if weights and any(entry.weighted for entry in found):
        raise _weights("Weights stand both in grpo.rewards and in grpo.reward_weights.", "Leave one of the two out.")
    if weights and len(weights) != len(found):
        raise _weights(
            f"There are {len(weights)} weights for {len(found)} rewards.", "Write one weight for each reward."
        )
    if weights:
        found = [replace(entry, weight=weight) for entry, weight in zip(found, weights, strict=True)]
    if len(found) > 1 and any(entry.kind == "auto" for entry in found):
        raise InputError(
            "auto stands beside other rewards.",
            code="reward.auto",
            where="grpo.rewards",
            fix="Write auto alone, or name every reward.",
        )
    return found


def hashes(spec: JobSpec) -> list[str]:
    """SHA-256 of each file that a reward comes from, in the order of the entries. Raises InputError as `content`."""
    return [files.sha256(files.content(entry.path)) for entry in entries(spec.grpo) if entry.path]


def load(spec: JobSpec, approved: Sequence[str] | None = None) -> Rewards:
    """The rewards of a job, in the job's own process: a user's file runs here.

    `approved` are the hashes of the plan; a file that differs from what was approved is refused (reward.changed).
    Raises InputError: as `entries`, `files.function`, reward.auto, reward.package, reward.schema.
    """
    wanted = entries(spec.grpo)
    if any(entry.kind == "auto" for entry in wanted):
        raise InputError(
            "The rewards are still auto.",
            why="An attempt runs a plan in which every auto has been chosen.",
            code="reward.auto",
            where="grpo.rewards",
        )
    data = {place: files.content(entry.path) for place, entry in enumerate(wanted) if entry.path}
    if approved is not None:
        _unchanged([wanted[place] for place in data], [files.sha256(one) for one in data.values()], approved)
    made = [_made(entry, data.get(place)) for place, entry in enumerate(wanted)]
    rewards = Rewards(made, group=spec.grpo.num_generations)
    rewards.state.max_steps = spec.train.max_steps or 0
    rewards.state.num_train_epochs = spec.train.epochs
    return rewards


def installed(entry: Entry) -> bool:
    """Whether the package that an entry needs is here. Imports nothing of it."""
    module = None if entry.kind == "json" and not entry.path else _MODULES.get(entry.kind)
    return module is None or importlib.util.find_spec(module) is not None


def _made(entry: Entry, data: bytes | None) -> Reward:
    if entry.kind == "file":
        call = files.function(entry, data or b"")
        name = entry.argument or files.named(entry, data or b"")
        return Reward(name, entry.weight, call, entry.text, str(Path(entry.path).expanduser()))
    if not installed(entry):
        raise missing(entry.kind)
    if entry.kind in _LOOKS and not entry.path:
        return Reward(entry.name, entry.weight, _LOOKS[entry.kind](entry), entry.text)
    setup: dict[str, Any] = {"pattern": entry.argument} if entry.kind == "regex" else {}
    if data is not None:
        setup = {"schema": asking.document(data, entry.path)}
    guard = Guard(entry.kind, setup)
    return Reward(entry.name, entry.weight, _ASKS[entry.kind](entry, guard), entry.text, guard=guard)


def _unchanged(wanted: Sequence[Entry], found: Sequence[str], approved: Sequence[str]) -> None:
    if list(found) == list(approved):
        return
    changed = [entry.path for entry, one, other in zip(wanted, found, approved, strict=False) if one != other]
    if len(found) != len(approved) or not changed:
        message = f"The plan approved {len(approved)} reward files, and the spec names {len(found)}."
    else:
        message = f"The reward file {changed[0]} has changed since the plan was approved."
    raise InputError(
        message,
        why=f"SHA-256 of what was approved: {', '.join(one[:16] for one in approved) or 'none'};"
        f" now: {', '.join(one[:16] for one in found) or 'none'}.",
        fix="Put the file back as it was, or plan the job again.",
        code="reward.changed",
        where=", ".join(changed) or "grpo.rewards",
    )


def _weights(message: str, fix: str) -> InputError:
    return InputError(message, code="reward.weights", where="grpo.reward_weights", fix=fix)
