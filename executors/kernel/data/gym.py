"""Rows of a Reasoning Gym task: `reasoning-gym:chain_sum`, made anew wherever they are read, the same by their seed.

A row has `prompt`, `answer` (null where a task has many right ones) and `metadata`, which names task, settings and
place, so that the reward `reasoning-gym` finds the entry again. Rows are made in a child process with one seed of
hashes: some tasks walk through sets. Cost: a second for the library, then mostly under a millisecond a row; a few
tasks (sokoban, knight_swap, zebra_puzzles) take a second a row, and want a `limit`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from tunesmith.executors.kernel.data.records import Record
from tunesmith.orchestrator.errors import InputError
from tunesmith.orchestrator.nouns import DataSource

if TYPE_CHECKING:
    from tunesmith.executors.kernel.rewards.guard import Guard

SCHEME = "reasoning-gym:"
ROWS = 500  # where neither limit nor size says how many, as the library has it
SEED = 0
# Entries are made from seed + place, so other seeds and other splits must lie further away than any number of rows, and
# below 2**32, which is all that some tasks take. Multiples of the golden section of a split keep seeds that are less
# than 10,000 apart, as people choose them, 80,000 rows and more from each other.
_SPLIT = 2**30
_SPREAD = 663_608_941
_SPLITS = {"train": 0, "test": 1, **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), 2)}
_CHUNK = 25
_PATIENCE = 120.0  # seconds for a chunk of rows


def is_gym(source: str) -> bool:
    """Whether a source names a task of Reasoning Gym."""
    return source.lower().replace("_", "-").startswith(SCHEME)


def records(source: DataSource) -> Iterator[Record]:
    """Stream (where, values) of a task. Raises InputError: data.gym, data.gym_config, data.gym_slow, reward.package."""
    task, config = _asked(source)
    for number, row in enumerate(_rows(task, config), 1):
        yield f"{source.source} row {number}", dict(row)


def rows(source: DataSource) -> int:
    """How many rows a source holds."""
    return int(json.loads(_asked(source)[1])["size"])


def _asked(source: DataSource) -> tuple[str, str]:
    """The task and its settings as canonical JSON, seed and size among them."""
    task = source.source.partition(":")[2].strip()
    try:
        config = json.loads(source.config) if source.config else {}
    except (ValueError, RecursionError) as error:
        raise _config(source, f"It is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise _config(source, "It is no mapping.")
    for key in ("seed", "size"):
        if key in config and (not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < 0):
            raise _config(source, f"{key} must be a whole number, not negative.")
    size = config.get("size") or source.limit or ROWS
    part = _SPLITS.get(source.split.strip().lower())
    if part is None:
        raise _split(source)
    seed = part * _SPLIT + config.get("seed", SEED) * _SPREAD % _SPLIT
    return task, json.dumps({**config, "size": size, "seed": seed}, sort_keys=True)


@lru_cache(maxsize=8)
def _rows(task: str, config: str) -> tuple[dict[str, Any], ...]:
    """The rows of a task. Kept, because a plan reads its data several times."""
    guard = _maker()
    about = guard.map([{"do": "about", "task": task, "config": config, "alarm": _PATIENCE}], _PATIENCE * 1.5)[0]
    if about.slow or about.trouble:
        raise _refused(task, about.trouble or "It took too long.")
    if "known" in about.value:
        raise _unknown(task, about.value["unknown"], about.value["known"])
    if "refused" in about.value:
        raise _refused(task, about.value["refused"])
    found: list[dict[str, Any]] = []
    settings = json.loads(config)
    for start in range(0, settings["size"], _CHUNK):
        ask = {"do": "rows", "task": task, "config": config, "from": start, "alarm": _PATIENCE}
        ask["to"] = min(start + _CHUNK, settings["size"])
        made = guard.map([ask], _PATIENCE * 1.5)[0]
        if made.slow or made.trouble:
            raise _slow(task, start) if made.slow else _refused(task, made.trouble)
        for place, entry in enumerate(made.value, start):
            ours = {"source_dataset": task, "source_index": place, "source_config": settings}
            row = {"prompt": entry["question"], "answer": entry["answer"], "metadata": {**entry["metadata"], **ours}}
            found.append(row)
    return tuple(found)


@cache
def _maker() -> Guard:
    """The child that makes rows, one for all sources of this process; it goes by itself when nobody asks."""
    from tunesmith.executors.kernel.rewards.guard import Guard

    return Guard("reasoning-gym", children=1)


def _unknown(task: str, near: list[str], known: list[str]) -> InputError:
    return InputError(
        f"Reasoning Gym has no task {task[:80]!r}.",
        fix=f"Did you mean {', '.join(near)}?" if near else f"It has {', '.join(known)}.",
        code="data.gym",
        where=f"{SCHEME}{task[:80]}",
    )


def _config(source: DataSource, why: str) -> InputError:
    return InputError(
        f"The config of {source.source} cannot be used.",
        why=why[:300],
        fix="""Write it as JSON: config: '{"max_terms": 2}'.""",
        code="data.gym_config",
        where=source.source,
    )


def _split(source: DataSource) -> InputError:
    return InputError(
        f"{source.source} has no split {source.split[:80]!r}.",
        fix=f"Write one of {', '.join(_SPLITS)}.",
        code="data.gym_config",
        where=source.source,
    )


def _refused(task: str, why: str) -> InputError:
    return InputError(
        f"Reasoning Gym does not make rows of {task}.",
        why=why,
        fix="Change data.config.",
        code="data.gym_config",
        where=f"{SCHEME}{task}",
    )


def _slow(task: str, made: int) -> InputError:
    return InputError(
        f"Rows of {task} take too long to make: {_CHUNK} were not done in {_PATIENCE:g} seconds.",
        why=f"{made:,} rows were made before.",
        fix="Make the task smaller by data.config, or set a lower data.limit.",
        code="data.gym_slow",
        where=f"{SCHEME}{task}",
    )
