"""Rewards made from a spec or a file of the test, and ended with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.executors.kernel import rewards
from tunesmith.orchestrator.nouns import DataSource, GrpoSpec, JobSpec, ModelRef


def spec(*entries: str, method: str = "grpo", **grpo: Any) -> JobSpec:
    """A job that is taught by these rewards."""
    return JobSpec(
        model=ModelRef(id="m"),
        data=(DataSource(source="rows.jsonl"),),
        method=method,
        grpo=GrpoSpec(rewards=entries, **grpo),
    )


@pytest.fixture
def load():
    """Loads rewards, whose children end with the test."""
    made = []

    def load(*entries: str, approved: Any = None, **grpo: Any) -> rewards.Rewards:
        made.append(rewards.load(spec(*entries, **grpo), approved))
        return made[-1]

    yield load
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def kept():
    """Rewards by entry, loaded once for all tests: a child that has loaded its library serves them all."""
    made: dict[str, rewards.Rewards] = {}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture
def score(kept):
    """The values that one reward gives to completions, with one value of each column for all, or a tuple of them."""

    def score(entry: str, completions: list[Any], *, prompt: Any = "q", **columns: Any) -> list[float | None]:
        count = len(completions)
        spread = {name: cells if isinstance(cells, tuple) else (cells,) * count for name, cells in columns.items()}
        ids = [list(range(len(str(done).split()))) for done in completions]
        if entry not in kept:
            kept[entry] = rewards.load(spec(entry))
        found = kept[entry].score([prompt] * count, completions, ids, spread, 1)
        return [row[0] for row in found.values]

    return score


@pytest.fixture
def own(tmp_path: Path):
    """Writes a user's file and gives its path."""

    def own(text: str, name: str = "own.py") -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return own


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder with the real data sets."""
    folder = Path(__file__).parents[5] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at {folder}")
    return folder
