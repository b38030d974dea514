"""The built-in rewards that a guard works out: boxed, regex, json with a schema, reasoning-gym.

A completion that takes too long scores 0, and is counted in `Guard.slow`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith.executors.kernel.rewards.entry import Entry
from tunesmith.executors.kernel.rewards.guard import PATIENCE, Guard
from tunesmith.executors.kernel.rewards.guarded import MOST_MATHS
from tunesmith.executors.kernel.rewards.number import MARK
from tunesmith.executors.kernel.rewards.number import boxed as in_box
from tunesmith.executors.kernel.rewards.texts import answer_in, normal, references, tagged, text_of, written
from tunesmith.orchestrator.errors import InputError

MAKING = 120.0  # seconds to make a row of Reasoning Gym again, as many as there were when it was made first

Values = list[float | None]
Call = Callable[..., Any]


def boxed(entry: Entry, guard: Guard) -> Call:
    """1 where the last \\boxed{} of the completion is the answer as mathematics: 1/2 is 0.5 is \\frac12; else 0."""

    def call(completions: Sequence[Any], **columns: Any) -> Values:
        answers = references(columns, entry.argument, entry.kind)
        values: Values = []
        items: list[dict[str, Any]] = []
        places: list[int] = []
        for done, answer in zip(completions, answers, strict=True):
            said, wanted = in_box(answer_in(text_of(done))), reference(answer)
            if wanted is None:
                values.append(None)
            elif said is None or not said.strip() or len(said) > MOST_MATHS:
                values.append(0.0)
            elif normal(said) == normal(wanted):
                values.append(1.0)
            else:
                places.append(len(values))
                items.append({"said": said, "wanted": wanted})
                values.append(0.0)
        for place, outcome in zip(places, guard.map(items), strict=True):
            values[place] = 0.0 if outcome.slow or outcome.trouble else outcome.value
        return values

    return call


def reference(answer: Any) -> str | None:
    """The mathematics that an answer column holds: what is boxed in it, what follows ####, or all of it."""
    if answer is None or isinstance(answer, bool):
        return None
    text = written(answer)
    inside = in_box(text)
    if inside is None:
        inside = text.rpartition(MARK)[2].strip().strip("$").strip()
    return inside if inside.strip() and len(inside) <= MOST_MATHS else None


def regex(entry: Entry, guard: Guard) -> Call:
    """1 where the pattern is found anywhere in the completion, else 0; ^ and $ are its beginning and end."""

    def call(completions: Sequence[Any], **columns: Any) -> Values:
        return _values(guard.map([{"text": text_of(done)} for done in completions]))

    return call


def schema(entry: Entry, guard: Guard) -> Call:
    """1 where the answer is JSON that fits the schema, else 0."""

    def call(completions: Sequence[Any], **columns: Any) -> Values:
        return _values(guard.map([{"text": text_of(done)} for done in completions]))

    return call


def document(data: bytes, path: str) -> Any:
    """The JSON schema in a file's bytes. Raises InputError reward.schema."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _no_schema(path, str(error)) from error
    if not isinstance(found, (dict, bool)):
        raise _no_schema(path, "A schema is a mapping.")
    return found


def gym(entry: Entry, guard: Guard) -> Call:
    """What the scorer of the row's own task gives, from 0 to 1; None for rows of no task.

    The answer is what stands in <answer> tags, else all that follows the thinking.
    """

    def call(completions: Sequence[Any], **columns: Any) -> Values:
        if "metadata" not in columns:
            raise InputError(
                "The reward reasoning-gym scores rows of Reasoning Gym, and these have no metadata column.",
                fix='Use data like {source: "reasoning-gym:chain_sum"}.',
                code="reward.no_column",
                where="grpo.rewards",
            )
        values: Values = [None] * len(completions)
        items: dict[int, dict[str, Any]] = {}
        for place, done in enumerate(completions):
            row = {name: cells[place] for name, cells in columns.items() if name in ("prompt", "question", "answer")}
            item = task_of(columns["metadata"][place], row)
            if item is not None:
                said = answer_in(text_of(done))
                inside = tagged(said)
                items[place] = {**item, "answer": (said if inside is None else inside).strip()}
        for place, outcome in zip(items, guard.map(list(items.values()), MAKING + PATIENCE), strict=True):
            values[place] = 0.0 if outcome.slow or outcome.trouble else outcome.value
        return values

    return call


def task_of(metadata: Any, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which task and entry a row's metadata names, as a guard is asked; None for none.

    Rows of our source name a task's settings and place, so that the scorer sees the entry that was made, not its JSON;
    rows that a user saved are scored by what they hold.
    """
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("source_dataset"), str):
        return None
    task, config, index = (metadata.get(key) for key in ("source_dataset", "source_config", "source_index"))
    if isinstance(config, Mapping) and isinstance(index, int):
        return {"task": task, "config": json.dumps(config, sort_keys=True), "index": index, "making": MAKING}
    entry = {"question": row.get("question", row.get("prompt")), "answer": row.get("answer"), "metadata": metadata}
    return {"task": task, "entry": entry}


def _values(outcomes: Sequence[Any]) -> Values:
    return [0.0 if outcome.slow or outcome.trouble else outcome.value for outcome in outcomes]


def _no_schema(path: str, why: str) -> InputError:
    return InputError(
        f"{path} holds no JSON schema.", why=why[:300], code="reward.schema", where="grpo.rewards", fix="Write JSON."
    )
