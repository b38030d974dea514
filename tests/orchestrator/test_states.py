"""The table of states: its ends, its reopening, and that docs/architecture.md draws exactly it."""

from __future__ import annotations

import re
from pathlib import Path

from tunesmith.orchestrator.states import (
    ATTEMPT_ENDS,
    ATTEMPT_MOVES,
    JOB_ENDS,
    JOB_MOVES,
    AttemptState,
    JobState,
    attempt_may,
    job_may,
)

DOC = Path(__file__).parents[2] / "docs" / "architecture.md"


def drawn(name: str) -> set[tuple[str, str]]:
    text = DOC.read_text(encoding="utf-8")
    (picture,) = re.findall(rf'state "{name}" as.*?\n    }}\n', text, re.DOTALL)
    return {pair for pair in re.findall(r"(\w+) --> (\w+)", picture) if "*" not in pair[0]}


def test_every_state_has_its_moves() -> None:
    assert set(JOB_MOVES) == set(JobState)
    assert set(ATTEMPT_MOVES) == set(AttemptState)


def test_the_drawing_of_jobs_is_the_table() -> None:
    table = {(old.value, new.value) for old, news in JOB_MOVES.items() for new in news}
    cancels = {(old.value, "cancelled") for old in JobState if old not in JOB_ENDS}
    assert drawn("Job") | cancels == table


def test_the_drawing_of_attempts_is_in_the_table() -> None:
    assert all(attempt_may(AttemptState(old), AttemptState(new)) for old, new in drawn("Attempt"))


def test_what_succeeded_stays_and_attempts_never_reopen() -> None:
    assert JOB_MOVES[JobState.SUCCEEDED] == frozenset()
    assert all(ATTEMPT_MOVES[state] == frozenset() for state in ATTEMPT_ENDS)


def test_an_end_without_a_result_is_left_by_retry_only() -> None:
    for state in JOB_ENDS - {JobState.SUCCEEDED}:
        assert JOB_MOVES[state] <= {JobState.PLANNING, JobState.QUEUED}
    assert not job_may(JobState.REJECTED, JobState.QUEUED)


def test_unknown_is_not_lost() -> None:
    assert attempt_may(AttemptState.UNKNOWN, AttemptState.RUNNING)
    assert not attempt_may(AttemptState.LOST, AttemptState.RUNNING)
