"""What a person asks of a job: answer, edit, approve, reject, cancel, retry. Each is one transaction.

A wish that changes what a driver works on takes its lease away, so that nothing computed from the old facts is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.orchestrator.attempts import Attempts
from tunesmith.orchestrator.errors import Conflict, InputError, NotReady, Waiting
from tunesmith.orchestrator.events import now
from tunesmith.orchestrator.nouns import Plan
from tunesmith.orchestrator.plain import plain
from tunesmith.orchestrator.states import JOB_ENDS, JobState
from tunesmith.orchestrator.store import Store, dumps

_BEFORE_WORK = (JobState.PLANNING, JobState.AWAITING_INPUT, JobState.AWAITING_APPROVAL)


def answer(store: Store, job: str, fields: Mapping[str, Any]) -> str:
    """Store answers to the questions of the newest plan; the job is planned again. The job's state.

    Raises InputError (answer.unknown) for a field nobody asked about, NotReady where nothing is asked.
    """
    with store.transaction():
        state = store.job(job)["state"]
        plan = store.plan(job)
        if state != JobState.AWAITING_INPUT or plan is None:
            raise NotReady(f"{job} asks nothing: it is {state}.", code="answer.not_asked", where=job)
        asked = [question.field for question in plan.questions]
        if not fields:
            raise InputError("No answer was given.", code="answer.empty", fix=f"It asks for: {', '.join(asked)}.")
        for field, value in fields.items():
            if field not in asked:
                raise InputError(
                    f"{job} does not ask for {field[:80]!r}.",
                    code="answer.unknown",
                    fix=f"It asks for: {', '.join(asked)}.",
                    where=field[:80],
                )
            store.write(
                "INSERT OR REPLACE INTO answers (job, field, value, time) VALUES (?, ?, ?, ?)",
                job,
                field,
                dumps(value),
                now(),
            )
        _plan_again(store, job)
        return str(store.job(job)["state"])


def edit(store: Store, job: str, sets: Mapping[str, Any]) -> str:
    """Change dotted spec keys of the request. Voids the plan and every approval; the job is planned again.

    Raises NotReady while something of the job runs, and for a job that succeeded.
    """
    with store.transaction():
        row = store.job(job)
        attempts = Attempts(store)
        attempts.withdraw(job)
        if attempts.any_live(job) or row["state"] not in {*_BEFORE_WORK, *JOB_ENDS, JobState.QUEUED, JobState.PAUSED}:
            raise NotReady(
                f"{job} is {row['state']}: it cannot be edited now.",
                code="job.running",
                fix=f"Cancel it first: tunesmith cancel {job}",
                where=job,
            )
        if row["state"] == JobState.SUCCEEDED:
            raise NotReady(
                f"{job} has succeeded.", code="job.ended", fix="Start another job with the change.", where=job
            )
        request = store.request(job)
        merged = {**request.sets, **sets}
        store.set(job, request=dumps({**plain(request), "sets": merged}), yes=None)
        store.write("UPDATE approvals SET void = 1 WHERE job = ?", job)
        store.record(job, {"keys": sorted(sets)}, kind="edit")
        _plan_again(store, job)
        return str(store.job(job)["state"])


def approve(
    store: Store,
    job: str,
    *,
    by: str,
    plan: str | None = None,
    usd: float | None = None,
    hours: float | None = None,
    paid: bool = False,
) -> str:
    """Store an approval of the newest plan; a first one queues the job. Approving the same plan again changes nothing.

    `plan` is the hash that the person saw. Raises Conflict (plan.stale) where it is another one now, Waiting where
    questions are open, NotReady where there is nothing to approve, InputError (limits.usd) for money without a cap.
    """
    with store.transaction():
        row, newest = store.job(job), store.plan(job)
        given = store.approval(job)
        if plan is not None and (newest is None or row["plan_stale"] or newest.plan_hash != plan):
            raise Conflict(
                "The plan has changed since it was shown.",
                code="plan.stale",
                why="An approval holds for one plan only.",
                fix=f"Look at it again: tunesmith show {job}",
                where=job,
            )
        if given is not None and row["state"] not in JOB_ENDS:
            return str(row["state"])
        if row["state"] == JobState.AWAITING_INPUT:
            raise Waiting(f"{job} waits for an answer.", fix=f"tunesmith answer {job} FIELD=VALUE", where=job)
        if row["state"] != JobState.AWAITING_APPROVAL or newest is None:
            raise NotReady(f"{job} is {row['state']}: there is no plan to approve.", code="job.no_plan", where=job)
        if len(newest.stages) != 1:
            raise NotReady(f"The plan of {job} has {len(newest.stages)} stages; one can be run.", code="plan.stages")
        if paid and usd is None and newest.stages[0].spec.limits.usd is None:
            raise no_cap(newest.stages[0].spec.backend)
        number = store.rows("SELECT COALESCE(MAX(number), 0) + 1 AS n FROM approvals WHERE job = ?", job)[0]["n"]
        store.write(
            "INSERT INTO approvals (job, number, hash, by, usd, hours, time) VALUES (?, ?, ?, ?, ?, ?, ?)",
            job,
            number,
            newest.plan_hash,
            by,
            usd,
            hours,
            now(),
        )
        store.set(job, yes=None, error=None, tries=0)
        said = {"by": by, "plan_hash": newest.plan_hash, "usd": usd, "hours": hours}
        if store.attempts(
            job
        ):  # a changed plan after earlier attempts: the graph sees by the state that it begins anew
            store.record(job, {"state": row["state"], "approval": said})
        else:
            store.move(job, JobState.QUEUED, approval=said)
        store.mark(job)
        return str(store.job(job)["state"])


def reject(store: Store, job: str) -> str:
    """Say no to a plan or to its questions."""
    with store.transaction():
        row = store.job(job)
        if row["state"] != JobState.REJECTED:
            if row["state"] not in (JobState.AWAITING_INPUT, JobState.AWAITING_APPROVAL):
                raise NotReady(
                    f"{job} is {row['state']}: there is nothing to reject.",
                    code="job.state",
                    fix=f"To end it: tunesmith cancel {job}",
                    where=job,
                )
            store.revoke(job)
            store.set(job, yes=None, wanted=None)
            store.move(job, JobState.REJECTED)
            store.settle(job)
        return str(JobState.REJECTED)


def cancel(store: Store, job: str) -> str:
    """End a job. What already runs is asked to stop first; until it has, the state stays and `cancel` is wanted."""
    with store.transaction():
        row = store.job(job)
        if row["state"] in JOB_ENDS:
            if row["wanted"] == "retry":
                store.set(job, wanted=None)
                store.revoke(job)
                store.settle(job)
            elif row["state"] != JobState.CANCELLED:
                raise NotReady(f"{job} has already ended: {row['state']}.", code="job.ended", where=job)
            return str(row["state"])
        attempts = Attempts(store)
        attempts.withdraw(job)
        if attempts.any_live(job):
            if row["wanted"] != "cancel":
                store.set(job, wanted="cancel")
                store.record(job, {"state": row["state"], "wanted": "cancel"})
                store.mark(job)
            return str(row["state"])
        store.revoke(job)
        store.set(job, yes=None, wanted=None)
        store.move(job, JobState.CANCELLED)
        store.settle(job)
        return str(JobState.CANCELLED)


def retry(store: Store, job: str) -> str:
    """Try again what failed, was cancelled or lost, from its newest checkpoint; without a standing plan, from planning.

    Where the approved plan still stands the state stays, with `retry` wanted, until the graph submits another attempt.
    """
    with store.transaction():
        row = store.job(job)
        if row["wanted"] == "retry":
            return str(row["state"])
        if row["state"] not in JOB_ENDS or row["state"] == JobState.SUCCEEDED:
            raise NotReady(f"{job} is {row['state']}: there is nothing to retry.", code="job.state", where=job)
        if Attempts(store).any_live(job):
            raise NotReady(f"An attempt of {job} still runs.", code="job.running", where=job)
        if store.approval(job) is None or row["state"] == JobState.REJECTED:
            _plan_again(store, job)
        else:
            store.revoke(job)
            store.set(job, wanted="retry", error=None)
            store.record(job, {"state": row["state"], "wanted": "retry"})
            store.mark(job)
        return str(store.job(job)["state"])


def no_cap(backend: str) -> InputError:
    """The error for spending money without a cap."""
    return InputError(
        f"{backend} costs money, and no limit was given.",
        code="limits.usd",
        why="Nothing is spent without a cap that a person set.",
        fix="Add --set limits.usd=AMOUNT.",
        where="limits.usd",
    )


def paid(plan: Plan, price: Mapping[str, float]) -> bool:
    """Whether a plan's backends cost money: by its offers, or by the price of each backend where that is known."""
    for stage in plan.stages:
        backend = stage.spec.backend
        if price.get(backend, 0.0) > 0:
            return True
        if any(offer.backend == backend and offer.usd_per_hour > 0 for offer in stage.offers):
            return True
    return False


def _plan_again(store: Store, job: str) -> None:
    store.revoke(job)
    store.set(job, plan_stale=1, wanted=None, error=None)
    store.move(job, JobState.PLANNING)
    store.mark(job)
