"""What the store knows of attempts, and every change the queue makes to one: each is one transaction with its event."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tunesmith.orchestrator.errors import Conflict
from tunesmith.orchestrator.events import now
from tunesmith.orchestrator.nouns import Attempt
from tunesmith.orchestrator.plain import build
from tunesmith.orchestrator.ports import AttemptView, Handle
from tunesmith.orchestrator.states import ATTEMPT_ENDS, AttemptState, JobState, attempt_may
from tunesmith.orchestrator.store import Row, Store, dumps, safe

LIVE = tuple(state for state in AttemptState if state not in ATTEMPT_ENDS)
_LIVE_SQL = "a.state IN ('submitted', 'starting', 'running', 'finishing', 'unknown')"
_JOINED = (
    "SELECT a.*, j.number AS place, j.priority, j.wanted, j.state AS job_state, j.name"
    " FROM attempts a JOIN jobs j ON j.id = a.job WHERE "
)


class Attempts:
    """The queue's side of the store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def backends(self) -> list[str]:
        """Every backend with an attempt that has not ended."""
        found = self.store.rows(f"SELECT DISTINCT backend FROM attempts a WHERE {_LIVE_SQL}")  # noqa: S608
        return [str(row["backend"]) for row in found]

    def waiting(self, backend: str | None = None) -> list[Row]:
        """Attempts whose turn has not come, in the order of their turns: priority, then submission."""
        return self.store.rows(
            f"{_JOINED}{_LIVE_SQL} AND NOT a.intent AND (?1 IS NULL OR a.backend = ?1)"
            " AND j.state = 'queued' AND j.wanted IS NOT 'cancel' ORDER BY j.priority DESC, j.number",
            backend,
        )

    def live(self, backend: str | None = None) -> list[Row]:
        """Attempts that an executor was asked to start and that have not ended, oldest job first."""
        return self.store.rows(
            f"{_JOINED}{_LIVE_SQL} AND a.intent AND (?1 IS NULL OR a.backend = ?1) ORDER BY j.number", backend
        )

    def get(self, job: str, number: int) -> Row:
        """One attempt with its job's place, priority, wish and state. Raises Conflict where there is none."""
        found = self.store.row(f"{_JOINED}a.job = ? AND a.number = ?", job, number)
        if found is None:
            raise Conflict(f"There is no attempt {number} of {job}.", code="attempt.unknown", where=job)
        return found

    def before(self, job: str, number: int) -> list[Row]:
        """Earlier attempts that ended without proof in the store that nothing of them runs."""
        return self.store.rows(
            "SELECT * FROM attempts WHERE job = ? AND number < ? AND state = 'lost' AND handle IS NOT NULL", job, number
        )

    def begin(self, job: str, number: int) -> bool:
        """Note the intent to start, before the executor is asked; False where a person was faster."""
        with self.store.transaction():
            row = self.get(job, number)
            if (
                row["state"] != AttemptState.SUBMITTED
                or row["job_state"] != JobState.QUEUED
                or row["wanted"] == "cancel"
            ):
                return False
            self.store.write("UPDATE attempts SET intent = 1 WHERE job = ? AND number = ?", job, number)
            return True

    def started(self, handle: Handle) -> None:
        """Store where the executor put an attempt; the job runs from here on."""
        with self.store.transaction():
            row = self.get(handle.job, handle.number)
            self.store.write(
                "UPDATE attempts SET handle = ?, intent = 1, started_at = COALESCE(started_at, ?)"
                " WHERE job = ? AND number = ?",
                dumps(handle.data),
                now(),
                handle.job,
                handle.number,
            )
            if row["state"] == AttemptState.SUBMITTED:
                self.move(handle.job, handle.number, AttemptState.STARTING)
            if row["job_state"] == JobState.QUEUED:
                self.store.move(handle.job, JobState.RUNNING, attempt=handle.number)

    def checkpoint(self, job: str, number: int, path: str) -> None:
        """Remember the newest checkpoint, relative to the job's folder."""
        with self.store.transaction():
            self.store.write("UPDATE attempts SET checkpoint = ? WHERE job = ? AND number = ?", path, job, number)

    def ending(self, job: str, number: int, why: str) -> None:
        """Remember that the daemon began to end an attempt, and why: cancel or deadline. The first reason stays."""
        with self.store.transaction():
            self.store.write(
                "UPDATE attempts SET ending = COALESCE(ending, ?) WHERE job = ? AND number = ?", why, job, number
            )
            self.store.record(
                job, {"state": self.store.job(job)["state"], "attempt": {"number": number, "ending": why}}
            )

    def move(self, job: str, number: int, new: AttemptState, **values: Any) -> bool:
        """Take an attempt to another state; False where it is there already. Conflict where the table forbids it."""
        with self.store.transaction():
            old = AttemptState(self.get(job, number)["state"])
            if old == new:
                return False
            if not attempt_may(old, new):
                raise Conflict(f"An attempt that is {old} cannot become {new}.", code="attempt.state", where=job)
            self.store.write("UPDATE attempts SET state = ? WHERE job = ? AND number = ?", new, job, number)
            doc = {"number": number, "state": new, "from": old, **values}
            self.store.record(job, {"state": self.store.job(job)["state"], "attempt": doc})
            return True

    def end(
        self, job: str, number: int, state: AttemptState, exit_code: int | None, error: Mapping[str, Any] | None
    ) -> None:
        """End an attempt and mark its job for the graph, in one transaction. Ending it again changes nothing.

        What the daemon ended itself is called by its reason, whatever the process made of it; success and loss stand.
        """
        with self.store.transaction():
            row = self.get(job, number)
            if row["state"] in ATTEMPT_ENDS:
                return
            if row["ending"] and state in (AttemptState.FAILED, AttemptState.CANCELLED):
                state, error = _ended_by_daemon(row, error)
            self.store.write(
                "UPDATE attempts SET exit_code = ?, error = ?, ended_at = ? WHERE job = ? AND number = ?",
                exit_code,
                None if error is None else dumps(safe(error)),
                now(),
                job,
                number,
            )
            self.move(job, number, state, exit_code=exit_code)
            self.store.mark(job)

    def withdraw(self, job: str) -> None:
        """Cancel every attempt of a job that no executor was asked to start."""
        with self.store.transaction():
            for row in self.store.attempts(job):
                if row["state"] == AttemptState.SUBMITTED and not row["intent"]:
                    self.store.write(
                        "UPDATE attempts SET ended_at = ?, cause = 'cancelled' WHERE job = ? AND number = ?",
                        now(),
                        job,
                        row["number"],
                    )
                    self.move(job, row["number"], AttemptState.CANCELLED)

    def any_live(self, job: str) -> bool:
        """Whether an attempt of the job has not ended."""
        return self.store.row(f"SELECT 1 FROM attempts a WHERE job = ? AND {_LIVE_SQL}", job) is not None  # noqa: S608


