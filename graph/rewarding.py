"""Rewards in a plan: what `auto` becomes, the hashes of their files, and the question where nobody can know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tunesmith.graph.draft import StageDraft
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import JobSpec, Mapping, Question, Resolved

if TYPE_CHECKING:
    from tunesmith.executors.kernel.rewards import Choice

METHODS = ("grpo", "rloo")


def rewarded(stages: Sequence[StageDraft]) -> tuple[list[StageDraft], tuple[Question, ...]]:
    """The stages with their rewards settled, and a question for each that leaves them open. Runs no user's code."""
    made, questions = [], []
    for index, stage in enumerate(stages):
        prefix = f"stages.{index}." if len(stages) > 1 else ""
        found, question = _settled(stage, f"{prefix}grpo.rewards")
        made.append(found)
        questions += [question] if question is not None else []
    return made, tuple(questions)


def _settled(stage: StageDraft, field: str) -> tuple[StageDraft, Question | None]:
    if stage.spec.method not in METHODS:
        return stage, None
    from tunesmith.executors.kernel import rewards

    if stage.spec.grpo.rewards == ("auto",):
        if any(item.level == "error" for item in stage.data.problems):
            return stage, None  # nothing can be told of data that cannot be used, nor need it be
        choice = _choice(stage)
        if choice is None:
            return stage, Question(field=field, text=_QUESTION, choices=rewards.CHOICES)
        spec = replace(stage.spec, grpo=replace(stage.spec.grpo, rewards=choice.rewards))
        chosen = Resolved(key="grpo.rewards", value=list(choice.rewards), why=choice.why)
        stage = stage.noting(spec=spec, resolved=(*stage.resolved, chosen))
    checked = rewards.check(stage.spec, _columns(stage.spec))
    said = {item.where for item in stage.findings if item.level == "error"}
    fresh = [item for item in checked.findings if item.where not in said]
    return stage.noting(*fresh, reward_hashes=checked.hashes), None


_QUESTION = (
    "How are completions rewarded? Name a reward (regex:PATTERN and length:N too), several as a list, or a function of"
    " yours: FILE.py:FUNCTION."
)


def _choice(stage: StageDraft) -> Choice | None:
    """What the first rows of every source agree on."""
    from tunesmith.executors.kernel import data, rewards

    if stage.data.rows is None:
        return None
    found = []
    for source in stage.spec.data:
        mapping = source.mapping
        try:
            rows = data.sample(source, offline=False)
        except InputError:
            return None
        found.append(rewards.auto(rows, mapping.keep if isinstance(mapping, Mapping) else ()))
    return found[0] if found and all(choice == found[0] for choice in found) else None


def _columns(spec: JobSpec) -> list[str] | None:
    """The columns that rows bring along; None where a mapping is not known yet."""
    names: dict[str, None] = {}
    for source in spec.data:
        if not isinstance(source.mapping, Mapping):
            return None
        names |= dict.fromkeys(source.mapping.keep)
    return list(names)
