"""The graph's side of the store: one lease per job, and writes that a lost lease refuses.

A lease is an epoch (the fence) in the job's row, held by one driver process. Every write checks the fence in its own
transaction, so a driver that was superseded, or whose job a person has changed, can store nothing.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tunesmith.orchestrator import processes, wishes
from tunesmith.orchestrator.attempts import Attempts, view_of
from tunesmith.orchestrator.errors import Conflict, InputError, NotReady, TunesmithError
from tunesmith.orchestrator.events import now
from tunesmith.orchestrator.home import Home, write_text
from tunesmith.orchestrator.nouns import Attempt, Finding, Plan, Remedy, spec_hash
from tunesmith.orchestrator.plain import build, plain
from tunesmith.orchestrator.ports import Artifact, JobView
from tunesmith.orchestrator.states import ATTEMPT_ENDS, JOB_ENDS, AttemptState, JobState, job_may
from tunesmith.orchestrator.store import Row, Store, dumps, safe

MAX_TRIES = 10
SILENCE_SECONDS = 3600.0


class Leases:
    """Leases of jobs to drivers, and the writes of JobPort. `alive` says whether a holder's process still lives."""

    def __init__(
        self,
        store: Store,
        home: Home,
        *,
        alive: Callable[[str], bool] = processes.alive,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.home = home
        self.alive = alive
        self.clock = clock
        self.attempts = Attempts(store)
        self._pauses: dict[str, float] = {}
        self._released = False
        self._heard: dict[str, float] = {}  # when the holder of a lease last asked for something
        self._busy: set[str] = set()  # jobs whose driver waits for us

    # --- leases ------------------------------------------------------------------------------------------------

    def wanted(self) -> bool:
        """Whether some job needs the graph and nobody works on it."""
        return bool(self._ready())

    def lease(self, holder: str) -> tuple[str, int] | None:
        """Lease the next job that needs the graph: (job, fence), or None. Jobs in trouble come last, after a pause.

        A driver works on one job at a time: what it still holds when it asks again (an answer that got lost) is taken
        back first, its marks as they were.
        """
        held = self.store.row("SELECT 1 FROM jobs WHERE holder = ?", holder)
        if held is None and not self._ready():
            return None
        with self.store.transaction():
            self.store.write("UPDATE jobs SET holder = NULL, fence = fence + 1 WHERE holder = ?", holder)
            ready = self._ready()
            if not ready:
                return None
            job, fence = str(ready[0]["id"]), int(ready[0]["fence"]) + 1
            self.store.write(
                "UPDATE jobs SET fence = ?, holder = ?, leased_wake = wake WHERE id = ?", fence, holder, job
            )
            self._heard = {job: self.clock()}
            return job, fence

    def release(self, job: str, fence: int) -> None:
        """Give a lease back: the marks it was given for are worked off. A lease already lost is no error.

        A job that by the facts still needs the graph is marked again, so that none is left where nobody looks.
        """
        with self.store.transaction():
            row = self.store.job(job)
            if row["fence"] != fence or row["holder"] is None:
                return
            self.store.write("UPDATE jobs SET holder = NULL, seen = leased_wake, tries = 0 WHERE id = ?", job)
            self._released = True
            if row["leased_wake"] == row["wake"] and self.restless(job):
                self._trouble(job, row["tries"] + 1)

    def take_released(self) -> bool:
        """Whether any lease was given back in order since this was asked last."""
        released, self._released = self._released, False
        return released

    def give_up(self, error: TunesmithError) -> None:
        """No driver can be had: end the jobs that wait for one, with the reason."""
        for row in self.store.rows("SELECT id FROM jobs WHERE wake > seen AND holder IS NULL"):
            with self.store.transaction():
                self._end(row["id"], error.to_doc())

    def reap(self) -> list[str]:
        """Take the leases of drivers that are dead; their jobs."""
        held = self.store.rows("SELECT id, holder, tries FROM jobs WHERE holder IS NOT NULL")
        dead = [row for row in held if not self.alive(row["holder"])]
        for row in dead:
            with self.store.transaction():
                taken = self.store.write(
                    "UPDATE jobs SET holder = NULL, fence = fence + 1 WHERE id = ? AND holder = ?",
                    row["id"],
                    row["holder"],
                )
                if taken:
                    self._trouble(row["id"], row["tries"] + 1)
        return [str(row["id"]) for row in dead]

    def silent(self) -> list[str]:
        """Holders that live, and have asked for nothing for an hour: hung in something that does not come back."""
        moment, found = self.clock(), []
        for row in self.store.rows("SELECT id, holder FROM jobs WHERE holder IS NOT NULL"):
            since = self._heard.setdefault(row["id"], moment)
            if row["id"] not in self._busy and moment - since > SILENCE_SECONDS:
                found.append(str(row["holder"]))
        return found

    @contextlib.contextmanager
    def busy(self, job: str) -> Iterator[None]:
        """While the driver waits for something long that the daemon does for it, its silence means nothing."""
        self._busy.add(job)
        try:
            yield
        finally:
            self._busy.discard(job)
            self._heard[job] = self.clock()

    def restless(self, job: str) -> bool:
        """Whether the graph has something to do for a job, by the store's facts alone."""
        row = self.store.job(job)
        state = JobState(row["state"])
        if state in JOB_ENDS:
            return bool(row["wanted"] == "retry")
        if state is JobState.PAUSED or self.attempts.any_live(job):
            return False
        if row["wanted"] == "cancel" or row["plan"] is None or row["plan_stale"]:
            return True
        if state in (JobState.AWAITING_INPUT, JobState.AWAITING_APPROVAL):
            return self.store.approval(job) is not None
        return True

    def heal(self) -> None:
        """Mark every job that needs the graph and has no mark: once, when a daemon starts."""
        found = self.store.rows("SELECT id, state, wanted FROM jobs WHERE wake = seen AND holder IS NULL")
        found = [row for row in found if row["state"] not in JOB_ENDS or row["wanted"]]
        for row in found:
            if self.restless(row["id"]):
                with self.store.transaction():
                    self.store.mark(row["id"])

    def _ready(self) -> list[Row]:
        rows = self.store.rows(
            "SELECT id, fence, tries FROM jobs WHERE wake > seen AND holder IS NULL ORDER BY tries, number LIMIT 100"
        )
        moment = self.clock()
        return [row for row in rows if not row["tries"] or self._pauses.get(row["id"], 0.0) <= moment]

    def _trouble(self, job: str, tries: int) -> None:
        """A driver died over the job, or left it undone: again after a pause, and in the end not again."""
        self.store.set(job, tries=tries)
        self.store.mark(job)
        self._pauses[job] = self.clock() + min(0.2 * 2**tries, 30.0)
        if tries >= MAX_TRIES:
            stuck = TunesmithError(
                f"The driver could not finish its work on this job in {MAX_TRIES} tries.",
                why="Something in the request or its data stops it; driver.log may say what.",
                fix=f"Change the request (tunesmith edit {job} ...) or try again: tunesmith retry {job}",
                code="graph.stuck",
            )
            self._end(job, stuck.to_doc())

    def _end(self, job: str, error: Mapping[str, Any]) -> None:
        """Fail a job that the graph cannot go on with; one whose attempt runs, or that waits for a person, stays."""
        row = self.store.job(job)
        self._pauses.pop(job, None)
        self.store.set(job, error=dumps(error), seen=row["wake"], tries=0, wanted=None)
        if job_may(JobState(row["state"]), JobState.FAILED) and not self.attempts.any_live(job):
            self.store.move(job, JobState.FAILED, error=error)

    def check(self, job: str, fence: int) -> Row:
        """The row of a job whose lease has this fence. Raises Conflict where the lease was lost."""
        row = self.store.job(job)
        self._heard[job] = self.clock()
        if row["fence"] != fence or row["holder"] is None:
            raise Conflict(
                f"The lease of {job} was lost.",
                code="lease.lost",
                why="Another driver has taken over, or a person has changed the job.",
                where=job,
            )
        return row

    # --- JobPort -----------------------------------------------------------------------------------------------

    def view(self, job: str, fence: int | None = None) -> JobView:
        """The job's facts now, of one moment. With a fence the lease is checked too."""
        store = self.store
        with store.transaction():
            row = store.job(job) if fence is None else self.check(job, fence)
            plan = store.plan(job)
            remedies = store.rows("SELECT doc FROM remedies WHERE job = ? ORDER BY attempt, id", job)
            repairs = plan.stages[0].spec.limits.repairs if plan is not None and plan.stages else 3
            return JobView(
                id=job,
                state=JobState(row["state"]),
                request=store.request(job),
                answers=store.answers(job),
                plan=plan,
                plan_stale=bool(row["plan_stale"]),
                approval=store.approval(job),
                attempts=tuple(view_of(item) for item in store.attempts(job)),
                remedies=tuple(build(Remedy, json.loads(item["doc"])) for item in remedies),
                repairs_left=max(repairs - row["repairs"], 0),
                wanted=row["wanted"],
            )

    def save_plan(self, job: str, fence: int, plan: Plan, *, paid: bool = False) -> None:
        """Store a plan: to awaiting_input (questions), failed (errors) or awaiting_approval, where --yes approves."""
        store = self.store
        with store.transaction():
            row = self.check(job, fence)
            if self.attempts.any_live(job):
                raise Conflict(f"An attempt of {job} runs: its plan stands.", code="attempt.live", where=job)
            doc = dumps(plan)
            known = store.row("SELECT version, doc FROM plans WHERE job = ? ORDER BY version DESC LIMIT 1", job)
            if known is not None and known["doc"] == doc and not row["plan_stale"] and _stands(row, plan):
                return
            version = 1 if known is None else known["version"] + 1
            store.write("INSERT INTO plans VALUES (?, ?, ?, ?, ?)", job, version, plan.plan_hash, doc, now())
            store.set(job, plan=version, plan_stale=0, wanted=None, error=None, **_columns(row, plan))
            store.move(job, JobState.PLANNING)
            self._settle(job, plan, json.loads(row["yes"]) if row["yes"] else None, paid)
            folder = self.home.job(job)
            write_text(folder / "plan.json", doc, durable=False)
            if plan.stages:
                write_text(folder / "spec.json", dumps(plan.stages[0].spec), durable=False)

    def _settle(self, job: str, plan: Plan, yes: Mapping[str, Any] | None, paid: bool) -> None:
        store = self.store
        if plan.errors:
            error = _from_finding(plan.errors[0])
            store.set(job, error=dumps(error))
            store.move(job, JobState.FAILED, error=error)
        elif plan.questions:
            store.move(job, JobState.AWAITING_INPUT, fields=[question.field for question in plan.questions])
        elif not plan.stages:
            error = _nothing_to_train(plan)
            store.set(job, error=dumps(error))
            store.move(job, JobState.FAILED, error=error)
        else:
            store.move(job, JobState.AWAITING_APPROVAL, plan_hash=plan.plan_hash)
            if yes is not None:
                self._approve(job, yes, paid)

    def _approve(self, job: str, yes: Mapping[str, Any], paid: bool) -> None:
        by = f"{yes.get('by') or 'somebody'} (--yes)"
        try:
            wishes.approve(self.store, job, by=by, usd=yes.get("usd"), hours=yes.get("hours"), paid=paid)
        except (InputError, NotReady) as error:
            self.store.set(job, error=dumps(error.to_doc()), yes=None)
            return
        # The driver that saves the plan goes on with it in the same turn: this mark is not for another one.
        self.store.write("UPDATE jobs SET leased_wake = wake WHERE id = ? AND leased_wake = wake - 1", job)

    def submit(self, job: str, fence: int, attempt: Attempt) -> None:
        """Store an attempt, once for its key, and queue the job. Raises Conflict where its plan is not approved."""
        store = self.store
        with store.transaction():
            self.check(job, fence)
            if store.row("SELECT 1 FROM attempts WHERE key = ?", attempt.key) is not None:
                return
            approval = store.approval(job)
            if attempt.job != job or approval is None or approval.plan_hash != attempt.plan_hash:
                raise Conflict(f"No approval of this plan of {job} stands.", code="plan.not_approved", where=job)
            plan = store.plan(job)
            if plan is None or spec_hash(attempt.spec) not in [spec_hash(stage.spec) for stage in plan.stages]:
                raise Conflict("The attempt's spec is not the one approved.", code="plan.stale", where=job)
            known = store.attempts(job)
            if any(item["state"] not in ATTEMPT_ENDS for item in known):
                raise Conflict(f"An attempt of {job} has not ended.", code="attempt.live", where=job)
            if attempt.number != len(known) + 1:
                raise Conflict(f"The next attempt of {job} is {len(known) + 1}.", code="attempt.number", where=job)
            store.write(
                "INSERT INTO attempts (job, number, key, backend, state, doc, submitted_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                job,
                attempt.number,
                attempt.key,
                attempt.spec.backend,
                AttemptState.SUBMITTED,
                dumps(attempt),
                now(),
            )
            store.set(job, wanted=None, error=None)
            store.move(job, JobState.QUEUED)
            doc = {"number": attempt.number, "state": AttemptState.SUBMITTED, "resume_from": attempt.resume_from}
            store.record(job, {"state": JobState.QUEUED, "attempt": doc})

    def diagnose(
        self, job: str, fence: int, number: int, cause: str, evidence: Sequence[Finding], remedies: Sequence[Remedy]
    ) -> None:
        """Record why an attempt ended as it did, with the evidence, and what is proposed."""
        store = self.store
        with store.transaction():
            self.check(job, fence)
            row = self.attempts.get(job, number)
            if row["state"] not in ATTEMPT_ENDS:
                raise Conflict(f"Attempt {number} of {job} has not ended.", code="attempt.live", where=job)
            store.write(
                "UPDATE attempts SET cause = ?, evidence = ? WHERE job = ? AND number = ?",
                cause,
                dumps(safe(plain(list(evidence)))),
                job,
                number,
            )
            for remedy in remedies:
                store.write(
                    "INSERT OR REPLACE INTO remedies VALUES (?, ?, ?, ?)", job, number, remedy.id, dumps(remedy)
                )
            if row["cause"] is None:
                store.record(
                    job, {"attempt": number, "cause": cause, "evidence": safe(plain(list(evidence)))}, kind="diagnosis"
                )

    def collectable(self, job: str, fence: int) -> Row:
        """The attempt whose results are to be brought home. Raises Conflict where the last one has not succeeded."""
        self.check(job, fence)
        rows = self.store.attempts(job)
        if not rows or rows[-1]["state"] != AttemptState.SUCCEEDED:
            raise Conflict(f"{job} has no result to collect.", code="attempt.no_result", where=job)
        return rows[-1]

    def collected(self, job: str, fence: int, number: int, artifacts: Sequence[Artifact]) -> None:
        """Store results that are home and verified; the job is delivering from here on."""
        store = self.store
        with store.transaction():
            row = self.check(job, fence)
            for item in artifacts:
                store.write(
                    "INSERT OR REPLACE INTO artifacts VALUES (?, ?, ?, ?, ?, ?)",
                    job,
                    item.path,
                    number,
                    item.kind,
                    item.bytes,
                    item.sha256,
                )
            if row["state"] != JobState.SUCCEEDED:
                store.move(job, JobState.DELIVERING, artifacts=len(artifacts))

    def finish(self, job: str, fence: int, state: JobState, error: Mapping[str, Any] | None = None) -> None:
        """End a job. In this end already: it stays, and the error is kept. Raises Conflict while an attempt lives."""
        if state not in JOB_ENDS:
            raise Conflict(f"{state} is not the end of a job.", code="job.state", where=job)
        store = self.store
        with store.transaction():
            row = self.check(job, fence)
            if self.attempts.any_live(job):
                raise Conflict(f"An attempt of {job} has not ended.", code="attempt.live", where=job)
            error = None if error is None else safe(plain(error))
            kept = {} if error is None and state != JobState.SUCCEEDED else {"error": dumps(error) if error else None}
            store.set(job, wanted=None, **kept)
            said = {"error": error} if error else {}
            if row["state"] == state and row["wanted"] is not None:
                store.record(job, {"state": state, "from": state, **said})
            store.move(job, state, **said)


def _stands(row: Row, plan: Plan) -> bool:
    """Whether a job stands where this plan, saved before, had taken it."""
    if plan.errors or not plan.stages:
        return bool(row["state"] == JobState.FAILED and row["wanted"] is None)
    if plan.questions:
        return bool(row["state"] == JobState.AWAITING_INPUT)
    return row["state"] not in {*JOB_ENDS, JobState.PLANNING}


def _columns(row: Row, plan: Plan) -> dict[str, Any]:
    if not plan.stages:
        return {}
    spec = plan.stages[0].spec
    methods = dict.fromkeys(stage.spec.method for stage in plan.stages)
    return {
        "name": spec.name or row["name"],
        "backend": spec.backend,
        "method": "+".join(methods),
        "model": spec.model.id,
        "priority": spec.priority,
    }


def _from_finding(finding: Finding) -> dict[str, Any]:
    return InputError(finding.message, code=finding.code, fix=finding.fix, where=finding.where).to_doc()


def _nothing_to_train(plan: Plan) -> dict[str, Any]:
    return InputError(
        f"This asks for {plan.intent}, not for training.",
        code="intent.not_train",
        fix=" ".join(plan.command),
    ).to_doc()