def _ended_by_daemon(row: Row, error: Mapping[str, Any] | None) -> tuple[AttemptState, Mapping[str, Any]]:
    if row["ending"] == "cancel":
        return AttemptState.CANCELLED, {
            "type": "JobFailed",
            "code": "attempt.cancelled",
            "message": "The attempt was cancelled.",
            "exit_code": 1,
        }
    return AttemptState.FAILED, {
        "type": "JobFailed",
        "code": "attempt.deadline",
        "message": "The attempt reached its time limit.",
        "why": "limits.hours was used up, earlier attempts included.",
        "fix": f"Raise it: tunesmith edit {row['job']} --set limits.hours=N",
        "exit_code": 1,
    }


def attempt_of(row: Row) -> Attempt:
    """The noun in an attempt's row."""
    return build(Attempt, json.loads(row["doc"]))


def handle_of(row: Row) -> Handle:
    """How the executor finds the attempt of a row; without data where it has never said."""
    data = json.loads(row["handle"]) if row["handle"] else {}
    return Handle(backend=row["backend"], key=row["key"], job=row["job"], number=row["number"], data=data)


def view_of(row: Row) -> AttemptView:
    """An attempt's row as the graph may see it."""
    return AttemptView(
        number=row["number"],
        backend=row["backend"],
        state=AttemptState(row["state"]),
        exit_code=row["exit_code"],
        error=json.loads(row["error"]) if row["error"] else None,
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        resumed_from=json.loads(row["doc"]).get("resume_from"),
        checkpoint=row["checkpoint"],
        cause=row["cause"],
    )
