"""The states of jobs and attempts and every legal move between them, as one table (drawn in docs/architecture.md)."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands, from request to result."""

    PLANNING = "planning"
    AWAITING_INPUT = "awaiting_input"
    AWAITING_APPROVAL = "awaiting_approval"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    EVALUATING = "evaluating"
    DELIVERING = "delivering"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    LOST = "lost"


class AttemptState(StrEnum):
    """Where one execution stands. `unknown` (backend out of reach) is left by proof only; `lost` is not `failed`."""

    SUBMITTED = "submitted"
    STARTING = "starting"
    RUNNING = "running"
    FINISHING = "finishing"
    UNKNOWN = "unknown"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


_J = JobState
_A = AttemptState

JOB_ENDS = frozenset({_J.SUCCEEDED, _J.FAILED, _J.CANCELLED, _J.REJECTED, _J.LOST})
ATTEMPT_ENDS = frozenset({_A.SUCCEEDED, _A.FAILED, _A.CANCELLED, _A.LOST})

# A job that ended without a result may be reopened by `retry`: that is the only way out of an end.
JOB_MOVES: dict[JobState, frozenset[JobState]] = {
    _J.PLANNING: frozenset({_J.AWAITING_INPUT, _J.AWAITING_APPROVAL, _J.FAILED, _J.CANCELLED}),
    _J.AWAITING_INPUT: frozenset({_J.PLANNING, _J.REJECTED, _J.CANCELLED}),
    _J.AWAITING_APPROVAL: frozenset({_J.PLANNING, _J.QUEUED, _J.FAILED, _J.REJECTED, _J.CANCELLED}),
    _J.QUEUED: frozenset({_J.RUNNING, _J.PAUSED, _J.PLANNING, _J.AWAITING_APPROVAL, _J.FAILED, _J.CANCELLED, _J.LOST}),
    _J.RUNNING: frozenset(
        {
            _J.QUEUED,
            _J.PAUSED,
            _J.AWAITING_APPROVAL,
            _J.EVALUATING,
            _J.DELIVERING,
            _J.FAILED,
            _J.CANCELLED,
            _J.LOST,
        }
    ),
    _J.PAUSED: frozenset({_J.QUEUED, _J.PLANNING, _J.AWAITING_APPROVAL, _J.CANCELLED}),
    _J.EVALUATING: frozenset({_J.DELIVERING, _J.FAILED, _J.CANCELLED, _J.LOST}),
    _J.DELIVERING: frozenset({_J.SUCCEEDED, _J.FAILED, _J.CANCELLED}),
    _J.SUCCEEDED: frozenset(),
    _J.FAILED: frozenset({_J.PLANNING, _J.QUEUED}),
    _J.CANCELLED: frozenset({_J.PLANNING, _J.QUEUED}),
    _J.REJECTED: frozenset({_J.PLANNING}),
    _J.LOST: frozenset({_J.PLANNING, _J.QUEUED}),
}

ATTEMPT_MOVES: dict[AttemptState, frozenset[AttemptState]] = {
    _A.SUBMITTED: frozenset(
        {_A.STARTING, _A.RUNNING, _A.FINISHING, _A.UNKNOWN, _A.SUCCEEDED, _A.FAILED, _A.CANCELLED, _A.LOST}
    ),
    _A.STARTING: frozenset({_A.RUNNING, _A.FINISHING, _A.UNKNOWN, _A.SUCCEEDED, _A.FAILED, _A.CANCELLED, _A.LOST}),
    _A.RUNNING: frozenset({_A.FINISHING, _A.UNKNOWN, _A.SUCCEEDED, _A.FAILED, _A.CANCELLED, _A.LOST}),
    _A.FINISHING: frozenset({_A.UNKNOWN, _A.SUCCEEDED, _A.FAILED, _A.CANCELLED, _A.LOST}),
    _A.UNKNOWN: frozenset({_A.RUNNING, _A.FINISHING, _A.SUCCEEDED, _A.FAILED, _A.CANCELLED, _A.LOST}),
    _A.SUCCEEDED: frozenset(),
    _A.FAILED: frozenset(),
    _A.CANCELLED: frozenset(),
    _A.LOST: frozenset(),
}


def job_may(old: JobState, new: JobState) -> bool:
    """Whether a job may go from `old` to `new`."""
    return new in JOB_MOVES[old]


def attempt_may(old: AttemptState, new: AttemptState) -> bool:
    """Whether an attempt may go from `old` to `new`."""
    return new in ATTEMPT_MOVES[old]
